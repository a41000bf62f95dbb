// The launches of the Earth Mover's Distance on a GPU, written against a Device so that the emulator runs the same
// code; margin_softmax/gpu.h says what a Device offers.
#pragma once

#include "emd/flow_backward.cuh"
#include "emd/kernels.cuh"

namespace fewshot_ext {

// Suppliers, and consumers, that the kernels take.
constexpr int64_t emd_most_nodes_on_gpu = EmdBlock<512>::most_of_a_side;

template <class Storage, class Device>
void emd_on_gpu(Device& device, const EmdProblem<Storage, Accumulate<Storage>>& problem) {
  const int64_t n = problem.suppliers, m = problem.consumers;
  const auto batch = static_cast<unsigned>(problem.batch);
  if (EmdWarps::take(n, m))
    device.template launch<emd_by_warps<Storage>>((batch + EmdWarps::warps - 1) / EmdWarps::warps, EmdWarps::threads,
                                                  problem);
  else if (EmdBlock<128>::take(n, m))
    device.template launch<emd_by_blocks<Storage, 128>>(batch, 128, problem);
  else
    device.template launch<emd_by_blocks<Storage, 512>>(batch, 512, problem);
}

template <class T, class Device>
void emd_flow_backward_on_gpu(Device& device, const EmdFlowBackwardProblem<T>& problem) {
  const auto batch = static_cast<unsigned>(problem.batch);
  device.template launch<emd_flow_backward_by_warps<T>>((batch + EmdFlowBackward::warps - 1) / EmdFlowBackward::warps,
                                                        EmdFlowBackward::threads, problem);
}

}  // namespace fewshot_ext
