// Episode fine-tuning on CUDA devices.
#include "common/cuda_device.h"
#include "episode_finetune/gpu.h"
#include "episode_finetune/tensors.h"

namespace fewshot_ext {
namespace {

struct CudaKernels {
  template <class Storage, class Accumulate>
  static void run(const EpisodeFinetuneProblem<Storage, Accumulate>& problem, const torch::stable::Tensor& support) {
    const FinetuneForm form = episode_finetune_tensors::form_by_environment();
    CudaDevice device(support);
    finetune_episodes_on_gpu<Storage>(device, problem, form);
  }

  template <class Accumulate>
  static void draw(const EpisodeDraws& draws, const torch::stable::Tensor& support) {
    CudaDevice device(support);
    draw_episodes_on_gpu<Accumulate>(device, draws);
  }
};

}  // namespace
}  // namespace fewshot_ext

STABLE_TORCH_LIBRARY_IMPL(fewshot_ext, CUDA, m) {
  using namespace fewshot_ext;
  m.impl("finetune_episodes", FEWSHOT_EXT_KERNEL(&episode_finetune_tensors::finetune<CudaKernels>));
  m.impl("draw_episodes", FEWSHOT_EXT_KERNEL(&episode_finetune_tensors::draw<CudaKernels>));
}
