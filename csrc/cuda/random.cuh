// Random numbers that depend on a key and an element's place alone. The layout is defined in
// python/embattle/reference.py.
#pragma once

#include "number.cuh"

namespace embattle::cuda {

struct Words {
  unsigned w[4];
};

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
__device__ __forceinline__ Words philox(const int64_t (&key)[2], int64_t block, unsigned stream) {
  unsigned k0 = unsigned(key[0]), k1 = unsigned(key[0] >> 32);
  unsigned c0 = unsigned(block), c1 = unsigned(block >> 32);
  unsigned c2 = unsigned(key[1]), c3 = unsigned(key[1] >> 32) ^ (stream << 31);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const unsigned high0 = __umulhi(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
    const unsigned high1 = __umulhi(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

enum class Draw : int { uniform, gaussian, exponential };

// The integers behind an element: m of `bits` bits, and a sign.
template <class R>
struct Raw {
  R m;  // exact
  bool minus;
};

// Elements kCount * chunk up to kCount * (chunk + 1) of a tensor with elements T: uniform in [0,
// 1), standard normal, or a signed standard exponential. Of the kind kDraw, or normal where
// `normal`: in one function, as what both begin with is long.
template <class T, Draw kDraw, int kCount, class A>
__device__ __forceinline__ void draw(bool normal, const int64_t (&key)[2], int64_t chunk,
                                     A (&out)[kCount]) {
  constexpr bool kWide = sizeof(T) == 8;
  using R = std::conditional_t<kWide, double, float>;
  constexpr int kPerBlock = kWide ? 2 : 4;
  constexpr R kUnit = kWide ? R(0x1p-53) : R(0x1p-24f);
  static_assert(kCount % kPerBlock == 0);
#pragma unroll
  for (int i = 0; i < kCount; i += kPerBlock) {
    const Words words = philox(key, chunk * (kCount / kPerBlock) + i / kPerBlock, 0);
    Raw<R> raw[kPerBlock];
#pragma unroll
    for (int j = 0; j < kPerBlock; ++j) {
      if constexpr (kWide) {
        const unsigned high = words.w[2 * j], low = words.w[2 * j + 1];
        raw[j] = {R((unsigned long long)high << 21 | low >> 11), bool(low & 1)};
      } else {
        raw[j] = {R(words.w[j] >> 8), bool(words.w[j] & 1)};
      }
    }
    if constexpr (kDraw != Draw::gaussian) {
      if (!normal) {
#pragma unroll
        for (int j = 0; j < kPerBlock; ++j) {
          if constexpr (kDraw == Draw::uniform) {
            out[i + j] = A(raw[j].m * kUnit);
          } else {
            const R size = -log((raw[j].m + 1) * kUnit);
            out[i + j] = A(raw[j].minus ? -size : size);
          }
        }
        continue;
      }
    }
#pragma unroll
    for (int j = 0; j < kPerBlock; j += 2) {  // Box-Muller
      const R radius = sqrt(R(-2) * log((raw[j].m + 1) * kUnit));
      R s, c;
      sin_cos_pi(2 * (raw[j + 1].m * kUnit), &s, &c);
      out[i + j] = A(radius * c);
      out[i + j + 1] = A(radius * s);
    }
  }
}

// A group's radius in the unit ball of dimension n: U^(1/n).
__device__ __forceinline__ double draw_radius(const int64_t (&key)[2], int64_t group, double n) {
  const Words words = philox(key, group, 1);
  const double u = double(((unsigned long long)words.w[0] << 21 | words.w[1] >> 11) + 1) * 0x1p-53;
  return exp(log(u) / larger(n, 1.0));
}

}  // namespace embattle::cuda
