// Sorting a batch's indices: stable, so that equal keys keep the order of the batch.
#include "runs.cuh"
#include "sort.cuh"

namespace embattle::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kDigits = 256;  // eight bits in each pass
constexpr int kRounds = 16;   // of a warp in a tile
constexpr int kTile = kThreads * kRounds;
constexpr int kSmall = 2048;            // pairs that one block sorts in shared memory
constexpr int kScan = 1024, kEach = 4;  // threads of the scan, and what each adds up at once

struct Pairs {
  const int64_t* indices = nullptr;  // the first pass; negative ones are left out
  const long long* keys = nullptr;   // later passes
  const int64_t* positions = nullptr;
  int64_t count = 0;
  __device__ __forceinline__ long long key(int64_t i) const {
    if (!indices) return keys[i];
    return indices[i] < 0 ? kNoKey : (long long)indices[i];
  }
  __device__ __forceinline__ int64_t position(int64_t i) const {
    return indices ? i : positions[i];
  }
};

__global__ void __launch_bounds__(kThreads)
    small_sort_kernel(const __grid_constant__ Pairs from, int pairs, long long* keys,
                      int64_t* positions) {
  EMBATTLE_DYNAMIC_SHARED(shared);
  auto* const k = reinterpret_cast<long long*>(shared);
  int* const at = reinterpret_cast<int*>(k + pairs);
  for (int i = int(threadIdx.x); i < pairs; i += kThreads) {
    k[i] = i < from.count ? from.key(i) : kNoKey;
    at[i] = i;
  }
  sort_pairs(k, at, pairs);
  for (int i = int(threadIdx.x); i < from.count; i += kThreads) {
    keys[i] = k[i];
    positions[i] = at[i];
  }
}

// counts[digit][tile]: how often a digit occurs in a tile.
__global__ void __launch_bounds__(kThreads)
    count_kernel(const __grid_constant__ Pairs from, int shift, int64_t tiles, int64_t* counts) {
  EMBATTLE_DYNAMIC_SHARED(shared);
  unsigned* const seen = reinterpret_cast<unsigned*>(shared);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    seen[threadIdx.x] = 0;
    __syncthreads();
    for (int r = 0; r < kRounds; ++r) {
      const int64_t i = tile * kTile + r * kThreads + threadIdx.x;
      if (i < from.count) atomicAdd(&seen[from.key(i) >> shift & (kDigits - 1)], 1u);
    }
    __syncthreads();
    counts[threadIdx.x * tiles + tile] = seen[threadIdx.x];
    __syncthreads();
  }
}

// values[i] becomes the sum of those before it. One block.
__global__ void __launch_bounds__(kScan) scan_kernel(int64_t* values, int64_t count) {
  EMBATTLE_DYNAMIC_SHARED(shared);
  auto* const warps = reinterpret_cast<long long*>(shared);  // [32]
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  long long before = 0;
  for (int64_t begin = 0; begin < count; begin += kScan * kEach) {
    const int64_t first = begin + int64_t(threadIdx.x) * kEach;
    long long own[kEach], sum = 0;
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      own[e] = first + e < count ? values[first + e] : 0;
      sum += own[e];
    }
    long long upto = sum;
    for (int by = 1; by < 32; by *= 2) {
      const long long other = __shfl_up_sync(0xffffffffu, upto, unsigned(by));
      if (lane >= by) upto += other;
    }
    if (lane == 31) warps[warp] = upto;
    __syncthreads();
    long long total = 0, here = before + upto - sum;
    for (int w = 0; w < kScan / 32; ++w) {
      if (w < warp) here += warps[w];
      total += warps[w];
    }
    before += total;
    __syncthreads();
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      if (first + e < count) values[first + e] = here;
      here += own[e];
    }
  }
}

