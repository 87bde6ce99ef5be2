// Random numbers that depend on a key and an element's place alone. The layout is defined in
// python/embattle/ops/reference.py.
#pragma once

#include "../formulas.h"
#include "number.cuh"

namespace embattle::cuda {

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
    const Words words = philox(uint64_t(key[0]), uint64_t(key[1]),
                               uint64_t(chunk * (kCount / kPerBlock) + i / kPerBlock), 0);
    Raw<R> raw[kPerBlock];
#pragma unroll
    for (int j = 0; j < kPerBlock; ++j) {
      if constexpr (kWide) {
        const unsigned high = words.w[2 * j], low = words.w[2 * j + 1];
        raw[j] = {R(bits53(high, low)), bool(low & 1)};
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
  const double u = radius_uniform(uint64_t(key[0]), uint64_t(key[1]), uint64_t(group));
  return exp(log(u) / larger(n, 1.0));
}

}  // namespace embattle::cuda
