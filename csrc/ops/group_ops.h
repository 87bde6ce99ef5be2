// The group ops for any device: check, allocate, launch. `Launch` brings the launchers of a device:
// static functions group_norm, project, pgd_step, momentum_step, random_start and gaussian_noise
// that take the argument struct of launch.h and a tensor of the device, and check_key(op, key,
// like), which refuses a key that the kernels cannot read.
#pragma once

#include "../checks.h"

namespace embattle {

// ---- Arguments
// -----------------------------------------------------------------------------------

// An argument per group: [groups] or one element, of any float type.
struct Strength {
  OptionalTensor held;
  PerGroup value;

  Strength(const char* op, const char* name, double number, const OptionalTensor& per_group,
           const Tensor& like, int64_t groups) {
    value.value = number;
    if (!per_group) return;
    check_device(op, name, *per_group, "the data", like);
    const int64_t count = per_group->numel();
    if (per_group->dim() > 1 || (count != groups && count != 1))
      fail("embattle.", op, ": ", name, " must be a number or have one value for each of ", groups,
           " groups, got ", shape_of(*per_group));
    held = packed(*per_group);
    if (float_dtype(op, name, *held) != Dtype::f32 && float_dtype(op, name, *held) != Dtype::f64)
      held = torch::stable::to(*held, ScalarType::Float);
    value.values = held->const_data_ptr();
    value.dtype = float_dtype(op, name, *held);
    value.broadcast = count == 1;
  }

  // Every value that can be read without waiting for a device satisfies `good`.
  template <class F>
  void require(const char* op, const char* name, const char* what, const F& good) const {
    const auto check = [&](double x) {
      if (!good(x)) fail("embattle.", op, ": ", name, " must ", what, ", got ", x);
    };
    if (!held) {
      check(value.value);
    } else if (held->is_cpu()) {
      for (int64_t i = 0; i < held->numel(); ++i)
        check(value.dtype == Dtype::f64 ? static_cast<const double*>(value.values)[i]
                                        : static_cast<const float*>(value.values)[i]);
    }
  }
};

// The box and the ball's centre as an op takes them: a bound is a number, a tensor, or absent.
struct BoxOptions {
  const OptionalTensor& x0;
  const std::optional<double>&lower, &upper;
  const OptionalTensor &lower_per_element, &upper_per_element;
};

inline bool not_negative(double x) { return x >= 0; }
inline bool is_finite(double x) { return std::isfinite(x); }

// x, its groups, the ball and the box, with everything they point to.
struct Placed {
  const char* op;
  Tensor x;
  OptionalTensor offsets, mask;
  Norm norm;
  Groups groups;
  Strength eps;
  OptionalTensor x0, lower, upper;
  Box box;

  Placed(const char* op, const char* name, const Tensor& given, double radius, double order,
         bool token, const OptionalTensor& offsets_, const OptionalTensor& mask_,
         const OptionalTensor& eps_per_group, const BoxOptions& given_box)
      : op(op),
        x(checked_packed(op, name, given)),
        offsets(packed(offsets_)),
        mask(packed(mask_)),
        norm(checked_norm(op, order)),
        groups(checked_groups(op, name, x, token, offsets, mask)),
        eps(op, "eps", radius, eps_per_group, x, groups.groups) {
    eps.require(op, "eps", "not be negative", not_negative);
    const Dtype dtype = float_dtype(op, name, x);
    if (given_box.x0) {
      check_same_shape(op, "x0", *given_box.x0, name, x);
      x0 = of_type(*given_box.x0, "x0", name);
      box.x0 = {x0->const_data_ptr(), dtype};
    }
    bound(given_box.lower, given_box.lower_per_element, "lower", name, dtype, &box.lower_value,
          &lower, &box.lower, &box.lower_broadcast);
    bound(given_box.upper, given_box.upper_per_element, "upper", name, dtype, &box.upper_value,
          &upper, &box.upper, &box.upper_broadcast);
    if (box.lower_value > box.upper_value)
      fail("embattle.", op, ": lower must not be above upper, got ", box.lower_value, " and ",
           box.upper_value);
  }

 private:
  Tensor of_type(const Tensor& t, const char* what, const char* name) const {
    float_dtype(op, what, t);
    check_device(op, what, t, name, x);
    return packed(t.scalar_type() == x.scalar_type() ? t : torch::stable::to(t, x.scalar_type()));
  }

