// New tensors without their operator being looked up by name, which torch::stable::new_empty does at every call: for
// the results of a small problem that took longer than the problem.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <cstddef>
#include <cstdint>

namespace fewshot_ext {

// Contiguous and not initialized, on the device of `like`.
inline torch::stable::Tensor new_empty(const torch::stable::Tensor& like, const int64_t* sizes, size_t dimensions,
                                       torch::headeronly::ScalarType type) {
  std::array<int64_t, 3> strides;
  STD_TORCH_CHECK(dimensions <= strides.size(), "new_empty: expected at most ", strides.size(), " dimensions");
  int64_t stride = 1;
  for (size_t k = dimensions; k-- > 0;) {
    strides[k] = stride;
    stride *= sizes[k] > 1 ? sizes[k] : 1;
  }
  int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(dimensions), sizes, strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), device_type,
                               like.get_device_index(), &handle));
  return torch::stable::Tensor(handle);
}

template <size_t dimensions>
torch::stable::Tensor new_empty(const torch::stable::Tensor& like, const int64_t (&sizes)[dimensions],
                                torch::headeronly::ScalarType type) {
  return new_empty(like, sizes, dimensions, type);
}

}  // namespace fewshot_ext
