// Binding of scale_gradients_ for any device.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

#include "common/half.h"
#include "common/torch_calls.h"

namespace fewshot_ext {

namespace scale_gradients_tensors {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Calls Kernels::run<Storage>(gradients[2], counts[2], factor, device_of) on the device of the gradients.
template <class Kernels>
void scale_gradients(Tensor first, Tensor second, Tensor factor) {
  STD_TORCH_CHECK(first.device() == second.device() && first.device() == factor.device(),
                  "gradients and factor are on different devices");
  STD_TORCH_CHECK(first.scalar_type() == second.scalar_type(), "the gradients differ in dtype");
  STD_TORCH_CHECK(first.is_contiguous() && second.is_contiguous(), "gradients: expected contiguous tensors");
  const ScalarType accumulate = first.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(factor.dim() == 0 && factor.scalar_type() == accumulate,
                  "factor: expected a scalar in the accumulation dtype");
  void* const gradients[] = {first.mutable_data_ptr(), second.mutable_data_ptr()};
  const int64_t counts[] = {first.numel(), second.numel()};
  const void* by = factor.const_data_ptr();
  switch (first.scalar_type()) {
    case ScalarType::Float:
      return Kernels::template run<float>(gradients, counts, by, first);
    case ScalarType::Double:
      return Kernels::template run<double>(gradients, counts, by, first);
    case ScalarType::BFloat16:
      return Kernels::template run<BFloat16>(gradients, counts, by, first);
    case ScalarType::Half:
      return Kernels::template run<Float16>(gradients, counts, by, first);
    default:
      STD_TORCH_CHECK(false, "gradients: expected float32, float64, bfloat16 or float16");
  }
}

}  // namespace scale_gradients_tensors
}  // namespace fewshot_ext
