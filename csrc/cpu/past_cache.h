// Stores past the cache, for results that are too many to stay there. The bits are the same.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

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
  memcpy(to, &x, sizeof(x));
}

// What was stored past the cache is seen by others from here on.
inline void settle_stores() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace embattle
