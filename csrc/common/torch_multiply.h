// Matrix products by torch, on whichever device the matrices are.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>
#include <cstdint>
#include <type_traits>

#include "common/half.h"
#include "common/matrix.h"

namespace fewshot_ext {

template <class Element>
constexpr torch::headeronly::ScalarType scalar_type_of() {
  using torch::headeronly::ScalarType;
  if constexpr (std::is_same_v<Element, double>) return ScalarType::Double;
  if constexpr (std::is_same_v<Element, BFloat16>) return ScalarType::BFloat16;
  if constexpr (std::is_same_v<Element, Float16>) return ScalarType::Half;
  return ScalarType::Float;
}

// A view, which torch may write to where the matrix may be.
template <class Element>
torch::stable::Tensor tensor_of(const Matrix<Element>& matrix, const torch::stable::Device& device) {
  using Plain = std::remove_const_t<Element>;
  const int64_t sizes[] = {matrix.rows, matrix.columns}, strides[] = {matrix.row_stride, matrix.column_stride};
  return torch::stable::from_blob(const_cast<Plain*>(matrix.data), sizes, strides, device, scalar_type_of<Plain>());
}

// out = a b: on GPUs by cuBLAS, in TF32 where torch is told so, summed in float32 for half types.
//
// What TunableOp makes of them was read in torch's source, not run. mm.out goes where torch.mm goes: to a kernel tuned
// by measuring, on the first call with these sizes, which a CUDA graph must not capture. mm.dtype_out goes to
// gemm<half, float>, which tunes nothing; what refuses float32 results of half types is the branch with a bias, and it
// has none.
template <class Out, class Element>
void multiply_by_torch(const Matrix<Out>& out, const Matrix<const Element>& a, const Matrix<const Element>& b,
                       const torch::stable::Device& device) {
  using torch::stable::detail::from;
  const auto call = [](const char* overload, StableIValue* stack) {
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", overload, stack, TORCH_ABI_VERSION));
    torch::stable::detail::to<torch::stable::Tensor>(stack[0]);  // owns the result, another handle of `out`
  };
  if constexpr (std::is_same_v<Out, Element>) {
    std::array<StableIValue, 3> stack{from(tensor_of(a, device)), from(tensor_of(b, device)),
                                      from(tensor_of(out, device))};
    call("out", stack.data());
  } else {
    std::array<StableIValue, 4> stack{from(tensor_of(a, device)), from(tensor_of(b, device)),
                                      from(scalar_type_of<Out>()), from(tensor_of(out, device))};
    call("dtype_out", stack.data());
  }
}

}  // namespace fewshot_ext
