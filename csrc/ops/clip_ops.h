// The ops on per-sample gradients: check, allocate, launch. Included once for each device; Device
// has the launchers.
#pragma once

#include "../checks.h"
#include "../launch_clip.h"

namespace embattle {
namespace {

// A checked list, and what keeps its memory alive.
struct Samples {
  std::vector<Tensor> held;
  std::vector<SampleTensor> tensors;
  int64_t batch = 0;
  bool any_f64 = false;
};

Samples checked_samples(const char* op, const std::vector<Tensor>& grads) {
  if (grads.empty()) fail("embattle.", op, ": grads must hold at least one tensor");
  Samples samples;
  samples.held.reserve(grads.size());
  samples.tensors.reserve(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    const auto sizes = grads[i].sizes();
    if (sizes.empty())
      fail("embattle.", op, ": grads[", i, "] has no dim: dim 0 must be the batch");
    if (i == 0)
      samples.batch = sizes[0];
    else if (sizes[0] != samples.batch)
      fail("embattle.", op, ": all grads must have one batch size, got ", samples.batch,
           " in grads[0] and ", sizes[0], " in grads[", i, "]");
    check_device(op, "every one of grads", grads[i], "grads[0]", grads[0]);
    SampleTensor tensor;
    tensor.width = 1;
    for (size_t d = 1; d < sizes.size(); ++d) tensor.width *= sizes[d];
    samples.held.push_back(packed(grads[i]));
    tensor.grad = {samples.held[i].const_data_ptr(), float_dtype(op, "grads", grads[i])};
    samples.any_f64 |= tensor.grad.dtype == Dtype::f64;
    samples.tensors.push_back(tensor);
  }
  return samples;
}

template <class Device>
Tensor per_sample_norm(const std::vector<Tensor>& grads) {
  const Samples samples = checked_samples("per_sample_norm", grads);
  SampleNormArgs args;
  args.tensors = samples.tensors.data();
  args.count = static_cast<int64_t>(samples.tensors.size());
  args.batch = samples.batch;
  Tensor norms = torch::stable::new_empty(samples.held[0], {samples.batch},
                                          samples.any_f64 ? ScalarType::Double : ScalarType::Float);
  args.norms = {norms.mutable_data_ptr(), samples.any_f64 ? Dtype::f64 : Dtype::f32};
  Device::per_sample_norm(args, norms);
  return norms;
}

ClipMode checked_mode(const char* op, const std::string& mode) {
  if (mode == "flat") return ClipMode::flat;
  if (mode == "per_layer") return ClipMode::per_layer;
  if (mode == "automatic") return ClipMode::automatic;
  fail("embattle.", op, ": mode must be 'flat', 'per_layer' or 'automatic', got '", mode, "'");
}

// One bound, or one for each tensor in per_layer mode.
std::vector<double> checked_bounds(const char* op, std::vector<double> bounds, ClipMode mode,
                                   size_t tensors) {
  if (mode == ClipMode::per_layer && bounds.size() == 1) bounds.resize(tensors, bounds[0]);
  if (bounds.size() != (mode == ClipMode::per_layer ? tensors : 1))
    fail("embattle.", op, ": max_norm must be one number",
         mode == ClipMode::per_layer ? ", or one for each tensor" : "", ", got ", bounds.size());
  for (const double bound : bounds) {
    if (!(bound >= 0)) fail("embattle.", op, ": max_norm must not be negative, got ", bound);
    if (mode == ClipMode::automatic && std::isinf(bound))
      fail("embattle.", op, ": max_norm must be finite in mode 'automatic', got ", bound);
  }
  return bounds;
}

template <class Device>
std::tuple<std::vector<Tensor>, Tensor> clip_and_sum(const std::vector<Tensor>& grads,
                                                     const std::vector<double>& max_norm,
                                                     const std::string& mode_name,
                                                     const OptionalTensor& weights_, double gamma) {
  const char* op = "clip_and_sum";
  Samples samples = checked_samples(op, grads);
  ClipArgs args;
  args.mode = checked_mode(op, mode_name);
  const std::vector<double> bounds = checked_bounds(op, max_norm, args.mode, grads.size());
  if (args.mode == ClipMode::automatic && !(gamma >= 0 && std::isfinite(gamma)))
    fail("embattle.", op, ": gamma must be finite and not negative, got ", gamma);
  const OptionalTensor weights = packed(weights_);
  if (weights) {
    if (weights->dim() != 1 || weights->size(0) != samples.batch)
      fail("embattle.", op, ": weights must have shape [", samples.batch, "], got ",
           shape_of(*weights));
    check_device(op, "weights", *weights, "grads", samples.held[0]);
    args.weights = {weights->const_data_ptr(), float_dtype(op, "weights", *weights)};
  }

  std::vector<Tensor> sums;
  sums.reserve(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    const auto sizes = grads[i].sizes();
    sums.push_back(torch::stable::new_empty(
        grads[i], torch::headeronly::IntHeaderOnlyArrayRef(sizes.data() + 1, sizes.size() - 1)));
    samples.tensors[i].sum = {sums[i].mutable_data_ptr(), samples.tensors[i].grad.dtype};
  }
  args.tensors = samples.tensors.data();
  args.count = static_cast<int64_t>(samples.tensors.size());
  args.batch = samples.batch;
  args.max_norm = bounds.data();
  args.gamma = gamma;
  const ScalarType norm_type = samples.any_f64 ? ScalarType::Double : ScalarType::Float;
  Tensor norms =
      args.mode == ClipMode::per_layer
          ? torch::stable::new_empty(samples.held[0], {samples.batch, args.count}, norm_type)
          : torch::stable::new_empty(samples.held[0], {samples.batch}, norm_type);
  args.norms = {norms.mutable_data_ptr(), samples.any_f64 ? Dtype::f64 : Dtype::f32};
  Device::clip_and_sum(args, norms);
  return {std::move(sums), std::move(norms)};
}

LinearMethod checked_method(const char* op, const std::string& method) {
  if (method == "auto") return LinearMethod::automatic;
  if (method == "gram") return LinearMethod::gram;
  if (method == "direct") return LinearMethod::direct;
  fail("embattle.", op, ": method must be 'auto', 'gram' or 'direct', got '", method, "'");
}

template <class Device>
Tensor linear_grad_norm(const Tensor& input_, const Tensor& grad_, bool bias,
                        const std::string& method) {
  const char* op = "linear_grad_norm";
  const Tensor input = checked_packed(op, "input", input_);
  const Tensor grad = checked_packed(op, "grad_output", grad_);
  const int64_t dims = input.dim();
  bool fits = dims >= 2 && grad.dim() == dims;
  for (int64_t d = 0; fits && d + 1 < dims; ++d) fits = input.size(d) == grad.size(d);
  if (!fits)
    fail("embattle.", op, ": input and grad_output must have shapes [B, *, I] and [B, *, O], got ",
         shape_of(input), " and ", shape_of(grad));
  check_device(op, "grad_output", grad, "input", input);
  LinearNormArgs args;
  args.input = {input.const_data_ptr(), float_dtype(op, "input", input)};
  args.grad = {grad.const_data_ptr(), float_dtype(op, "grad_output", grad)};
  args.batch = input.size(0);
  args.tokens = 1;
  for (int64_t d = 1; d + 1 < dims; ++d) args.tokens *= input.size(d);
  args.inputs = input.size(dims - 1);
  args.outputs = grad.size(dims - 1);
  args.bias = bias;
  args.method = checked_method(op, method);
  const bool wide = args.input.dtype == Dtype::f64 || args.grad.dtype == Dtype::f64;
  Tensor norms =
      torch::stable::new_empty(input, {args.batch}, wide ? ScalarType::Double : ScalarType::Float);
  args.norms = {norms.mutable_data_ptr(), wide ? Dtype::f64 : Dtype::f32};
  Device::linear_grad_norm(args, norms);
  return norms;
}

}  // namespace
}  // namespace embattle

#define EMBATTLE_REGISTER_CLIP_OPS(m, Device)                               \
  m.impl("per_sample_norm", TORCH_BOX(&embattle::per_sample_norm<Device>)); \
  m.impl("clip_and_sum", TORCH_BOX(&embattle::clip_and_sum<Device>));       \
  m.impl("linear_grad_norm", TORCH_BOX(&embattle::linear_grad_norm<Device>))
