// The ops on embedding tables: check, allocate, launch. Included once for each device; Device has
// the launchers. Values of indices are checked on the CPU only: on CUDA that would wait for the
// GPU.
#pragma once

#include "../checks.h"
#include "../launch_clip.h"

namespace embattle {
namespace {

// Indices as contiguous int64.
Tensor checked_indices(const char* op, const char* name, const Tensor& t) {
  check_defined(op, name, t);
  if (t.scalar_type() == ScalarType::Int)
    return packed(torch::stable::to(t, std::make_optional(ScalarType::Long)));
  if (t.scalar_type() != ScalarType::Long)
    fail("embattle.", op, ": ", name, " must be int64 or int32, got ",
         torch::headeronly::toString(t.scalar_type()));
  return packed(t);
}

const int64_t* values(const Tensor& t) { return static_cast<const int64_t*>(t.const_data_ptr()); }

void check_range(const char* op, const char* name, const Tensor& indices, int64_t lowest,
                 int64_t end) {
  if (!indices.is_cpu()) return;
  const int64_t* const index = values(indices);
  const int64_t n = indices.numel();
  bool inside = true;
  for (int64_t i = 0; i < n; ++i) inside &= index[i] >= lowest && index[i] < end;
  if (inside) return;
  for (int64_t i = 0; i < n; ++i)
    if (index[i] < lowest || index[i] >= end)
      fail("embattle.", op, ": ", name, " must lie in [", lowest, ", ", end, "), got ", index[i],
           " at position ", i);
}

// Rows of dim numbers, one for each index.
void check_rows(const char* op, const char* name, const Tensor& t, const Tensor& indices) {
  check_defined(op, name, t);
  check_defined(op, "indices", indices);
  bool fits = t.dim() == indices.dim() + 1;
  for (int64_t d = 0; fits && d < indices.dim(); ++d) fits = t.size(d) == indices.size(d);
  if (!fits)
    fail("embattle.", op, ": ", name, " must have the shape of indices and one more dim, ",
         shape_of(indices), " + [D], got ", shape_of(t));
}

void check_table(const char* op, const char* name, const Tensor& t) {
  check_defined(op, name, t);
  if (t.dim() != 2)
    fail("embattle.", op, ": ", name, " must have shape [rows, D], got ", shape_of(t));
}

template <class Device>
Tensor embedding_grad_norm(const Tensor& indices_, const Tensor& grad_, int64_t padding,
                           const OptionalTensor& offsets_, bool mean,
                           const OptionalTensor& weights_) {
  const char* op = "embedding_grad_norm";
  const Tensor indices = checked_indices(op, "indices", indices_);
  const Tensor grad = checked_packed(op, "grad_output", grad_);
  check_device(op, "indices", indices, "grad_output", grad);
  EmbeddingNormArgs args;
  args.grad = {grad.const_data_ptr(), float_dtype(op, "grad_output", grad)};
  args.indices = values(indices);
  args.padding = padding;
  OptionalTensor offsets, weights;
  if (offsets_) {
    offsets = checked_indices(op, "offsets", *offsets_);
    check_device(op, "offsets", *offsets, "grad_output", grad);
    if (grad.dim() != 2)
      fail("embattle.", op, ": grad_output must have shape [B, D] with offsets, got ",
           shape_of(grad));
    args.batch = grad.size(0);
    args.dim = grad.size(1);
    args.count = indices.numel();
    args.offsets = values(*offsets);
    const int64_t given = offsets->numel();
    if (indices.dim() != 1)
      fail("embattle.", op, ": indices must have one dim with offsets, got ", shape_of(indices));
    if (offsets->dim() != 1 || (given != args.batch && given != args.batch + 1))
      fail("embattle.", op, ": offsets must have shape [B] or [B + 1] for B = ", args.batch,
           " bags, got ", shape_of(*offsets));
    args.closed = given == args.batch + 1;
    for (int64_t i = 0; offsets->is_cpu() && i < given; ++i) {
      const int64_t before = i == 0 ? 0 : args.offsets[i - 1];
      if (args.offsets[i] < before || args.offsets[i] > args.count || (i == 0 && args.offsets[0]))
        fail("embattle.", op, ": offsets must start at 0, not decrease, and end at most at ",
             args.count, ", the number of indices; got ", args.offsets[i], " at ", i);
    }
    if (args.closed && offsets->is_cpu()) args.count = args.offsets[args.batch];
  } else {
    check_rows(op, "grad_output", grad, indices);
    if (indices.dim() < 1)
      fail("embattle.", op, ": indices must have shape [B, *], got ", shape_of(indices));
    args.batch = grad.size(0);
    args.dim = grad.size(grad.dim() - 1);
    args.tokens = 1;
    for (int64_t d = 1; d < indices.dim(); ++d) args.tokens *= indices.size(d);
    if (mean) fail("embattle.", op, ": mode 'mean' needs offsets, got none");
  }
  if (weights_) {
    if (!offsets_ || mean)
      fail("embattle.", op, ": per_sample_weights needs offsets and mode 'sum', got ",
           mean ? "mode 'mean'" : "no offsets");
    weights = packed(*weights_);
    check_same_shape(op, "per_sample_weights", *weights, "indices", indices);
    check_device(op, "per_sample_weights", *weights, "grad_output", grad);
    args.weights = {weights->const_data_ptr(), float_dtype(op, "per_sample_weights", *weights)};
  }
  args.mean = mean;
  const bool wide = args.grad.dtype == Dtype::f64;
  Tensor norms =
      torch::stable::new_empty(grad, {args.batch}, wide ? ScalarType::Double : ScalarType::Float);
  args.norms = {norms.mutable_data_ptr(), wide ? Dtype::f64 : Dtype::f32};
  Device::embedding_grad_norm(args, norms);
  return norms;
}

template <class Device>
Tensor embedding_perturb(const Tensor& weight_, const Tensor& indices_, const Tensor& delta_,
                         const Tensor& inverse_) {
  const char* op = "embedding_perturb";
  check_table(op, "weight", weight_);
  check_table(op, "delta", delta_);
  if (delta_.size(1) != weight_.size(1))
    fail("embattle.", op, ": delta must have rows as long as weight's, ", weight_.size(1), ", got ",
         delta_.size(1));
  check_same_shape(op, "inverse", inverse_, "indices", indices_);
  const Tensor weight = packed(weight_), delta = packed(delta_);
  const Tensor indices = checked_indices(op, "indices", indices_);
  const Tensor inverse = checked_indices(op, "inverse", inverse_);
  check_device(op, "indices", indices, "weight", weight);
  check_device(op, "delta", delta, "weight", weight);
  check_device(op, "inverse", inverse, "weight", weight);
  check_range(op, "indices", indices, 0, weight.size(0));
  check_range(op, "inverse", inverse, -1, delta.size(0));
  const auto sizes = indices.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.push_back(weight.size(1));
  Tensor out = torch::stable::new_empty(weight, shape);
  PerturbArgs args;
  args.weight = {weight.const_data_ptr(), float_dtype(op, "weight", weight)};
  args.indices = values(indices);
  args.delta = {delta.const_data_ptr(), float_dtype(op, "delta", delta)};
  args.inverse = values(inverse);
  args.count = indices.numel();
  args.dim = weight.size(1);
  args.out = {out.mutable_data_ptr(), args.weight.dtype};
  Device::embedding_perturb(args, out);
  return out;
}

// The arguments of a sum by rows, and what keeps their memory alive.
struct Segments {
  Tensor grad, indices;
  OptionalTensor weights;
  SegmentSumArgs args;
};

// name, lowest: of the indices, and the smallest of them.
Segments checked_segments(const char* op, const Tensor& grad, const char* name,
                          const Tensor& indices, int64_t lowest, int64_t rows) {
  check_rows(op, "grad_output", grad, indices);
  Segments found{packed(grad), checked_indices(op, name, indices), {}, {}};
  check_device(op, name, found.indices, "grad_output", found.grad);
  check_range(op, name, found.indices, lowest, rows);
  SegmentSumArgs& args = found.args;
  args.grad = {found.grad.const_data_ptr(), float_dtype(op, "grad_output", found.grad)};
  args.inverse = values(found.indices);
  args.count = found.indices.numel();
  args.dim = grad.size(grad.dim() - 1);
  args.rows = rows;
  return found;
}

template <class Device>
Tensor summed(const char* op, Segments& segments) {
  SegmentSumArgs& args = segments.args;
  Tensor out = torch::stable::new_empty(segments.grad, {args.rows, args.dim});
  args.out = {out.mutable_data_ptr(), args.grad.dtype};
  Device::segment_sum(op, args, out);
  return out;
}

template <class Device>
Tensor embedding_perturb_backward(const Tensor& grad, const Tensor& inverse, int64_t rows) {
  const char* op = "embedding_perturb_backward";
  if (rows < 0) fail("embattle.", op, ": delta_rows must not be negative, got ", rows);
  Segments segments = checked_segments(op, grad, "inverse", inverse, -1, rows);
  return summed<Device>(op, segments);
}

// The gradients of samples that have a weight each, and one row that gets nothing.
Segments weighted_segments(const char* op, const Tensor& indices, const Tensor& grad, int64_t rows,
                           const OptionalTensor& weights, int64_t padding) {
  if (rows < 0) fail("embattle.", op, ": rows must not be negative, got ", rows);
  if (padding >= rows)
    fail("embattle.", op, ": padding_idx must be one of ", rows, " rows, got ", padding);
  Segments found = checked_segments(op, grad, "indices", indices, 0, rows);
  found.args.padding = padding;
  if (!weights) return found;
  if (indices.dim() < 1)
    fail("embattle.", op, ": indices must have shape [B, *] with weights, got ", shape_of(indices));
  if (weights->dim() != 1 || weights->size(0) != indices.size(0))
    fail("embattle.", op, ": weights must have shape [", indices.size(0), "], got ",
         shape_of(*weights));
  found.weights = packed(*weights);
  check_device(op, "weights", *found.weights, "grad_output", found.grad);
  found.args.weights = {found.weights->const_data_ptr(), float_dtype(op, "weights", *weights)};
  if (found.args.count > 0) found.args.tokens = found.args.count / indices.size(0);
  return found;
}

template <class Device>
Tensor embedding_grad_sum(const Tensor& indices, const Tensor& grad, int64_t rows,
                          const OptionalTensor& weights, int64_t padding) {
  const char* op = "embedding_grad_sum";
  Segments segments = weighted_segments(op, indices, grad, rows, weights, padding);
  return summed<Device>(op, segments);
}

template <class Device>
void rowwise_adagrad_(const Tensor& weight_, const Tensor& state_, const Tensor& indices_,
                      const Tensor& grad_, double lr, double eps,
                      const std::optional<double>& max_norm) {
  const char* op = "rowwise_adagrad_";
  check_table(op, "weight", weight_);
  check_defined(op, "state", state_);
  if (state_.dim() != 1 || state_.size(0) != weight_.size(0))
    fail("embattle.", op, ": state must have one number for each row of weight, [", weight_.size(0),
         "], got ", shape_of(state_));
  check_rows(op, "grad", grad_, indices_);
  if (grad_.size(grad_.dim() - 1) != weight_.size(1))
    fail("embattle.", op, ": grad must have rows as long as weight's, ", weight_.size(1), ", got ",
         grad_.size(grad_.dim() - 1));
  if (!std::isfinite(lr)) fail("embattle.", op, ": lr must be finite, got ", lr);
  if (!(eps >= 0)) fail("embattle.", op, ": eps must not be negative, got ", eps);
  if (max_norm && !(*max_norm >= 0))
    fail("embattle.", op, ": max_norm must not be negative, got ", *max_norm);
  const Tensor indices = checked_indices(op, "indices", indices_), grad = packed(grad_);
  check_device(op, "state", state_, "weight", weight_);
  check_device(op, "indices", indices, "weight", weight_);
  check_device(op, "grad", grad, "weight", weight_);
  check_range(op, "indices", indices, 0, weight_.size(0));
  check_writable(op, "weight", weight_);
  check_writable(op, "state", state_);
  // A table that is not contiguous is copied and written back.
  Tensor weight = packed(weight_), state = packed(state_);
  AdagradArgs args;
  args.weight = {weight.mutable_data_ptr(), float_dtype(op, "weight", weight)};
  args.state = {state.mutable_data_ptr(), float_dtype(op, "state", state)};
  args.indices = values(indices);
  args.rows = weight.size(0);
  args.grad = {grad.const_data_ptr(), float_dtype(op, "grad", grad)};
  args.count = indices.numel();
  args.dim = weight.size(1);
  args.lr = lr;
  args.eps = eps;
  args.max_norm = max_norm.value_or(std::numeric_limits<double>::infinity());
  Device::rowwise_adagrad(args, weight);
  if (!weight_.is_contiguous()) {
    Tensor target = weight_;
    torch::stable::copy_(target, weight);
  }
  if (!state_.is_contiguous()) {
    Tensor target = state_;
    torch::stable::copy_(target, state);
  }
}

}  // namespace
}  // namespace embattle

#define EMBATTLE_REGISTER_EMBEDDING_OPS(m, Device)                                                \
  m.impl("embedding_grad_norm", TORCH_BOX(&embattle::embedding_grad_norm<Device>));               \
  m.impl("embedding_perturb", TORCH_BOX(&embattle::embedding_perturb<Device>));                   \
  m.impl("embedding_perturb_backward", TORCH_BOX(&embattle::embedding_perturb_backward<Device>)); \
  m.impl("embedding_grad_sum", TORCH_BOX(&embattle::embedding_grad_sum<Device>));                 \
  m.impl("rowwise_adagrad_", TORCH_BOX(&embattle::rowwise_adagrad_<Device>))
