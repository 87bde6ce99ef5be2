// The group ops on the CPU: check, allocate, launch.
#include "../checks.h"
#include "parallel.h"

namespace embattle {
namespace {

Tensor group_norm(const Tensor& x_, double norm, bool token, const OptionalTensor& offsets_,
                  const OptionalTensor& mask_) {
  const char* op = "group_norm";
  const Tensor x = packed(x_);
  const OptionalTensor offsets = packed(offsets_), mask = packed(mask_);
  NormArgs args;
  args.groups = checked_groups(op, "x", x, token, offsets, mask);
  args.norm = checked_norm(op, norm);
  args.x = {x.const_data_ptr(), float_dtype(op, "x", x)};
  const bool wide = args.x.dtype == Dtype::f64;
  Tensor out = torch::stable::new_empty(x, {args.groups.groups},
                                        wide ? ScalarType::Double : ScalarType::Float);
  args.out = {out.mutable_data_ptr(), wide ? Dtype::f64 : Dtype::f32};
  cpu_kernels().group_norm(args, torch_parallel_for);
  return out;
}

}  // namespace
}  // namespace embattle

STABLE_TORCH_LIBRARY_IMPL(embattle, CPU, m) {
  m.impl("group_norm", TORCH_BOX(&embattle::group_norm));
}
