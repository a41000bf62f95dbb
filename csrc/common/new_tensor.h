// New tensors, without their operator being looked up by name, which torch::stable::new_empty does at every call: for
// the results of a small problem that took longer than the problem.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>
#include <cstddef>
#include <cstdint>

#include "common/torch_calls.h"

namespace fewshot_ext {

// Contiguous and not initialized, on the device of `like`.
inline torch::stable::Tensor new_empty(const torch::stable::Tensor& like, const int64_t* sizes, size_t dimensions,
                                       torch::headeronly::ScalarType type) {
  std::array<int64_t, 3> strides;
  STD_TORCH_CHECK(dimensions <= strides.size(), "new_empty: expected at most ", strides.size(), " dimensions");
  int64_t stride = 1;
  for (size_t k = dimensions; k-- > 0;) {
    strides[k] = stride;
    // A product that goes round is undefined here, before torch has a look at it.
    STD_TORCH_CHECK(!__builtin_mul_overflow(stride, sizes[k] > 1 ? sizes[k] : 1, &stride),
                    "expected a tensor of less than 2^63 elements");
  }
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  return torch_calls::asking(like, {sizes, dimensions}, type, [&] {
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(static_cast<int64_t>(dimensions), sizes, strides.data(),
                                 torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), device_type,
                                 like.get_device_index(), &handle));
    return torch::stable::Tensor(handle);
  });
}

template <size_t dimensions>
torch::stable::Tensor new_empty(const torch::stable::Tensor& like, const int64_t (&sizes)[dimensions],
                                torch::headeronly::ScalarType type) {
  return new_empty(like, sizes, dimensions, type);
}

inline torch::stable::Tensor make_zeros(const torch::stable::Tensor& like, torch_calls::IntHeaderOnlyArrayRef sizes,
                                        torch::headeronly::ScalarType type) {
  return torch_calls::asking(like, sizes, type, [&] { return torch::stable::new_zeros(like, sizes, type); });
}

inline torch::stable::Tensor make_contiguous(const torch::stable::Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor;
  return torch_calls::asking(tensor, tensor.sizes(), tensor.scalar_type(),
                             [&] { return torch::stable::contiguous(tensor); });
}

}  // namespace fewshot_ext
