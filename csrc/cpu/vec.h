// Vectors of doubles as wide as the SIMD level has them, and how the four element types are read
// into and written from them. Arithmetic is double whatever the storage: squares of the smallest
// and the largest float neither vanish nor overflow there.
#pragma once

#include <cstring>

#include "level.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace embattle {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 8;
#elif defined(__AVX__)
constexpr int kLanes = 4;
#else
constexpr int kLanes = 2;
#endif

typedef double V __attribute__((vector_size(8 * kLanes)));
typedef int64_t I __attribute__((vector_size(8 * kLanes)));
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words32 __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Words16 __attribute__((vector_size(2 * kLanes)));

// Storage of the half types, by its bits.
struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

// The number of elements of a whole vector, as a type: loops over whole vectors know it when they
// are compiled, loops' ends pass an int.
struct Whole {
  constexpr operator int() const { return kLanes; }
};

inline V splat(double x) { return x - V{}; }
// x in the first n lanes, and zero in the others, as a load has them.
template <class N>
inline V first_lanes(double x, N n) {
  if (static_cast<int>(n) == kLanes) return splat(x);
  V first{};
  for (int k = 0; k < n; ++k) first[k] = x;
  return first;
}
inline I bits(V x) { return reinterpret_cast<I>(x); }
inline V from_bits(I x) { return reinterpret_cast<V>(x); }
constexpr int64_t kSign = INT64_MIN;
inline V abs(V x) { return from_bits(bits(x) & ~kSign); }
inline V with_sign(V size, V sign) { return from_bits(bits(size) | (bits(sign) & kSign)); }
inline V larger(V a, V b) { return a > b ? a : b; }               // b where a is NaN
inline V at_most(V x, V limit) { return x > limit ? limit : x; }  // a NaN stays

inline V iota(int64_t start) {
  I x;
  for (int k = 0; k < kLanes; ++k) x[k] = start + k;
  return __builtin_convertvector(x, V);
}

inline double total(V x) {  // of neighbours, of neighbouring pairs, and so on
  double sum[kLanes];
  std::memcpy(sum, &x, sizeof(x));
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int k = 0; k < width; ++k) sum[k] = sum[2 * k] + sum[2 * k + 1];
  return sum[0];
}

inline double largest(V x) {
  double most = x[0];
  for (int k = 1; k < kLanes; ++k) most = x[k] > most ? x[k] : most;
  return most;
}

// ---- Conversions
// ---------------------------------------------------------------------------------

template <class T>
struct Packed;  // as many elements of type T as a V has lanes
template <>
struct Packed<double> {
  typedef V type;
};
template <>
struct Packed<float> {
  typedef Floats type;
};
template <>
struct Packed<f16> {
  typedef Words16 type;
};
template <>
struct Packed<bf16> {
  typedef Words16 type;
};

template <class T>
inline V widen(typename Packed<T>::type x);
template <class T>
inline typename Packed<T>::type narrow(V x);  // to nearest even

template <>
inline V widen<double>(V x) {
  return x;
}
template <>
inline V narrow<double>(V x) {
  return x;
}
// By name where the compiler would convert halves of vectors. (A mask of all lanes costs nothing;
// the plain forms make gcc 12 warn of what its own header leaves undefined.)
template <>
inline V widen<float>(Floats x) {
#if defined(__AVX512F__)
  return reinterpret_cast<V>(_mm512_maskz_cvtps_pd(0xff, reinterpret_cast<__m256>(x)));
#elif defined(__AVX__)
  return reinterpret_cast<V>(_mm256_cvtps_pd(reinterpret_cast<__m128>(x)));
#else
  return __builtin_convertvector(x, V);
#endif
}
template <>
inline Floats narrow<float>(V x) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(_mm512_maskz_cvtpd_ps(0xff, reinterpret_cast<__m512d>(x)));
#elif defined(__AVX__)
  return reinterpret_cast<Floats>(_mm256_cvtpd_ps(reinterpret_cast<__m256d>(x)));
#else
  return __builtin_convertvector(x, Floats);
#endif
}

template <>
inline V widen<bf16>(Words16 x) {
  return widen<float>(reinterpret_cast<Floats>(__builtin_convertvector(x, Words32) << 16));
}
template <>
inline Words16 narrow<bf16>(V x) {
  const Words32 b = reinterpret_cast<Words32>(narrow<float>(x));
  const Words32 rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  return __builtin_convertvector((b << 1) > 0xff000000u ? (b >> 16) | 0x40u : rounded, Words16);
}

