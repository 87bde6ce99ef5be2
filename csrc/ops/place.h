// What the group ops share: the arguments of groups, balls and boxes, and their checks.
//
//   norm           1., 2. or inf
//   token          every vector of the last dim is a group; otherwise everything but dim 0 is one
//   offsets        [groups + 1] int64, ragged groups of packed rows; overrides `token`
//   mask           bool, x.shape[:-1]; masked-out rows take no part and get no perturbation
//   *_per_group    [groups] or one element; overrides the float beside it
//   x0             the ball's centre: the first argument and the result are then x = x0 + delta
//   lower, upper   the box the result lies in; None for no bound
//   *_per_element  [] or [1] or x.shape; overrides the float beside it
//   nonfinite      int32 [groups], incremented where the gradient holds a NaN or an Inf
//   key            int64 [2]: what Philox is keyed with
//
// What each means is written out in python/embattle/ops/reference/.
#pragma once

#include "results.h"

#define EMBATTLE_GROUPS(A) A(double, norm, 2.) A(bool, token, False)
#define EMBATTLE_RAGGED(A) A(OptionalTensor, offsets, None) A(OptionalTensor, mask, None)
#define EMBATTLE_BALL(A)                     \
  EMBATTLE_RAGGED(A)                         \
  A(OptionalTensor, eps_per_group, None)     \
  A(OptionalTensor, x0, None)                \
  A(OptionalNumber, lower, None)             \
  A(OptionalNumber, upper, None)             \
  A(OptionalTensor, lower_per_element, None) \
  A(OptionalTensor, upper_per_element, None)

namespace embattle {

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
      refuse(op, name, " must be a number or have one value for each of ", groups, " groups, got ",
             shape_of(*per_group));
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
      if (!good(x)) refuse(op, name, " must ", what, ", got ", x);
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

inline bool not_negative(double x) { return x >= 0; }
inline bool is_finite(double x) { return std::isfinite(x); }

// x, its groups, the ball and the box, with everything they point to.
struct Placed {
  const char* op;
  Tensor x;
  OptionalTensor offsets, mask;
  ProjectArgs args;  // without `out`
  Strength eps;
  OptionalTensor x0, lower, upper;

  // name, given: the argument that is placed.
  template <class Args>
  Placed(const Args& a, const char* name, const Tensor& given)
      : op(a.op),
        x(checked_packed(op, name, given)),
        offsets(packed(a.offsets)),
        mask(packed(a.mask)),
        args{.groups = checked_groups(op, name, x, a.token, offsets, mask),
             .norm = checked_norm(op, a.norm)},
        eps(op, "eps", a.eps, a.eps_per_group, x, args.groups.groups) {
    eps.require(op, "eps", "not be negative", not_negative);
    args.eps = eps.value;
    args.x = {x.const_data_ptr(), float_dtype(op, name, x)};
    Box& box = args.box;
    if (a.x0) {
      check_same_shape(op, "x0", *a.x0, name, x);
      x0 = of_type(*a.x0, "x0", name);
      box.x0 = {x0->const_data_ptr(), args.x.dtype};
    }
    bound(a.lower, a.lower_per_element, "lower", name, &box.lower_value, &lower, &box.lower,
          &box.lower_broadcast);
    bound(a.upper, a.upper_per_element, "upper", name, &box.upper_value, &upper, &box.upper,
          &box.upper_broadcast);
    if (box.lower_value > box.upper_value)
      refuse(op, "lower must not be above upper, got ", box.lower_value, " and ", box.upper_value);
  }

  // What surrounds x lies apart from what is written.
  void apart(const Arguments& a, const char* name, const Written& out) const {
    out.apart(a, name, "x0", x0);
    out.apart(a, name, "lower", lower);
    out.apart(a, name, "upper", upper);
  }

 private:
  Tensor of_type(const Tensor& t, const char* what, const char* name) const {
    float_dtype(op, what, t);
    check_device(op, what, t, name, x);
    return packed(t.scalar_type() == x.scalar_type() ? t : torch::stable::to(t, x.scalar_type()));
  }

  void bound(const OptionalNumber& number, const OptionalTensor& t, const char* what,
             const char* name, double* value, OptionalTensor* held, ConstData* data,
             bool* broadcast) const {
    if (!t) {
      if (number && *number != *number) refuse(op, what, " must not be a NaN");
      if (number) *value = *number;
      return;
    }
    *broadcast = t->numel() == 1 && t->dim() <= 1 && !same_shape(*t, x);
    if (!*broadcast) check_same_shape(op, what, *t, name, x);
    *held = of_type(*t, what, name);
    *data = {(*held)->const_data_ptr(), args.x.dtype};
  }
};

}  // namespace embattle