  void bound(const std::optional<double>& number, const OptionalTensor& t, const char* what,
             const char* name, Dtype dtype, double* value, OptionalTensor* held, ConstData* data,
             bool* broadcast) const {
    if (!t) {
      if (number && *number != *number) fail("embattle.", op, ": ", what, " must not be a NaN");
      if (number) *value = *number;
      return;
    }
    *broadcast = t->numel() == 1 && t->dim() <= 1 && !same_shape(*t, x);
    if (!*broadcast) check_same_shape(op, what, *t, name, x);
    *held = of_type(*t, what, name);
    *data = {(*held)->const_data_ptr(), dtype};
  }
};

// What is written: a new tensor, or the argument itself, through a copy where it is not contiguous.
struct Written {
  Tensor target;
  Tensor memory;
  bool copy_back = false;

  Written(const Tensor& packed_like) : target(packed_like), memory(empty_packed(packed_like)) {}
  Written(const char* op, const char* name, const Tensor& argument, const Tensor& packed_argument)
      : target(argument), memory(packed_argument), copy_back(!argument.is_contiguous()) {
    check_writable(op, name, argument);
  }

  Data data(Dtype dtype) { return {memory.mutable_data_ptr(), dtype}; }
  void finish() {
    if (copy_back) torch::stable::copy_(target, memory);
  }
};

// The bounds in an op's signature, in the order of its schema.
#define EMBATTLE_BOUNDS                                                 \
  const std::optional<double>&lower, const std::optional<double>&upper, \
      const OptionalTensor &lower_per_element, const OptionalTensor &upper_per_element

struct StepOptions {
  double step_size;
  const OptionalTensor& step_per_group;
  double top;
  int64_t max_groups;
  const OptionalTensor& nonfinite;
};

// The parts of a step that pgd_step and momentum_step have in common.
struct Step {
  Placed placed;
  Tensor grad;
  Strength step_size;
  StepArgs args;

  Step(Placed placed_, const Tensor& grad_, bool token, const StepOptions& options)
      : placed(std::move(placed_)),
        grad(checked_packed(placed.op, "grad", grad_)),
        step_size(placed.op, "step_size", options.step_size, options.step_per_group, placed.x,
                  placed.groups.groups) {
    const char* op = placed.op;
    check_same_shape(op, "grad", grad, "delta", placed.x);
    check_device(op, "grad", grad, "delta", placed.x);
    step_size.require(op, "step_size", "be finite", is_finite);
    args.groups = placed.groups;
    args.norm = placed.norm;
    args.delta = {placed.x.const_data_ptr(), float_dtype(op, "delta", placed.x)};
    args.grad = {grad.const_data_ptr(), float_dtype(op, "grad", grad)};
    args.step_size = step_size.value;
    args.eps = placed.eps.value;
    args.box = placed.box;
    args.top = options.top;
    if (!(options.top > 0) || (options.top > 1 && options.top != std::floor(options.top)))
      fail("embattle.", op, ": top must be a whole number from 1 on, or a fraction below 1, got ",
           options.top);
    args.max_groups = options.max_groups;
    if (options.max_groups != -1) {
      if (options.max_groups < 0)
        fail("embattle.", op, ": max_groups must not be negative, got ", options.max_groups);
      if (!token || placed.offsets)
        fail("embattle.", op, ": max_groups needs group='token' without offsets, got ",
             placed.offsets ? "offsets" : "group='sample'");
      args.groups_per_sample =
          placed.x.dim() < 2 ? 1 : placed.groups.groups / std::max<int64_t>(placed.x.size(0), 1);
    }
    if (options.nonfinite) {
      const Tensor& n = *options.nonfinite;
      if (n.scalar_type() != ScalarType::Int || n.dim() != 1 || n.size(0) != args.groups.groups ||
          !n.is_contiguous())
        fail("embattle.", op, ": nonfinite must be contiguous int32 of shape [", args.groups.groups,
             "], got ", torch::headeronly::toString(n.scalar_type()), " ", shape_of(n),
             n.is_contiguous() ? "" : ", not contiguous");
      check_device(op, "nonfinite", n, "delta", placed.x);
      args.nonfinite = static_cast<int32_t*>(n.mutable_data_ptr());
    }
  }
};

// ---- Ops
// -----------------------------------------------------------------------------------------

template <class Launch>
struct GroupOps {
  static Tensor group_norm(const Tensor& x_, double norm, bool token,
                           const OptionalTensor& offsets_, const OptionalTensor& mask_) {
    const char* op = "group_norm";
    const Tensor x = checked_packed(op, "x", x_);
    const OptionalTensor offsets = packed(offsets_), mask = packed(mask_);
    NormArgs args;
    args.groups = checked_groups(op, "x", x, token, offsets, mask);
    args.norm = checked_norm(op, norm);
    args.x = {x.const_data_ptr(), float_dtype(op, "x", x)};
    const bool wide = args.x.dtype == Dtype::f64;
    Tensor out = torch::stable::new_empty(x, {args.groups.groups},
                                          wide ? ScalarType::Double : ScalarType::Float);
    args.out = {out.mutable_data_ptr(), wide ? Dtype::f64 : Dtype::f32};
    Launch::group_norm(args, x);
    return out;
  }

