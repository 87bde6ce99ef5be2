// The CUDA launchers, run by the emulator, as a Python module. Tensors come as (address, dtype)
// pairs or None; emulated.py makes them from torch tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <new>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cuda/kernels.h"
#include "cuda_runtime.h"
#include "emulator.h"

namespace py = pybind11;
using namespace embattle;

namespace {

using Pointer = std::optional<std::pair<uintptr_t, int>>;

ConstData in(const Pointer& p) {
  if (!p) return {};
  return {reinterpret_cast<const void*>(p->first), Dtype(p->second)};
}
Data out(const Pointer& p) {
  if (!p) return {};
  return {reinterpret_cast<void*>(p->first), Dtype(p->second)};
}

// A number, or (address, dtype, broadcast).
PerGroup per_group(const py::object& o) {
  PerGroup p;
  if (py::isinstance<py::tuple>(o)) {
    const auto t = o.cast<std::tuple<uintptr_t, int, bool>>();
    p.values = reinterpret_cast<const void*>(std::get<0>(t));
    p.dtype = Dtype(std::get<1>(t));
    p.broadcast = std::get<2>(t);
  } else {
    p.value = o.cast<double>();
  }
  return p;
}

Groups groups_of(const py::dict& d) {
  Groups g;
  g.rows = d["rows"].cast<int64_t>();
  g.dim = d["dim"].cast<int64_t>();
  g.groups = d["groups"].cast<int64_t>();
  g.rows_per_group = d["rows_per_group"].cast<int64_t>();
  g.offsets = reinterpret_cast<const int64_t*>(d["offsets"].cast<uintptr_t>());
  g.mask = reinterpret_cast<const bool*>(d["mask"].cast<uintptr_t>());
  return g;
}

Box box_of(const py::dict& d) {
  Box b;
  b.x0 = in(d["x0"].cast<Pointer>());
  b.lower = in(d["lower"].cast<Pointer>());
  b.upper = in(d["upper"].cast<Pointer>());
  b.lower_broadcast = d["lower_broadcast"].cast<bool>();
  b.upper_broadcast = d["upper_broadcast"].cast<bool>();
  b.lower_value = d["lower_value"].cast<double>();
  b.upper_value = d["upper_value"].cast<double>();
  return b;
}

StepArgs step_of(const py::dict& d) {
  StepArgs a;
  a.groups = groups_of(d);
  a.norm = Norm(d["norm"].cast<int>());
  a.delta = in(d["delta"].cast<Pointer>());
  a.velocity = in(d["velocity"].cast<Pointer>());
  a.grad = in(d["grad"].cast<Pointer>());
  a.out = out(d["out"].cast<Pointer>());
  a.velocity_out = out(d["velocity_out"].cast<Pointer>());
  a.step_size = per_group(d["step_size"]);
  a.eps = per_group(d["eps"]);
  a.box = box_of(d);
  a.top = d["top"].cast<double>();
  a.max_groups = d["max_groups"].cast<int64_t>();
  a.groups_per_sample = d["groups_per_sample"].cast<int64_t>();
  a.decay = d["decay"].cast<double>();
  a.apgd = d["apgd"].cast<bool>();
  a.nonfinite = reinterpret_cast<int32_t*>(d["nonfinite"].cast<uintptr_t>());
  return a;
}

ProjectArgs project_of(const py::dict& d) {
  ProjectArgs a;
  a.groups = groups_of(d);
  a.norm = Norm(d["norm"].cast<int>());
  a.delta = in(d["delta"].cast<Pointer>());
  a.out = out(d["out"].cast<Pointer>());
  a.eps = per_group(d["eps"]);
  a.box = box_of(d);
  return a;
}

NoiseArgs noise_of(const py::dict& d) {
  NoiseArgs a;
  a.groups = groups_of(d);
  a.norm = Norm(d["norm"].cast<int>());
  a.x = in(d["x"].cast<Pointer>());
  a.out = out(d["out"].cast<Pointer>());
  a.key = reinterpret_cast<const int64_t*>(d["key"].cast<uintptr_t>());
  a.key_on_host = d["key_on_host"].cast<bool>();
  a.std = per_group(d["std"]);
  a.eps = per_group(d["eps"]);
  a.box = box_of(d);
  return a;
}

NormArgs norm_of(const py::dict& d) {
  NormArgs a;
  a.groups = groups_of(d);
  a.norm = Norm(d["norm"].cast<int>());
  a.x = in(d["x"].cast<Pointer>());
  a.out = out(d["out"].cast<Pointer>());
  return a;
}

// A list of (gradient, width, sum or None).
std::vector<SampleTensor> list_of(const py::dict& d) {
  std::vector<SampleTensor> tensors;
  for (const auto& [grad, width, sum] :
       d["tensors"].cast<std::vector<std::tuple<Pointer, int64_t, Pointer>>>())
    tensors.push_back({in(grad), width, out(sum)});
  return tensors;
}

LinearNormArgs linear_of(const py::dict& d) {
  LinearNormArgs a;
  a.input = in(d["input"].cast<Pointer>());
  a.grad = in(d["grad"].cast<Pointer>());
  a.batch = d["batch"].cast<int64_t>();
  a.tokens = d["tokens"].cast<int64_t>();
  a.inputs = d["inputs"].cast<int64_t>();
  a.outputs = d["outputs"].cast<int64_t>();
  a.bias = d["bias"].cast<bool>();
  a.method = LinearMethod(d["method"].cast<int>());
  a.norms = out(d["norms"].cast<Pointer>());
  return a;
}

const int64_t* indices_of(const py::dict& d, const char* name) {
  return reinterpret_cast<const int64_t*>(d[name].cast<uintptr_t>());
}

EmbeddingNormArgs embedding_of(const py::dict& d) {
  EmbeddingNormArgs a;
  a.indices = indices_of(d, "indices");
  a.offsets = indices_of(d, "offsets");
  a.closed = d["closed"].cast<bool>();
  a.count = d["count"].cast<int64_t>();
  a.batch = d["batch"].cast<int64_t>();
  a.tokens = d["tokens"].cast<int64_t>();
  a.dim = d["dim"].cast<int64_t>();
  a.grad = in(d["grad"].cast<Pointer>());
  a.padding = d["padding"].cast<int64_t>();
  a.mean = d["mean"].cast<bool>();
  a.weights = in(d["weights"].cast<Pointer>());
  a.norms = out(d["norms"].cast<Pointer>());
  return a;
}

PerturbArgs perturb_of(const py::dict& d) {
  PerturbArgs a;
  a.weight = in(d["weight"].cast<Pointer>());
  a.indices = indices_of(d, "indices");
  a.delta = in(d["delta"].cast<Pointer>());
  a.inverse = indices_of(d, "inverse");
  a.count = d["count"].cast<int64_t>();
  a.dim = d["dim"].cast<int64_t>();
  a.out = out(d["out"].cast<Pointer>());
  return a;
}

SegmentSumArgs segment_of(const py::dict& d) {
  SegmentSumArgs a;
  a.grad = in(d["grad"].cast<Pointer>());
  a.inverse = indices_of(d, "inverse");
  a.count = d["count"].cast<int64_t>();
  a.dim = d["dim"].cast<int64_t>();
  a.rows = d["rows"].cast<int64_t>();
  a.weights = in(d["weights"].cast<Pointer>());
  a.tokens = d["tokens"].cast<int64_t>();
  a.padding = d["padding"].cast<int64_t>();
  a.out = out(d["out"].cast<Pointer>());
  return a;
}

AdagradArgs adagrad_of(const py::dict& d) {
  AdagradArgs a;
  a.weight = out(d["weight"].cast<Pointer>());
  a.state = out(d["state"].cast<Pointer>());
  a.indices = indices_of(d, "indices");
  a.rows = d["rows"].cast<int64_t>();
  a.grad = in(d["grad"].cast<Pointer>());
  a.count = d["count"].cast<int64_t>();
  a.dim = d["dim"].cast<int64_t>();
  a.lr = d["lr"].cast<double>();
  a.eps = d["eps"].cast<double>();
  a.max_norm = d["max_norm"].cast<double>();
  return a;
}

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

// Calls a launcher with a workspace exactly as long as it asks for, filled with NaNs.
template <class Args>
void call(int (*launcher)(const Args&, const cuda::Context&), const Args& args) {
  std::optional<Workspace> workspace;
  cuda::Context context;
  context.self = &workspace;
  context.allocate = [](void* self, size_t bytes) -> void* {
    auto& w = *static_cast<std::optional<Workspace>*>(self);
    if (w) throw std::logic_error("a launcher asked for a second workspace");
    return w.emplace(bytes).memory;
  };
  const int error = cuda::call(launcher, args, context);
  const std::string what = emu::take_error();
  if (error || !what.empty())
    throw std::runtime_error(std::string(cuda::error_text(error)) + ": " + what);
}

}  // namespace

