// A call of margin softmax on the CPU: the kernel for its dtype. Included inside FEWSHOT_EXT_TARGET_BEGIN ... END; see
// common/isa.h.
#pragma once

#include "margin_softmax/cpu_kernel.h"

namespace fewshot_ext::FEWSHOT_EXT_ISA {

template <class T, class Storage>
void run_margin_softmax(const MarginSoftmaxProblem& problem, bool backward) {
  MarginSoftmax<T, Storage> run(problem, backward);
  backward ? run.backward() : run.forward();
}

void margin_softmax(const MarginSoftmaxProblem& problem, bool backward) {
  switch (problem.dtype) {
    case Dtype::float32:
      return run_margin_softmax<float, float>(problem, backward);
    case Dtype::float64:
      return run_margin_softmax<double, double>(problem, backward);
    case Dtype::bfloat16:
      return run_margin_softmax<float, BFloat16>(problem, backward);
    case Dtype::float16:
      return run_margin_softmax<float, Float16>(problem, backward);
  }
}

}  // namespace fewshot_ext::FEWSHOT_EXT_ISA
