// The ops on embedding tables for any device: check, allocate, launch. Their cost follows the rows
// touched, never the table. Values of indices are checked on the CPU only: on CUDA that would wait
// for the GPU.
#pragma once

#include "../launch_clip.h"
#include "results.h"

#define EMBATTLE_EMBEDDING_GRAD_NORM(A) \
  A(Tensor, indices)                    \
  A(Tensor, grad_output)                \
  A(int64_t, padding_idx, -1)           \
  A(OptionalTensor, offsets, None)      \
  A(bool, mean, False)                  \
  A(OptionalTensor, per_sample_weights, None)
#define EMBATTLE_EMBEDDING_GRAD_SUM(A) \
  A(Tensor, indices)                   \
  A(Tensor, grad_output)               \
  A(int64_t, rows)                     \
  A(OptionalTensor, weights, None)     \
  A(int64_t, padding_idx, -1)
#define EMBATTLE_EMBEDDING_PERTURB(A) \
  A(Tensor, weight) A(Tensor, indices) A(Tensor, delta) A(Tensor, inverse)
#define EMBATTLE_EMBEDDING_PERTURB_BACKWARD(A) \
  A(Tensor, grad_output) A(Tensor, inverse) A(int64_t, delta_rows)
#define EMBATTLE_ROWWISE_ADAGRAD(A) \
  A(Tensor, weight)                 \
  A(Tensor, state)                  \
  A(Tensor, indices)                \
  A(Tensor, grad)                   \
  A(double, lr)                     \
  A(double, eps, 1e-8)              \
  A(OptionalNumber, max_norm, None)

