// How the four element types are read into vectors and written from them: the one place that knows,
// and that knows what the processor calls it.
#pragma once

#include <type_traits>

#include "vec.h"

namespace embattle {
namespace {

// ---- Half types ----

// Their storage, by its bits.
struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};
template <class T>
constexpr bool is_half = sizeof(T) == 2;
template <class T>
using Word = std::conditional_t<is_half<T>, uint16_t, T>;  // vectors are of these

template <class T>
inline Word<T>* words_of(T* p) {
  return reinterpret_cast<Word<T>*>(p);
}
template <class T>
inline const Word<T>* words_of(const T* p) {
  return reinterpret_cast<const Word<T>*>(p);
}

#if defined(__SSE4_1__)
// Four numbers of sixteen bits in the lower half of a register.
inline __m128i four_of(Vec<uint16_t, 4> x) {
  __m128i y{};
  std::memcpy(&y, &x, sizeof(x));
  return y;
}
inline Vec<uint16_t, 4> to_four(__m128i y) {
  Vec<uint16_t, 4> x;
  std::memcpy(&x, &y, sizeof(x));
  return x;
}
#endif

// Sixteen bits to and from 32.
template <int n>
inline Vec<uint32_t, n> spread_out(Vec<uint16_t, n> x) {
#if defined(__AVX512F__)
  if constexpr (n == 16)
    return reinterpret_cast<U>(_mm512_maskz_cvtepu16_epi32(0xffff, reinterpret_cast<__m256i>(x)));
#endif
#if defined(__AVX2__)
  if constexpr (n == 8)
    return reinterpret_cast<Vec<uint32_t, n>>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(x)));
#endif
#if defined(__SSE4_1__)
  if constexpr (n == 4) return reinterpret_cast<Vec<uint32_t, n>>(_mm_cvtepu16_epi32(four_of(x)));
#endif
  return __builtin_convertvector(x, Vec<uint32_t, n>);
}
template <int n>
inline Vec<uint16_t, n> packed_up(Vec<uint32_t, n> x) {  // of numbers below 2^16
#if defined(__AVX2__)
  if constexpr (n == 8) {
    const __m256i y = reinterpret_cast<__m256i>(x);
    return reinterpret_cast<Vec<uint16_t, n>>(
        _mm_packus_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1)));
  }
#endif
#if defined(__SSE4_1__)
  if constexpr (n == 4) {
    const __m128i y = reinterpret_cast<__m128i>(x);
    return to_four(_mm_packus_epi32(y, y));
  }
#endif
  return __builtin_convertvector(x, Vec<uint16_t, n>);
}

template <int n>
inline Vec<float, n> of_halves(Vec<uint16_t, n> x) {
#if defined(__AVX512F__)
  if constexpr (n == 16)
    return reinterpret_cast<F>(_mm512_maskz_cvtph_ps(0xffff, reinterpret_cast<__m256i>(x)));
#endif
#if defined(__F16C__)
  if constexpr (n == 8)
    return reinterpret_cast<Vec<float, n>>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(x)));
  if constexpr (n == 4) return reinterpret_cast<Vec<float, n>>(_mm_cvtph_ps(four_of(x)));
