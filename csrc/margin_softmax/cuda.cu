// Margin softmax on CUDA devices.
#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <string>

#include "common/cuda_device.h"
#include "margin_softmax/gpu.h"
#include "margin_softmax/tensors.h"

namespace fewshot_ext {
namespace {

std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

// The environment may name the kernel, for tests and benchmarks of each, and what complete rows of products may take.
MarginSoftmaxPlan plan_for(const MarginSoftmaxProblem& problem) {
  MarginSoftmaxPlan plan;
  if (const std::string name = variable("FEWSHOT_EXT_MARGIN_SOFTMAX_KERNEL"); !name.empty()) {
    plan.kernel = margin_softmax_kernel(name);
    STD_TORCH_CHECK(plan.kernel, "FEWSHOT_EXT_MARGIN_SOFTMAX_KERNEL: expected one_launch, one_pass or chunked, got ",
                    name);
    STD_TORCH_CHECK(plan.kernel != MarginSoftmaxKernel::one_launch || MarginSoftmaxPlan::fits_one_launch(problem),
                    "FEWSHOT_EXT_MARGIN_SOFTMAX_KERNEL: one_launch does not take ", problem.samples, " samples and ",
                    problem.classes, " classes");
  }
  if (const std::string mebibytes = variable("FEWSHOT_EXT_MARGIN_SOFTMAX_MIB"); !mebibytes.empty())
    plan.bytes = margin_softmax_bytes(mebibytes, problem);
  return plan;
}

struct CudaKernels {
  static void run(const MarginSoftmaxProblem& problem, const torch::stable::Tensor& features) {
    CudaDevice device(features);
    margin_softmax_on_gpu(device, problem, plan_for(problem));
  }
};

}  // namespace
}  // namespace fewshot_ext

STABLE_TORCH_LIBRARY_IMPL(fewshot_ext, CUDA, m) {
  using namespace fewshot_ext;
  m.impl("margin_softmax", FEWSHOT_EXT_KERNEL(&margin_softmax_tensors::forward<CudaKernels>));
  m.impl("margin_softmax_backward", FEWSHOT_EXT_KERNEL(&margin_softmax_tensors::backward<CudaKernels>));
}