// Exact: a half's exponent and mantissa, shifted into place, are 2^-112 times its value.
template <>
inline V widen<f16>(Words16 x) {
  const Words32 h = __builtin_convertvector(x, Words32);
  const Words32 size = (h & 0x7fffu) << 13;
  const Words32 finite = reinterpret_cast<Words32>(reinterpret_cast<Floats>(size) * 0x1p112f);
  const Words32 special = size | 0x7f800000u;
  const Words32 value = size >= 0x0f800000u ? special : finite;
  return widen<float>(reinterpret_cast<Floats>(value | ((h & 0x8000u) << 16)));
}
template <>
inline Words16 narrow<f16>(V x) {
  const Words32 b = reinterpret_cast<Words32>(narrow<float>(x));
  const Words32 size = b & 0x7fffffffu;
  // Subnormal halves: adding 0.5 rounds to their unit, 2^-24.
  const Words32 small =
      reinterpret_cast<Words32>(reinterpret_cast<Floats>(size) + 0.5f) - 0x3f000000u;
  const Words32 normal = (size + 0xc8000fffu + ((size >> 13) & 1u)) >> 13;
  const Words32 special = size > 0x7f800000u ? Words32{} + 0x7e00u : Words32{} + 0x7c00u;
  const Words32 value = size >= 0x47800000u ? special : size < 0x38800000u ? small : normal;
  return __builtin_convertvector(value | ((b >> 16) & 0x8000u), Words16);
}

// ---- Memory
// --------------------------------------------------------------------------------------

// n elements as doubles; the lanes beyond n are zero.
template <class T, class N>
inline V load(const T* p, N n) {
  typename Packed<T>::type x{};
  std::memcpy(&x, p, sizeof(T) * static_cast<size_t>(n));
  return widen<T>(x);
}

template <class T, class N>
inline V load(const void* data, int64_t i, N n) {
  return load(static_cast<const T*>(data) + i, n);
}

// Rounds x to T, writes its first n lanes, and returns what was written.
template <class T, class N>
inline V store(T* p, N n, V x) {
  const typename Packed<T>::type rounded = narrow<T>(x);
  std::memcpy(p, &rounded, sizeof(T) * static_cast<size_t>(n));
  return widen<T>(rounded);
}

// ---- Element types
// -------------------------------------------------------------------------------

template <class T>
struct Type;
template <>
struct Type<double> {
  static constexpr double unit = 0x1p-53;  // unit roundoff
  typedef int64_t Bits;
};
template <>
struct Type<float> {
  static constexpr double unit = 0x1p-24;
  typedef int32_t Bits;
};
template <>
struct Type<f16> {
  static constexpr double unit = 0x1p-11;
  typedef int16_t Bits;
};
template <>
struct Type<bf16> {
  static constexpr double unit = 0x1p-8;
  typedef int16_t Bits;
};

template <class T>
inline double value_of(T x) {
  return load(&x, 1)[0];
}

// The neighbour of a finite x on the side of `goal`, as nextafter.
template <class T>
inline T toward(T x, double goal) {
  typename Type<T>::Bits b;
  std::memcpy(&b, &x, sizeof(T));
  constexpr typename Type<T>::Bits sign =
      static_cast<typename Type<T>::Bits>(uint64_t{1} << (8 * sizeof(T) - 1));
  const double v = value_of(x);
  if (v == goal) return x;
  if (v == 0)
    b = static_cast<typename Type<T>::Bits>(goal > 0 ? 1 : sign | 1);
  else
    b = static_cast<typename Type<T>::Bits>((v > goal) == (v > 0) ? b - 1 : b + 1);
  std::memcpy(&x, &b, sizeof(T));
  return x;
}

// The number of type T that is nearest to x.
template <class T>
inline double nearest(double x) {
  T rounded;
  return store(&rounded, 1, splat(x))[0];
}

// The largest number of type T that is not above x >= 0.
template <class T>
inline double round_down(double x) {
  T rounded;
  store(&rounded, 1, splat(x));
  while (value_of(rounded) > x) rounded = toward(rounded, 0.);
  return value_of(rounded);
}

// ---- Tensors
// -------------------------------------------------------------------------------------

// A tensor's elements. Elements<Any> are of a type that is only known when the program runs: one
// copy of a kernel then serves all, at the price of a call per vector.
struct Any {};

template <class T>
struct Elements {
  T* p = nullptr;

  Elements() = default;
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
  double unit() const { return Type<T>::unit; }
  double nearest(double x) const { return embattle::nearest<T>(x); }
  double round_down(double x) const { return embattle::round_down<T>(x); }
};

// Calls f(Elements<T>) for the type T that a tensor's elements have.
template <class F>
inline auto with_elements(const Data& x, const F& f) {
  switch (x.dtype) {
    case Dtype::f32:
      return f(Elements<float>(x));
    case Dtype::f64:
      return f(Elements<double>(x));
    case Dtype::f16:
      return f(Elements<f16>(x));
    case Dtype::bf16:
      break;
  }
  return f(Elements<bf16>(x));
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
