// What the kernels over groups are told.
#pragma once

#include "../launch.h"
#include "team.cuh"

namespace embattle::cuda {

// One input.
struct Stream {
  const void* data = nullptr;  // null: absent
  Dtype type = Dtype::f32;
  bool aligned = false;    // full chunks can be read as vectors
  bool broadcast = false;  // one element for all
  int slot = -1;           // where in shared memory its chunks are kept, in bytes; -1: nowhere
};

struct GroupParams {
  Groups groups;
  Shape shape;
  int resident = 0;  // chunks of each thread that shared memory holds
  Stream x, grad, velocity, x0, lower, upper;
  bool boxed = false;
  double lower_value = 0, upper_value = 0;  // where there is no tensor; not rounded yet
  int draws = -1;                           // slot for random values
  void* out = nullptr;
  Dtype out_type = Dtype::f32;
  bool out_aligned = false;
  void* velocity_out = nullptr;  // of the velocity's type
  bool velocity_aligned = false;
  PerGroup step, eps, std;
  StepRule rule;
  bool start = false;                     // random_start, not gaussian_noise
  const unsigned char* chosen = nullptr;  // [groups]: which groups move; null: all
  double* scores = nullptr;               // [groups]: norms that max_groups chooses by
  int32_t* nonfinite = nullptr;
  const int64_t* key = nullptr;  // [2] on the device; or null:
  int64_t key_value[2] = {};
  TeamGlobal* team_global = nullptr;
  Sums* team_slots = nullptr;
};

}  // namespace embattle::cuda
