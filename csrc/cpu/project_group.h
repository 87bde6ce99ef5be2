// One group through `project`, for kernels that leave a group's projection to it: the bits are
// those that the op itself gives, and its code is compiled once.
#pragma once

#include "cut.h"
#include "level.h"

namespace embattle {

void EMBATTLE_AT_LEVEL(project)(const ProjectArgs& args, ParallelFor parallel_for);

namespace {

// Projects the group of `delta`, which may be `out` itself or float64, on the ball and the box.
inline void project_group(const Cut& cut, Norm norm, const ConstData& delta, const Data& out,
                          double eps, const Box& box) {
  const auto from_here = [&](const ConstData& x, bool broadcast = false) {
    if (!x.data || broadcast) return x;
    return ConstData{static_cast<const char*>(x.data) + cut.begin() * bytes_of(x.dtype), x.dtype};
  };
  ProjectArgs args;
  args.groups.rows = args.groups.rows_per_group = cut.last - cut.first;
  args.groups.dim = cut.groups.dim;
  args.groups.groups = 1;
  args.groups.mask = cut.groups.mask ? cut.groups.mask + cut.first : nullptr;
  args.norm = norm;
  args.delta = from_here(delta);
  args.out = {static_cast<char*>(out.data) + cut.begin() * bytes_of(out.dtype), out.dtype};
  args.eps.value = eps;
  args.box = box;
  args.box.x0 = from_here(box.x0);
  args.box.lower = from_here(box.lower, box.lower_broadcast);
  args.box.upper = from_here(box.upper, box.upper_broadcast);
  EMBATTLE_AT_LEVEL(project)(args, cut.parallel_for);
}

}  // namespace
}  // namespace embattle
