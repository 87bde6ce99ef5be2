// Hands torch's thread pool to the CPU kernels.
#pragma once

#include "../launch.h"
#include "../stable.h"

namespace embattle {

inline void torch_parallel_for(int64_t count, int64_t grain, Body body, void* context) {
  if (count <= 0) return;
  if (count <= grain)
    body(context, 0, count);
  else
    torch::stable::parallel_for(0, count, grain,
                                [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

}  // namespace embattle
