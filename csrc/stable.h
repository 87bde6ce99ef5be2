// Everything that is needed to live on torch's stable ABI, in one place. No other file includes a
// torch header, but for the CUDA kernels' headeronly number types.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstring>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace embattle {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// STD_TORCH_CHECK puts file and line in front of its message, which a user has no use for: throw a
// bare std::runtime_error instead.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  ((text << parts), ...);
  throw std::runtime_error(text.str());
}

// Refuses what an op was given: embattle.ops makes a ValueError of it, by how it begins.
template <class... Parts>
[[noreturn]] void refuse(const char* op, const Parts&... parts) {
  fail("embattle.", op, ": ", parts...);
}

// The tensor itself where it is contiguous, else a contiguous copy.
inline Tensor packed(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// New memory. In the emulator it holds NaNs, which show where a kernel wrote nothing.
inline Tensor unwritten(Tensor t) {
#ifdef EMBATTLE_EMULATED
  int64_t bytes = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  std::memset(t.mutable_data_ptr(), 0xff, size_t(bytes));
#endif
  return t;
}

// An uninitialised contiguous tensor of the shape, dtype and device of `like`, which must be
// contiguous. Straight to the C shim: torch::stable::empty_like looks an op up by name.
inline Tensor empty_packed(const Tensor& like) {
  int32_t dtype = 0, device_type = 0, device_index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(like.dim(), like.sizes().data(),
                                                         like.strides().data(), dtype, device_type,
                                                         device_index, &handle));
  return unwritten(Tensor(handle));
}

// An uninitialised tensor on the device of `like`, of its dtype or another.
inline Tensor new_tensor(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                         std::optional<ScalarType> dtype = {}) {
  return unwritten(torch::stable::new_empty(like, sizes, dtype));
}

inline OptionalTensor packed(const OptionalTensor& t) { return t ? OptionalTensor(packed(*t)) : t; }

}  // namespace embattle
