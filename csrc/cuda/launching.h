// Host side of every kernel: what the device has, enqueueing, element types.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "number.cuh"

namespace embattle::cuda {

inline size_t rounded(size_t bytes) { return (bytes + 255) / 256 * 256; }

struct Grid {
  int64_t blocks = 0;
  int threads = 0;
  size_t shared = 0;         // bytes of dynamic shared memory
  int cluster = 1;           // so many blocks can wait for each other
  bool cooperative = false;  // all can, and every block is resident
};

// An array of the workspace: where to write down its place (null, if it is empty), and its length.
template <class T>
struct Array {
  T** place;
  int64_t count;

  size_t bytes() const { return size_t(count) * sizeof(T); }
  void put(void* memory) const {
    if (count) *place = static_cast<T*>(memory);
  }
};

// What an op enqueues, in order. After an error nothing more is enqueued, and error() tells it.
class Queue {
 public:
  explicit Queue(const Context& context) : context_(context) {}

  cudaError_t error() const { return error_; }
  cudaStream_t stream() const { return static_cast<cudaStream_t>(context_.stream); }
  // Takes what the runtime says of a call.
  void note(cudaError_t error) {
    if (error_ == cudaSuccess) error_ = error;
  }

  // What the current device has.
  int device(cudaDeviceAttr attribute) {
    int device = 0, value = 0;
    note(cudaGetDevice(&device));
    note(cudaDeviceGetAttribute(&value, attribute, device));
    return value;
  }

  // Whether a kernel has cluster operations. What it was compiled for decides, not the device: code
  // for an older architecture, translated when it is loaded, has none (device.cuh).
  template <class... Params>
  bool has_clusters(void (*kernel)(Params...)) {
    cudaFuncAttributes attributes{};
    note(cudaFuncGetAttributes(&attributes, kernel));
    return attributes.ptxVersion >= 90 && attributes.binaryVersion >= 90;
  }

  // Makes room for all arrays in the workspace; called once.
  template <class... T>
  void allocate(const Array<T>&... arrays) {
    size_t end = 0;
    const auto next = [&](size_t bytes) {
      const size_t begin = rounded(end);
      end = begin + bytes;
      return begin;
    };
    (next(arrays.bytes()), ...);
    if (error_ != cudaSuccess || end == 0) return;
    auto* const memory = static_cast<unsigned char*>(context_.allocate(context_.self, end));
    if (!memory) return note(cudaErrorMemoryAllocation);
    end = 0;
    (arrays.put(memory + next(arrays.bytes())), ...);
  }

  // Sets all bits to zero.
  void clear(void* memory, size_t bytes) {
    if (error_ == cudaSuccess && bytes) note(cudaMemsetAsync(memory, 0, bytes, stream()));
  }

  // Enqueues a kernel. Nothing where there are no blocks; grids are cut off at the most that a
  // device takes, so kernels go on in strides of the grid.
  template <class... Params, class... Args>
  void launch(void (*kernel)(Params...), const Grid& grid, const Args&... args) {
    if (grid.blocks <= 0) return;
    if (grid.shared > (48 << 10)) allow_shared(kernel);
    if (error_ != cudaSuccess) return;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(std::min<int64_t>(grid.blocks, (int64_t(1) << 31) - 1)));
    config.blockDim = dim3(unsigned(grid.threads));
    config.dynamicSmemBytes = grid.shared;
    config.stream = stream();
    cudaLaunchAttribute attributes[2];
    if (grid.cluster > 1) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {unsigned(grid.cluster), 1, 1};
    }
    if (grid.cooperative) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    }
    config.attrs = attributes;
    // What it returns is this launch's error; the last error may be one of others.
    note(cudaLaunchKernelEx(&config, kernel, Params(args)...));
  }

 private:
  // Lets a kernel have all the dynamic shared memory that a block may opt in to. Always the same
  // number: host threads that launch one kernel with more and with less cannot take it from each
  // other, nor a later call from a graph that was captured and is not yet instantiated.
  template <class... Params>
  void allow_shared(void (*kernel)(Params...)) {
    cudaFuncAttributes attributes{};
    note(cudaFuncGetAttributes(&attributes, kernel));
    const int most = device(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    if (error_ == cudaSuccess)
      note(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                most - int(attributes.sharedSizeBytes)));
  }

  const Context& context_;
  cudaError_t error_ = cudaSuccess;
};

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

// The smallest power of two that is at least n, and at most `most`.
inline int power_of_two(int64_t n, int most) {
  int p = 1;
  while (p < most && p < n) p *= 2;
  return p;
}

}  // namespace embattle::cuda
