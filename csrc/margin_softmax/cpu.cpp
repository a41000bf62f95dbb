// Margin softmax on the CPU: the labels looked at, and the version for this processor called.
#include <torch/csrc/stable/library.h>

#include "common/isa.h"
#include "margin_softmax/tensors.h"

namespace fewshot_ext {

namespace baseline {
void margin_softmax(const MarginSoftmaxProblem& problem, bool backward);
}
namespace avx2 {
void margin_softmax(const MarginSoftmaxProblem& problem, bool backward);
}
namespace avx512 {
void margin_softmax(const MarginSoftmaxProblem& problem, bool backward);
}

namespace {

void check_labels(const MarginSoftmaxProblem& problem) {
  for (int64_t i = 0; i < problem.samples; ++i) {
    const int64_t label = problem.target[i];
    STD_TORCH_CHECK(label == problem.ignore_index || (label >= 0 && label < problem.total_classes), "target: label ",
                    label, " at index ", i, " is outside [0, ", problem.total_classes, ")");
  }
}

struct CpuKernels {
  static void run(const MarginSoftmaxProblem& problem, const torch::stable::Tensor&) {
    check_labels(problem);
    const bool backward = problem.grad_loss != nullptr;
#if defined(__x86_64__)
    switch (cpu_capability()) {
      case CpuCapability::avx512:
        return avx512::margin_softmax(problem, backward);
      case CpuCapability::avx2:
        return avx2::margin_softmax(problem, backward);
      case CpuCapability::baseline:
        break;
    }
#endif
    baseline::margin_softmax(problem, backward);
  }
};

}  // namespace
}  // namespace fewshot_ext

STABLE_TORCH_LIBRARY_IMPL(fewshot_ext, CPU, m) {
  using namespace fewshot_ext;
  m.impl("margin_softmax", FEWSHOT_EXT_KERNEL(&margin_softmax_tensors::forward<CpuKernels>));
  m.impl("margin_softmax_backward", FEWSHOT_EXT_KERNEL(&margin_softmax_tensors::backward<CpuKernels>));
}
