// The part of <cuda_runtime.h> that the kernels in csrc/cuda use, for a machine without a GPU: put
// this folder first on the include path and compile the .cu files as C++. See emulator.h for what
// is checked.
//
// Sources that are to run both ways
//   - launch with cudaLaunchKernelEx, never with <<<>>>;
//   - take dynamic shared memory, clusters and asynchronous copies through csrc/cuda/device.cuh.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <unordered_map>

#include "emulator.h"
#include "trace.h"

#define EMBATTLE_EMULATOR 1

// ---- Keywords
// --------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
// One instance per process, which is one per block as blocks with static shared memory run one
// after another. The section gives the emulator its bounds, to poison and to watch. (GCC refuses
// such a variable inside a template: kernels that are templates use dynamic shared memory.)
#define __shared__ static __attribute__((section("emu_shared")))

// ---- Types
// -----------------------------------------------------------------------------------------

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(16) longlong2 {
  long long x, y;
};

// ---- Built-in variables
// ----------------------------------------------------------------------------

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// ---- Barriers and warp operations
// ------------------------------------------------------------------

inline void __syncthreads() { emu::block_barrier(); }
inline int __syncthreads_count(int predicate) {
  return int(emu::block_barrier_count(predicate != 0));
}
inline int __syncthreads_or(int predicate) { return emu::block_barrier_count(predicate != 0) != 0; }
inline int __syncthreads_and(int predicate) {
  return emu::block_barrier_count(predicate == 0) == 0;
}
inline void __syncwarp(unsigned mask = ~0u) { emu::warp_barrier(mask); }

namespace emu {
template <class T>
T exchange_value(unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  word = exchange(mask, word, source);
  std::memcpy(&value, &word, sizeof value);
  return value;
}
}  // namespace emu

// As on the device, a source beyond the (sub)warp leaves the value as it is (up, down, xor).
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return emu::exchange_value(mask, value,
                             (emu::lane() & ~(width - 1u)) | (unsigned(source) & (width - 1u)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const unsigned self = emu::lane(), other = self ^ unsigned(bits);
  return emu::exchange_value(mask, value, other < (self & ~(width - 1u)) + width ? other : self);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const unsigned self = emu::lane();
  return emu::exchange_value(mask, value,
                             (self & (width - 1u)) + by < unsigned(width) ? self + by : self);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const unsigned self = emu::lane();
  return emu::exchange_value(mask, value, (self & (width - 1u)) >= by ? self - by : self);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return emu::ballot(mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) {
  return emu::ballot(mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return emu::ballot(mask, predicate == 0) == 0;
}

// ---- Memory
// ----------------------------------------------------------------------------------------

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T value) {
  *p = value;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { emu::spin(); }

// Not watched for races: that is what they are for.
#define EMU_UNWATCHED __attribute__((no_sanitize("thread"), noinline))
template <class T>
EMU_UNWATCHED T atomicAdd(T* p, T value) {
  static_assert(std::is_integral_v<T>, "float atomics depend on the order of threads");
  emu::atomic_access(p, sizeof(T));
  const T old = *p;
  *p = old + value;
  return old;
}
template <class T>
EMU_UNWATCHED T atomicMax(T* p, T value) {
  static_assert(std::is_integral_v<T>);
  emu::atomic_access(p, sizeof(T));
  const T old = *p;
  if (value > old) *p = value;
  return old;
}
template <class T>
EMU_UNWATCHED T atomicCAS(T* p, T expected, T value) {
  static_assert(std::is_integral_v<T>);
  emu::atomic_access(p, sizeof(T));
  const T old = *p;
  if (old == expected) *p = value;
  return old;
}

// ---- Arithmetic
// ------------------------------------------------------------------------------------

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
inline float __uint_as_float(unsigned x) {
  float f;
  std::memcpy(&f, &x, 4);
  return f;
}
inline unsigned __float_as_uint(float f) {
  unsigned x;
  std::memcpy(&x, &f, 4);
  return x;
}
inline double __longlong_as_double(long long x) {
  double d;
  std::memcpy(&d, &x, 8);
  return d;
}
inline long long __double_as_longlong(double d) {
  long long x;
  std::memcpy(&x, &d, 8);
  return x;
}

// ---- Host side
// -------------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorLaunchFailure = 719,
  cudaErrorStreamCaptureUnsupported = 900,
};
using cudaStream_t = void*;

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
  }
  return "unknown error";
}

