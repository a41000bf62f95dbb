// The launches of the Earth Mover's Distance on a GPU, written against a Device so that the emulator runs the same
// code; margin_softmax/gpu.h says what a Device offers.
#pragma once

#include "emd/exact.cuh"
#include "emd/flow_backward.cuh"
#include "emd/kernels.cuh"

namespace fewshot_ext {

// Suppliers, and consumers, that the kernels take.
constexpr int64_t emd_most_nodes_on_gpu = 1024;

template <class Storage, class Device>
void emd_on_gpu(Device& device, const EmdProblem<Storage, Accumulate<Storage>>& problem) {
  const int64_t n = problem.suppliers, m = problem.consumers;
  const auto batch = static_cast<unsigned>(problem.batch);
  if (EmdWarps::take(n, m))
    device.template launch<emd_by_warps<Storage>>((batch + EmdWarps::warps - 1) / EmdWarps::warps, EmdWarps::threads,
                                                  problem);
  else if (EmdBlock<128>::take(n, m))
    device.template launch<emd_by_blocks<Storage, 128>>(batch, 128, problem);
  else if (EmdBlock<512>::take(n, m))
    device.template launch<emd_by_blocks<Storage, 512>>(batch, 512, problem);
  else
    device.template launch<emd_leave_to_exact<Storage>>((batch + 255) / 256, 256, problem);

  const int64_t bytes = gpu::Solver<Storage>::bytes(problem);
  const int64_t room = std::max<int64_t>(EmdExactly::most_bytes / bytes, 1);
  const int64_t warps = std::min({problem.batch, EmdExactly::most_warps, room});
  device.template launch<emd_exactly_by_warps<Storage>>(
      static_cast<unsigned>(warps), EmdExactly::threads, problem,
      reinterpret_cast<unsigned char*>(device.allocate(warps * bytes)), bytes);
}

template <class T, class Device>
void emd_flow_backward_on_gpu(Device& device, const EmdFlowBackwardProblem<T>& problem) {
  const auto run = [&]<int most_nodes>() {
    using Size = EmdFlowBackward<most_nodes>;
    const auto blocks = static_cast<unsigned>((problem.batch + Size::warps - 1) / Size::warps);
    device.template launch<emd_flow_backward_by_warps<T, most_nodes>>(blocks, Size::threads, problem);
  };
  if (problem.suppliers + problem.consumers <= 512)
    run.template operator()<512>();
  else
    run.template operator()<2 * emd_most_nodes_on_gpu>();
}

}  // namespace fewshot_ext
