// embattle._C: importing it runs the static registrations of ops/, and it tells how
// the library was built. No torch header here: pybind11 stays outside the stable ABI's reach.
#include <pybind11/pybind11.h>

#include "launch.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native ops of embattle; importing this registers torch.ops.embattle.*.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = EMBATTLE_VERSION;
        info["torch_target"] = EMBATTLE_TORCH_TARGET;
        info["torch_built_against"] = EMBATTLE_TORCH_BUILT_AGAINST;
        info["compiler"] = EMBATTLE_COMPILER;
        info["simd"] = embattle::cpu_kernels().level;
        info["simd_available"] = embattle::cpu_levels_available();
        info["cuda"] = bool(EMBATTLE_WITH_CUDA);
        info["cuda_archs"] = EMBATTLE_CUDA_ARCHS;
        info["cuda_version"] = EMBATTLE_CUDA_VERSION;
        return info;
      },
      "How this library was built, and the SIMD level it chose: a dict of plain values.");
}
