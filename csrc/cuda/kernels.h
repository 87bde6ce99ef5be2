// The CUDA launchers, for the torch-facing side: no CUDA header needed to call them.
//
// A launcher enqueues everything on one stream and returns at once: no synchronisation, no
// allocation but one workspace at most. It returns 0, or a cudaError_t that error_text() puts into
// words. Call it through call(), which leaves no error behind.
#pragma once

#include <cstddef>

#include "../launch_clip.h"

namespace embattle::cuda {

struct Context {
  void* stream = nullptr;  // a cudaStream_t
  // Device memory of at least `bytes`, 256-byte aligned, that lives until the stream has passed
  // this call; asked for once per launcher, at most.
  void* (*allocate)(void* self, size_t bytes) = nullptr;
  void* self = nullptr;
};

const char* error_text(int error);

// Takes back the error that the runtime keeps: whoever asks for the last one next, after a launch
// of his own, would take it for his.
void forget_error();

// Runs a launcher. What it returns is all that is left of an error.
template <class Args>
int call(int (*launcher)(const Args&, const Context&), const Args& args, const Context& context) {
  const int error = launcher(args, context);
  if (error) forget_error();
  return error;
}

#define EMBATTLE_KERNEL(name, Args) int name(const Args&, const Context&);
EMBATTLE_KERNELS(EMBATTLE_KERNEL)
#undef EMBATTLE_KERNEL

}  // namespace embattle::cuda
