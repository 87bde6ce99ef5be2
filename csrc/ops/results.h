// What an op returns and writes.
#pragma once

#include "../checks.h"
#include "arguments.h"

namespace embattle {

// What an op writes: a new tensor, or in place the argument itself, through a copy where that is
// not contiguous.
struct Written {
  Tensor target;
  Tensor memory;
  bool copy_back = false;

  Written(const Arguments& a, const char* name, const Tensor& argument,
          const Tensor& packed_argument)
      : target(argument),
        memory(a.in_place ? packed_argument : empty_packed(packed_argument)),
        copy_back(a.in_place && !argument.is_contiguous()) {
    if (a.in_place) check_writable(a.op, name, argument);
  }

  // What is read besides, by its name, lies elsewhere (see check_apart).
  void apart(const Arguments& a, const char* name, const char* other, const OptionalTensor& read,
             bool same = true) const {
    if (a.in_place) check_apart(a.op, name, memory, other, read, same);
  }

  Data data(Dtype dtype) { return {memory.mutable_data_ptr(), dtype}; }
  Tensor finish() {
    if (copy_back) torch::stable::copy_(target, memory);
    return std::move(memory);
  }
};

// New norms: float32, or float64 where `wide`.
struct Norms {
  Tensor tensor;
  Data data;

  Norms(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, bool wide)
      : tensor(new_tensor(like, sizes, wide ? ScalarType::Double : ScalarType::Float)),
        data{tensor.mutable_data_ptr(), wide ? Dtype::f64 : Dtype::f32} {}
};

}  // namespace embattle
