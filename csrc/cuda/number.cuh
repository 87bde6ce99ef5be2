// Element types as the kernels see them: bits in memory, float or double in registers.
#pragma once

#include <cstring>

#include "../launch.h"
#include "device.cuh"

#ifdef __CUDACC__
#include <cuda_fp16.h>
#endif

namespace embattle::cuda {

__host__ __device__ inline bool aligned(const void* p, size_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class T>
constexpr Dtype dtype_of = Dtype::f32;
template <>
constexpr Dtype dtype_of<double> = Dtype::f64;
template <>
constexpr Dtype dtype_of<Half> = Dtype::f16;
template <>
constexpr Dtype dtype_of<BFloat16> = Dtype::bf16;

__host__ __device__ inline int bytes_of(Dtype t) {
  return t == Dtype::f64 ? 8 : t == Dtype::f32 ? 4 : 2;
}

// ---- From memory
// -----------------------------------------------------------------------------------

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(BFloat16 x) {
  return __uint_as_float(unsigned(x.bits) << 16);
}
__device__ __forceinline__ float widen(Half x) {
#ifdef __CUDACC__
  return __half2float(__ushort_as_half(x.bits));
#else
  const unsigned sign = unsigned(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31;
  const unsigned fraction = x.bits & 0x3ff;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
  if (exponent == 0) {
    const float small = float(fraction) * 0x1p-24f;
    return sign ? -small : small;
  }
  return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
#endif
}

// ---- To memory
// -------------------------------------------------------------------------------------

// To the nearest, ties to even. From double by way of float where T is a half type, as torch does.
template <class T>
struct Round {
  static __device__ __forceinline__ T nearest(float x) { return T(x); }
  static __device__ __forceinline__ T nearest(double x) { return T(x); }
};
template <>
struct Round<BFloat16> {
  static __device__ __forceinline__ BFloat16 nearest(float x) {
#ifdef __CUDACC__
    BFloat16 near;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(near.bits) : "f"(x));
    return near;
#else
    const unsigned bits = __float_as_uint(x);
    if (x != x) return {uint16_t(0x7fc0)};
    return {uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
#endif
  }
  static __device__ __forceinline__ BFloat16 nearest(double x) { return nearest(float(x)); }
};
template <>
struct Round<Half> {
  static __device__ __forceinline__ Half nearest(float x) {
#ifdef __CUDACC__
    return {__half_as_ushort(__float2half_rn(x))};
#else
    const unsigned bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u,
                   size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
    if (size >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // rounds to beyond the largest
    if (size < 0x38800000u) {                                    // subnormal: a multiple of 2^-24
      const float scaled = std::nearbyintf(__uint_as_float(size) * 0x1p24f);
      return {uint16_t(sign | unsigned(scaled))};
    }
    return {uint16_t(sign | ((size - 0x38000000u + 0xfffu + (size >> 13 & 1)) >> 13))};
#endif
  }
  static __device__ __forceinline__ Half nearest(double x) { return nearest(float(x)); }
};

// The neighbour of x in the direction of zero; x is neither zero nor a NaN.
__device__ __forceinline__ float step_down(float x) {
  return __uint_as_float(__float_as_uint(x) - 1);
}
__device__ __forceinline__ double step_down(double x) {
  return __longlong_as_double(__double_as_longlong(x) - 1);
}
__device__ __forceinline__ Half step_down(Half x) { return {uint16_t(x.bits - 1)}; }
__device__ __forceinline__ BFloat16 step_down(BFloat16 x) { return {uint16_t(x.bits - 1)}; }

// The neighbour of x away from zero; x is neither zero nor infinite nor a NaN.
__device__ __forceinline__ float step_up(float x) {
  return __uint_as_float(__float_as_uint(x) + 1);
}
__device__ __forceinline__ double step_up(double x) {
  return __longlong_as_double(__double_as_longlong(x) + 1);
}
__device__ __forceinline__ Half step_up(Half x) { return {uint16_t(x.bits + 1)}; }
__device__ __forceinline__ BFloat16 step_up(BFloat16 x) { return {uint16_t(x.bits + 1)}; }

#ifdef __CUDACC__
__device__ __forceinline__ uint16_t bfloat16_toward_zero(float x) {
  uint16_t bits;
  asm("cvt.rz.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
#endif

// The largest T that is no larger in magnitude than x: |result| <= |x|.
template <class T, class A>
__device__ __forceinline__ T toward_zero(A x) {
#ifdef __CUDACC__  // one instruction, where there is one
  if constexpr (std::is_same_v<T, Half> && std::is_same_v<A, float>)
    return {__half_as_ushort(__float2half_rz(x))};
  else if constexpr (std::is_same_v<T, BFloat16> && std::is_same_v<A, float>)
    return {bfloat16_toward_zero(x)};
  else if constexpr (std::is_same_v<T, float> && std::is_same_v<A, double>)
    return __double2float_rz(x);
  else if constexpr (std::is_same_v<T, A>)
    return x;
#endif
  const T near = Round<T>::nearest(x);
  return magnitude(A(widen(near))) > magnitude(x) ? step_down(near) : near;
}

// The T next to x in the direction of `to`.
template <class T>
__device__ __forceinline__ T step_toward(T x, double to) {
  const double value = double(widen(x));
  if (value == to) return x;
  if (value == 0) {  // the smallest magnitude with the sign of `to`
    T least = T();
    if constexpr (sizeof(T) == 2)
      least.bits = uint16_t(to < 0 ? 0x8001 : 1);
    else if constexpr (sizeof(T) == 4)
      least = __uint_as_float(to < 0 ? 0x80000001u : 1u);
    else
      least = __longlong_as_double((to < 0 ? (long long)(1ull << 63) : 0ll) + 1);
    return least;
  }
  return (to < value) == (value > 0) ? step_down(x) : step_up(x);
}

// ---- Vectors of elements
// ---------------------------------------------------------------------------

// kCount elements as one aligned load or store of up to 16 bytes each.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Pack {
  T at[kCount];
};

template <class T, int kCount, class A>
__device__ __forceinline__ void load_pack(const void* p, A (&out)[kCount]) {
  constexpr int kPiece = 16 / int(sizeof(T)) < kCount ? 16 / int(sizeof(T)) : kCount;
#pragma unroll
  for (int i = 0; i < kCount; i += kPiece) {
    const auto pack = reinterpret_cast<const Pack<T, kPiece>*>(p)[i / kPiece];
#pragma unroll
    for (int j = 0; j < kPiece; ++j) out[i + j] = A(widen(pack.at[j]));
  }
}

// Calls f(type_tag) with the element type that a Dtype stands for.
template <class F>
__device__ __forceinline__ auto for_type(Dtype type, const F& f) {
  switch (type) {
    case Dtype::f32:
      return f(float{});
    case Dtype::f64:
      return f(double{});
    case Dtype::f16:
      return f(Half{});
    default:
      return f(BFloat16{});
  }
}

// The same for a type that is only known at run time; p is aligned for it.
template <int kCount, class A>
__device__ __forceinline__ void load_pack(const void* p, Dtype type, A (&out)[kCount]) {
  for_type(type, [&](auto tag) { load_pack<decltype(tag)>(p, out); });
}

template <class A>
__device__ __forceinline__ A load_one(const void* p, Dtype type, int64_t i) {
  return for_type(type,
                  [&](auto tag) { return A(widen(static_cast<const decltype(tag)*>(p)[i])); });
}

__device__ __forceinline__ void store_one(void* data, Dtype type, int64_t at, double value) {
  for_type(type, [&](auto tag) {
    using T = decltype(tag);
    static_cast<T*>(data)[at] = Round<T>::nearest(value);
  });
}

// The value of one group.
__device__ __forceinline__ double value_of(const PerGroup& p, int64_t group) {
  return p.values ? load_one<double>(p.values, p.dtype, p.broadcast ? 0 : group) : p.value;
}

}  // namespace embattle::cuda
