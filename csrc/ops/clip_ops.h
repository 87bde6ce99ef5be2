// The ops on per-sample gradients for any device: check, allocate, launch. Dim 0 of every tensor of
// a list is the batch.
#pragma once

#include "../launch_clip.h"
#include "results.h"

#define EMBATTLE_PER_SAMPLE_NORM(A) A(std::vector<Tensor>, grads)
#define EMBATTLE_CLIP_AND_SUM(A)   \
  A(std::vector<Tensor>, grads)    \
  A(std::vector<double>, max_norm) \
  A(std::string, mode, "flat")     \
  A(OptionalTensor, weights, None) \
  A(double, gamma, 0.01)
#define EMBATTLE_LINEAR_GRAD_NORM(A) \
  A(Tensor, input) A(Tensor, grad_output) A(bool, bias, False) A(std::string, method, "auto")

namespace embattle {

EMBATTLE_ARGUMENTS(PerSampleNorm, "per_sample_norm", EMBATTLE_PER_SAMPLE_NORM);
EMBATTLE_ARGUMENTS(ClipAndSum, "clip_and_sum", EMBATTLE_CLIP_AND_SUM);
EMBATTLE_ARGUMENTS(LinearGradNorm, "linear_grad_norm", EMBATTLE_LINEAR_GRAD_NORM);

// A checked list, and what keeps its memory alive.
struct Samples {
  std::vector<Tensor> held;
  std::vector<SampleTensor> tensors;
  int64_t batch = 0;
  bool any_f64 = false;
};

inline Samples checked_samples(const char* op, const std::vector<Tensor>& grads) {
  if (grads.empty()) refuse(op, "grads must hold at least one tensor");
  Samples samples;
  samples.held.reserve(grads.size());
  samples.tensors.reserve(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    const Tensor& grad = grads[i];
    if (grad.dim() == 0) refuse(op, "grads[", i, "] has no dim: dim 0 must be the batch");
    if (i == 0)
      samples.batch = grad.size(0);
    else if (grad.size(0) != samples.batch)
      refuse(op, "all grads must have one batch size, got ", samples.batch, " in grads[0] and ",
             grad.size(0), " in grads[", i, "]");
    check_device(op, "every one of grads", grad, "grads[0]", grads[0]);
    SampleTensor tensor;
    tensor.width = extent(grad, 1, grad.dim());
    samples.held.push_back(packed(grad));
    tensor.grad = {samples.held[i].const_data_ptr(), float_dtype(op, "grads", grad)};
    samples.any_f64 |= tensor.grad.dtype == Dtype::f64;
    samples.tensors.push_back(tensor);
  }
  return samples;
}

inline ClipMode checked_mode(const char* op, const std::string& mode) {
  if (mode == "flat") return ClipMode::flat;
  if (mode == "per_layer") return ClipMode::per_layer;
  if (mode == "automatic") return ClipMode::automatic;
  refuse(op, "mode must be 'flat', 'per_layer' or 'automatic', got '", mode, "'");
}

// One bound, or one for each tensor in per_layer mode.
inline std::vector<double> checked_bounds(const char* op, std::vector<double> bounds, ClipMode mode,
                                          size_t tensors) {
  if (mode == ClipMode::per_layer && bounds.size() == 1) bounds.resize(tensors, bounds[0]);
  if (bounds.size() != (mode == ClipMode::per_layer ? tensors : 1))
    refuse(op, "max_norm must be one number",
           mode == ClipMode::per_layer ? ", or one for each tensor" : "", ", got ", bounds.size());
  for (const double bound : bounds) {
    if (!(bound >= 0)) refuse(op, "max_norm must not be negative, got ", bound);
    if (mode == ClipMode::automatic && std::isinf(bound))
      refuse(op, "max_norm must be finite in mode 'automatic', got ", bound);
  }
  return bounds;
}

inline LinearMethod checked_method(const char* op, const std::string& method) {
  if (method == "auto") return LinearMethod::automatic;
  if (method == "gram") return LinearMethod::gram;
  if (method == "direct") return LinearMethod::direct;
  refuse(op, "method must be 'auto', 'gram' or 'direct', got '", method, "'");
}

template <class Launch>
struct ClipOps {
  static Tensor per_sample_norm(const PerSampleNorm& a) {
    const Samples samples = checked_samples(a.op, a.grads);
    SampleNormArgs args;
    args.tensors = samples.tensors.data();
    args.count = static_cast<int64_t>(samples.tensors.size());
    args.batch = samples.batch;
    const Norms norms(samples.held[0], {samples.batch}, samples.any_f64);
    args.norms = norms.data;
    Launch::per_sample_norm(a.op, args, norms.tensor);
    return norms.tensor;
  }

