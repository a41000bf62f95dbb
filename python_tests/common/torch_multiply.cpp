// The package's matrix product for GPUs as an operator on the CPU, for test_torch_multiply.py.
#include "common/torch_multiply.h"

#include <torch/csrc/stable/library.h>

#include "common/torch_calls.h"

namespace {

using fewshot_ext::BFloat16;
using fewshot_ext::Float16;
using fewshot_ext::Matrix;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class Element>
Matrix<Element> matrix_of(const Tensor& tensor) {
  auto* data = static_cast<Element*>(const_cast<void*>(tensor.const_data_ptr()));
  return {data, tensor.size(0), tensor.size(1), tensor.stride(0), tensor.stride(1)};
}

template <class Out, class Element>
void multiply_as(const Tensor& out, const Tensor& a, const Tensor& b) {
  fewshot_ext::multiply_by_torch(matrix_of<Out>(out), matrix_of<const Element>(a), matrix_of<const Element>(b),
                                 out.device());
}

void multiply(Tensor out, Tensor a, Tensor b) {
  switch (a.scalar_type()) {
    case ScalarType::Float:
      return multiply_as<float, float>(out, a, b);
    case ScalarType::Double:
      return multiply_as<double, double>(out, a, b);
    case ScalarType::BFloat16:
      return multiply_as<float, BFloat16>(out, a, b);
    case ScalarType::Half:
      return multiply_as<float, Float16>(out, a, b);
    default:
      STD_TORCH_CHECK(false, "a: expected float32, float64, bfloat16 or float16");
  }
}

}  // namespace

STABLE_TORCH_LIBRARY(fewshot_ext_test, m) { m.def("multiply(Tensor(a!) out, Tensor a, Tensor b) -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(fewshot_ext_test, CPU, m) { m.impl("multiply", FEWSHOT_EXT_KERNEL(&multiply)); }
