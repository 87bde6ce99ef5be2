// Kernels whose cost is known by counting, for tests of the emulator's counters. Each case runs one
// launch; a shared library, called by ctypes.
#include <vector>

#include "cuda/number.cuh"

namespace {

using embattle::cuda::Pack;

// Four floats a thread, of n.
__global__ void copy(const float* x, float* y, int n, int rounds) {
  for (int round = 0; round < rounds; ++round)
    for (int i = int(blockIdx.x * blockDim.x + threadIdx.x) * 4; i < n;
         i += int(gridDim.x * blockDim.x) * 4)
      *reinterpret_cast<Pack<float, 4>*>(y + i) = *reinterpret_cast<const Pack<float, 4>*>(x + i);
}

__global__ void strided(const float* x, float* y, int n, int stride) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) y[i] = x[i * stride];
}

// Each thread a word, or 8 or 16 bytes, of shared memory, `stride` apart.
template <class T>
__global__ void banked(const float*, float* y, int, int stride) {
  EMBATTLE_DYNAMIC_SHARED(memory);
  T* shared = reinterpret_cast<T*>(memory);
  shared[int(threadIdx.x) * stride] = T{};
  __syncthreads();
  y[threadIdx.x] = *reinterpret_cast<const float*>(&shared[int(threadIdx.x) * stride]);
}

// Lane l goes round l times: 31 requests, of 31, 30, ... lanes.
__global__ void uneven(const float* x, float* y, int, int) {
  float sum = 0;
  for (int i = 0; i < int(threadIdx.x % 32); ++i) sum += x[32 * i + int(threadIdx.x % 32)];
  y[threadIdx.x] = sum;
}

// Eight lanes work together and agree twice between two loads.
__global__ void teams(const float* x, float* y, int, int) {
  const unsigned mask = 0xffu << (threadIdx.x % 32 / 8 * 8);
  float sum = x[threadIdx.x];
  for (int by = 4; by; by /= 2) sum += __shfl_xor_sync(mask, sum, by);
  y[threadIdx.x] = sum + x[threadIdx.x + blockDim.x];
}

__global__ void staged(const float* x, float* y, int, int) {
  EMBATTLE_DYNAMIC_SHARED(memory);
  auto* shared = reinterpret_cast<Pack<float, 4>*>(memory);
  embattle::cuda::async_copy<16>(&shared[threadIdx.x], x + threadIdx.x * 4);
  embattle::cuda::async_wait();
  reinterpret_cast<Pack<float, 4>*>(y)[threadIdx.x] = shared[threadIdx.x];
}

using Kernel = void (*)(const float*, float*, int, int);

}  // namespace

// True if all went well. x is on the device, as y is.
extern "C" __attribute__((visibility("default"))) bool run(const char* name, unsigned grid,
                                                           unsigned threads, const float* x,
                                                           float* y, int n, int parameter) {
  const struct {
    const char* name;
    Kernel kernel;
  } cases[] = {{"copy", copy},
               {"strided", strided},
               {"words", banked<float>},
               {"pairs", banked<Pack<float, 2>>},
               {"quads", banked<Pack<float, 4>>},
               {"uneven", uneven},
               {"teams", teams},
               {"staged", staged}};
  for (const auto& c : cases) {
    if (std::strcmp(c.name, name) != 0) continue;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(grid);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = 48 << 10;
    return cudaLaunchKernelEx(&config, c.kernel, x, y, n, parameter) == cudaSuccess;
  }
  return false;
}
