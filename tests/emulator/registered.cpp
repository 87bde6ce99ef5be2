// The ops of csrc/ops with the CUDA launchers, registered a second time: in a namespace of their
// own and for tensors on the CPU, where the emulator runs the kernels. And, as a Python module,
// what tests steer and count.
#include <pybind11/pybind11.h>

#include <new>
#include <optional>
#include <utility>

#include "cuda/kernels.h"
#include "cuda_runtime.h"
#include "emulator.h"
#include "ops/clip_ops.h"
#include "ops/embedding_ops.h"
#include "ops/group_ops.h"
#include "ops/step_ops.h"

namespace embattle {
namespace {

// Device memory: freed as it was allocated.
struct Workspace {
  static constexpr std::align_val_t kAlignment{256};
  void* memory;
  explicit Workspace(size_t bytes) : memory(::operator new(bytes, kAlignment)) {
    std::memset(memory, 0xff, bytes);
  }
  Workspace(Workspace&& other) noexcept : memory(std::exchange(other.memory, nullptr)) {}
  ~Workspace() { ::operator delete(memory, kAlignment); }
};

// Every tensor is on the CPU here: the key is now read by the launcher, now by the kernel.
template <class Args>
Args with_key_anywhere(const Args& args, const Tensor& x) {
  Args other = args;
  if constexpr (std::is_same_v<Args, NoiseArgs>) other.key_on_host = x.numel() % 2 == 1;
  return other;
}

// Calls a launcher with a workspace exactly as long as it asks for, filled with NaNs.
template <class Args>
void launch(int (*launcher)(const Args&, const cuda::Context&), const Args& args, const Tensor& x) {
  std::optional<Workspace> workspace;
  cuda::Context context;
  context.self = &workspace;
  context.allocate = [](void* self, size_t bytes) -> void* {
    auto& w = *static_cast<std::optional<Workspace>*>(self);
    if (w) throw std::logic_error("a launcher asked for a second workspace");
    return w.emplace(bytes).memory;
  };
  const int error = cuda::call(launcher, with_key_anywhere(args, x), context);
  const std::string what = emu::take_error();
  if (error || !what.empty())
    throw std::runtime_error(std::string(cuda::error_text(error)) + ": " + what);
}

struct Emulated {
#define EMBATTLE_KERNEL(name, Args) \
  static void name(const char*, const Args& args, const Tensor& x) { launch(cuda::name, args, x); }
  EMBATTLE_KERNELS(EMBATTLE_KERNEL)
#undef EMBATTLE_KERNEL
};

template <Register kWhat>
void add(torch::stable::detail::StableLibrary& library) {
  const Ops<kWhat> ops(library);
  StepOps<Emulated>::add(ops);
  GroupOps<Emulated>::add(ops);
  ClipOps<Emulated>::add(ops);
  EmbeddingOps<Emulated>::add(ops);
}

}  // namespace
}  // namespace embattle

STABLE_TORCH_LIBRARY(embattle_emulated, m) { embattle::add<embattle::Register::schemas>(m); }
STABLE_TORCH_LIBRARY_IMPL(embattle_emulated, CPU, m) {
  embattle::add<embattle::Register::functions>(m);
}

namespace py = pybind11;

PYBIND11_MODULE(emulated_kernels, m) {
  m.def(
      "set_order",
      [](const std::string& order, uint32_t seed) {
        emu::set_order(order == "forward"   ? emu::Order::forward
                       : order == "reverse" ? emu::Order::reverse
                                            : emu::Order::random,
                       seed);
      },
      py::arg("order"), py::arg("seed") = 0);
  m.def(
      "set_device",
      [](int multiprocessors, int major, int shared_per_block, int shared_per_multiprocessor,
         bool cooperative, int code) {
        emu::device().multiprocessors = multiprocessors;
        emu::device().capability_major = major;
        emu::device().shared_per_block = shared_per_block;
        emu::device().shared_per_multiprocessor = shared_per_multiprocessor;
        emu::device().cooperative = cooperative;
        emu::device().code = code;
      },
      py::arg("multiprocessors") = 4, py::arg("major") = 9, py::arg("shared_per_block") = 227 << 10,
      py::arg("shared_per_multiprocessor") = 228 << 10, py::arg("cooperative") = true,
      py::arg("code") = 0);
  m.def("take_counters", [] {
    const emu::Counters c = emu::counters();
    emu::counters() = {};
    return py::dict(py::arg("launches") = c.launches, py::arg("blocks") = c.blocks,
                    py::arg("threads") = c.threads, py::arg("clusters") = c.cluster_launches,
                    py::arg("cooperative") = c.cooperative_launches,
                    py::arg("largest_shared") = c.largest_shared,
                    py::arg("lowered_limits") = c.lowered_limits, py::arg("accesses") = c.accesses);
  });
  // The error that the runtime keeps, one that others have left there, and how it is forgotten.
  m.def("last_error", [] { return int(cudaPeekAtLastError()); });
  m.def("leave_error", [] { emu::record(cudaErrorInvalidValue); });
  m.def("forget_error", [] { (void)cudaGetLastError(); });
  m.def(
      "refuse_launches",
      [](unsigned count, unsigned after) {
        emu::device().refusals = count;
        emu::device().spared = after;
      },
      py::arg("count"), py::arg("after") = 0);
}
