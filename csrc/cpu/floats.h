// Float lanes: the fast paths of float32, float16 and bfloat16. Products are rounded to float32 and
// summed in fours before they go on in double, so that a sum of numbers >= 0 is within 3 units of
// roundoff (kSumError) of the exact one, however long it is. Callers see to over- and underflow: a
// sum that is not finite, or so small that squares may have vanished, is theirs to take again in
// double lanes.
#pragma once

#include "ball.h"
#include "past_cache.h"

namespace embattle {
namespace {

constexpr int kFloats = 2 * kLanes;
constexpr double kSumError = 3.5 * 0x1p-24;  // relative; float32's roundoff and some of double's

typedef float F __attribute__((vector_size(4 * kFloats)));
typedef int32_t J __attribute__((vector_size(4 * kFloats)));
typedef uint32_t U __attribute__((vector_size(4 * kFloats)));
typedef uint16_t H __attribute__((vector_size(2 * kFloats)));

// The number of elements of a whole vector, as Whole is for doubles.
struct All {
  constexpr operator int() const { return kFloats; }
};

inline F all(float x) { return x - F{}; }
inline F abs(F x) { return reinterpret_cast<F>(reinterpret_cast<U>(x) & 0x7fffffffu); }
inline F with_sign(F size, F sign) {
  return reinterpret_cast<F>(reinterpret_cast<U>(size) | (reinterpret_cast<U>(sign) & 0x80000000u));
}
inline J as_mask(F comparison) { return reinterpret_cast<J>(comparison); }
inline F of_mask(J comparison) { return reinterpret_cast<F>(comparison); }
inline bool any(J comparison) {
#if defined(__AVX512DQ__)
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(comparison)) != 0;
#elif defined(__AVX__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(comparison)) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_ps(reinterpret_cast<__m128>(comparison)) != 0;
#else
  int32_t all = 0;
  for (int k = 0; k < kFloats; ++k) all |= comparison[k];
  return all != 0;
#endif
}
inline F larger(F a, F b) { return a > b ? a : b; }  // b where a is NaN
inline F clamped(F x, F limit) {                     // a NaN stays
  x = x > limit ? limit : x;
  return x < -limit ? -limit : x;
}

// The sum of neighbouring halves, in double.
inline V halves(F x) {
#if defined(__AVX512F__)
  const __m512d y = reinterpret_cast<__m512d>(x);
  const __m256 low = _mm256_castpd_ps(_mm512_maskz_extractf64x4_pd(0xf, y, 0));
  const __m256 high = _mm256_castpd_ps(_mm512_maskz_extractf64x4_pd(0xf, y, 1));
  return widen<float>(reinterpret_cast<Floats>(low)) + widen<float>(reinterpret_cast<Floats>(high));
#elif defined(__AVX__)
  const __m256 y = reinterpret_cast<__m256>(x);
  const __m128 low = _mm256_castps256_ps128(y), high = _mm256_extractf128_ps(y, 1);
  return widen<float>(reinterpret_cast<Floats>(low)) + widen<float>(reinterpret_cast<Floats>(high));
#else
  Floats half[2];
  std::memcpy(half, &x, sizeof(x));
  return widen<float>(half[0]) + widen<float>(half[1]);
#endif
}

inline double largest(F x) {
  float most = x[0];
  for (int k = 1; k < kFloats; ++k) most = x[k] > most ? x[k] : most;
  return most;
}

// Sixteen bits to and from 32, by name where the compiler would take detours.
inline U spread_out(H x) {
#if defined(__AVX512F__)
  return reinterpret_cast<U>(_mm512_maskz_cvtepu16_epi32(0xffff, reinterpret_cast<__m256i>(x)));
#elif defined(__AVX2__)
  return reinterpret_cast<U>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(x)));
#else
  return __builtin_convertvector(x, U);
#endif
}
inline H packed_up(U x) {  // of numbers below 2^16
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i y = reinterpret_cast<__m256i>(x);
  return reinterpret_cast<H>(
      _mm_packus_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1)));
#else
  return __builtin_convertvector(x, H);
#endif
}

// ---- Memory ----

