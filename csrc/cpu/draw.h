// Random numbers in float lanes; their layout is told in python/embattle/ops/reference/. Philox
// runs on the low halves of 64-bit lanes, a block of four words in each, so that a multiplication
// gives both halves of its product at once.
#pragma once

#include "sums.h"

namespace embattle {
namespace {

enum class Draw { uniform, gaussian, exponential };  // in (-1, 1), N(0, 1), signed

typedef uint64_t L __attribute__((vector_size(8 * kLanes)));

// Elements that kLanes blocks serve.
constexpr int kSet = 4 * kLanes;
// What is drawn at once: no call draws across a border of such stretches of the tensor.
constexpr int64_t kStretch = 1024;

// a * b + c; one rounding where the processor has it.
inline F fused(F a, F b, F c) {
#if defined(__AVX512F__)
  return reinterpret_cast<F>(_mm512_fmadd_ps(
      reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__FMA__)
  return reinterpret_cast<F>(_mm256_fmadd_ps(
      reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
  return a * b + c;
#endif
}
inline F fused(F a, float b, float c) { return fused(a, all(b), all(c)); }
inline F fused(F a, F b, float c) { return fused(a, b, all(c)); }

inline F root(F x) {  // one instruction
  for (int k = 0; k < kFloats; ++k) x[k] = __builtin_sqrtf(x[k]);
  return x;
}

// The arithmetic of Philox in the low halves of lanes; what the high ones hold does not matter.
struct InLanes {
  typedef L Word;
  static L high(L x) { return x >> 32; }
  static L low(L x) { return x; }
  static L product(L a, uint32_t m) {
#if defined(__AVX512F__)
    return reinterpret_cast<L>(
        _mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(a), _mm512_set1_epi64(m)));
#elif defined(__AVX2__)
    return reinterpret_cast<L>(
        _mm256_mul_epu32(reinterpret_cast<__m256i>(a), _mm256_set1_epi64x(m)));
#elif defined(__SSE2__)
    return reinterpret_cast<L>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), _mm_set1_epi64x(m)));
#else
    return (a & 0xffffffffu) * m;
#endif
  }
};

// The low halves of `even` and of `odd` in turn.
inline U in_turn(L even, L odd) {
  const L high = odd << 32;
#if defined(__AVX512F__)
  return reinterpret_cast<U>(_mm512_mask_mov_epi32(reinterpret_cast<__m512i>(even), 0xaaaa,
                                                   reinterpret_cast<__m512i>(high)));
#elif defined(__AVX2__)
  return reinterpret_cast<U>(
      _mm256_blend_epi32(reinterpret_cast<__m256i>(even), reinterpret_cast<__m256i>(high), 0xaa));
#else
  return reinterpret_cast<U>((even & 0xffffffffu) | high);
#endif
}

// a and b in turn, by pairs of blocks: the numbers of the first half of a set's blocks and those of
// the second, in order, if the lanes hold the blocks as kOrder has them.
inline void in_order(F a, F b, F* first, F* second) {
#if defined(__AVX512F__)
  *first = __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
  *second =
      __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
#elif defined(__AVX__)
  *first = __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13);
  *second = __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
#else
  *first = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  *second = __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}
#if defined(__AVX512F__)
constexpr L kOrder = {0, 4, 1, 5, 2, 6, 3, 7};
#elif defined(__AVX__)
constexpr L kOrder = {0, 2, 1, 3};
#else
constexpr L kOrder = {0, 1};
#endif

// A key, and what the rounds make of it.
struct Keys {
  uint32_t c2, c3;
  uint32_t k0[2], k1[2];
  L later0[kPhiloxRounds - 2], later1[kPhiloxRounds - 2];  // from the third round on, in every lane

  explicit Keys(const int64_t* key) {
    const auto low = [](int64_t x) { return static_cast<uint32_t>(x); };
    c2 = low(key[1]);
    c3 = low(key[1] >> 32);
    uint32_t a = low(key[0]), b = low(key[0] >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      if (round < 2) {
        k0[round] = a;
        k1[round] = b;
      } else {
        later0[round - 2] = L{} + a;
        later1[round - 2] = L{} + b;
      }
      a += kPhiloxPlus0;
      b += kPhiloxPlus1;
    }
  }
};

