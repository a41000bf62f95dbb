// scale_gradients_ on CUDA devices.
#include "common/cuda_device.h"
#include "scale_gradients/kernels.cuh"
#include "scale_gradients/tensors.h"

namespace fewshot_ext {
namespace {

struct CudaKernels {
  template <class Storage>
  static void run(void* const* gradients, const int64_t* counts, const void* by, const torch::stable::Tensor& like) {
    CudaDevice device(like);
    scale_gradients_on_gpu<Storage>(device, gradients, counts, by);
  }
};

}  // namespace
}  // namespace fewshot_ext

STABLE_TORCH_LIBRARY_IMPL(fewshot_ext, CUDA, m) {
  using namespace fewshot_ext;
  m.impl("scale_gradients_", FEWSHOT_EXT_KERNEL(&scale_gradients_tensors::scale_gradients<CudaKernels>));
}
