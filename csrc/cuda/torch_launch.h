// Calling the CUDA launchers with torch's device, stream and allocator.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <type_traits>

#include "../stable.h"
#include "kernels.h"

namespace embattle {
namespace {

// libtorch_cuda is not linked, so that one library also loads with a CPU torch; whoever holds a
// CUDA tensor has loaded it.
template <class F>
F torch_cuda_symbol(const char* name) {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  F found = library ? reinterpret_cast<F>(dlsym(library, name)) : nullptr;
  if (!found) fail("embattle: this torch has no ", name, ", which CUDA tensors need");
  return found;
}

// Makes a tensor's device the current one, and the one from before at the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t device) {
    static const auto create =
        torch_cuda_symbol<int (*)(int32_t, void**)>("aoti_torch_create_cuda_guard");
    if (create(device, &guard_)) fail("embattle: device ", device, " cannot be made current");
  }
  ~DeviceGuard() {
    static const auto destroy = torch_cuda_symbol<int (*)(void*)>("aoti_torch_delete_cuda_guard");
    destroy(guard_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  void* guard_ = nullptr;
};

void* current_stream(int32_t device) {
  static const auto ask =
      torch_cuda_symbol<int (*)(int32_t, void**)>("aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  if (ask(device, &stream)) fail("embattle: device ", device, " has no current stream");
  return stream;
}

// Runs a launcher on x's device and stream, with a workspace from torch's allocator. The workspace
// may be given back at once: later users of its memory come behind this call in the stream.
template <class Args>
void launch(const char* op, int (*launcher)(const Args&, const cuda::Context&), const Args& args,
            const Tensor& x) {
  const int32_t device = x.get_device();
  const DeviceGuard guard(device);
  struct Workspace {
    const Tensor& like;
    OptionalTensor memory;
  } workspace{x, {}};
  cuda::Context context;
  context.stream = current_stream(device);
  context.self = &workspace;
  context.allocate = [](void* self, size_t bytes) -> void* {
    auto& w = *static_cast<Workspace*>(self);
    w.memory = torch::stable::new_empty(w.like, {int64_t(bytes)}, ScalarType::Byte);
    return w.memory->mutable_data_ptr();
  };
  constexpr int kCaptureUnsupported = 900;
  const int error = cuda::call(launcher, args, context);
  if (std::is_same_v<Args, NoiseArgs> && error == kCaptureUnsupported)
    refuse(op,
           "under CUDA graph capture a CPU generator's numbers would be the same at "
           "every replay; pass generator=torch.Generator('cuda')");
  if (error) fail("embattle.", op, ": CUDA error: ", cuda::error_text(error));
}

}  // namespace
}  // namespace embattle
