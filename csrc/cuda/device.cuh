// What the kernels need of the device beyond plain C++, each thing in two spellings: CUDA's, and
// that of the emulator in tests/emulator, which runs the same sources on the CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cooperative_groups.h>
#endif

// The block's dynamic shared memory, 16-byte aligned.
#ifdef __CUDACC__
#define EMBATTLE_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#else
#define EMBATTLE_DYNAMIC_SHARED(name) unsigned char* const name = emu::dynamic_shared()
#endif

#ifdef __CUDACC__
#define EMBATTLE_NOINLINE __noinline__
#else
#define EMBATTLE_NOINLINE __attribute__((noinline))
#endif

namespace embattle::cuda {

// Copies kBytes (4, 8 or 16, both ends aligned to it) to shared memory in the background; visible
// to this thread after async_wait(), to the block after a barrier behind that.
template <int kBytes>
__device__ __forceinline__ void async_copy(void* shared, const void* global) {
#ifdef __CUDACC__
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(kBytes)
                 : "memory");
#else
  emu::async_copy(shared, global, kBytes);
#endif
}

__device__ __forceinline__ void async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_all;" ::: "memory");
#else
  emu::async_wait();
#endif
}

// Writes 16 bytes to global memory at once; both ends are aligned to that. Plain assignments next
// to a scalar version of the same store are merged with it by the compiler, and split.
__device__ __forceinline__ void store_16(void* global, const void* from) {
#ifdef __CUDACC__
  const uint4 v = *static_cast<const uint4*>(from);
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(global)),
               "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
#else
  std::memcpy(global, from, 16);
#endif
}

// Every thread of every block of the cluster, memory included. Clusters need compute
// capability 9.0: launchers never ask for one below.
__device__ __forceinline__ void cluster_sync() {
#if !defined(__CUDACC__)
  emu::cluster_barrier();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#endif
}

// Where block `rank` of the cluster has what this block has at p.
template <class T>
__device__ __forceinline__ T* in_block(T* p, unsigned rank) {
#if !defined(__CUDACC__)
  return static_cast<T*>(emu::map_shared_rank(p, rank));
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(p, rank);
#else
  return p;
#endif
}

// Every thread of every block of a cooperative launch, memory included.
__device__ __forceinline__ void grid_sync() {
#ifdef __CUDACC__
  cooperative_groups::this_grid().sync();
#else
  emu::grid_barrier();
#endif
}

// A barrier among `blocks` blocks of a cooperative launch, through a counter in global memory that
// starts at 0 and only grows. `round` counts the barriers from 1. All threads of the blocks call
// it.
__device__ __forceinline__ void blocks_sync(unsigned* counter, unsigned blocks, unsigned round) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(counter, 1u);
    while (*static_cast<volatile unsigned*>(counter) < blocks * round) __nanosleep(32);
    __threadfence();
  }
  __syncthreads();
}

// a * b rounded towards zero.
__device__ __forceinline__ float mul_toward_zero(float a, float b) {
#ifdef __CUDACC__
  return __fmul_rz(a, b);
#else
  const double exact = double(a) * double(b);
  const float near = float(exact);
  return std::fabs(double(near)) > std::fabs(exact) ? std::nextafterf(near, 0.f) : near;
#endif
}
__device__ __forceinline__ double mul_toward_zero(double a, double b) {
#ifdef __CUDACC__
  return __dmul_rz(a, b);
#else
  const double near = a * b, rest = std::fma(a, b, -near);
  return near != 0 && rest != 0 && (near > 0) == (rest < 0) ? std::nextafter(near, 0.0) : near;
#endif
}

// sin(pi x) and cos(pi x).
template <class A>
__device__ __forceinline__ void sin_cos_pi(A x, A* s, A* c) {
#ifndef __CUDACC__
  const long double angle = 3.14159265358979323846264338327950288L * x;
  *s = A(std::sin(angle));
  *c = A(std::cos(angle));
#else
  if constexpr (sizeof(A) == 4)
    sincospif(x, s, c);
  else
    sincospi(x, s, c);
#endif
}

__device__ __forceinline__ float fused(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return fma(a, b, c); }

// a * b rounded by itself: never fused with what it is added to.
__device__ __forceinline__ double product(double a, double b) {
#ifdef __CUDACC__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

template <class T>
__device__ __forceinline__ T larger(T a, T b) {
  return b > a ? b : a;
}
template <class T>
__device__ __forceinline__ T smaller(T a, T b) {
  return b < a ? b : a;
}
// Without its sign, that of a zero too: the bits of magnitudes are compared.
__device__ __forceinline__ float magnitude(float x) { return fabsf(x); }
__device__ __forceinline__ double magnitude(double x) { return fabs(x); }
template <class T>
__device__ __forceinline__ bool is_finite(T x) {
  return x - x == 0;
}

}  // namespace embattle::cuda
