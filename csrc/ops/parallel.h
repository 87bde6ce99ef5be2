// Calls the CPU kernels, and hands them torch's thread pool.
#pragma once

#include "../cpu/denormals.h"
#include "../launch.h"
#include "../stable.h"

namespace embattle {

inline void torch_parallel_for(int64_t count, int64_t grain, Body body, void* context) {
  if (count <= 0) return;
  if (count <= grain)
    body(context, 0, count);
  else
    torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      const KeepDenormals here;
      body(context, begin, end);
    });
}

// Runs a kernel of the level that was chosen.
template <class Args>
void on_cpu(void (*CpuKernels::*kernel)(const Args&, ParallelFor), const Args& args) {
  const KeepDenormals here;
  (cpu_kernels().*kernel)(args, torch_parallel_for);
}

}  // namespace embattle
