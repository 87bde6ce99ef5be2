// How long a group is, and where its result lies.
#pragma once

#include "../formulas.h"
#include "sums.h"

namespace embattle {
namespace {

constexpr double kInfinity = __builtin_inf();

template <Norm kNorm>
inline void add_length(V z, V& acc) {
  if (kNorm == Norm::l2)
    acc += z * z;
  else if (kNorm == Norm::l1)
    acc += abs(z);
  else
    acc = larger(abs(z), acc);
}

constexpr unsigned maxima_of(Norm norm) { return norm == Norm::linf ? 1u : 0u; }

// The l2 norm from a sum of squares that may have over- or underflowed (float64 elements only).
template <class F>
inline double length_of_square(const Cut& cut, double square, const F& f) {
  if (square > 1e-280 && square < 1e300) return __builtin_sqrt(square);
  if (square == 0 || !(square < kInfinity)) {
    const double most = totals<1, 1>(cut, [&](int64_t i, auto n, V* acc) {
                          acc[0] = larger(abs(f(i, n)), acc[0]);
                        }).v[0];
    if (most == 0 || most == kInfinity || square != square)
      return most == 0 ? square : most + square;
  }
  const double scale = square < 1 ? 0x1p600 : 0x1p-600;
  const double scaled = totals<1>(cut, [&](int64_t i, auto n, V* acc) {
                          const V z = f(i, n) * scale;
                          acc[0] += z * z;
                        }).v[0];
  return __builtin_sqrt(scaled) / scale;
}

// The norm of a group's elements f(i, n).
template <Norm kNorm, class F>
inline double length(const Cut& cut, const F& f) {
  const double sum = totals<1, maxima_of(kNorm)>(cut, [&](int64_t i, auto n, V* acc) {
                       add_length<kNorm>(f(i, n), acc[0]);
                     }).v[0];
  return kNorm == Norm::l2 ? length_of_square(cut, sum, f) : sum;
}

// A perturbation that is to be projected: z(i, n) gives elements of it, given(i, n) those of the
// tensor as it came in (x itself where there is an origin).
template <class G, class Z>
struct Source {
  G given;
  Z z;
};
template <class G, class Z>
Source(G, Z) -> Source<G, Z>;

// The result and its bounds.
template <class T>
struct Place {
  typedef Elements<T> Tensor;
  Tensor out, x0, lower_elements, upper_elements;  // absent where there is none, or one number
  double lower_value = -kInfinity, upper_value = kInfinity;
  bool boxed = false;
  bool plain = true;  // there is neither an origin nor a box

  explicit Place(const Tensor& result) : out(result) {}
  Place(const Data& result, const Box& box)
      : out(result), x0(box.x0), boxed(is_boxed(box)), plain(!x0 && !boxed) {
    lower_value = place(box.lower, box.lower_broadcast, box.lower_value, &lower_elements);
    upper_value = place(box.upper, box.upper_broadcast, box.upper_value, &upper_elements);
  }

  template <class N>
  V origin(int64_t i, N n) const {
    return x0 ? x0.load(i, n) : V{};
  }
  template <class N>
  V lower(int64_t i, N n) const {
    return lower_elements ? lower_elements.load(i, n) : first_lanes(lower_value, n);
  }
  template <class N>
  V upper(int64_t i, N n) const {
    return upper_elements ? upper_elements.load(i, n) : first_lanes(upper_value, n);
  }

  // z, put where origin + z lies in the box.
  template <class N>
  V in_box(int64_t i, N n, V z) const {
    const V centre = origin(i, n);
    return between(z, lower(i, n) - centre, upper(i, n) - centre);
  }

  // The point of the box that is nearest to the origin: a number of the element type.
  template <class N>
  V nearest(int64_t i, N n) const {
    return boxed ? between(origin(i, n), lower(i, n), upper(i, n)) : origin(i, n);
  }

 private:
  double place(const ConstData& bound, bool broadcast, double value, Tensor* elements) const {
    if (!bound.data) return out.nearest(value);
    if (broadcast) return Tensor(bound).at(0);
    *elements = Tensor(bound);
    return value;
  }
};

}  // namespace
}  // namespace embattle
