// Margin softmax on CUDA devices.
#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <string>

#include "common/cuda_device.h"
#include "margin_softmax/gpu.h"
#include "margin_softmax/tensors.h"

namespace fewshot_ext {
namespace {

// The environment may name the kernel, for tests and benchmarks of each.
MarginSoftmaxPlan plan_for(const MarginSoftmaxProblem& problem) {
  MarginSoftmaxPlan plan;
  const char* variable = std::getenv("FEWSHOT_EXT_MARGIN_SOFTMAX_KERNEL");
  if (variable == nullptr || *variable == '\0') return plan;
  const std::string name = variable;
  STD_TORCH_CHECK(name == "one_launch" || name == "chunked",
                  "FEWSHOT_EXT_MARGIN_SOFTMAX_KERNEL: expected one_launch or chunked, got ", name);
  plan.kernel = name == "chunked" ? MarginSoftmaxKernel::chunked : MarginSoftmaxKernel::one_launch;
  STD_TORCH_CHECK(plan.kernel == MarginSoftmaxKernel::chunked || MarginSoftmaxPlan::fits_one_launch(problem),
                  "FEWSHOT_EXT_MARGIN_SOFTMAX_KERNEL: one_launch does not take ", problem.samples, " samples and ",
                  problem.classes, " classes");
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
  m.impl("margin_softmax", TORCH_BOX(&margin_softmax_tensors::forward<CudaKernels>));
  m.impl("margin_softmax_backward", TORCH_BOX(&margin_softmax_tensors::backward<CudaKernels>));
}
