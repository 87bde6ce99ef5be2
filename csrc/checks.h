// Argument checks, shared by both devices. Every message starts with "embattle.<op>: " and names
// the argument and the offending value. Header-only: used by the files in ops/ and nowhere else.
#pragma once

#include <cmath>
#include <limits>

#include "launch.h"
#include "stable.h"

namespace embattle {

inline std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) {
    if (i) text += ", ";
    text += std::to_string(t.size(i));
  }
  return text + "]";
}

inline Dtype float_dtype(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::Double:
      return Dtype::f64;
    case ScalarType::Half:
      return Dtype::f16;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    default:
      refuse(op, name, " must be float32, float64, float16 or bfloat16, got ",
             torch::headeronly::toString(t.scalar_type()));
  }
}

inline Norm checked_norm(const char* op, double norm) {
  if (norm == 1) return Norm::l1;
  if (norm == 2) return Norm::l2;
  if (norm == std::numeric_limits<double>::infinity()) return Norm::linf;
  refuse(op, "norm must be 1, 2 or inf, got ", norm);
}

// Python's None reaches an op as a tensor that is not defined.
inline void check_defined(const char* op, const char* name, const Tensor& t) {
  if (!t.defined()) refuse(op, name, " must be a tensor, got NoneType");
}

inline Tensor checked_packed(const char* op, const char* name, const Tensor& t) {
  check_defined(op, name, t);
  return packed(t);
}

// How many elements dims [begin, end) have.
inline int64_t extent(const Tensor& t, int64_t begin, int64_t end) {
  int64_t product = 1;
  for (int64_t d = begin; d < end; ++d) product *= t.size(d);
  return product;
}

// Whether the first `dims` sizes are the same. Precondition: both have so many.
inline bool same_sizes(const Tensor& a, const Tensor& b, int64_t dims) {
  for (int64_t d = 0; d < dims; ++d)
    if (a.size(d) != b.size(d)) return false;
  return true;
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  return a.dim() == b.dim() && same_sizes(a, b, a.dim());
}

inline void check_same_shape(const char* op, const char* name, const Tensor& t, const char* of,
                             const Tensor& like) {
  check_defined(op, name, t);
  check_defined(op, of, like);
  if (!same_shape(t, like))
    refuse(op, name, " must have the shape of ", of, ", ", shape_of(like), ", got ", shape_of(t));
}

inline void check_device(const char* op, const char* name, const Tensor& t, const char* of,
                         const Tensor& like) {
  if (t.is_cpu() != like.is_cpu() || t.get_device() != like.get_device())
    refuse(op, name, " must be on the same device as ", of);
}

// A tensor that is written must have memory for each of its elements.
inline void check_writable(const char* op, const char* name, const Tensor& t) {
  if (t.is_contiguous()) return;
  for (int64_t i = 0; i < t.dim(); ++i)
    if (t.stride(i) == 0 && t.size(i) > 1)
      refuse(
          op, name,
          " is written, but several of its elements share memory (it is expanded): pass a clone");
}

inline int64_t bytes_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
    case ScalarType::Long:
      return 8 * t.numel();
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return 2 * t.numel();
    default:
      return 4 * t.numel();
  }
}

// What is read must not lie where a part of what is written does: elements would be read after they
// have changed. The very same elements may, unless `same` says no. Both are contiguous.
inline void check_apart(const char* op, const char* name, const Tensor& written, const char* other,
                        const OptionalTensor& read, bool same = true) {
  if (!read) return;
  const auto* to = static_cast<const char*>(written.const_data_ptr());
  const auto* from = static_cast<const char*>(read->const_data_ptr());
  const int64_t size = bytes_of(written), other_size = bytes_of(*read);
  if (same && to == from && size == other_size) return;
  if (size > 0 && other_size > 0 && to < from + other_size && from < to + size)
    refuse(op, name, " is written, and shares memory with ", other, ": pass a clone");
}

// Cuts x into groups. The returned struct points into `offsets` and `mask`, which must be
// contiguous and outlive it.
inline Groups checked_groups(const char* op, const char* name, const Tensor& x, bool token,
                             const OptionalTensor& offsets, const OptionalTensor& mask) {
  Groups g;
  const int64_t dims = x.dim();
  g.dim = dims == 0 ? 1 : x.size(dims - 1);
  g.rows = extent(x, 0, dims - 1);
  if (offsets) {
    if (offsets->scalar_type() != ScalarType::Long || offsets->dim() != 1 || offsets->numel() < 1)
      refuse(op, "offsets must be int64 of shape [groups + 1], got ",
             torch::headeronly::toString(offsets->scalar_type()), " ", shape_of(*offsets));
    check_device(op, "offsets", *offsets, name, x);
    g.groups = offsets->numel() - 1;
    g.offsets = static_cast<const int64_t*>(offsets->const_data_ptr());
    if (offsets->is_cpu()) {
      if (g.offsets[0] != 0 || g.offsets[g.groups] != g.rows)
        refuse(op, "offsets must run from 0 to the number of rows, ", g.rows, ", got ",
               g.offsets[0], " to ", g.offsets[g.groups]);
      for (int64_t i = 0; i < g.groups; ++i)
        if (g.offsets[i] > g.offsets[i + 1])
          refuse(op, "offsets must not decrease, got ", g.offsets[i], " then ", g.offsets[i + 1],
                 " at ", i);
    }
  } else if (token) {
    g.groups = g.rows;
    g.rows_per_group = 1;
  } else {
    g.groups = dims < 2 ? 1 : x.size(0);
    g.rows_per_group = g.groups == 0 ? 0 : g.rows / g.groups;
  }
  if (mask) {
    if (mask->scalar_type() != ScalarType::Bool)
      refuse(op, "mask must be bool, got ", torch::headeronly::toString(mask->scalar_type()));
    if (mask->dim() != std::max<int64_t>(dims - 1, 0) || !same_sizes(*mask, x, mask->dim()))
      refuse(op, "mask must have the shape of ", name, " without its last dim, i.e. of ",
             shape_of(x), "[:-1], got ", shape_of(*mask));
    check_device(op, "mask", *mask, name, x);
    g.mask = static_cast<const bool*>(mask->const_data_ptr());
  }
  return g;
}

}  // namespace embattle
