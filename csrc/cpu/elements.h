// Tensors' elements, of the four types, in double lanes.
#pragma once

#include "memory.h"

namespace embattle {
namespace {

// Calls f(T*), with a null pointer, for the type T that `dtype` names.
template <class F>
inline auto with_type(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::f32:
      return f(static_cast<float*>(nullptr));
    case Dtype::f64:
      return f(static_cast<double*>(nullptr));
    case Dtype::f16:
      return f(static_cast<f16*>(nullptr));
    case Dtype::bf16:
      break;
  }
  return f(static_cast<bf16*>(nullptr));
}

// The unit roundoff of a type.
template <class T>
constexpr double kUnit = std::is_same_v<T, double>  ? 0x1p-53
                         : std::is_same_v<T, float> ? 0x1p-24
                         : std::is_same_v<T, f16>   ? 0x1p-11
                                                    : 0x1p-8;

template <class T>
inline double value_of(T x) {
  if constexpr (is_half<T>) {
    Vec<uint16_t, kLanes> words{};
    words[0] = x.bits;
    return widened(to_floats<T, kLanes>(words))[0];
  } else {
    return x;
  }
}

// The number of type T that is nearest to x.
template <class T>
inline T nearest(double x) {
  T rounded;
  store(&rounded, 1, splat(x));
  return rounded;
}

// The neighbour of a finite x on the side of `goal`, as nextafter.
template <class T>
inline T toward(T x, double goal) {
  typedef std::conditional_t<sizeof(T) == 8, int64_t,
                             std::conditional_t<sizeof(T) == 4, int32_t, int16_t>>
      Bits;
  Bits b;
  std::memcpy(&b, &x, sizeof(T));
  constexpr Bits sign = static_cast<Bits>(uint64_t{1} << (8 * sizeof(T) - 1));
  const double v = value_of(x);
  if (v == goal) return x;
  if (v == 0)
    b = static_cast<Bits>(goal > 0 ? 1 : sign | 1);
  else
    b = static_cast<Bits>((v > goal) == (v > 0) ? b - 1 : b + 1);
  std::memcpy(&x, &b, sizeof(T));
  return x;
}

// The largest number of type T that is not above x >= 0.
template <class T>
inline double round_down(double x) {
  T rounded = nearest<T>(x);
  while (value_of(rounded) > x) rounded = toward(rounded, 0.);
  return value_of(rounded);
}

// A tensor's elements. Elements<Any> are of a type that is only known when the program runs: one
// copy of a kernel then serves all, at the price of a call per vector.
struct Any {};

template <class T>
struct Elements {
  T* p = nullptr;

  Elements() = default;
  explicit Elements(T* to) : p(to) {}
  explicit Elements(const Data& x) : p(static_cast<T*>(x.data)) {}
  explicit Elements(const ConstData& x) : p(static_cast<T*>(const_cast<void*>(x.data))) {}
  explicit operator bool() const { return p; }

  template <class N>
  V load(int64_t i, N n) const {
    return embattle::load(p + i, n);
  }
  // What was stored comes back.
  template <class N>
  V store(int64_t i, N n, V x) const {
    return embattle::store(p + i, n, x);
  }
  double at(int64_t i) const { return value_of(p[i]); }
  void move_toward(int64_t i, double goal) const { p[i] = toward(p[i], goal); }
  double unit() const { return kUnit<T>; }
  double nearest(double x) const { return value_of(embattle::nearest<T>(x)); }
  double round_down(double x) const { return embattle::round_down<T>(x); }
};

// Calls f(Elements<T>) for the type T that a tensor's elements have.
template <class F>
inline auto with_elements(const Data& x, const F& f) {
  return with_type(x.dtype, [&]<class T>(T*) { return f(Elements<T>(x)); });
}

[[maybe_unused, gnu::noinline]] V load_any(const Data& x, int64_t i, int n) {
  return with_elements(x, [&](auto e) { return n == kLanes ? e.load(i, Whole{}) : e.load(i, n); });
}
[[maybe_unused, gnu::noinline]] V store_any(const Data& x, int64_t i, int n, V value) {
  return with_elements(
      x, [&](auto e) { return n == kLanes ? e.store(i, Whole{}, value) : e.store(i, n, value); });
}

template <>
struct Elements<Any> {
  Data x;

  Elements() = default;
  explicit Elements(const Data& data) : x(data) {}
  explicit Elements(const ConstData& data) : x{const_cast<void*>(data.data), data.dtype} {}
  explicit operator bool() const { return x.data; }

  V load(int64_t i, int n) const { return load_any(x, i, n); }
  V store(int64_t i, int n, V value) const { return store_any(x, i, n, value); }
  double at(int64_t i) const { return load_any(x, i, 1)[0]; }
  void move_toward(int64_t i, double goal) const {
    with_elements(x, [&](auto e) { e.move_toward(i, goal); });
  }
  double unit() const {
    return with_elements(x, [](auto e) { return e.unit(); });
  }
  double nearest(double value) const {
    return with_elements(x, [&](auto e) { return e.nearest(value); });
  }
  double round_down(double value) const {
    return with_elements(x, [&](auto e) { return e.round_down(value); });
  }
};

}  // namespace
}  // namespace embattle
