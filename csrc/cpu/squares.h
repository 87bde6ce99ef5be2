// Sums and norms of rows of gradients, in float64; of float32 and half types also in float lanes,
// where these do.
#pragma once

#include "../formulas.h"
#include "sums.h"

namespace embattle {
namespace {

inline double element(const ConstData& x, int64_t i) { return Elements<Any>(x).at(i); }
inline void put(const Data& x, int64_t i, double value) {  // float64 or float32
  if (x.dtype == Dtype::f64)
    static_cast<double*>(x.data)[i] = value;
  else
    static_cast<float*>(x.data)[i] = static_cast<float>(value);
}

// The lanes in which numbers of type C are computed.
template <class C>
struct Lane {
  static constexpr int kCount = kFloats;
  typedef F Vector;
  template <class T, class N>
  EMBATTLE_INLINE static F load(const T* x, N n) {
    return fetch(x, n);
  }
  EMBATTLE_INLINE static V in_double(F x) { return halves(x); }  // neighbours' sums
};
template <>
struct Lane<double> {
  static constexpr int kCount = kLanes;
  typedef V Vector;
  template <class T, class N>
  EMBATTLE_INLINE static V load(const T* x, N n) {
    return embattle::load(x, n);
  }
  EMBATTLE_INLINE static V in_double(V x) { return x; }
};

// total[0, n) += x
template <class N>
EMBATTLE_INLINE inline void add_to(double* total, N n, V x) {
  store(total, n, load(total, n) + x);
}
template <class N>
EMBATTLE_INLINE inline void add_to(double* total, N n, F x) {
  if (static_cast<int>(n) >= kLanes) {
    add_to(total, Whole{}, half<0>(x));
    if constexpr (std::is_same_v<N, All>)
      add_to(total + kLanes, Whole{}, half<1>(x));
    else
      add_to(total + kLanes, static_cast<int>(n) - kLanes, half<1>(x));
  } else {
    add_to(total, static_cast<int>(n), half<0>(x));
  }
}

// total[0, n) += factor * x[0, n)
template <class T>
inline void add_scaled(const T* x, double factor, int64_t n, double* total) {
  each(0, n,
       [=](int64_t i, auto w) EMBATTLE_INLINE { add_to(total + i, w, factor * load(x + i, w)); });
}

// The sum of the squares of x[0, n), times scale^2.
template <class T>
inline double squares_wide(const T* x, int64_t n, double scale = 1) {
  return totals_of_run<1>(0, n,
                          [=](int64_t i, auto w, V* acc) EMBATTLE_INLINE {
                            const V v = load(x + i, w) * scale;
                            acc[0] += v * v;
                          })
      .v[0];
}

inline double squares(const double* x, int64_t n) { return squares_wide(x, n); }
// Float lanes, 16 squares in each of a block's; one that comes near the ends of float32's range is
// done again in double.
template <class T>
inline double squares(const T* x, int64_t n) {
  constexpr int64_t kBlock = 64 * kFloats;
  double sum = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    F part[4] = {};
    const auto add = [&](int64_t i, auto w, int k) EMBATTLE_INLINE {
      const F v = fetch(x + i, w);
      part[k] += v * v;
    };
    int64_t i = begin;
    for (; i + 4 * kFloats <= end; i += 4 * kFloats)
      for (int k = 0; k < 4; ++k) add(i + k * kFloats, All{}, k);
    each<kFloats>(i, end, [&](int64_t at, auto w) EMBATTLE_INLINE { add(at, w, 0); });
    const double block = total(halves((part[0] + part[1]) + (part[2] + part[3])));
    const bool moderate = block > 1e-25 && block < 1e+37;
    sum += __builtin_expect(moderate, true) ? block : squares_wide(x + begin, end - begin);
  }
  return sum;
}

// The largest size among x[0, n) and `so_far`, or NaN where one is.
template <class T>
inline double largest(const T* x, int64_t n, double so_far) {
  for (int64_t i = 0; i < n; ++i) {
    const double size = __builtin_fabs(value_of(x[i]));
    if (size > so_far || size != size) so_far = size;
  }
  return so_far;
}

// The norm whose square is square_at(1), and with all elements times s square_at(s). Squares of
// float64 numbers may leave the range of doubles: then `most()` tells the largest size.
template <class T, class S, class M>
inline double norm_of(const S& square_at, const M& most) {
  const double square = square_at(1.);
  if (sizeof(T) < sizeof(double) || (square > 1e-280 && square < 1e280))
    return __builtin_sqrt(square);
  const double scale = scale_for(most());
  return __builtin_sqrt(square_at(scale)) / scale;
}

// The l2 norm of x[0, n).
template <class T>
inline double row_norm(const T* x, int64_t n) {
  return norm_of<T>(
      [=](double scale) { return scale == 1 ? squares(x, n) : squares_wide(x, n, scale); },
      [=] { return largest(x, n, 0); });
}

}  // namespace
}  // namespace embattle