template <class T>
struct Bulk;  // kFloats elements as they are stored
template <>
struct Bulk<float> {
  typedef F type;
  static F wide(F x) { return x; }
  static F narrowed(F x, F* stored) { return *stored = x; }
};
template <>
struct Bulk<bf16> {
  typedef H type;
  static F wide(H x) { return reinterpret_cast<F>(spread_out(x) << 16); }
  static H narrowed(F x, F* stored) {
    const U b = reinterpret_cast<U>(x);
    const U near = (b + 0x7fffu + ((b >> 16) & 1u)) & 0xffff0000u;
    const F rounded = reinterpret_cast<F>(near);
    *stored = x == x ? rounded : reinterpret_cast<F>((b & 0xffff0000u) | 0x400000u);
    return packed_up(reinterpret_cast<U>(*stored) >> 16);
  }
};
template <>
struct Bulk<f16> {
  typedef H type;
#if defined(__AVX512F__)
  static F wide(H x) {
    return reinterpret_cast<F>(_mm512_maskz_cvtph_ps(0xffff, reinterpret_cast<__m256i>(x)));
  }
  static H narrowed(F x, F* stored) {
    const H half = reinterpret_cast<H>(
        _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
    *stored = wide(half);
    return half;
  }
#elif defined(__F16C__)
  static F wide(H x) { return reinterpret_cast<F>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(x))); }
  static H narrowed(F x, F* stored) {
    const H half = reinterpret_cast<H>(
        _mm256_cvtps_ph(reinterpret_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
    *stored = wide(half);
    return half;
  }
#else  // as in vec.h
  static F wide(H x) {
    const U h = spread_out(x);
    const U size = (h & 0x7fffu) << 13;
    const U finite = reinterpret_cast<U>(reinterpret_cast<F>(size) * 0x1p112f);
    const U value = size >= 0x0f800000u ? size | 0x7f800000u : finite;
    return reinterpret_cast<F>(value | ((h & 0x8000u) << 16));
  }
  static H narrowed(F x, F* stored) {
    const U b = reinterpret_cast<U>(x);
    const U size = b & 0x7fffffffu;
    const U small = reinterpret_cast<U>(reinterpret_cast<F>(size) + 0.5f) - 0x3f000000u;
    const U normal = (size + 0xc8000fffu + ((size >> 13) & 1u)) >> 13;
    const U special = size > 0x7f800000u ? U{} + 0x7e00u : U{} + 0x7c00u;
    const U value = size >= 0x47800000u ? special : size < 0x38800000u ? small : normal;
    const H half = packed_up(value | ((b >> 16) & 0x8000u));
    *stored = wide(half);
    return half;
  }
#endif
};

// n elements; the lanes beyond n are zero.
template <class T, class N>
[[gnu::always_inline]] inline F fetch(const T* p, N n) {
  typename Bulk<T>::type x{};
  std::memcpy(&x, p, sizeof(T) * static_cast<size_t>(n));
  return Bulk<T>::wide(x);
}

// Where results go: through the cache, or past it where they are too many to stay there.
template <class T>
struct Sink {
  T* p;
  bool past_cache = false;

  explicit Sink(T* to) : p(to) {}  // in place

  // `from` is where the input lies: lines that were read to be written are in the cache already.
  Sink(const Data& out, const void* from, const Groups& groups) : p(static_cast<T*>(out.data)) {
    past_cache = out.data != from &&
                 pays_past_cache(p, groups.rows, groups.dim * static_cast<int64_t>(sizeof(T)));
  }

  // What was stored comes back.
  template <class N>
  [[gnu::always_inline]] F store(int64_t i, N n, F x) const {
    F stored;
    const typename Bulk<T>::type words = Bulk<T>::narrowed(x, &stored);
    if (static_cast<int>(n) == kFloats && past_cache)
      put_past_cache(p + i, words);
    else
      std::memcpy(p + i, &words, sizeof(T) * static_cast<size_t>(n));
    return stored;
  }

  void settle() const {
    if (past_cache) settle_stores();
  }
};

// ---- Loops ----

// Lambdas that loops call for every vector.
#define EMBATTLE_INLINE __attribute__((always_inline))

// Whether a group is so small that one thread takes it in one go.
inline bool is_short(const Cut& cut) {
  return !cut.parallel_for && !cut.groups.mask && cut.end() - cut.begin() <= kGrain;
}

// K sums of what f(i, n, terms) gives, K vectors of terms of the elements from i on. The sums whose
// bit is set in `kMaxima` are maxima of numbers >= 0 instead, those in `kCounts` count the lanes in
// which the term is what a comparison gives.
template <int K, unsigned kMaxima = 0, unsigned kCounts = 0>
struct Terms {
  V acc[K] = {};
  F most[K] = {};
  J seen[K] = {};

  static constexpr bool is_most(int k) { return kMaxima >> k & 1; }
  static constexpr bool is_count(int k) { return kCounts >> k & 1; }

  // Adds those of elements [begin, end), four vectors at a time.
  template <class Fn>
  [[gnu::always_inline]] void add(int64_t begin, int64_t end, const Fn& f) {
    int64_t i = begin;
    for (; i + 4 * kFloats <= end; i += 4 * kFloats) {
      F a[K], b[K], c[K], d[K];
      f(i, All{}, a);
      f(i + kFloats, All{}, b);
      f(i + 2 * kFloats, All{}, c);
      f(i + 3 * kFloats, All{}, d);
      for (int k = 0; k < K; ++k)
        if (is_most(k))
          most[k] = larger(larger(larger(a[k], b[k]), larger(c[k], d[k])), most[k]);
        else if (is_count(k))
          seen[k] -= (as_mask(a[k]) + as_mask(b[k])) + (as_mask(c[k]) + as_mask(d[k]));
        else
          acc[k] += halves((a[k] + b[k]) + (c[k] + d[k]));
    }
    const auto one = [&](auto n) EMBATTLE_INLINE {
      F a[K];
      f(i, n, a);
      for (int k = 0; k < K; ++k)
        if (is_most(k))
          most[k] = larger(a[k], most[k]);
        else if (is_count(k))
          seen[k] -= as_mask(a[k]);
        else
          acc[k] += halves(a[k]);
    };
    for (; i + kFloats <= end; i += kFloats) one(All{});
    if (i < end) one(static_cast<int>(end - i));
  }

  double result(int k) const {
    return is_most(k)    ? largest(most[k])
           : is_count(k) ? total(halves(__builtin_convertvector(seen[k], F)))
                         : total(acc[k]);
  }
};

// Terms over a group. `settle()` is called on the thread that did a block. kBackwards: from the
// last element to the first, chunk by chunk, so that a second pass begins with what the first one
// has left in the cache.
template <int K, bool kBackwards = false, unsigned kMaxima = 0, unsigned kCounts = 0, class Fn,
          class S>
inline Totals<K> float_sums(const Cut& cut, const Fn& given, const S& settle) {
  constexpr int64_t kChunk = 4096;
  typedef Terms<K, kMaxima, kCounts> Sums;
  const auto merge = [](double& a, double b, int k) {
    a = Sums::is_most(k) ? (b > a ? b : a) : a + b;
  };
  const auto add = [&](int64_t begin, int64_t end, double* to) {
    const Fn f = given;  // a copy of one's own: what it holds stays in registers
    Sums sums;
    sums.add(begin, end, f);
    for (int k = 0; k < K; ++k) merge(to[k], sums.result(k), k);
  };
  const auto run = [&](int64_t begin, int64_t end, double* to) {
    while (end > begin) {
      const int64_t start = kBackwards && end - begin > kChunk ? end - kChunk : begin;
      add(start, end, to);
      end = start;
    }
  };
  Totals<K> sum = {};
  if (is_short(cut)) {
    run(cut.begin(), cut.end(), sum.v);
    settle();
    return sum;
  }
  Totals<K> parts[kMaxBlocks];
  const int count = cut.blocks(
      [&](int block, int64_t low, int64_t high) {
        parts[block] = {};
        cut.runs(low, high, [&](int64_t begin, int64_t end) { run(begin, end, parts[block].v); });
        settle();
      },
      kBackwards);
  for (int b = 0; b < count; ++b)
    for (int k = 0; k < K; ++k) merge(sum.v[k], parts[b].v[k], k);
  return sum;
}

template <int K, unsigned kMaxima = 0, unsigned kCounts = 0, class Fn>
inline Totals<K> float_sums(const Cut& cut, const Fn& f) {
  return float_sums<K, false, kMaxima, kCounts>(cut, f, [] {});
}

}  // namespace
}  // namespace embattle
