// Positions that hold the same key, in the order of the batch: those of a block, and of a whole
// batch.
#pragma once

#include "launching.h"

namespace embattle::cuda {

constexpr long long kNoKey = 0x7fffffffffffffffll;  // sorted last

// Sorts the pairs key(i), i, in memory that the block has for itself, by key, equal keys by
// position. n is a power of two; n log(n)^2 comparisons. All threads of the block call it.
template <class Key>
__device__ __forceinline__ void sort_pairs(long long* keys, int* positions, int n, Key key) {
  for (int i = int(threadIdx.x); i < n; i += int(blockDim.x)) {
    keys[i] = key(i);
    positions[i] = i;
  }
  for (int span = 2; span <= n; span *= 2) {
    for (int step = span / 2; step > 0; step /= 2) {
      __syncthreads();
      for (int i = int(threadIdx.x); i < n / 2; i += int(blockDim.x)) {
        const int low = 2 * i - (i & (step - 1)), high = low + step;
        const long long a = keys[low], b = keys[high];
        const int at = positions[low], bt = positions[high];
        const bool above = a > b || (a == b && at > bt);
        if (above == ((low & span) == 0)) {
          keys[low] = b;
          keys[high] = a;
          positions[low] = bt;
          positions[high] = at;
        }
      }
    }
  }
  __syncthreads();
}

// Runs of equal keys in sorted pairs.
template <class Key, class Position>
struct SortedRuns {
  const Key* keys;
  const Position* positions;
  int64_t count;
  // The first of its key, which is none of those that are left out.
  __device__ __forceinline__ bool head(int64_t i) const {
    return keys[i] != kNoKey && (i == 0 || keys[i - 1] != keys[i]);
  }
  // Whether item j has the key of item i, which is item j or comes before it.
  __device__ __forceinline__ bool together(int64_t i, int64_t j) const {
    return j < count && keys[j] == keys[i];
  }
};

using SortedIndices = SortedRuns<long long, int64_t>;

// Enqueues a stable sort of indices[0, count), all below `rows`; negative ones come last, as none.
// The result lies in the workspace, which is asked for here.
SortedIndices sort_indices(const int64_t* indices, int64_t count, int64_t rows, Queue& queue);

}  // namespace embattle::cuda