// The words of kSets * kLanes blocks of stream 0, those of even and odd elements in turn. Three of
// the four words of a counter are the same for all blocks: two rounds are partly worked out once.
// Precondition: no multiple of 2^32 lies among the blocks but at their beginning.
template <int kSets>
[[gnu::always_inline]] inline void philox_sets(const Keys& keys, uint64_t block, U (*to)[2]) {
  const auto high = [](uint64_t x) { return static_cast<uint32_t>(x >> 32); };
  const uint64_t first1 = uint64_t{keys.c2} * kPhiloxTimes1;
  const uint32_t one0 = high(first1) ^ high(block) ^ keys.k0[0];
  const uint32_t one1 = static_cast<uint32_t>(first1);
  const uint64_t second0 = uint64_t{one0} * kPhiloxTimes0;
  const L one2 = L{} + (keys.c3 ^ keys.k1[0]);
  const L two0 = L{} + (one1 ^ keys.k0[1]), two2 = L{} + (high(second0) ^ keys.k1[1]);
  const L two3 = L{} + (second0 & 0xffffffffu);
  L w0[kSets], w1[kSets], w2[kSets], w3[kSets];
  for (int s = 0; s < kSets; ++s) {
    const L first = kOrder + (block + static_cast<uint64_t>(s * kLanes));
    const L p0 = InLanes::product(first, kPhiloxTimes0);
    const L p1 = InLanes::product((p0 >> 32) ^ one2, kPhiloxTimes1);
    w0[s] = (p1 >> 32) ^ two0;
    w1[s] = p1;
    w2[s] = p0 ^ two2;
    w3[s] = two3;
  }
#pragma GCC unroll 8
  for (int round = 0; round < kPhiloxRounds - 2; ++round)
    for (int s = 0; s < kSets; ++s)
      philox_round<InLanes>(w0[s], w1[s], w2[s], w3[s], keys.later0[round], keys.later1[round]);
  for (int s = 0; s < kSets; ++s) {
    to[s][0] = in_turn(w0[s], w2[s]);
    to[s][1] = in_turn(w1[s], w3[s]);
  }
}

// -kTimes * log((m + 1) * 2^-24) of m < 2^24, by the logarithm of 1 + f in [2/3, 4/3): a minimax
// polynomial, off by 3e-8 of the value.
template <int kTimes>
[[gnu::always_inline]] inline F minus_log(U m) {
  constexpr float t = -kTimes;
  const F x = __builtin_convertvector(reinterpret_cast<J>(m), F) + 1.f;
  const J away = reinterpret_cast<J>(reinterpret_cast<U>(x) - 0x3f2aaaabu);
  const F exponent = __builtin_convertvector((away >> 23) - 24, F);
  const U scaled = reinterpret_cast<U>(x) - (reinterpret_cast<U>(away) & 0xff800000u);
  const F f = reinterpret_cast<F>(scaled) - 1.f;
  const F f2 = f * f;
  const F a = fused(f, t * 0.33333198f, t * -0.49999936f);
  const F b = fused(f, t * 0.20011169f, t * -0.25007819f);
  const F c = fused(f, t * 0.13995806f, t * -0.16415960f);
  const F d = fused(f, t * 0.14026363f, t * -0.15388546f);
  const F curve = fused(f2 * f2, fused(d, f2, c), fused(b, f2, a));
  return fused(curve, f2, fused(exponent, all(t * 0.69314718f), f * t));
}

// The cosine and sine of 2 pi m / 2^24, m being the upper 24 bits of w: polynomials in the distance
// to the nearest quarter of the circle, off by 3e-8.
[[gnu::always_inline]] inline void circle(U w, F* cosine, F* sine) {
  const U quarter = w + 0x20000000u;  // in its two uppermost bits
  const F t = __builtin_convertvector(reinterpret_cast<J>((w & 0xffffff00u) << 2), F) *
              static_cast<float>(1.5707963267948966 * 0x1p-32);
  const F t2 = t * t;
  const F s3 = fused(t2, fused(t2, -1.9517300e-4f, 8.3321781e-3f), -0.16666655f) * t2;
  const F s = fused(s3, t, t);
  const F c = fused(t2, fused(t2, fused(t2, -1.3597823e-3f, 4.1656295e-2f), -0.49999895f), 1.f);
  const auto odd = reinterpret_cast<J>(quarter << 1) < 0;
  const F x = odd ? s : c, y = odd ? c : s;
  *cosine = reinterpret_cast<F>(reinterpret_cast<U>(x) ^ ((quarter ^ quarter << 1) & 0x80000000u));
  *sine = reinterpret_cast<F>(reinterpret_cast<U>(y) ^ (quarter & 0x80000000u));
}

