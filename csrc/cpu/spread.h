// Spreading a kernel's work over threads.
#pragma once

#include "../launch.h"

namespace embattle {
namespace {

// What is worth a thread of its own, in elements read.
constexpr int64_t kGrain = 32768;

inline void in_this_thread(int64_t count, int64_t, Body body, void* context) {
  if (count > 0) body(context, 0, count);
}

// parallel_for with a callable.
template <class Function>
inline void spread(ParallelFor parallel_for, int64_t count, int64_t grain, const Function& body) {
  parallel_for(
      count, grain < 1 ? 1 : grain,
      [](void* context, int64_t begin, int64_t end) {
        (*static_cast<const Function*>(context))(begin, end);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace
}  // namespace embattle