enum cudaLaunchAttributeID {
  cudaLaunchAttributeCooperative = 2,
  cudaLaunchAttributeClusterDimension = 4,
};
struct cudaLaunchAttributeValue {
  int cooperative = 0;
  struct {
    unsigned x = 1, y = 1, z = 1;
  } clusterDim;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id = cudaLaunchAttributeCooperative;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 13,
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrCooperativeLaunch = 95,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

struct cudaFuncAttributes {
  size_t sharedSizeBytes = 0;
  int ptxVersion = 0, binaryVersion = 0;
};

namespace emu {
inline std::unordered_map<const void*, size_t> shared_limits;  // by kernel
inline cudaError_t last_error = cudaSuccess;
inline cudaError_t record(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}
}  // namespace emu

inline cudaError_t cudaPeekAtLastError() { return emu::last_error; }
inline cudaError_t cudaGetLastError() {
  const cudaError_t error = emu::last_error;
  emu::last_error = cudaSuccess;
  return error;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  return emu::record(device == 0 ? cudaSuccess : cudaErrorInvalidValue);
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return emu::record(cudaErrorInvalidValue);
  const emu::Device& d = emu::device();
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = d.multiprocessors;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = d.capability_major;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = d.capability_minor;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = d.shared_per_multiprocessor;
      break;
    case cudaDevAttrCooperativeLaunch:
      *value = d.cooperative;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = d.shared_per_block;
      break;
  }
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value > emu::device().shared_per_block) return emu::record(cudaErrorInvalidValue);
    size_t& limit = emu::shared_limits[reinterpret_cast<const void*>(kernel)];
    emu::counters().lowered_limits += size_t(value) < limit;
    limit = size_t(value);
  }
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  const emu::Device& d = emu::device();
  attributes->binaryVersion = 10 * d.capability_major + d.capability_minor;
  attributes->ptxVersion = d.code ? d.code : attributes->binaryVersion;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int threads,
                                                          size_t dynamic_shared) {
  *blocks = int(emu::blocks_at_once(unsigned(threads), dynamic_shared));
  return cudaSuccess;
}
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0, cudaStreamCaptureStatusActive = 1 };
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t size, cudaStream_t) {
  std::memset(p, value, size);
  emu::trace_memset(size);
  return cudaSuccess;
}

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
  auto call = [&] { kernel(static_cast<Params>(args)...); };
  emu::Launch launch;
  launch.grid = {config->gridDim.x, config->gridDim.y, config->gridDim.z};
  launch.block = {config->blockDim.x, config->blockDim.y, config->blockDim.z};
  launch.dynamic_shared = config->dynamicSmemBytes;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& a = config->attrs[i];
    if (a.id == cudaLaunchAttributeCooperative) launch.cooperative = a.val.cooperative != 0;
    if (a.id == cudaLaunchAttributeClusterDimension)
      launch.cluster = {a.val.clusterDim.x, a.val.clusterDim.y, a.val.clusterDim.z};
  }
  const auto& limits = emu::shared_limits;
  if (auto found = limits.find(reinterpret_cast<const void*>(kernel)); found != limits.end())
    launch.shared_limit = std::max(launch.shared_limit, found->second);
  launch.body = [](void* context) { (*static_cast<decltype(call)*>(context))(); };
  launch.context = &call;
  launch.kernel = reinterpret_cast<const void*>(kernel);
  return emu::record(emu::run(launch) ? cudaSuccess : cudaErrorLaunchFailure);
}