// What an element's word gives where it gives one number.
template <Draw kDraw>
[[gnu::always_inline]] inline F number_of(U w) {
  if (kDraw == Draw::uniform)
    return __builtin_convertvector(reinterpret_cast<J>(w >> 8), F) * 0x1p-23f - 1.f;
  return reinterpret_cast<F>(reinterpret_cast<U>(minus_log<1>(w >> 8)) ^ (w << 31));
}

// The words of a stretch. Preconditions: begin is a multiple of 4, and all elements [begin, end)
// lie in one stretch (begin / kStretch == (end - 1) / kStretch).
struct Drawn {
  U words[kStretch / kSet + 1][2];
  int sets;

  Drawn(const Keys& keys, int64_t begin, int64_t end)
      : sets(static_cast<int>((end - begin + kSet - 1) / kSet)) {
    constexpr int kAtOnce = 4;  // hides the latency of multiplications
    const uint64_t block = static_cast<uint64_t>(begin) / 4;
    int done = 0;
    for (; done + kAtOnce <= sets; done += kAtOnce)
      philox_sets<kAtOnce>(keys, block + static_cast<uint64_t>(done * kLanes), words + done);
    for (; done < sets; ++done)
      philox_sets<1>(keys, block + static_cast<uint64_t>(done * kLanes), words + done);
  }

  // The numbers of a set's elements.
  template <Draw kDraw>
  [[gnu::always_inline]] void numbers(int set, F (&to)[2]) const {
    F even, odd;
    if constexpr (kDraw == Draw::gaussian) {
      const F radius = root(minus_log<2>(words[set][0] >> 8));
      circle(words[set][1], &even, &odd);
      even *= radius;
      odd *= radius;
    } else {
      even = number_of<kDraw>(words[set][0]);
      odd = number_of<kDraw>(words[set][1]);
    }
    in_order(even, odd, &to[0], &to[1]);
  }
};

// Calls f(i, n, numbers) for the vectors of elements [begin, end) of a stretch, as soon as they are
// worked out: what f writes drains while the next ones are.
template <Draw kDraw, class Fn>
inline void draw_each(const Keys& keys, int64_t begin, int64_t end, const Fn& given) {
  const Fn f = given;  // a copy of one's own: what it holds stays in registers
  const int64_t start = begin & ~int64_t{3};
  const Drawn drawn(keys, start, end);
  for (int s = 0; s < drawn.sets; ++s) {
    const int64_t at = start + s * kSet;
    F numbers[2];
    drawn.numbers<kDraw>(s, numbers);
    if (__builtin_expect(at >= begin && at + kSet <= end, 1)) {
      f(at, All{}, numbers[0]);
      f(at + kFloats, All{}, numbers[1]);
      continue;
    }
    float all[kSet];
    std::memcpy(all, numbers, sizeof(numbers));
    const int64_t stop = at + kSet < end ? at + kSet : end;
    for (int64_t i = at < begin ? begin : at; i < stop; i += kFloats) {
      const int n = static_cast<int>(stop - i < kFloats ? stop - i : kFloats);
      f(i, n, fetch(all + (i - at), n));
    }
  }
}

// Writes the numbers of elements [begin, end) of a stretch.
template <Draw kDraw>
inline void draw(const Keys& keys, int64_t begin, int64_t end, float* to) {
  draw_each<kDraw>(keys, begin, end, [=](int64_t i, auto n, F numbers) EMBATTLE_INLINE {
    put_words<float, kFloats>(to + (i - begin), n, numbers);
  });
}

// Calls f(begin, end) for the stretches of [begin, end).
template <class Fn>
inline void stretches(int64_t begin, int64_t end, const Fn& f) {
  for (int64_t stop; begin < end; begin = stop) {
    stop = (begin / kStretch + 1) * kStretch;
    if (stop > end) stop = end;
    f(begin, stop);
  }
}

}  // namespace
}  // namespace embattle
