// What the kernels on per-sample gradients and on embedding tables are told; see launch.h.
#pragma once

#include "launch.h"

namespace embattle {

// One tensor of a list whose dim 0 is the batch.
struct SampleTensor {
  ConstData grad;  // [batch, width]
  int64_t width = 0;
  Data sum;  // [width], dtype of grad; clip_and_sum only
};

enum class ClipMode : int { flat, per_layer, automatic };

struct SampleNormArgs {
  const SampleTensor* tensors = nullptr;  // [count], on the host
  int64_t count = 0;
  int64_t batch = 0;
  Data norms;  // [batch], f64 if any gradient is and f32 otherwise
};

struct ClipArgs {
  const SampleTensor* tensors = nullptr;  // [count], on the host
  int64_t count = 0;
  int64_t batch = 0;
  ClipMode mode = ClipMode::flat;
  const double* max_norm = nullptr;  // one, or [count] for per_layer; on the host
  double gamma = 0;
  ConstData weights;  // [batch] or absent
  Data norms;         // [batch], or [batch, count] for per_layer; f64 if any gradient is, else f32
};

}  // namespace embattle
