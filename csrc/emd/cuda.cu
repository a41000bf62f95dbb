// The Earth Mover's Distance on CUDA devices.
#include "common/cuda_device.h"
#include "emd/gpu.h"
#include "emd/tensors.h"

namespace fewshot_ext {
namespace {

void check_size(const char* argument, int64_t n, int64_t m) {
  STD_TORCH_CHECK(n <= emd_most_nodes_on_gpu && m <= emd_most_nodes_on_gpu, argument,
                  ": expected [B, n, m] with n and m at most ", emd_most_nodes_on_gpu, " on CUDA devices, got n = ", n,
                  ", m = ", m, "; the CPU takes larger ones");
}

struct CudaKernels {
  template <class Storage, class Accumulate>
  static void run(const EmdProblem<Storage, Accumulate>& problem, const torch::stable::Tensor& cost) {
    check_size("cost", problem.suppliers, problem.consumers);
    CudaDevice device(cost);
    emd_on_gpu<Storage>(device, problem);
  }

  template <class Accumulate>
  static void run_flow_backward(const EmdFlowBackwardProblem<Accumulate>& problem,
                                const torch::stable::Tensor& grad_flow) {
    check_size("grad_flow", problem.suppliers, problem.consumers);
    CudaDevice device(grad_flow);
    emd_flow_backward_on_gpu(device, problem);
  }
};

}  // namespace
}  // namespace fewshot_ext

STABLE_TORCH_LIBRARY_IMPL(fewshot_ext, CUDA, m) {
  using namespace fewshot_ext;
  m.impl("emd", FEWSHOT_EXT_KERNEL(&emd_tensors::forward<CudaKernels>));
  m.impl("emd_flow_backward", FEWSHOT_EXT_KERNEL(&emd_tensors::flow_backward<CudaKernels>));
}
