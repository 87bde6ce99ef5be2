// Kernels with one fault each, or none: the emulator has to tell which. An executable that runs the
// case named on its command line in one order, prints what the emulator said, and exits with 0 if
// it said nothing.
#include <cuda_runtime.h>

#include <cstdlib>
#include <memory>
#include <vector>

namespace {

constexpr unsigned kAll = 0xffffffffu;

// Sums 256 numbers, with or without the barrier between the warps' part and the first warp's.
template <bool kBarrier>
__device__ void sum_block(const float* in, float* out, float* part) {
  float v = in[threadIdx.x];
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(kAll, v, o);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
  if (kBarrier) __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0;
    for (int i = 0; i < 8; ++i) total += part[i];
    *out = total;
  }
}

__global__ void good(const float* in, float* out) {
  __shared__ float part[8];
  sum_block<true>(in, out, part);
}

__global__ void missing_barrier(const float* in, float* out) {
  __shared__ float part[8];
  sum_block<false>(in, out, part);
}

// The second round's writes overtake the first round's reads.
__global__ void missing_barrier_after_reading(const float* in, float* out) {
  __shared__ float part[256];
  float v = in[threadIdx.x];
  for (int round = 0; round < 2; ++round) {
    part[threadIdx.x] = v;
    __syncthreads();
    v += part[255 - threadIdx.x];
  }
  out[threadIdx.x] = v;
}

