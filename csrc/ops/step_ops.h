// pgd_step and momentum_step for any device: check, allocate, launch.
#pragma once

#include "place.h"

// The first seven arguments are those of pgd_step_plain: a ball of one radius, and nothing else. A
// small call's time is that of turning arguments into what the stable ABI takes.
#define EMBATTLE_PGD_STEP(A)                   \
  A(Tensor, delta)                             \
  A(Tensor, grad)                              \
  A(double, step_size)                         \
  A(double, eps)                               \
  EMBATTLE_GROUPS(A)                           \
  A(OptionalCounter, nonfinite, None)          \
  EMBATTLE_BALL(A)                             \
  A(OptionalTensor, step_size_per_group, None) \
  A(double, top, 1.)                           \
  A(OptionalInteger, max_groups, None)
#define EMBATTLE_MOMENTUM_STEP(A)              \
  A(Tensor, delta)                             \
  A(Tensor, velocity)                          \
  A(Tensor, grad)                              \
  A(double, decay)                             \
  A(double, step_size)                         \
  A(double, eps)                               \
  EMBATTLE_GROUPS(A)                           \
  EMBATTLE_BALL(A)                             \
  A(OptionalTensor, step_size_per_group, None) \
  A(double, top, 1.)                           \
  A(bool, apgd, False)                         \
  A(OptionalCounter, nonfinite, None)

namespace embattle {

EMBATTLE_ARGUMENTS(PgdStep, "pgd_step", EMBATTLE_PGD_STEP);
constexpr int kPlainPgdStep = 7;
EMBATTLE_ARGUMENTS(MomentumStep, "momentum_step", EMBATTLE_MOMENTUM_STEP);
template <>
inline constexpr int kWritten<MomentumStep> = 2;

// What both steps have in common.
struct Step {
  Placed placed;
  Tensor grad;
  Strength step_size;
  StepArgs args;

  template <class Args>
  explicit Step(const Args& a)
      : placed(a, "delta", a.delta),
        grad(checked_packed(a.op, "grad", a.grad)),
        step_size(a.op, "step_size", a.step_size, a.step_size_per_group, placed.x,
                  placed.args.groups.groups) {
    static_cast<ProjectArgs&>(args) = placed.args;
    check_same_shape(a.op, "grad", grad, "delta", placed.x);
    check_device(a.op, "grad", grad, "delta", placed.x);
    step_size.require(a.op, "step_size", "be finite", is_finite);
    args.grad = {grad.const_data_ptr(), float_dtype(a.op, "grad", grad)};
    args.step_size = step_size.value;
    args.rule.top = a.top;
    if (!(a.top > 0) || (a.top > 1 && a.top != std::floor(a.top)))
      refuse(a.op, "top must be a whole number from 1 on, or a fraction below 1, got ", a.top);
    if (a.nonfinite) count_in(*a.nonfinite);
  }

  // What is read besides lies apart from what is written.
  void apart(const Arguments& a, const char* name, const Written& out) const {
    out.apart(a, name, "grad", grad);
    placed.apart(a, name, out);
  }

 private:
  void count_in(const Tensor& n) {
    const char* op = placed.op;
    if (n.scalar_type() != ScalarType::Int || n.dim() != 1 || n.size(0) != args.groups.groups ||
        !n.is_contiguous())
      refuse(op, "nonfinite must be contiguous int32 of shape [", args.groups.groups, "], got ",
             torch::headeronly::toString(n.scalar_type()), " ", shape_of(n),
             n.is_contiguous() ? "" : ", not contiguous");
    check_device(op, "nonfinite", n, "delta", placed.x);
    args.nonfinite = static_cast<int32_t*>(n.mutable_data_ptr());
  }
};

template <class Launch>
struct StepOps {
  static Tensor pgd_step(const PgdStep& a) {
    Step step(a);
    StepArgs& args = step.args;
    if (a.max_groups) {
      if (*a.max_groups < 0) refuse(a.op, "max_groups must not be negative, got ", *a.max_groups);
      if (!a.token || a.offsets)
        refuse(a.op, "max_groups needs group='token' without offsets, got ",
               a.offsets ? "offsets" : "group='sample'");
      const Tensor& x = step.placed.x;
      args.rule.max_groups = *a.max_groups;
      args.groups_per_sample =
          x.dim() < 2 ? 1 : args.groups.groups / std::max<int64_t>(x.size(0), 1);
    }
    Written out(a, "delta", a.delta, step.placed.x);
    step.apart(a, "delta", out);
    args.out = out.data(args.x.dtype);
    Launch::pgd_step(a.op, args, step.placed.x);
    return out.finish();
  }

  static std::tuple<Tensor, Tensor> momentum_step(const MomentumStep& a) {
    Step step(a);
    StepArgs& args = step.args;
    const Tensor& x = step.placed.x;
    check_same_shape(a.op, "velocity", a.velocity, "delta", x);
    check_device(a.op, "velocity", a.velocity, "delta", x);
    if (!std::isfinite(a.decay)) refuse(a.op, "decay must be finite, got ", a.decay);
    const Tensor velocity = packed(a.velocity);
    args.rule.decay = a.decay;
    args.rule.apgd = a.apgd;
    args.velocity = {velocity.const_data_ptr(), float_dtype(a.op, "velocity", velocity)};
    Written out(a, "delta", a.delta, x), velocity_out(a, "velocity", a.velocity, velocity);
    step.apart(a, "delta", out);
    step.apart(a, "velocity", velocity_out);
    out.apart(a, "delta", "velocity", velocity, false);
    args.out = out.data(args.x.dtype);
    args.velocity_out = velocity_out.data(args.velocity.dtype);
    Launch::momentum_step(a.op, args, x);
    return {out.finish(), velocity_out.finish()};
  }

  template <Register kWhat>
  static void add(Ops<kWhat> ops) {
    ops.template op<&pgd_step>("pgd_step");
    ops.template op<&pgd_step>("pgd_step_plain", kPlainPgdStep);
    ops.template in_place<&pgd_step>("pgd_step_");
    ops.template in_place<&pgd_step>("pgd_step_plain_", kPlainPgdStep);
    ops.template op<&momentum_step>("momentum_step");
    ops.template in_place<&momentum_step>("momentum_step_");
  }
};

}  // namespace embattle