  static void run_project(const Placed& placed, Written out) {
    ProjectArgs args;
    args.groups = placed.groups;
    args.norm = placed.norm;
    args.delta = {placed.x.const_data_ptr(), float_dtype(placed.op, "delta", placed.x)};
    args.out = out.data(args.delta.dtype);
    args.eps = placed.eps.value;
    args.box = placed.box;
    Launch::project(args, placed.x);
    out.finish();
  }

  static Tensor project(const Tensor& delta, double eps, double norm, bool token,
                        const OptionalTensor& offsets, const OptionalTensor& mask,
                        const OptionalTensor& eps_per_group, const OptionalTensor& x0,
                        EMBATTLE_BOUNDS) {
    const Placed placed("project", "delta", delta, eps, norm, token, offsets, mask, eps_per_group,
                        {x0, lower, upper, lower_per_element, upper_per_element});
    const Written out(placed.x);
    run_project(placed, out);
    return out.memory;
  }

  static Tensor project_plain(const Tensor& delta, double eps, double norm, bool token) {
    const OptionalTensor none;
    const std::optional<double> no_bound;
    return project(delta, eps, norm, token, none, none, none, none, no_bound, no_bound, none, none);
  }

  static void project_(const Tensor& delta, double eps, double norm, bool token,
                       const OptionalTensor& offsets, const OptionalTensor& mask,
                       const OptionalTensor& eps_per_group, const OptionalTensor& x0,
                       EMBATTLE_BOUNDS) {
    const char* op = "project_";
    const Placed placed(op, "delta", delta, eps, norm, token, offsets, mask, eps_per_group,
                        {x0, lower, upper, lower_per_element, upper_per_element});
    run_project(placed, Written(op, "delta", delta, placed.x));
  }

  static void run_step(Step& step, Written out) {
    step.args.out = out.data(step.args.delta.dtype);
    Launch::pgd_step(step.args, step.placed.x);
    out.finish();
  }

  static Tensor pgd_step(const Tensor& delta, const Tensor& grad, double step_size, double eps,
                         double norm, bool token, const OptionalTensor& offsets,
                         const OptionalTensor& mask, const OptionalTensor& step_per_group,
                         const OptionalTensor& eps_per_group, double top, int64_t max_groups,
                         const OptionalTensor& x0, EMBATTLE_BOUNDS,
                         const OptionalTensor& nonfinite) {
    Step step(Placed("pgd_step", "delta", delta, eps, norm, token, offsets, mask, eps_per_group,
                     {x0, lower, upper, lower_per_element, upper_per_element}),
              grad, token, {step_size, step_per_group, top, max_groups, nonfinite});
    const Written out(step.placed.x);
    run_step(step, out);
    return out.memory;
  }

  static void pgd_step_(const Tensor& delta, const Tensor& grad, double step_size, double eps,
                        double norm, bool token, const OptionalTensor& offsets,
                        const OptionalTensor& mask, const OptionalTensor& step_per_group,
                        const OptionalTensor& eps_per_group, double top, int64_t max_groups,
                        const OptionalTensor& x0, EMBATTLE_BOUNDS,
                        const OptionalTensor& nonfinite) {
    const char* op = "pgd_step_";
    Step step(Placed(op, "delta", delta, eps, norm, token, offsets, mask, eps_per_group,
                     {x0, lower, upper, lower_per_element, upper_per_element}),
              grad, token, {step_size, step_per_group, top, max_groups, nonfinite});
    run_step(step, Written(op, "delta", delta, step.placed.x));
  }

  // With a ball of one radius, and nothing else.
  static Step plain_step(const char* op, const Tensor& delta, const Tensor& grad, double step_size,
                         double eps, double norm, bool token, const OptionalTensor& nonfinite) {
    const OptionalTensor none;
    const std::optional<double> no_bound;
    return Step(Placed(op, "delta", delta, eps, norm, token, none, none, none,
                       {none, no_bound, no_bound, none, none}),
                grad, token, {step_size, none, 1, -1, nonfinite});
  }

