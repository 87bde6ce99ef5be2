// Vectors of eight float32 (or four float64) lanes, and loads that widen half types into them. The
// lane count is the same at every SIMD level, so that sums come out in the same order on all.
#pragma once

#include <stdint.h>
#include <string.h>

#include "level.h"

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace embattle {
namespace {

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

typedef float f32x4 __attribute__((vector_size(16)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef double f64x4 __attribute__((vector_size(32)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));

template <class To, class From>
[[gnu::always_inline]] inline To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// ---- One element ----

inline double widened(double x) { return x; }
inline float widened(float x) { return x; }
inline float widened(bf16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }
inline float widened(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return bits_as<float>(sign | 0x7f800000 | (rest << 13));
  const float magnitude = rest < 0x0400  // subnormal: a multiple of 2^-24
                              ? static_cast<float>(rest) * 0x1p-24f
                              : bits_as<float>((rest << 13) + (112u << 23));
  return bits_as<float>(sign | bits_as<uint32_t>(magnitude));
}

// Rounds to nearest, ties to even.
inline void narrow(double x, double& out) { out = x; }
inline void narrow(double x, float& out) { out = static_cast<float>(x); }

// float64 to a half type in one rounding: the float32 in between is rounded to odd, which keeps
// what the second rounding has to know.
inline float rounded_to_odd(double x) {
  float near = static_cast<float>(x);
  if (static_cast<double>(near) == x || near != near) return near;
  uint32_t bits = bits_as<uint32_t>(near);
  if (bits & 1) return near;
  const double magnitude = x < 0 ? -x : x, stored = near < 0 ? -near : near;
  if ((bits & 0x7fffffff) == 0) return bits_as<float>((x < 0 ? 0x80000000u : 0u) | 1u);
  bits += stored < magnitude ? 1 : -1;
  return bits_as<float>(bits);
}

inline void narrow(float x, float& out) { out = x; }
inline void narrow(float x, bf16& out) {
  uint32_t bits = bits_as<uint32_t>(x);
  if ((bits & 0x7fffffff) > 0x7f800000) {
    out.bits = 0x7fc0;
    return;
  }
  bits += 0x7fff + ((bits >> 16) & 1);
  out.bits = static_cast<uint16_t>(bits >> 16);
}
inline void narrow(float x, f16& out) {
  const uint32_t bits = bits_as<uint32_t>(x), sign = (bits >> 16) & 0x8000;
  const uint32_t rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) {
    out.bits = 0x7e00;
  } else if (rest >= 0x477ff000) {  // 65520 and above
    out.bits = static_cast<uint16_t>(sign | 0x7c00);
  } else if (rest < 0x38800000) {  // below 2^-14: adding 0.5 rounds to a multiple of 2^-24
    const float magnitude = bits_as<float>(rest) + 0.5f;
    out.bits = static_cast<uint16_t>(sign | (bits_as<uint32_t>(magnitude) - 0x3f000000));
  } else {
    const uint32_t rounded = rest - (112u << 23) + 0xfff + ((rest >> 13) & 1);
    out.bits = static_cast<uint16_t>(sign | (rounded >> 13));
  }
}
template <class Half>
inline void narrow_half(double x, Half& out) {
  narrow(rounded_to_odd(x), out);
}
inline void narrow(double x, f16& out) { narrow_half(x, out); }
inline void narrow(double x, bf16& out) { narrow_half(x, out); }

// ---- Eight elements as float32 ----

[[gnu::always_inline]] inline f32x8 load8(const float* x) {
  f32x8 v;
  memcpy(&v, x, sizeof(v));
  return v;
}

[[gnu::always_inline]] inline f32x8 load8(const bf16* x) {
#if defined(__AVX2__)
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return bits_as<f32x8>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
#else
  u16x8 half;
  memcpy(&half, x, sizeof(half));
  return bits_as<f32x8>(__builtin_convertvector(half, u32x8) << 16);
#endif
}

[[gnu::always_inline]] inline f32x8 load8(const f16* x) {
#if defined(__F16C__)
  return bits_as<f32x8>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
#else
  f32x8 v;
  for (int i = 0; i < 8; ++i) v[i] = widened(x[i]);
  return v;
#endif
}

[[gnu::always_inline]] inline void store8(float* x, f32x8 v) { memcpy(x, &v, sizeof(v)); }

[[gnu::always_inline]] inline void store8(bf16* x, f32x8 v) {
  const u32x8 bits = bits_as<u32x8>(v);
  const u32x8 near = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const u32x8 is_nan = u32x8(v != v);
  const u32x8 words = (near & ~is_nan) | (0x7fc0 & is_nan);
#if defined(__AVX2__)  // convertvector takes detours
  const __m256i all = bits_as<__m256i>(words);
  const __m128i half =
      _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
#else
  const u16x8 half = __builtin_convertvector(words, u16x8);
#endif
  memcpy(x, &half, sizeof(half));
}

[[gnu::always_inline]] inline void store8(f16* x, f32x8 v) {
#if defined(__F16C__)
  const __m128i half = _mm256_cvtps_ph(bits_as<__m256>(v), _MM_FROUND_TO_NEAREST_INT);
  memcpy(x, &half, sizeof(half));
#else
  for (int i = 0; i < 8; ++i) narrow(v[i], x[i]);
#endif
}

[[gnu::always_inline]] inline f64x4 widened4(f32x4 v) {
#if defined(__AVX__)
  return bits_as<f64x4>(_mm256_cvtps_pd(bits_as<__m128>(v)));  // convertvector makes two of it
#else
  return __builtin_convertvector(v, f64x4);
#endif
}

[[gnu::always_inline]] inline f32x4 narrowed4(f64x4 v) {
#if defined(__AVX__)
  return bits_as<f32x4>(_mm256_cvtpd_ps(bits_as<__m256d>(v)));
#else
  return __builtin_convertvector(v, f32x4);
#endif
}

[[gnu::always_inline]] inline f64x4 lower(f32x8 v) {
  return widened4(__builtin_shufflevector(v, v, 0, 1, 2, 3));
}
[[gnu::always_inline]] inline f64x4 upper(f32x8 v) {
  return widened4(__builtin_shufflevector(v, v, 4, 5, 6, 7));
}

// ---- Four elements as float64 ----

[[gnu::always_inline]] inline f64x4 load4(const double* x) {
  f64x4 v;
  memcpy(&v, x, sizeof(v));
  return v;
}

[[gnu::always_inline]] inline f64x4 load4(const float* x) {
  f32x4 v;
  memcpy(&v, x, sizeof(v));
  return widened4(v);
}

template <class Half>
[[gnu::always_inline]] inline f64x4 load4(const Half* x) {
  return f64x4{widened(x[0]), widened(x[1]), widened(x[2]), widened(x[3])};
}

[[gnu::always_inline]] inline void store4(double* x, f64x4 v) { memcpy(x, &v, sizeof(v)); }

[[gnu::always_inline]] inline double sum_of(f64x4 v) { return (v[0] + v[1]) + (v[2] + v[3]); }

template <class Pointer>
struct ElementOf;
template <class T>
struct ElementOf<const T*> {
  using Type = T;
};
template <class Pointer>
using Element = typename ElementOf<Pointer>::Type;

// Calls action(static_cast<const T*>(nullptr)) with the element type of `dtype`.
template <class Action>
[[gnu::always_inline]] inline void with_type(Dtype dtype, const Action& action) {
  switch (dtype) {
    case Dtype::f32:
      return action(static_cast<const float*>(nullptr));
    case Dtype::f64:
      return action(static_cast<const double*>(nullptr));
    case Dtype::f16:
      return action(static_cast<const f16*>(nullptr));
    case Dtype::bf16:
      return action(static_cast<const bf16*>(nullptr));
  }
}

inline double element(const ConstData& x, int64_t i) {
  double value = 0;
  with_type(x.dtype, [&](auto* type) { value = widened(static_cast<decltype(type)>(x.data)[i]); });
  return value;
}

inline void put(const Data& x, int64_t i, double value) {
  if (x.dtype == Dtype::f64)
    static_cast<double*>(x.data)[i] = value;
  else
    static_cast<float*>(x.data)[i] = static_cast<float>(value);
}

// ---- total[0, n) += factor * x[0, n), in float64 ----

template <class T>
[[gnu::always_inline]] inline void add_scaled(const T* x, double factor, int64_t n, double* total) {
  int64_t i = 0;
  if constexpr (sizeof(T) == 2)
    for (; i + 8 <= n; i += 8) {
      const f32x8 v = load8(x + i);
      store4(total + i, load4(total + i) + factor * lower(v));
      store4(total + i + 4, load4(total + i + 4) + factor * upper(v));
    }
  for (; i < n; ++i) total[i] += factor * static_cast<double>(widened(x[i]));
}

// ---- Sums of squares, in float64 ----

[[gnu::always_inline]] inline double squares(const double* x, int64_t n) {
  f64x4 a{}, b{}, c{}, d{};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const f64x4 p = load4(x + i), q = load4(x + i + 4), r = load4(x + i + 8), s = load4(x + i + 12);
    a += p * p;
    b += q * q;
    c += r * r;
    d += s * s;
  }
  double sum = sum_of((a + b) + (c + d));
  for (; i < n; ++i) sum += x[i] * x[i];
  return sum;
}

[[gnu::always_inline]] inline double squares_wide(const double* x, int64_t n) {
  return squares(x, n);
}
template <class T>
[[gnu::always_inline]] inline double squares_wide(const T* x, int64_t n) {
  f64x4 a{}, b{}, c{}, d{};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const f32x8 u = load8(x + i), v = load8(x + i + 8);
    const f64x4 p = lower(u), q = upper(u), r = lower(v), s = upper(v);
    a += p * p;
    b += q * q;
    c += r * r;
    d += s * s;
  }
  double sum = sum_of((a + b) + (c + d));
  for (; i < n; ++i) {
    const double value = widened(x[i]);
    sum += value * value;
  }
  return sum;
}

// The largest size among x[0, n) and `so_far`, or NaN where one is.
template <class T>
inline double largest(const T* x, int64_t n, double so_far) {
  for (int64_t i = 0; i < n; ++i) {
    const double value = static_cast<double>(widened(x[i])), size = value < 0 ? -value : value;
    if (size > so_far || size != size) so_far = size;
  }
  return so_far;
}

// A power of two by which numbers up to `largest`, squared, stay in the range of doubles.
inline double scale_for(double largest) {
  return largest > 0x1p400 ? 0x1p-600 : largest < 0x1p-400 ? 0x1p600 : 1;
}
inline bool in_range(double square) { return square > 1e-280 && square < 1e280; }

// Blocks of 512 are summed in float32, 16 squares in a lane, and added in float64. A block that
// comes near the ends of float32's range is done again in float64.
template <class T>
[[gnu::always_inline]] inline double squares(const T* x, int64_t n) {
  double sum = 0;
  int64_t i = 0;
  while (i + 32 <= n) {
    const int64_t start = i, stop = i + 512 < n ? i + 512 : n;
    f32x8 a{}, b{}, c{}, d{};
    for (; i + 32 <= stop; i += 32) {
      const f32x8 p = load8(x + i), q = load8(x + i + 8);
      const f32x8 r = load8(x + i + 16), s = load8(x + i + 24);
      a += p * p;
      b += q * q;
      c += r * r;
      d += s * s;
    }
    const f32x8 lanes = (a + b) + (c + d);
    const double block = sum_of(lower(lanes) + upper(lanes));
    const bool moderate = block > 1e-25 && block < 1e+37;
    sum += __builtin_expect(moderate, true) ? block : squares_wide(x + start, i - start);
  }
  return sum + squares_wide(x + i, n - i);
}

// The l2 norm of x[0, n); float64 numbers may have squares beyond the range of doubles.
template <class T>
inline double row_norm(const T* x, int64_t n) {
  double sum = squares(x, n);
  if (sizeof(T) < sizeof(double) || in_range(sum)) return __builtin_sqrt(sum);
  const double scale = scale_for(largest(x, n, 0));
  sum = 0;
  for (int64_t c = 0; c < n; ++c) {
    const double value = static_cast<double>(widened(x[c])) * scale;
    sum += value * value;
  }
  return __builtin_sqrt(sum) / scale;
}

}  // namespace
}  // namespace embattle
