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

enum class LinearMethod : int { automatic, gram, direct };

struct LinearNormArgs {
  ConstData input;  // [batch, tokens, inputs]
  ConstData grad;   // [batch, tokens, outputs]
  int64_t batch = 0;
  int64_t tokens = 0;
  int64_t inputs = 0;
  int64_t outputs = 0;
  bool bias = false;
  LinearMethod method = LinearMethod::automatic;
  Data norms;  // [batch], f64 if either input is and f32 otherwise
};

struct EmbeddingNormArgs {
  const int64_t* indices = nullptr;  // [batch, tokens], or [count] cut into bags by offsets
  const int64_t* offsets = nullptr;  // [batch] starts of bags; or null
  bool closed = false;               // offsets has one more, where the last bag ends
  int64_t count = 0;                 // of indices, with offsets
  int64_t batch = 0;
  int64_t tokens = 0;  // without offsets
  int64_t dim = 0;
  ConstData grad;  // [batch, tokens, dim]; with offsets [batch, dim]
  int64_t padding = -1;
  bool mean = false;
  ConstData weights;  // [count] or absent; with offsets only
  Data norms;         // [batch], f64 for an f64 grad and f32 otherwise
};

// Preconditions: 0 <= indices < rows of weight, -1 <= inverse < rows of delta.
struct PerturbArgs {
  ConstData weight;                  // [rows, dim]
  const int64_t* indices = nullptr;  // [count]
  ConstData delta;                   // [any, dim]
  const int64_t* inverse = nullptr;  // [count]
  int64_t count = 0;
  int64_t dim = 0;
  Data out;  // [count, dim], dtype of weight
};

// Makes room for the sums of the rows that occur, once it is known how many they are.
struct FoundRows {
  void* self = nullptr;
  // keys: [found], out: [found, dim].
  void (*allocate)(void* self, int64_t found, int64_t** keys, void** out) = nullptr;
};

// out[r] = sum of weight * grad[i] over inverse[i] == r. Precondition: -1 <= inverse < rows.
struct SegmentSumArgs {
  ConstData grad;                    // [count, dim]
  const int64_t* inverse = nullptr;  // [count]
  int64_t count = 0;
  int64_t dim = 0;
  int64_t rows = 0;
  ConstData weights;                 // [count / tokens] or absent: each of `tokens` items in a row
  int64_t tokens = 1;                // at least 1
  int64_t padding = -1;              // a row that gets nothing, if not negative
  Data out;                          // [rows, dim], dtype of grad
  const FoundRows* found = nullptr;  // CPU: the rows that occur, ascending, instead of all in `out`
};

// Precondition: 0 <= indices < rows of weight.
struct AdagradArgs {
  Data weight;                       // [rows, dim]
  Data state;                        // [rows]
  const int64_t* indices = nullptr;  // [count]
  int64_t rows = 0;
  ConstData grad;  // [count, dim]
  int64_t count = 0;
  int64_t dim = 0;
  double lr = 0;
  double eps = 0;
  double max_norm = 0;  // infinite: no bound
};

}  // namespace embattle