__global__ void missing_syncwarp(const float* in, float* out) {
  float* part = reinterpret_cast<float*>(emu::dynamic_shared());
  part[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = part[threadIdx.x ^ 1];
}

__global__ void syncwarp(const float* in, float* out) {
  float* part = reinterpret_cast<float*>(emu::dynamic_shared());
  part[threadIdx.x] = in[threadIdx.x];
  __syncwarp();
  out[threadIdx.x] = part[threadIdx.x ^ 1];
}

__global__ void divergent_barrier(const float* in, float* out) {
  if (threadIdx.x < 100) __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
}

__global__ void divergent_shuffle(const float* in, float* out) {
  float v = in[threadIdx.x];
  if (threadIdx.x % 32 < 16) v = __shfl_xor_sync(kAll, v, 1);
  out[threadIdx.x] = v;
}

__global__ void shuffle_outside_mask(const float* in, float* out) {
  float v = in[threadIdx.x];
  if (threadIdx.x % 32 < 16) v = __shfl_sync(0xffffu, v, 20);
  out[threadIdx.x] = v;
}

__global__ void half_warps(const float* in, float* out) {
  const unsigned mask = threadIdx.x % 32 < 16 ? 0xffffu : 0xffff0000u;
  float v = in[threadIdx.x];
  for (int o = 8; o; o >>= 1) v += __shfl_xor_sync(mask, v, o, 16);
  if (threadIdx.x == 0) *out = v;
}

__global__ void unwritten_shared(const float* in, float* out) {
  float* part = reinterpret_cast<float*>(emu::dynamic_shared());
  if (threadIdx.x) part[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = part[threadIdx.x];
}

__global__ void unwritten_static(const float* in, float* out) {
  __shared__ float part[256];
  if (threadIdx.x && blockIdx.x == 0) part[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  if (threadIdx.x) out[threadIdx.x] = part[threadIdx.x];  // block 1 sees what block 0 left, or not
}

__global__ void shared_out_of_bounds(const float* in, float* out) {
  float* part = reinterpret_cast<float*>(emu::dynamic_shared());
  part[threadIdx.x + 1] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = part[threadIdx.x + 1];
}

__global__ void global_out_of_bounds(const float* in, float* out) {
  out[threadIdx.x] = in[threadIdx.x + 1];
}

__global__ void async_without_wait(const float* in, float* out) {
  float* part = reinterpret_cast<float*>(emu::dynamic_shared());
  emu::async_copy(part + threadIdx.x, in + threadIdx.x, 4);
  const float v = part[threadIdx.x];
  emu::async_wait();
  out[threadIdx.x] = v;
}

__global__ void cluster_sum(const float* in, float* out) {
  float* part = reinterpret_cast<float*>(emu::dynamic_shared());
  part[threadIdx.x] = in[threadIdx.x];
  emu::cluster_barrier();
  float total = 0;
  for (unsigned r = 0; r < emu::cluster_size(); ++r)
    total += static_cast<float*>(emu::map_shared_rank(part, r))[threadIdx.x];
  if (emu::cluster_rank() == 0) out[threadIdx.x] = total;
  emu::cluster_barrier();  // nobody leaves while others still read
}

__global__ void cluster_leaves_early(const float* in, float* out) {
  float* part = reinterpret_cast<float*>(emu::dynamic_shared());
  part[threadIdx.x] = in[threadIdx.x];
  emu::cluster_barrier();
  if (emu::cluster_rank() == 0) return;
  out[threadIdx.x] = *static_cast<float*>(emu::map_shared_rank(part, 0));
}

__global__ void cluster_missing_barrier(const float* in, float* out) {
  float* part = reinterpret_cast<float*>(emu::dynamic_shared());
  part[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] =
      static_cast<float*>(emu::map_shared_rank(part, emu::cluster_rank() ^ 1))[threadIdx.x];
  emu::cluster_barrier();
}

__global__ void grid_barrier(unsigned* arrived, float* out) {
  __syncthreads();
  if (threadIdx.x == 0) {
    atomicAdd(arrived, 1u);
    while (*static_cast<volatile unsigned*>(arrived) < gridDim.x) __nanosleep(32);
  }
  __syncthreads();
  out[threadIdx.x] = float(*arrived);
}

// Every block brings a number and adds up those of all; out[0] becomes the smallest of the sums.
template <bool kBarrier>
__device__ void sum_grid(float* out) {
  float* const numbers = out + 1;
  float* const sums = numbers + gridDim.x;
  if (threadIdx.x == 0) numbers[blockIdx.x] = float(blockIdx.x + 1);
  if (kBarrier) emu::grid_barrier();
  if (threadIdx.x == 0) {
    sums[blockIdx.x] = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) sums[blockIdx.x] += numbers[b];
  }
  emu::grid_barrier();
  if (threadIdx.x != 0 || blockIdx.x != 0) return;
  *out = sums[0];
  for (unsigned b = 1; b < gridDim.x; ++b) *out = std::min(*out, sums[b]);
}

__global__ void grid_sum(const float*, float* out) { sum_grid<true>(out); }
__global__ void missing_grid_barrier(const float*, float* out) { sum_grid<false>(out); }

// A grid barrier orders what a block does with its shared memory, too.
__global__ void grid_barrier_orders_shared(const float* in, float* out) {
  float* part = reinterpret_cast<float*>(emu::dynamic_shared());
  part[threadIdx.x] = in[threadIdx.x];
  emu::grid_barrier();
  out[threadIdx.x] = part[63 - threadIdx.x];
}

__global__ void block_leaves_before_grid_barrier(const float*, float*) {
  if (blockIdx.x == 1) return;
  emu::grid_barrier();
}

__global__ void thread_leaves_before_grid_barrier(const float*, float*) {
  if (blockIdx.x == 1 && threadIdx.x == 5) return;
  emu::grid_barrier();
}

__global__ void mixed_barriers(const float*, float*) {
  if (threadIdx.x < 32)
    emu::grid_barrier();
  else
    __syncthreads();
}

struct Case {
  const char* name;
  unsigned threads, grid, cluster;
  size_t shared;
  bool cooperative;
  void (*kernel)(const float*, float*);
};

const Case cases[] = {
    {"good", 256, 3, 1, 0, false, good},
    {"half_warps", 32, 1, 1, 0, false, half_warps},
    {"syncwarp", 64, 1, 1, 256, false, syncwarp},
    {"cluster_sum", 64, 4, 4, 256, false, cluster_sum},
    {"missing_barrier", 256, 1, 1, 0, false, missing_barrier},
    {"missing_barrier_after_reading", 256, 1, 1, 0, false, missing_barrier_after_reading},
    {"missing_syncwarp", 64, 1, 1, 256, false, missing_syncwarp},
    {"divergent_barrier", 256, 1, 1, 0, false, divergent_barrier},
    {"divergent_shuffle", 64, 1, 1, 0, false, divergent_shuffle},
    {"shuffle_outside_mask", 64, 1, 1, 0, false, shuffle_outside_mask},
    {"unwritten_shared", 64, 1, 1, 256, false, unwritten_shared},
    {"unwritten_static", 256, 2, 1, 0, false, unwritten_static},
    {"shared_out_of_bounds", 64, 1, 1, 256, false, shared_out_of_bounds},
    {"global_out_of_bounds", 256, 1, 1, 0, false, global_out_of_bounds},
    {"async_without_wait", 64, 1, 1, 256, false, async_without_wait},
    {"cluster_leaves_early", 64, 2, 2, 256, false, cluster_leaves_early},
    {"cluster_missing_barrier", 64, 2, 2, 256, false, cluster_missing_barrier},
    {"grid_sum", 64, 4, 1, 0, true, grid_sum},
    {"grid_barrier_orders_shared", 64, 3, 1, 256, true, grid_barrier_orders_shared},
    {"missing_grid_barrier", 64, 4, 1, 0, true, missing_grid_barrier},
    {"block_leaves_before_grid_barrier", 64, 3, 1, 0, true, block_leaves_before_grid_barrier},
    {"thread_leaves_before_grid_barrier", 64, 3, 1, 0, true, thread_leaves_before_grid_barrier},
    {"mixed_barriers", 64, 3, 1, 0, true, mixed_barriers},
    {"grid_barrier_not_cooperative", 64, 4, 1, 0, false, grid_sum},
    {"too_many_threads", 1025, 1, 1, 0, false, good},
    {"too_much_shared", 256, 1, 1, 64 << 10, false, good},
    {"does_not_fit", 256, 1000, 1, 0, true, good},
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const std::string name = argv[1], order = argv[2];
  if (order == "forward")
    emu::set_order(emu::Order::forward, 0);
  else if (order == "reverse")
    emu::set_order(emu::Order::reverse, 0);
  else
    emu::set_order(emu::Order::random, unsigned(std::atoi(order.c_str())));
  // Exactly as long as needed: AddressSanitizer sees the first element beyond.
  auto in = std::make_unique<float[]>(256), out = std::make_unique<float[]>(256);
  for (int i = 0; i < 256; ++i) in[i] = float(i + 1), out[i] = 0;
  if (name == "grid_barrier") {
    unsigned arrived = 0;
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    cudaLaunchConfig_t config;
    config.gridDim = 3;
    config.blockDim = 64;
    config.attrs = &attribute;
    config.numAttrs = 1;
    cudaLaunchKernelEx(&config, grid_barrier, &arrived, out.get());
  }
  for (const Case& c : cases) {
    if (name != c.name) continue;
    cudaLaunchAttribute attributes[2];
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {c.cluster, 1, 1};
    attributes[1].id = cudaLaunchAttributeCooperative;
    attributes[1].val.cooperative = c.cooperative;
    cudaLaunchConfig_t config;
    config.gridDim = c.grid;
    config.blockDim = c.threads;
    config.dynamicSmemBytes = c.shared;
    config.attrs = attributes;
    config.numAttrs = 2;
    cudaLaunchKernelEx(&config, c.kernel, static_cast<const float*>(in.get()), out.get());
  }
  const bool ok = cudaPeekAtLastError() == cudaSuccess;
  const std::string error = emu::take_error();
  std::printf("%g %s\n", double(out[0]), error.c_str());
  return ok && error.empty() ? 0 : 1;
}