  static Tensor pgd_step_plain(const Tensor& delta, const Tensor& grad, double step_size,
                               double eps, double norm, bool token,
                               const OptionalTensor& nonfinite) {
    Step step = plain_step("pgd_step", delta, grad, step_size, eps, norm, token, nonfinite);
    const Written out(step.placed.x);
    run_step(step, out);
    return out.memory;
  }

  static void pgd_step_plain_(const Tensor& delta, const Tensor& grad, double step_size, double eps,
                              double norm, bool token, const OptionalTensor& nonfinite) {
    const char* op = "pgd_step_";
    Step step = plain_step(op, delta, grad, step_size, eps, norm, token, nonfinite);
    run_step(step, Written(op, "delta", delta, step.placed.x));
  }

  static Tensor checked_velocity(const char* op, const Tensor& velocity, const Tensor& delta) {
    check_same_shape(op, "velocity", velocity, "delta", delta);
    check_device(op, "velocity", velocity, "delta", delta);
    return packed(velocity);
  }

  static void run_momentum(Step& step, double decay, bool apgd, const Tensor& velocity, Written out,
                           Written velocity_out) {
    StepArgs& args = step.args;
    if (!std::isfinite(decay))
      fail("embattle.", step.placed.op, ": decay must be finite, got ", decay);
    args.decay = decay;
    args.apgd = apgd;
    args.velocity = {velocity.const_data_ptr(), float_dtype(step.placed.op, "velocity", velocity)};
    args.out = out.data(args.delta.dtype);
    args.velocity_out = velocity_out.data(args.velocity.dtype);
    Launch::momentum_step(args, step.placed.x);
    out.finish();
    velocity_out.finish();
  }

  static std::tuple<Tensor, Tensor> momentum_step(
      const Tensor& delta, const Tensor& velocity_, const Tensor& grad, double decay,
      double step_size, double eps, double norm, bool apgd, bool token,
      const OptionalTensor& offsets, const OptionalTensor& mask,
      const OptionalTensor& step_per_group, const OptionalTensor& eps_per_group, double top,
      const OptionalTensor& x0, EMBATTLE_BOUNDS, const OptionalTensor& nonfinite) {
    const char* op = "momentum_step";
    Step step(Placed(op, "delta", delta, eps, norm, token, offsets, mask, eps_per_group,
                     {x0, lower, upper, lower_per_element, upper_per_element}),
              grad, token, {step_size, step_per_group, top, -1, nonfinite});
    const Tensor velocity = checked_velocity(op, velocity_, step.placed.x);
    const Written out(step.placed.x), velocity_out(velocity);
    run_momentum(step, decay, apgd, velocity, out, velocity_out);
    return {out.memory, velocity_out.memory};
  }

  static void momentum_step_(const Tensor& delta, const Tensor& velocity_, const Tensor& grad,
                             double decay, double step_size, double eps, double norm, bool apgd,
                             bool token, const OptionalTensor& offsets, const OptionalTensor& mask,
                             const OptionalTensor& step_per_group,
                             const OptionalTensor& eps_per_group, double top,
                             const OptionalTensor& x0, EMBATTLE_BOUNDS,
                             const OptionalTensor& nonfinite) {
    const char* op = "momentum_step_";
    Step step(Placed(op, "delta", delta, eps, norm, token, offsets, mask, eps_per_group,
                     {x0, lower, upper, lower_per_element, upper_per_element}),
              grad, token, {step_size, step_per_group, top, -1, nonfinite});
    const Tensor velocity = checked_velocity(op, velocity_, step.placed.x);
    if (velocity_.const_data_ptr() == delta.const_data_ptr() && delta.numel() > 0)
      fail("embattle.", op, ": velocity is written beside delta, got delta itself: pass a clone");
    run_momentum(step, decay, apgd, velocity, Written(op, "delta", delta, step.placed.x),
                 Written(op, "velocity", velocity_, velocity));
  }

  static NoiseArgs noise_args(const Placed& placed, Written& out, const Tensor& key) {
    NoiseArgs args;
    args.groups = placed.groups;
    args.norm = placed.norm;
    args.out = out.data(float_dtype(placed.op, "x", placed.x));
    args.key = static_cast<const int64_t*>(key.const_data_ptr());
    args.key_on_host = key.is_cpu();
    args.eps = placed.eps.value;
    args.box = placed.box;
    return args;
  }

  static Tensor checked_key(const char* op, const Tensor& key, const Tensor& like) {
    if (key.scalar_type() != ScalarType::Long || key.numel() != 2)
      fail("embattle.", op, ": key must be int64 of shape [2], got ",
           torch::headeronly::toString(key.scalar_type()), " ", shape_of(key));
    Launch::check_key(op, key, like);
    return packed(key);
  }