  static std::tuple<std::vector<Tensor>, Tensor> clip_and_sum(const ClipAndSum& a) {
    Samples samples = checked_samples(a.op, a.grads);
    ClipArgs args;
    args.mode = checked_mode(a.op, a.mode);
    const std::vector<double> bounds = checked_bounds(a.op, a.max_norm, args.mode, a.grads.size());
    if (args.mode == ClipMode::automatic && !(a.gamma >= 0 && std::isfinite(a.gamma)))
      refuse(a.op, "gamma must be finite and not negative, got ", a.gamma);
    const OptionalTensor weights = packed(a.weights);
    if (weights) {
      if (weights->dim() != 1 || weights->size(0) != samples.batch)
        refuse(a.op, "weights must have shape [", samples.batch, "], got ", shape_of(*weights));
      check_device(a.op, "weights", *weights, "grads", samples.held[0]);
      args.weights = {weights->const_data_ptr(), float_dtype(a.op, "weights", *weights)};
    }

    std::vector<Tensor> sums;
    sums.reserve(a.grads.size());
    for (size_t i = 0; i < a.grads.size(); ++i) {
      const auto sizes = a.grads[i].sizes();
      sums.push_back(new_tensor(a.grads[i], {sizes.data() + 1, sizes.size() - 1}));
      samples.tensors[i].sum = {sums[i].mutable_data_ptr(), samples.tensors[i].grad.dtype};
    }
    args.tensors = samples.tensors.data();
    args.count = static_cast<int64_t>(samples.tensors.size());
    args.batch = samples.batch;
    args.max_norm = bounds.data();
    args.gamma = a.gamma;
    std::vector<int64_t> shape{samples.batch};
    if (args.mode == ClipMode::per_layer) shape.push_back(args.count);
    const Norms norms(samples.held[0], shape, samples.any_f64);
    args.norms = norms.data;
    Launch::clip_and_sum(a.op, args, norms.tensor);
    return {std::move(sums), norms.tensor};
  }

  static Tensor linear_grad_norm(const LinearGradNorm& a) {
    const Tensor input = checked_packed(a.op, "input", a.input);
    const Tensor grad = checked_packed(a.op, "grad_output", a.grad_output);
    const int64_t dims = input.dim();
    if (dims < 2 || grad.dim() != dims || !same_sizes(input, grad, dims - 1))
      refuse(a.op, "input and grad_output must have shapes [B, *, I] and [B, *, O], got ",
             shape_of(input), " and ", shape_of(grad));
    check_device(a.op, "grad_output", grad, "input", input);
    LinearNormArgs args;
    args.input = {input.const_data_ptr(), float_dtype(a.op, "input", input)};
    args.grad = {grad.const_data_ptr(), float_dtype(a.op, "grad_output", grad)};
    args.batch = input.size(0);
    args.tokens = extent(input, 1, dims - 1);
    args.inputs = input.size(dims - 1);
    args.outputs = grad.size(dims - 1);
    args.bias = a.bias;
    args.method = checked_method(a.op, a.method);
    const Norms norms(input, {args.batch},
                      args.input.dtype == Dtype::f64 || args.grad.dtype == Dtype::f64);
    args.norms = norms.data;
    Launch::linear_grad_norm(a.op, args, norms.tensor);
    return norms.tensor;
  }

  template <Register kWhat>
  static void add(Ops<kWhat> ops) {
    ops.template op<&per_sample_norm>("per_sample_norm");
    ops.template op<&clip_and_sum>("clip_and_sum");
    ops.template op<&linear_grad_norm>("linear_grad_norm");
  }
};

}  // namespace embattle