namespace embattle {

EMBATTLE_ARGUMENTS(EmbeddingGradNorm, "embedding_grad_norm", EMBATTLE_EMBEDDING_GRAD_NORM);
EMBATTLE_ARGUMENTS(EmbeddingGradSum, "embedding_grad_sum", EMBATTLE_EMBEDDING_GRAD_SUM);
EMBATTLE_ARGUMENTS(EmbeddingGradRows, "embedding_grad_rows", EMBATTLE_EMBEDDING_GRAD_SUM);
EMBATTLE_ARGUMENTS(EmbeddingPerturb, "embedding_perturb", EMBATTLE_EMBEDDING_PERTURB);
EMBATTLE_ARGUMENTS(EmbeddingPerturbBackward, "embedding_perturb_backward",
                   EMBATTLE_EMBEDDING_PERTURB_BACKWARD);
EMBATTLE_ARGUMENTS(RowwiseAdagrad, "rowwise_adagrad", EMBATTLE_ROWWISE_ADAGRAD);
template <>
inline constexpr int kWritten<RowwiseAdagrad> = 2;

// Indices as contiguous int64.
inline Tensor checked_indices(const char* op, const char* name, const Tensor& t) {
  check_defined(op, name, t);
  if (t.scalar_type() == ScalarType::Int)
    return packed(torch::stable::to(t, std::make_optional(ScalarType::Long)));
  if (t.scalar_type() != ScalarType::Long)
    refuse(op, name, " must be int64 or int32, got ", torch::headeronly::toString(t.scalar_type()));
  return packed(t);
}

inline const int64_t* values(const Tensor& t) {
  return static_cast<const int64_t*>(t.const_data_ptr());
}

inline void check_range(const char* op, const char* name, const Tensor& indices, int64_t lowest,
                        int64_t end) {
  if (!indices.is_cpu()) return;
  const int64_t* const index = values(indices);
  const int64_t n = indices.numel();
  bool inside = true;
  for (int64_t i = 0; i < n; ++i) inside &= index[i] >= lowest && index[i] < end;
  if (inside) return;
  for (int64_t i = 0; i < n; ++i)
    if (index[i] < lowest || index[i] >= end)
      refuse(op, name, " must lie in [", lowest, ", ", end, "), got ", index[i], " at position ",
             i);
}

// Rows of dim numbers, one for each index.
inline void check_rows(const char* op, const char* name, const Tensor& t, const Tensor& indices) {
  check_defined(op, name, t);
  check_defined(op, "indices", indices);
  if (t.dim() != indices.dim() + 1 || !same_sizes(t, indices, indices.dim()))
    refuse(op, name, " must have the shape of indices and one more dim, ", shape_of(indices),
           " + [D], got ", shape_of(t));
}

inline void check_table(const char* op, const char* name, const Tensor& t) {
  check_defined(op, name, t);
  if (t.dim() != 2) refuse(op, name, " must have shape [rows, D], got ", shape_of(t));
}

// The arguments of a sum by rows, and what keeps their memory alive.
struct Segments {
  Tensor grad, indices;
  OptionalTensor weights;
  SegmentSumArgs args;
};

// name, lowest: of the indices, and the smallest of them.
inline Segments checked_segments(const char* op, const Tensor& grad, const char* name,
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

// The gradients of samples that have a weight each, and one row that gets nothing.
template <class Args>
Segments weighted_segments(const Args& a) {
  const char* op = a.op;
  const Tensor& indices = a.indices;
  const OptionalTensor& weights = a.weights;
  const int64_t rows = a.rows, padding = a.padding_idx;
  if (rows < 0) refuse(op, "rows must not be negative, got ", rows);
  if (padding >= rows) refuse(op, "padding_idx must be one of ", rows, " rows, got ", padding);
  Segments found = checked_segments(op, a.grad_output, "indices", indices, 0, rows);
  found.args.padding = padding;
  if (!weights) return found;
  if (indices.dim() < 1)
    refuse(op, "indices must have shape [B, *] with weights, got ", shape_of(indices));
  if (weights->dim() != 1 || weights->size(0) != indices.size(0))
    refuse(op, "weights must have shape [", indices.size(0), "], got ", shape_of(*weights));
  found.weights = packed(*weights);
  check_device(op, "weights", *found.weights, "grad_output", found.grad);
  found.args.weights = {found.weights->const_data_ptr(), float_dtype(op, "weights", *weights)};
  if (found.args.count > 0) found.args.tokens = found.args.count / indices.size(0);
  return found;
}

template <class Launch>
struct EmbeddingOps {
  static Tensor embedding_grad_norm(const EmbeddingGradNorm& a) {
    const char* op = a.op;
    const Tensor indices = checked_indices(op, "indices", a.indices);
    const Tensor grad = checked_packed(op, "grad_output", a.grad_output);
    check_device(op, "indices", indices, "grad_output", grad);
    EmbeddingNormArgs args;
    args.grad = {grad.const_data_ptr(), float_dtype(op, "grad_output", grad)};
    args.indices = values(indices);
    args.padding = a.padding_idx;
    OptionalTensor offsets, weights;
    if (a.offsets) {
      offsets = checked_indices(op, "offsets", *a.offsets);
      check_device(op, "offsets", *offsets, "grad_output", grad);
      if (grad.dim() != 2)
        refuse(op, "grad_output must have shape [B, D] with offsets, got ", shape_of(grad));
      args.batch = grad.size(0);
      args.dim = grad.size(1);
      args.count = indices.numel();
      args.offsets = values(*offsets);
      const int64_t given = offsets->numel();
      if (indices.dim() != 1)
        refuse(op, "indices must have one dim with offsets, got ", shape_of(indices));
      if (offsets->dim() != 1 || (given != args.batch && given != args.batch + 1))
        refuse(op, "offsets must have shape [B] or [B + 1] for B = ", args.batch, " bags, got ",
               shape_of(*offsets));
      args.closed = given == args.batch + 1;
      for (int64_t i = 0; offsets->is_cpu() && i < given; ++i) {
        const int64_t before = i == 0 ? 0 : args.offsets[i - 1];
        if (args.offsets[i] < before || args.offsets[i] > args.count || (i == 0 && args.offsets[0]))
          refuse(op, "offsets must start at 0, not decrease, and end at most at ", args.count,
                 ", the number of indices; got ", args.offsets[i], " at ", i);
      }
      if (args.closed && offsets->is_cpu()) args.count = args.offsets[args.batch];
    } else {
      check_rows(op, "grad_output", grad, indices);
      if (indices.dim() < 1) refuse(op, "indices must have shape [B, *], got ", shape_of(indices));
      args.batch = grad.size(0);
      args.dim = grad.size(grad.dim() - 1);
      args.tokens = extent(indices, 1, indices.dim());
      if (a.mean) refuse(op, "mode 'mean' needs offsets, got none");
    }
    if (a.per_sample_weights) {
      if (!a.offsets || a.mean)
        refuse(op, "per_sample_weights needs offsets and mode 'sum', got ",
               a.mean ? "mode 'mean'" : "no offsets");
      weights = packed(*a.per_sample_weights);
      check_same_shape(op, "per_sample_weights", *weights, "indices", indices);
      check_device(op, "per_sample_weights", *weights, "grad_output", grad);
      args.weights = {weights->const_data_ptr(), float_dtype(op, "per_sample_weights", *weights)};
    }
    args.mean = a.mean;
    const Norms norms(grad, {args.batch}, args.grad.dtype == Dtype::f64);
    args.norms = norms.data;
    Launch::embedding_grad_norm(op, args, norms.tensor);
    return norms.tensor;
  }

  static Tensor embedding_perturb(const EmbeddingPerturb& a) {
    const char* op = a.op;
    check_table(op, "weight", a.weight);
    check_table(op, "delta", a.delta);
    if (a.delta.size(1) != a.weight.size(1))
      refuse(op, "delta must have rows as long as weight's, ", a.weight.size(1), ", got ",
             a.delta.size(1));
    check_same_shape(op, "inverse", a.inverse, "indices", a.indices);
    const Tensor weight = packed(a.weight), delta = packed(a.delta);
    const Tensor indices = checked_indices(op, "indices", a.indices);
    const Tensor inverse = checked_indices(op, "inverse", a.inverse);
    check_device(op, "indices", indices, "weight", weight);
    check_device(op, "delta", delta, "weight", weight);
    check_device(op, "inverse", inverse, "weight", weight);
    check_range(op, "indices", indices, 0, weight.size(0));
    check_range(op, "inverse", inverse, -1, delta.size(0));
    const auto sizes = indices.sizes();
    std::vector<int64_t> shape(sizes.begin(), sizes.end());
    shape.push_back(weight.size(1));
    Tensor out = new_tensor(weight, shape);
    PerturbArgs args;
    args.weight = {weight.const_data_ptr(), float_dtype(op, "weight", weight)};
    args.indices = values(indices);
    args.delta = {delta.const_data_ptr(), float_dtype(op, "delta", delta)};
    args.inverse = values(inverse);
    args.count = indices.numel();
    args.dim = weight.size(1);
    args.out = {out.mutable_data_ptr(), args.weight.dtype};
    Launch::embedding_perturb(op, args, out);
    return out;
  }

  static Tensor embedding_perturb_backward(const EmbeddingPerturbBackward& a) {
    const int64_t rows = a.delta_rows;
    if (rows < 0) refuse(a.op, "delta_rows must not be negative, got ", rows);
    return summed(a.op, checked_segments(a.op, a.grad_output, "inverse", a.inverse, -1, rows));
  }

  static Tensor embedding_grad_sum(const EmbeddingGradSum& a) {
    return summed(a.op, weighted_segments(a));
  }

  static Tensor rowwise_adagrad(const RowwiseAdagrad& a) {
    const char* op = a.op;
    check_table(op, "weight", a.weight);
    check_defined(op, "state", a.state);
    if (a.state.dim() != 1 || a.state.size(0) != a.weight.size(0))
      refuse(op, "state must have one number for each row of weight, [", a.weight.size(0),
             "], got ", shape_of(a.state));
    check_rows(op, "grad", a.grad, a.indices);
    if (a.grad.size(a.grad.dim() - 1) != a.weight.size(1))
      refuse(op, "grad must have rows as long as weight's, ", a.weight.size(1), ", got ",
             a.grad.size(a.grad.dim() - 1));
    if (!std::isfinite(a.lr)) refuse(op, "lr must be finite, got ", a.lr);
    if (!(a.eps >= 0)) refuse(op, "eps must not be negative, got ", a.eps);
    if (a.max_norm && !(*a.max_norm >= 0))
      refuse(op, "max_norm must not be negative, got ", *a.max_norm);
    const Tensor indices = checked_indices(op, "indices", a.indices), grad = packed(a.grad);
    check_device(op, "state", a.state, "weight", a.weight);
    check_device(op, "indices", indices, "weight", a.weight);
    check_device(op, "grad", grad, "weight", a.weight);
    check_range(op, "indices", indices, 0, a.weight.size(0));
    const Tensor weight = packed(a.weight), state = packed(a.state);
    Written out(a, "weight", a.weight, weight), state_out(a, "state", a.state, state);
    out.apart(a, "weight", "state", state, false);
    out.apart(a, "weight", "grad", grad, false);
    state_out.apart(a, "state", "grad", grad, false);
    AdagradArgs args;
    args.weight = out.data(float_dtype(op, "weight", weight));
    args.state = state_out.data(float_dtype(op, "state", state));
    args.indices = values(indices);
    args.rows = weight.size(0);
    args.grad = {grad.const_data_ptr(), float_dtype(op, "grad", grad)};
    args.count = indices.numel();
    args.dim = weight.size(1);
    args.lr = a.lr;
    args.eps = a.eps;
    args.max_norm = a.max_norm.value_or(std::numeric_limits<double>::infinity());
    Launch::rowwise_adagrad(op, args, weight);
    state_out.finish();
    return out.finish();
  }

  template <Register kWhat>
  static void add(Ops<kWhat> ops) {
    ops.template op<&embedding_grad_norm>("embedding_grad_norm");
    ops.template op<&embedding_grad_sum>("embedding_grad_sum");
    ops.template op<&embedding_perturb>("embedding_perturb");
    ops.template op<&embedding_perturb_backward>("embedding_perturb_backward");
    ops.template in_place<&rowwise_adagrad>("rowwise_adagrad_");
  }

 private:
  static Tensor summed(const char* op, Segments segments) {
    SegmentSumArgs& args = segments.args;
    Tensor out = new_tensor(segments.grad, {args.rows, args.dim});
    args.out = {out.mutable_data_ptr(), args.grad.dtype};
    Launch::segment_sum(op, args, out);
    return out;
  }
};

}  // namespace embattle
