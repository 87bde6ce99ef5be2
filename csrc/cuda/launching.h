// Host side of every kernel: what the device has, enqueueing, element types.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "number.cuh"

namespace embattle::cuda {

struct Limits {
  int device = 0;
  int multiprocessors = 1, shared_per_block = 0, shared_per_multiprocessor = 0;
  int cooperative = 0;  // whether there are cooperative launches

  static cudaError_t of_current_device(Limits* limits) {
    cudaError_t error = cudaGetDevice(&limits->device);
    const auto ask = [&](int* value, cudaDeviceAttr attribute) {
      if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, limits->device);
    };
    ask(&limits->multiprocessors, cudaDevAttrMultiProcessorCount);
    ask(&limits->shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    ask(&limits->shared_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    ask(&limits->cooperative, cudaDevAttrCooperativeLaunch);
    return error;
  }
};

// Which blocks of a launch can wait for each other.
struct Meeting {
  int cluster = 1;    // so many in a cluster
  bool grid = false;  // all: a cooperative launch, every block resident
};

// Whether a kernel has cluster operations. What it was compiled for decides, not the device: code
// for an older architecture, translated when it is loaded, has none (device.cuh).
template <class... Params>
cudaError_t has_clusters(void (*kernel)(Params...), bool* clusters) {
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  *clusters = error == cudaSuccess && attributes.ptxVersion >= 90 && attributes.binaryVersion >= 90;
  return error;
}

// Lets a kernel have all the dynamic shared memory that a block may opt in to. Always the same
// number: host threads that launch one kernel with more and with less cannot take it from each
// other, nor a later call from a graph that was captured and is not yet instantiated.
template <class... Params>
cudaError_t allow_shared(void (*kernel)(Params...)) {
  int device = 0, most = 0;
  cudaFuncAttributes attributes{};
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              most - int(attributes.sharedSizeBytes));
}

// Enqueues a kernel on the context's stream. Nothing where there are no blocks; grids are cut off
// at the most that a device takes, so kernels go on in strides of the grid.
template <class... Params, class... Args>
cudaError_t enqueue(void (*kernel)(Params...), int64_t blocks, int threads, size_t shared,
                    const Context& context, Meeting meeting, const Args&... args) {
  if (blocks <= 0) return cudaSuccess;
  if (shared > (48 << 10)) {
    const cudaError_t error = allow_shared(kernel);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(std::min<int64_t>(blocks, (int64_t(1) << 31) - 1)));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(context.stream);
  cudaLaunchAttribute attributes[2];
  if (meeting.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = unsigned(meeting.cluster);
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
  }
  if (meeting.grid) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  config.attrs = attributes;
  // What it returns is this launch's error; the last error may be one of others.
  return cudaLaunchKernelEx(&config, kernel, Params(args)...);
}
template <class... Params, class... Args>
cudaError_t enqueue(void (*kernel)(Params...), int64_t blocks, int threads, size_t shared,
                    const Context& context, const Args&... args) {
  return enqueue(kernel, blocks, threads, shared, context, Meeting{}, args...);
}

// Calls f(type_tag) with the element type that a Dtype stands for.
template <class F>
auto with_type(Dtype type, F f) {
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

template <class F>
auto with_norm(Norm norm, F f) {
  switch (norm) {
    case Norm::l1:
      return f(std::integral_constant<Norm, Norm::l1>{});
    case Norm::l2:
      return f(std::integral_constant<Norm, Norm::l2>{});
    default:
      return f(std::integral_constant<Norm, Norm::linf>{});
  }
}

inline size_t rounded(size_t bytes) { return (bytes + 255) / 256 * 256; }

// The smallest power of two that is at least n, and at most `most`.
inline int power_of_two(int64_t n, int most) {
  int p = 1;
  while (p < most && p < n) p *= 2;
  return p;
}

}  // namespace embattle::cuda
