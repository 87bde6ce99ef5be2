// Where results in float lanes go: through the cache, or past it where they are too many to stay
// there. The bits are the same.
#pragma once

#include "memory.h"

namespace embattle {
namespace {

// Whether `rows` rows of `row_bytes` at `out` had better go past the cache: whole lines, and many.
inline bool pays_past_cache(const void* out, int64_t rows, int64_t row_bytes) {
#if defined(__SSE2__)
  constexpr int64_t kMany = int64_t{8} << 20;
  return rows * row_bytes >= kMany && row_bytes % 64 == 0 &&
         reinterpret_cast<uintptr_t>(out) % 64 == 0;
#else
  (void)out, (void)rows, (void)row_bytes;
  return false;
#endif
}

// Precondition: `to` is aligned to the vector.
template <class Words>
[[gnu::always_inline]] inline void put_past_cache(void* to, Words x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(x) == 64)
    return _mm512_stream_si512(static_cast<__m512i*>(to), reinterpret_cast<__m512i>(x));
#endif
#if defined(__AVX__)
  if constexpr (sizeof(x) == 32)
    return _mm256_stream_si256(static_cast<__m256i*>(to), reinterpret_cast<__m256i>(x));
#endif
#if defined(__SSE2__)
  if constexpr (sizeof(x) == 16)
    return _mm_stream_si128(static_cast<__m128i*>(to), reinterpret_cast<__m128i>(x));
#endif
  std::memcpy(to, &x, sizeof(x));
}

// What was stored past the cache is seen by others from here on.
inline void settle_stores() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <class T>
struct Sink {
  T* p;
  bool past_cache = false;

  explicit Sink(T* to) : p(to) {}  // in place

  // `from` is where the input lies: lines that were read to be written are in the cache already.
  Sink(const Data& out, const void* from, int64_t rows, int64_t dim)
      : p(static_cast<T*>(out.data)) {
    past_cache =
        out.data != from && pays_past_cache(p, rows, dim * static_cast<int64_t>(sizeof(T)));
  }

  // What was stored comes back.
  template <class N>
  EMBATTLE_INLINE F store(int64_t i, N n, F x) const {
    F stored;
    const auto words = to_words<T, kFloats>(x, &stored);
    if (static_cast<int>(n) == kFloats && past_cache)
      put_past_cache(p + i, words);
    else
      put_words<Word<T>, kFloats>(words_of(p + i), n, words);
    return stored;
  }

  // Copies elements [begin, end) of x.
  void copy(const T* x, int64_t begin, int64_t end) const {
    for (; past_cache && begin + kFloats <= end; begin += kFloats)
      put_past_cache(p + begin, words_at<Word<T>, kFloats>(words_of(x + begin), All{}));
    std::memcpy(static_cast<void*>(p + begin), x + begin,
                sizeof(T) * static_cast<size_t>(end - begin));
  }

  void settle() const {
    if (past_cache) settle_stores();
  }
};

}  // namespace
}  // namespace embattle
