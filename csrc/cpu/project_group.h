// One group through `project`, for kernels that leave a group's projection to it: the bits are
// those that the op itself gives, and its code is compiled once.
#pragma once

#include "cut.h"
#include "level.h"

namespace embattle {

void EMBATTLE_AT_LEVEL(project)(const ProjectArgs& args, ParallelFor parallel_for);

namespace {

// Projects the group of `x`, which may be `args.out` itself or float64, on the ball and the box.
inline void project_group(const Cut& cut, ProjectArgs args, const ConstData& x, double eps) {
  const auto from_here = [&](const ConstData& x, bool broadcast = false) {
    if (!x.data || broadcast) return x;
    return ConstData{static_cast<const char*>(x.data) + cut.begin() * bytes_of(x.dtype), x.dtype};
  };
  const int64_t rows = cut.last - cut.first;
  const bool* const mask = cut.groups.mask ? cut.groups.mask + cut.first : nullptr;
  args.groups = {
      .rows = rows, .dim = cut.groups.dim, .groups = 1, .rows_per_group = rows, .mask = mask};
  args.x = from_here(x);
  args.out.data = static_cast<char*>(args.out.data) + cut.begin() * bytes_of(args.out.dtype);
  args.eps = {.value = eps};
  args.box.x0 = from_here(args.box.x0);
  args.box.lower = from_here(args.box.lower, args.box.lower_broadcast);
  args.box.upper = from_here(args.box.upper, args.box.upper_broadcast);
  EMBATTLE_AT_LEVEL(project)(args, cut.parallel_for);
}

}  // namespace
}  // namespace embattle