// starts[digit][tile]: where the first pair of the tile with that digit goes.
__global__ void __launch_bounds__(kThreads)
    scatter_kernel(const __grid_constant__ Pairs from, int shift, int64_t tiles,
                   const int64_t* starts, long long* keys, int64_t* positions) {
  EMBATTLE_DYNAMIC_SHARED(shared);
  unsigned* const seen = reinterpret_cast<unsigned*>(shared);                 // [kWarps][kDigits]
  auto* const start = reinterpret_cast<long long*>(seen + kWarps * kDigits);  // [kDigits]
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  unsigned* const own = seen + warp * kDigits;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    for (int w = 0; w < kWarps; ++w) seen[w * kDigits + int(threadIdx.x)] = 0;
    start[threadIdx.x] = starts[threadIdx.x * tiles + tile];
    __syncthreads();
    // A warp has consecutive pairs: a pair's rank counts those with its digit before it.
    const int64_t begin = tile * kTile + int64_t(warp) * kRounds * 32;
    unsigned ranks[kRounds];
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int64_t i = begin + r * 32 + lane;
      const bool there = i < from.count;
      const unsigned digit = there ? unsigned(from.key(i) >> shift & (kDigits - 1)) : 0;
      unsigned same = __ballot_sync(0xffffffffu, there);
#pragma unroll
      for (int bit = 0; bit < 8; ++bit) {
        const bool set = digit >> bit & 1;
        const unsigned all = __ballot_sync(0xffffffffu, set);
        same &= set ? all : ~all;
      }
      const unsigned lower = (1u << lane) - 1;
      ranks[r] = there ? own[digit] + unsigned(__popc(same & lower)) : 0;
      __syncwarp();
      if (there && (same & lower) == 0) own[digit] += unsigned(__popc(same));
      __syncwarp();
    }
    __syncthreads();
    unsigned before = 0;
    for (int w = 0; w < kWarps; ++w) {
      const unsigned n = seen[w * kDigits + int(threadIdx.x)];
      seen[w * kDigits + int(threadIdx.x)] = before;
      before += n;
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int64_t i = begin + r * 32 + lane;
      if (i >= from.count) continue;
      const long long key = from.key(i);
      const unsigned digit = unsigned(key >> shift & (kDigits - 1));
      const int64_t to = start[digit] + own[digit] + ranks[r];
      keys[to] = key;
      positions[to] = from.position(i);
    }
    __syncthreads();
  }
}

int64_t tiles_of(int64_t count) { return (count + kTile - 1) / kTile; }
size_t array_bytes(int64_t count) { return rounded(size_t(count) * 8); }

}  // namespace

size_t sort_workspace(int64_t count) {
  if (count <= kSmall) return 2 * array_bytes(count);
  return 4 * array_bytes(count) + array_bytes(kDigits * tiles_of(count));
}

cudaError_t sort_indices(const int64_t* indices, int64_t count, int64_t rows, void* workspace,
                         SortedIndices* sorted, const Context& context) {
  auto* memory = static_cast<unsigned char*>(workspace);
  const auto take = [&](int64_t n) {
    void* const p = memory;
    memory += array_bytes(n);
    return p;
  };
  auto* keys = static_cast<long long*>(take(count));
  auto* positions = static_cast<int64_t*>(take(count));
  *sorted = {keys, positions, count};
  Pairs from;
  from.indices = indices;
  from.count = count;
  if (count <= kSmall) {
    const int pairs = power_of_two(count, kSmall);
    return enqueue(small_sort_kernel, count > 0, kThreads,
                   size_t(pairs) * (sizeof(long long) + sizeof(int)), context, from, pairs, keys,
                   positions);
  }
  auto* other_keys = static_cast<long long*>(take(count));
  auto* other_positions = static_cast<int64_t*>(take(count));
  const int64_t tiles = tiles_of(count);
  auto* const counts = static_cast<int64_t*>(take(kDigits * tiles));
  // Enough bits for `rows` itself: what is left out then has larger digits than any key.
  for (int shift = 0; shift == 0 || (shift < 63 && rows >> shift > 0); shift += 8) {
    cudaError_t error = enqueue(count_kernel, tiles, kThreads, kDigits * sizeof(unsigned), context,
                                from, shift, tiles, counts);
    if (error == cudaSuccess)
      error =
          enqueue(scan_kernel, 1, kScan, 32 * sizeof(long long), context, counts, kDigits * tiles);
    if (error == cudaSuccess)
      error = enqueue(scatter_kernel, tiles, kThreads,
                      kWarps * kDigits * sizeof(unsigned) + kDigits * sizeof(long long), context,
                      from, shift, tiles, static_cast<const int64_t*>(counts), keys, positions);
    if (error != cudaSuccess) return error;
    *sorted = {keys, positions, count};
    from.indices = nullptr;
    from.keys = keys;
    from.positions = positions;
    std::swap(keys, other_keys);
    std::swap(positions, other_positions);
  }
  return cudaSuccess;
}

}  // namespace embattle::cuda
