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
constexpr Dtype dtype_of = std::is_same_v<T, double>     ? Dtype::f64
                           : std::is_same_v<T, Half>     ? Dtype::f16
                           : std::is_same_v<T, BFloat16> ? Dtype::bf16
                                                         : Dtype::f32;

__host__ __device__ inline int bytes_of(Dtype t) {
  return t == Dtype::f64 ? 8 : t == Dtype::f32 ? 4 : 2;
}

// ---- From memory ----

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

// ---- To memory ----

__device__ __forceinline__ BFloat16 to_bfloat16(float x) {
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
__device__ __forceinline__ Half to_half(float x) {
#ifdef __CUDACC__
  return {__half_as_ushort(__float2half_rn(x))};
#else
  const unsigned bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (size >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // rounds to beyond the largest
  if (size < 0x38800000u) {                                    // subnormal: a multiple of 2^-24
    const float scaled = std::nearbyintf(__uint_as_float(size) * 0x1p24f);
    return {uint16_t(sign | unsigned(scaled))};
  }
  return {uint16_t(sign | ((size - 0x38000000u + 0xfffu + (size >> 13 & 1)) >> 13))};
#endif
}

// To the nearest, ties to even. From double by way of float where T is a half type, as torch does.
template <class T, class A>
__device__ __forceinline__ T nearest(A x) {
  if constexpr (std::is_same_v<T, BFloat16>)
    return to_bfloat16(float(x));
  else if constexpr (std::is_same_v<T, Half>)
    return to_half(float(x));
  else
    return T(x);
}

// ---- Neighbours ----

template <class T>
using Bits = std::conditional_t<sizeof(T) == 2, uint16_t,
                                std::conditional_t<sizeof(T) == 4, unsigned, unsigned long long>>;

template <class T>
__device__ __forceinline__ Bits<T> bits_of(T x) {
  if constexpr (sizeof(T) == 2)
    return x.bits;
  else if constexpr (sizeof(T) == 4)
    return __float_as_uint(x);
  else
    return Bits<T>(__double_as_longlong(x));
}
template <class T>
__device__ __forceinline__ T from_bits(Bits<T> bits) {
  if constexpr (sizeof(T) == 2)
    return {bits};
  else if constexpr (sizeof(T) == 4)
    return __uint_as_float(bits);
  else
    return __longlong_as_double((long long)bits);
}

// The neighbour of x away from zero (by = 1) or towards it (by = -1). x is neither zero nor a NaN,
// nor infinite where it is to go away.
template <class T>
__device__ __forceinline__ T neighbour(T x, int by) {
  return from_bits<T>(Bits<T>(bits_of(x) + Bits<T>(by)));
}

// The largest T that is no larger in magnitude than x: |result| <= |x|.
template <class T, class A>
__device__ __forceinline__ T toward_zero(A x) {
#ifdef __CUDACC__  // one instruction, where there is one
  if constexpr (std::is_same_v<T, Half> && std::is_same_v<A, float>)
    return {__half_as_ushort(__float2half_rz(x))};
  else if constexpr (std::is_same_v<T, float> && std::is_same_v<A, double>)
    return __double2float_rz(x);
  else if constexpr (std::is_same_v<T, A>)
    return x;
  if constexpr (std::is_same_v<T, BFloat16> && std::is_same_v<A, float>) {
    T near;
    asm("cvt.rz.bf16.f32 %0, %1;" : "=h"(near.bits) : "f"(x));
    return near;
  }
#endif
  const T near = nearest<T>(x);
  return magnitude(A(widen(near))) > magnitude(x) ? neighbour(near, -1) : near;
}

// The T next to x in the direction of `to`.
template <class T>
__device__ __forceinline__ T step_toward(T x, double to) {
  const double value = double(widen(x));
  if (value == to) return x;
  if (value == 0)  // the smallest magnitude with the sign of `to`
    return from_bits<T>(Bits<T>((to < 0 ? Bits<T>(1) << (8 * sizeof(T) - 1) : 0) + 1));
  return (to < value) == (value > 0) ? neighbour(x, -1) : neighbour(x, 1);
}

// ---- Types known at run time ----

// Calls f(type_tag) with the element type that a Dtype stands for: f is for the host or the device.
#pragma nv_exec_check_disable
template <class F>
__host__ __device__ __forceinline__ auto for_type(Dtype type, const F& f) {
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

template <class A>
__device__ __forceinline__ A load_one(const void* p, Dtype type, int64_t i) {
  return for_type(type, [&]<class T>(T) { return A(widen(static_cast<const T*>(p)[i])); });
}

__device__ __forceinline__ void store_one(void* data, Dtype type, int64_t at, double value) {
  for_type(type, [&]<class T>(T) { static_cast<T*>(data)[at] = nearest<T>(value); });
}

// The value of one group.
__device__ __forceinline__ double value_of(const PerGroup& p, int64_t group) {
  return p.values ? load_one<double>(p.values, p.dtype, p.broadcast ? 0 : group) : p.value;
}

// ---- Lengths ----

// The root of a sum of squares; squares(unit) gives it times unit^2. `wide`: squares may leave the
// range of doubles, as those of float64 do, and are then taken again in another unit.
template <class F>
__device__ __forceinline__ double length(bool wide, F squares) {
  const double sum = squares(1.0);
  if (!wide || (sum > 1e-280 && sum < 1e280)) return sqrt(sum);
  const double unit = sum < 1 ? 0x1p600 : 0x1p-600;
  return sqrt(squares(unit)) / unit;
}

// ---- Vectors of elements ----

// kCount elements, in registers or in memory that is aligned for accesses of up to 16 bytes.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Pack {
  T at[kCount];

  // Of these in one access.
  static constexpr int kPiece = 16 / int(sizeof(T)) < kCount ? 16 / int(sizeof(T)) : kCount;

  __device__ __forceinline__ T& operator[](int i) { return at[i]; }
  __device__ __forceinline__ const T& operator[](int i) const { return at[i]; }
};

template <class A, class T, int kCount>
__device__ __forceinline__ Pack<A, kCount> widened(const Pack<T, kCount>& x) {
  Pack<A, kCount> out;
#pragma unroll
  for (int i = 0; i < kCount; ++i) out[i] = A(widen(x[i]));
  return out;
}

template <class T, class A, int kCount>
__device__ __forceinline__ Pack<T, kCount> narrowed(const Pack<A, kCount>& x) {
  Pack<T, kCount> out;
#pragma unroll
  for (int i = 0; i < kCount; ++i) out[i] = nearest<T>(x[i]);
  return out;
}

// The pack at x, which is aligned for it.
template <int kCount, class T>
__device__ __forceinline__ Pack<T, kCount> load_pack(const T* x) {
  constexpr int kPiece = Pack<T, kCount>::kPiece;
  Pack<T, kCount> out;
#pragma unroll
  for (int i = 0; i < kCount; i += kPiece) {
    const auto piece = reinterpret_cast<const Pack<T, kPiece>*>(x)[i / kPiece];
#pragma unroll
    for (int j = 0; j < kPiece; ++j) out[i + j] = piece[j];
  }
  return out;
}

// The same of elements of a type that is only known at run time.
template <class A, int kCount>
__device__ __forceinline__ Pack<A, kCount> load_pack(const void* x, Dtype type) {
  return for_type(
      type, [&]<class T>(T) { return widened<A>(load_pack<kCount>(static_cast<const T*>(x))); });
}

// kGlobal: in global memory.
template <bool kGlobal = false, class T, int kCount>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, kCount>& values) {
  constexpr int kPiece = Pack<T, kCount>::kPiece;
#pragma unroll
  for (int i = 0; i < kCount; i += kPiece) {
    Pack<T, kPiece> piece;
#pragma unroll
    for (int j = 0; j < kPiece; ++j) piece[j] = values[i + j];
    if constexpr (kGlobal && sizeof piece == 16)
      store_16(to + i, &piece);
    else
      reinterpret_cast<Pack<T, kPiece>*>(to)[i / kPiece] = piece;
  }
}

}  // namespace embattle::cuda