  static Tensor random_start(const Tensor& like, const Tensor& key_, double eps, double norm,
                             bool token, const OptionalTensor& offsets, const OptionalTensor& mask,
                             const OptionalTensor& eps_per_group, const OptionalTensor& x0,
                             EMBATTLE_BOUNDS) {
    const char* op = "random_start";
    const Placed placed(op, "like", like, eps, norm, token, offsets, mask, eps_per_group,
                        {x0, lower, upper, lower_per_element, upper_per_element});
    placed.eps.require(op, "eps", "be finite", is_finite);
    const Tensor key = checked_key(op, key_, placed.x);
    Written out(placed.x);
    Launch::random_start(noise_args(placed, out, key), placed.x);
    return out.memory;
  }

  static void run_noise(const Placed& placed, const Tensor& key_, double std,
                        const OptionalTensor& std_per_group, Written out) {
    const Strength deviation(placed.op, "std", std, std_per_group, placed.x, placed.groups.groups);
    deviation.require(placed.op, "std", "not be negative", not_negative);
    const Tensor key = checked_key(placed.op, key_, placed.x);
    NoiseArgs args = noise_args(placed, out, key);
    args.x = {placed.x.const_data_ptr(), args.out.dtype};
    args.std = deviation.value;
    Launch::gaussian_noise(args, placed.x);
    out.finish();
  }

  static Tensor gaussian_noise(const Tensor& x, const Tensor& key, double std, double eps,
                               double norm, bool token, const OptionalTensor& offsets,
                               const OptionalTensor& mask, const OptionalTensor& std_per_group,
                               const OptionalTensor& eps_per_group, const OptionalTensor& x0,
                               EMBATTLE_BOUNDS) {
    const Placed placed("gaussian_noise", "x", x, eps, norm, token, offsets, mask, eps_per_group,
                        {x0, lower, upper, lower_per_element, upper_per_element});
    const Written out(placed.x);
    run_noise(placed, key, std, std_per_group, out);
    return out.memory;
  }

  static void gaussian_noise_(const Tensor& x, const Tensor& key, double std, double eps,
                              double norm, bool token, const OptionalTensor& offsets,
                              const OptionalTensor& mask, const OptionalTensor& std_per_group,
                              const OptionalTensor& eps_per_group, const OptionalTensor& x0,
                              EMBATTLE_BOUNDS) {
    const char* op = "gaussian_noise_";
    const Placed placed(op, "x", x, eps, norm, token, offsets, mask, eps_per_group,
                        {x0, lower, upper, lower_per_element, upper_per_element});
    run_noise(placed, key, std, std_per_group, Written(op, "x", x, placed.x));
  }
};

// Registers the group ops of one device; within STABLE_TORCH_LIBRARY_IMPL(embattle, <key>, m).
#define EMBATTLE_REGISTER_GROUP_OPS(m, Launch)                                        \
  m.impl("group_norm", TORCH_BOX(&embattle::GroupOps<Launch>::group_norm));           \
  m.impl("project", TORCH_BOX(&embattle::GroupOps<Launch>::project));                 \
  m.impl("project_constant", TORCH_BOX(&embattle::GroupOps<Launch>::project));        \
  m.impl("project_plain", TORCH_BOX(&embattle::GroupOps<Launch>::project_plain));     \
  m.impl("project_", TORCH_BOX(&embattle::GroupOps<Launch>::project_));               \
  m.impl("pgd_step", TORCH_BOX(&embattle::GroupOps<Launch>::pgd_step));               \
  m.impl("pgd_step_", TORCH_BOX(&embattle::GroupOps<Launch>::pgd_step_));             \
  m.impl("pgd_step_plain", TORCH_BOX(&embattle::GroupOps<Launch>::pgd_step_plain));   \
  m.impl("pgd_step_plain_", TORCH_BOX(&embattle::GroupOps<Launch>::pgd_step_plain_)); \
  m.impl("momentum_step", TORCH_BOX(&embattle::GroupOps<Launch>::momentum_step));     \
  m.impl("momentum_step_", TORCH_BOX(&embattle::GroupOps<Launch>::momentum_step_));   \
  m.impl("random_start", TORCH_BOX(&embattle::GroupOps<Launch>::random_start));       \
  m.impl("gaussian_noise", TORCH_BOX(&embattle::GroupOps<Launch>::gaussian_noise));   \
  m.impl("gaussian_noise_", TORCH_BOX(&embattle::GroupOps<Launch>::gaussian_noise_))

}  // namespace embattle