#endif
  // A half's exponent and mantissa, shifted into place, are 2^-112 times its value.
  typedef Vec<uint32_t, n> Us;
  const Us h = spread_out<n>(x), size = (h & 0x7fffu) << 13;
  const Us finite = reinterpret_cast<Us>(reinterpret_cast<Vec<float, n>>(size) * 0x1p112f);
  const Us value = size >= 0x0f800000u ? size | 0x7f800000u : finite;
  return reinterpret_cast<Vec<float, n>>(value | ((h & 0x8000u) << 16));
}
template <int n>
inline Vec<uint16_t, n> to_halves(Vec<float, n> x) {
#if defined(__AVX512F__)
  if constexpr (n == 16)
    return reinterpret_cast<Vec<uint16_t, n>>(
        _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
#endif
#if defined(__F16C__)
  if constexpr (n == 8)
    return reinterpret_cast<Vec<uint16_t, n>>(
        _mm256_cvtps_ph(reinterpret_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
  if constexpr (n == 4)
    return to_four(_mm_cvtps_ph(reinterpret_cast<__m128>(x), _MM_FROUND_TO_NEAREST_INT));
#endif
  // Subnormal halves: adding 0.5 rounds to their unit, 2^-24.
  typedef Vec<uint32_t, n> Us;
  const Us b = reinterpret_cast<Us>(x), size = b & 0x7fffffffu;
  const Us small = reinterpret_cast<Us>(reinterpret_cast<Vec<float, n>>(size) + 0.5f) - 0x3f000000u;
  const Us normal = (size + 0xc8000fffu + ((size >> 13) & 1u)) >> 13;
  const Us special = size > 0x7f800000u ? Us{} + 0x7e00u : Us{} + 0x7c00u;
  const Us value = size >= 0x47800000u ? special : size < 0x38800000u ? small : normal;
  return packed_up<n>(value | ((b >> 16) & 0x8000u));
}

// What n stored elements are worth.
template <class T, int n>
inline Vec<float, n> to_floats(Vec<Word<T>, n> x) {
  if constexpr (std::is_same_v<T, bf16>)
    return reinterpret_cast<Vec<float, n>>(spread_out<n>(x) << 16);
  else if constexpr (std::is_same_v<T, f16>)
    return of_halves<n>(x);
  else
    return x;
}

// What is stored of x, to nearest even, and in *stored what that is worth.
template <class T, int n>
inline Vec<Word<T>, n> to_words(Vec<float, n> x, Vec<float, n>* stored) {
  if constexpr (std::is_same_v<T, bf16>) {
    typedef Vec<uint32_t, n> Us;
    const Us b = reinterpret_cast<Us>(x);
    const Us near = (b + 0x7fffu + ((b >> 16) & 1u)) & 0xffff0000u;
    const Us value = x == x ? near : (b & 0xffff0000u) | 0x400000u;
    *stored = reinterpret_cast<Vec<float, n>>(value);
    return packed_up<n>(value >> 16);
  } else if constexpr (std::is_same_v<T, f16>) {
    const Vec<uint16_t, n> half = to_halves<n>(x);
    *stored = of_halves<n>(half);
    return half;
  } else {
    return *stored = x;
  }
}

// ---- Memory ----

// Copies an even number of bytes, up to kMost: a call of memcpy takes longer than that.
template <int kMost>
EMBATTLE_INLINE inline void copy_few(void* to, const void* from, unsigned bytes) {
  if (bytes >= kMost) {
    std::memcpy(to, from, kMost);
    return;
  }
  unsigned at = 0;
  const auto piece = [&](auto size) EMBATTLE_INLINE {
    if constexpr (decltype(size){} < kMost) {
      if (!(bytes & size)) return;
      std::memcpy(static_cast<char*>(to) + at, static_cast<const char*>(from) + at, size);
      at += size;
    }
  };
  piece(Count<16>{});
  piece(Count<8>{});
  piece(Count<4>{});
  piece(Count<2>{});
}

// The first n of up to four words of sixteen bits, in a register: what is stored in pieces is not
// at once there to be read whole.
[[maybe_unused]] inline uint64_t few_words(const uint16_t* p, int n) {
  uint64_t x = 0;
  if (n >= 4) {
    std::memcpy(&x, p, 8);
    return x;
  }
  if (n & 2) x = p[0] | uint64_t{p[1]} << 16;
  return n & 1 ? x | uint64_t{p[n - 1]} << 16 * (n - 1) : x;
}

// The first n words, n below kCount; the others are zero. By a mask of bytes, or of four bytes
// each, where the processor has one.
#if defined(__AVX2__) && !defined(__AVX512F__)
template <int kBytes>
inline Vec<int32_t, kBytes / 4> lanes_below(int bytes) {
  Vec<int32_t, kBytes / 4> end;
  for (int k = 0; k < kBytes / 4; ++k) end[k] = 4 * (k + 1);
  return end <= bytes;
}
#endif
template <class W, int kCount>
EMBATTLE_INLINE inline Vec<W, kCount> words_at(const W* p, int n) {
  typedef Vec<W, kCount> Words;
  [[maybe_unused]] const unsigned bytes = static_cast<unsigned>(n) * sizeof(W);
#if defined(__AVX512F__)
  const uint64_t mask = _bzhi_u64(~uint64_t{0}, bytes);
  if constexpr (sizeof(Words) == 64)
    return reinterpret_cast<Words>(_mm512_maskz_loadu_epi8(mask, p));
  else if constexpr (sizeof(Words) == 32)
    return reinterpret_cast<Words>(_mm256_maskz_loadu_epi8(static_cast<__mmask32>(mask), p));
  else
    return reinterpret_cast<Words>(_mm_maskz_loadu_epi8(static_cast<__mmask16>(mask), p));
#else
#if defined(__AVX2__)
  if constexpr (sizeof(W) >= 4) {
    const auto mask = lanes_below<sizeof(Words)>(static_cast<int>(bytes));
    const auto* const from = reinterpret_cast<const float*>(p);
    if constexpr (sizeof(Words) == 32)
      return reinterpret_cast<Words>(_mm256_maskload_ps(from, reinterpret_cast<__m256i>(mask)));
    else
      return reinterpret_cast<Words>(_mm_maskload_ps(from, reinterpret_cast<__m128i>(mask)));
  }
#endif
  if constexpr (sizeof(W) == 2 && kCount == 8)
    return reinterpret_cast<Words>(
        Vec<uint64_t, 2>{few_words(p, n), n > 4 ? few_words(p + 4, n - 4) : 0});
  Words x{};
  copy_few<sizeof(Words)>(&x, p, bytes);
  return x;
#endif
}
template <class W, int kCount>
EMBATTLE_INLINE inline void put_words(W* p, int n, Vec<W, kCount> x) {
  [[maybe_unused]] const unsigned bytes = static_cast<unsigned>(n) * sizeof(W);
#if defined(__AVX512F__)
  const uint64_t mask = _bzhi_u64(~uint64_t{0}, bytes);
  if constexpr (sizeof(x) == 64)
    _mm512_mask_storeu_epi8(p, mask, reinterpret_cast<__m512i>(x));
  else if constexpr (sizeof(x) == 32)
    _mm256_mask_storeu_epi8(p, static_cast<__mmask32>(mask), reinterpret_cast<__m256i>(x));
  else
    _mm_mask_storeu_epi8(p, static_cast<__mmask16>(mask), reinterpret_cast<__m128i>(x));
#else
  copy_few<sizeof(x)>(p, &x, bytes);
#endif
}

// All of them.
template <class W, int kCount>
EMBATTLE_INLINE inline Vec<W, kCount> words_at(const W* p, Count<kCount>) {
  Vec<W, kCount> x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
template <class W, int kCount>
EMBATTLE_INLINE inline void put_words(W* p, Count<kCount>, Vec<W, kCount> x) {
  std::memcpy(p, &x, sizeof(x));
}

// n elements; the lanes beyond n are zero.
template <class T, class N>
EMBATTLE_INLINE inline F fetch(const T* p, N n) {
  return to_floats<T, kFloats>(words_at<Word<T>, kFloats>(words_of(p), n));
}
template <class T, class N>
inline V load(const T* p, N n) {
  const auto words = words_at<Word<T>, kLanes>(words_of(p), n);
  if constexpr (std::is_same_v<T, double>)
    return words;
  else
    return widened(to_floats<T, kLanes>(words));
}

// x as floats that a half type can be rounded from: to odd, which keeps what the second rounding
// has to know.
inline Floats rounded_to_odd(V x) {
  typedef Vec<int32_t, kLanes> Ints;
  const Floats near = narrowed(x);
  const V back = widened(near);
  const Ints b = reinterpret_cast<Ints>(near);
  const Ints inexact = __builtin_convertvector((back < x) | (back > x), Ints);  // no NaN
  const Ints short_of = __builtin_convertvector(abs(back) < abs(x), Ints);
  const Ints towards = (short_of & 1) | (~short_of & -1);
  return reinterpret_cast<Floats>(b + (towards & inexact & ((b & 1) - 1)));
}

// Rounds x to T, once, writes its first n lanes, and returns what was written.
template <class T, class N>
inline V store(T* p, N n, V x) {
  if constexpr (std::is_same_v<T, double>) {
    put_words<double, kLanes>(p, n, x);
    return x;
  } else {
    Floats stored;
    const auto words = to_words<T, kLanes>(is_half<T> ? rounded_to_odd(x) : narrowed(x), &stored);
    put_words<Word<T>, kLanes>(words_of(p), n, words);
    return widened(stored);
  }
}

}  // namespace
}  // namespace embattle
