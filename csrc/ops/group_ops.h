// The group ops that are no steps, for any device: check, allocate, launch.
#pragma once

#include "place.h"

#define EMBATTLE_GROUP_NORM(A) A(Tensor, x) EMBATTLE_GROUPS(A) EMBATTLE_RAGGED(A)
// The first four arguments are those of project_plain.
#define EMBATTLE_PROJECT(A) A(Tensor, delta) A(double, eps) EMBATTLE_GROUPS(A) EMBATTLE_BALL(A)
#define EMBATTLE_RANDOM_START(A) \
  A(Tensor, like) A(Tensor, key) A(double, eps) EMBATTLE_GROUPS(A) EMBATTLE_BALL(A)
#define EMBATTLE_GAUSSIAN_NOISE(A) \
  A(Tensor, x)                     \
  A(Tensor, key)                   \
  A(double, std)                   \
  A(double, eps)                   \
  EMBATTLE_GROUPS(A)               \
  EMBATTLE_BALL(A)                 \
  A(OptionalTensor, std_per_group, None)

namespace embattle {

EMBATTLE_ARGUMENTS(GroupNorm, "group_norm", EMBATTLE_GROUP_NORM);
EMBATTLE_ARGUMENTS(Project, "project", EMBATTLE_PROJECT);
constexpr int kPlainProject = 4;
EMBATTLE_ARGUMENTS(RandomStart, "random_start", EMBATTLE_RANDOM_START);
EMBATTLE_ARGUMENTS(GaussianNoise, "gaussian_noise", EMBATTLE_GAUSSIAN_NOISE);
template <class Launch>
struct GroupOps {
  static Tensor group_norm(const GroupNorm& a) {
    const Tensor x = checked_packed(a.op, "x", a.x);
    const OptionalTensor offsets = packed(a.offsets), mask = packed(a.mask);
    NormArgs args;
    args.groups = checked_groups(a.op, "x", x, a.token, offsets, mask);
    args.norm = checked_norm(a.op, a.norm);
    args.x = {x.const_data_ptr(), float_dtype(a.op, "x", x)};
    Norms out(x, {args.groups.groups}, args.x.dtype == Dtype::f64);
    args.out = out.data;
    Launch::group_norm(a.op, args, x);
    return out.tensor;
  }

  static Tensor project(const Project& a) {
    Placed placed(a, "delta", a.delta);
    Written out(a, "delta", a.delta, placed.x);
    placed.apart(a, "delta", out);
    placed.args.out = out.data(placed.args.x.dtype);
    Launch::project(a.op, placed.args, placed.x);
    return out.finish();
  }

  static Tensor random_start(const RandomStart& a) {
    const Placed placed(a, "like", a.like);
    placed.eps.require(a.op, "eps", "be finite", is_finite);
    const Tensor key = checked_key(placed, a.key);
    Written out(a, "like", a.like, placed.x);
    NoiseArgs args = noise_args(placed, out, key);
    args.x = {};
    Launch::random_start(a.op, args, placed.x);
    return out.finish();
  }

  static Tensor gaussian_noise(const GaussianNoise& a) {
    const Placed placed(a, "x", a.x);
    const Strength std(a.op, "std", a.std, a.std_per_group, placed.x, placed.args.groups.groups);
    std.require(a.op, "std", "not be negative", not_negative);
    const Tensor key = checked_key(placed, a.key);
    Written out(a, "x", a.x, placed.x);
    placed.apart(a, "x", out);
    NoiseArgs args = noise_args(placed, out, key);
    args.std = std.value;
    Launch::gaussian_noise(a.op, args, placed.x);
    return out.finish();
  }

  template <Register kWhat>
  static void add(Ops<kWhat> ops) {
    ops.template op<&group_norm>("group_norm");
    ops.template op<&project>("project");
    // The same, but a constant to autograd: project's gradient rule takes longer than a small call.
    ops.template op<&project>("project_constant");
    ops.template op<&project>("project_plain", kPlainProject);
    ops.template in_place<&project>("project_");
    ops.template op<&random_start>("random_start");
    ops.template op<&gaussian_noise>("gaussian_noise");
    ops.template in_place<&gaussian_noise>("gaussian_noise_");
  }

 private:
  // A key on the CPU serves every device.
  static Tensor checked_key(const Placed& placed, const Tensor& key) {
    if (key.scalar_type() != ScalarType::Long || key.numel() != 2)
      refuse(placed.op, "key must be int64 of shape [2], got ",
             torch::headeronly::toString(key.scalar_type()), " ", shape_of(key));
    if (!key.is_cpu()) check_device(placed.op, "key", key, "the data", placed.x);
    return packed(key);
  }

  static NoiseArgs noise_args(const Placed& placed, Written& out, const Tensor& key) {
    NoiseArgs args;
    static_cast<ProjectArgs&>(args) = placed.args;
    args.out = out.data(args.x.dtype);
    args.key = static_cast<const int64_t*>(key.const_data_ptr());
    args.key_on_host = key.is_cpu();
    return args;
  }
};

}  // namespace embattle
