// Gathering the rows of a batch that belong together.
#pragma once

#include "launching.h"
#include "runs.cuh"

namespace embattle::cuda {

using SortedIndices = SortedRuns<long long, int64_t>;

// Enqueues a stable sort of indices[0, count), all below `rows`; negative ones come last, as none.
// The result lies in the workspace, which is asked for here.
cudaError_t sort_indices(const int64_t* indices, int64_t count, int64_t rows, SortedIndices* sorted,
                         const Context& context);

}  // namespace embattle::cuda
