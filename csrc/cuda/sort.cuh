// Gathering the rows of a batch that belong together.
#pragma once

#include "launching.h"
#include "runs.cuh"

namespace embattle::cuda {

using SortedIndices = SortedRuns<long long, int64_t>;

size_t sort_workspace(int64_t count);

// Enqueues a stable sort of indices[0, count), all below `rows`; negative ones come last, as none.
// The result lies in the workspace.
cudaError_t sort_indices(const int64_t* indices, int64_t count, int64_t rows, void* workspace,
                         SortedIndices* sorted, const Context& context);

}  // namespace embattle::cuda
