// Sorting a batch's indices: stable, so that equal keys keep the order of the batch.
//
// A few are sorted by one block in one launch; more by CUB, which is part of the toolkit.
#define CCCL_DISABLE_NVTX  // no ranges for profilers
#include <bit>
#include <cub/device/device_radix_sort.cuh>

#include "runs.cuh"
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
  for (int i = int(threadIdx.x); i < pairs; i += kThreads) {
    k[i] = i < count ? key_of(indices[i]) : kNoKey;
    at[i] = i;
  }
  sort_pairs(k, at, pairs);
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

cudaError_t sort_indices(const int64_t* indices, int64_t count, int64_t rows, SortedIndices* sorted,
                         const Context& context) {
  *sorted = {nullptr, nullptr, count};
  if (count == 0) return cudaSuccess;
  const auto allocate = [&](size_t bytes) {
    return static_cast<long long*>(context.allocate(context.self, bytes));
  };
  const size_t each = rounded(size_t(count) * 8) / 8;  // of an array's places
  if (count <= kSmall) {
    long long* const keys = allocate(2 * each * 8);
    if (!keys) return cudaErrorMemoryAllocation;
    int64_t* const positions = reinterpret_cast<int64_t*>(keys + each);
    *sorted = {keys, positions, count};
    const int pairs = power_of_two(count, kSmall);
    return enqueue(small_sort_kernel, 1, kThreads,
                   size_t(pairs) * (sizeof(long long) + sizeof(int)), context, indices, count,
                   pairs, keys, positions);
  }
  cub::DoubleBuffer<long long> keys;
  cub::DoubleBuffer<int64_t> positions;
  size_t scratch = 0;  // bytes
  const auto by_cub = [&](void* memory) {
    forget_error();  // CUB would take what others have left for its own
    // Enough bits for `rows` itself: what is left out then has larger digits than any key.
    return cub::DeviceRadixSort::SortPairs(memory, scratch, keys, positions, count, 0,
                                           int(std::bit_width(uint64_t(rows))),
                                           static_cast<cudaStream_t>(context.stream));
  };
  // Without memory it says how much it needs: host arithmetic, and what the runtime knows.
  cudaError_t error = by_cub(nullptr);
  if (error != cudaSuccess) return error;
  long long* const memory = allocate(4 * each * 8 + scratch);
  if (!memory) return cudaErrorMemoryAllocation;
  keys = {memory, memory + each};
  positions = {reinterpret_cast<int64_t*>(memory + 2 * each),
               reinterpret_cast<int64_t*>(memory + 3 * each)};
  error = enqueue(pairs_kernel, (count + kThreads - 1) / kThreads, kThreads, 0, context, indices,
                  count, keys.Current(), positions.Current());
  if (error == cudaSuccess) error = by_cub(memory + 4 * each);
  *sorted = {keys.Current(), positions.Current(), count};
  return error;
}

}  // namespace embattle::cuda
