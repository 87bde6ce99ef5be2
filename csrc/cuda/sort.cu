// Sorting a batch's indices: stable, so that equal keys keep the order of the batch.
//
// A few are sorted by one block in one launch; more by CUB, which is part of the toolkit.
#define CCCL_DISABLE_NVTX  // no ranges for profilers
#include <bit>
#include <cub/device/device_radix_sort.cuh>

#include "sort.cuh"

namespace embattle::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSmall = 2048;  // pairs that one block sorts in shared memory

__device__ __forceinline__ long long key_of(int64_t index) { return index < 0 ? kNoKey : index; }

__global__ void __launch_bounds__(kThreads)
    small_sort_kernel(const int64_t* indices, int count, int pairs, long long* keys,
                      int64_t* positions) {
  EMBATTLE_DYNAMIC_SHARED(shared);
  auto* const k = reinterpret_cast<long long*>(shared);
  int* const at = reinterpret_cast<int*>(k + pairs);
  sort_pairs(k, at, pairs, [&](int i) { return i < count ? key_of(indices[i]) : kNoKey; });
  for (int i = int(threadIdx.x); i < count; i += kThreads) {
    keys[i] = k[i];
    positions[i] = at[i];
  }
}

// What CUB sorts.
__global__ void __launch_bounds__(kThreads)
    pairs_kernel(const int64_t* indices, int64_t count, long long* keys, int64_t* positions) {
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += stride) {
    keys[i] = key_of(indices[i]);
    positions[i] = i;
  }
}

}  // namespace

SortedIndices sort_indices(const int64_t* indices, int64_t count, int64_t rows, Queue& queue) {
  if (count <= kSmall) {
    long long* keys = nullptr;
    int64_t* positions = nullptr;
    queue.allocate(Array{&keys, count}, Array{&positions, count});
    const int pairs = power_of_two(count, kSmall);
    const Grid grid{count > 0, kThreads, size_t(pairs) * (sizeof(long long) + sizeof(int))};
    queue.launch(small_sort_kernel, grid, indices, count, pairs, keys, positions);
    return {keys, positions, count};
  }
  cub::DoubleBuffer<long long> keys;
  cub::DoubleBuffer<int64_t> positions;
  unsigned char* scratch = nullptr;
  size_t bytes = 0;  // of it
  const auto by_cub = [&] {
    if (queue.error() != cudaSuccess) return;
    forget_error();  // CUB would take what others have left for its own
    // Enough bits for `rows` itself: what is left out then has larger digits than any key.
    queue.note(cub::DeviceRadixSort::SortPairs(scratch, bytes, keys, positions, count, 0,
                                               int(std::bit_width(uint64_t(rows))),
                                               queue.stream()));
  };
  // Without memory it says how much it needs: host arithmetic, and what the runtime knows.
  by_cub();
  queue.allocate(Array{&keys.d_buffers[0], count}, Array{&keys.d_buffers[1], count},
                 Array{&positions.d_buffers[0], count}, Array{&positions.d_buffers[1], count},
                 Array{&scratch, int64_t(bytes)});
  queue.launch(pairs_kernel, {(count + kThreads - 1) / kThreads, kThreads}, indices, count,
               keys.Current(), positions.Current());
  by_cub();
  return {keys.Current(), positions.Current(), count};
}

}  // namespace embattle::cuda
