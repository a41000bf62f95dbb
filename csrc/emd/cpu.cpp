// The Earth Mover's Distance on the CPU: the version for this processor called, and its failures put into words.
#include <torch/csrc/stable/library.h>

#include "common/isa.h"
#include "emd/flow_backward.h"
#include "emd/tensors.h"

namespace fewshot_ext {

namespace baseline {
template <class Storage, class Accumulate>
EmdFailure emd(const EmdProblem<Storage, Accumulate>& problem);
}
namespace avx2 {
template <class Storage, class Accumulate>
EmdFailure emd(const EmdProblem<Storage, Accumulate>& problem);
}
namespace avx512 {
template <class Storage, class Accumulate>
EmdFailure emd(const EmdProblem<Storage, Accumulate>& problem);
}

namespace {

template <class Storage, class Accumulate>
EmdFailure emd(const EmdProblem<Storage, Accumulate>& problem) {
#if defined(__x86_64__)
  switch (cpu_capability()) {
    case CpuCapability::avx512:
      return avx512::emd(problem);
    case CpuCapability::avx2:
      return avx2::emd(problem);
    case CpuCapability::baseline:
      break;
  }
#endif
  return baseline::emd(problem);
}

struct CpuKernels {
  template <class Storage, class Accumulate>
  static void run(const EmdProblem<Storage, Accumulate>& problem, const torch::stable::Tensor&) {
    const EmdFailure failure = emd(problem);
    const int64_t index = failure.index;
    switch (failure.fault) {
      case EmdFault::none:
        return;
      case EmdFault::cost:
        STD_TORCH_CHECK(false, "cost: expected finite numbers or infinity; problem ", index,
                        " of the batch has another");
      case EmdFault::supply:
        STD_TORCH_CHECK(false, "supply: expected finite numbers not below 0; problem ", index,
                        " of the batch has another");
      case EmdFault::demand:
        STD_TORCH_CHECK(false, "demand: expected finite numbers not below 0; problem ", index,
                        " of the batch has another");
      case EmdFault::no_mass:
        STD_TORCH_CHECK(false, "supply and demand: expected mass above 0; problem ", index,
                        " of the batch has a supply of ", failure.supply_mass, " and a demand of ",
                        failure.demand_mass);
      case EmdFault::unequal_mass:
        STD_TORCH_CHECK(false, "supply and demand: expected masses that agree to a relative ", emd_mass_tolerance,
                        "; problem ", index, " of the batch has a supply of ", failure.supply_mass, " and a demand of ",
                        failure.demand_mass);
      case EmdFault::forbidden:
        STD_TORCH_CHECK(false, "cost: no flow avoids the forbidden arcs; problem ", index, " of the batch");
      case EmdFault::overflow:
        STD_TORCH_CHECK(false, "cost: expected a value and duals within the range of the results' dtype; problem ",
                        index, " of the batch has one beyond");
      case EmdFault::stopped:
        STD_TORCH_CHECK(false, "emd: stopped by a signal");
      case EmdFault::not_optimal:
        STD_TORCH_CHECK(false, "emd: no proof of optimality for problem ", index,
                        " of the batch, n = ", problem.suppliers, ", m = ", problem.consumers,
                        "; please report it with its cost[", index, "], supply[", index, "] and demand[", index,
                        "], saved by torch.save");
    }
  }

  template <class Accumulate>
  static void run_flow_backward(const EmdFlowBackwardProblem<Accumulate>& problem, const torch::stable::Tensor&) {
    const int64_t failed = emd_flow_backward(problem);
    STD_TORCH_CHECK(failed < 0, "basis: problem ", failed, " of the batch has no tree as the forward pass returns it");
  }
};

}  // namespace
}  // namespace fewshot_ext

STABLE_TORCH_LIBRARY_IMPL(fewshot_ext, CPU, m) {
  using namespace fewshot_ext;
  m.impl("emd", FEWSHOT_EXT_KERNEL(&emd_tensors::forward<CpuKernels>));
  m.impl("emd_flow_backward", FEWSHOT_EXT_KERNEL(&emd_tensors::flow_backward<CpuKernels>));
}