PYBIND11_MODULE(emulated_kernels, m) {
  m.def("group_norm", [](const py::dict& d) { call(cuda::group_norm, norm_of(d)); });
  m.def("project", [](const py::dict& d) { call(cuda::project, project_of(d)); });
  m.def("pgd_step", [](const py::dict& d) { call(cuda::pgd_step, step_of(d)); });
  m.def("momentum_step", [](const py::dict& d) { call(cuda::momentum_step, step_of(d)); });
  m.def("random_start", [](const py::dict& d) { call(cuda::random_start, noise_of(d)); });
  m.def("gaussian_noise", [](const py::dict& d) { call(cuda::gaussian_noise, noise_of(d)); });

  m.def("per_sample_norm", [](const py::dict& d) {
    const auto tensors = list_of(d);
    SampleNormArgs a;
    a.tensors = tensors.data();
    a.count = int64_t(tensors.size());
    a.batch = d["batch"].cast<int64_t>();
    a.norms = out(d["norms"].cast<Pointer>());
    call(cuda::per_sample_norm, a);
  });
  m.def("clip_and_sum", [](const py::dict& d) {
    const auto tensors = list_of(d);
    const auto bounds = d["max_norm"].cast<std::vector<double>>();
    ClipArgs a;
    a.tensors = tensors.data();
    a.count = int64_t(tensors.size());
    a.batch = d["batch"].cast<int64_t>();
    a.mode = ClipMode(d["mode"].cast<int>());
    a.max_norm = bounds.data();
    a.gamma = d["gamma"].cast<double>();
    a.weights = in(d["weights"].cast<Pointer>());
    a.norms = out(d["norms"].cast<Pointer>());
    call(cuda::clip_and_sum, a);
  });
  m.def("linear_grad_norm", [](const py::dict& d) { call(cuda::linear_grad_norm, linear_of(d)); });
  m.def("embedding_grad_norm",
        [](const py::dict& d) { call(cuda::embedding_grad_norm, embedding_of(d)); });
  m.def("embedding_perturb",
        [](const py::dict& d) { call(cuda::embedding_perturb, perturb_of(d)); });
  m.def("segment_sum", [](const py::dict& d) { call(cuda::segment_sum, segment_of(d)); });
  m.def("rowwise_adagrad", [](const py::dict& d) { call(cuda::rowwise_adagrad, adagrad_of(d)); });

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
  m.def("refuse_launches", [](unsigned count) { emu::device().refusals = count; });
}
