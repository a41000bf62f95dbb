// The GPU of a call: its current stream, memory from torch's allocator, and matrix products by torch. Nothing here
// waits for the GPU, and all of it can be captured into a CUDA graph.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <type_traits>
#include <vector>

#include "common/matrix.h"
#include "common/new_tensor.h"
#include "common/torch_multiply.h"

namespace fewshot_ext {

class CudaDevice {
 public:
  using Tensor = torch::stable::Tensor;

  // The device of `like`, for as long as this lives.
  explicit CudaDevice(const Tensor& like) : like_(like), index_(like.get_device_index()), guard_(index_) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <auto kernel, class... Arguments>
  void launch(dim3 grid, dim3 block, const Arguments&... arguments) {
    launch_with_shared<kernel>(grid, block, 0, arguments...);
  }

  // With dynamic shared memory, of at most 48 KiB together with what the kernel has of its own.
  template <auto kernel, class... Arguments>
  void launch_with_shared(dim3 grid, dim3 block, int64_t bytes, const Arguments&... arguments) {
    start(kernel, {grid, block, static_cast<size_t>(bytes), stream_, nullptr, 0}, arguments...);
  }

  // All blocks at once, so that they can wait for each other: `most_blocks`, or as many as the GPU holds.
  template <auto kernel, class... Arguments>
  void launch_cooperative(int64_t most_blocks, int threads, const Arguments&... arguments) {
    const auto blocks = static_cast<unsigned>(std::min<int64_t>(most_blocks, resident_blocks<kernel>(threads)));
    cudaLaunchAttribute cooperative{};
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
    start(kernel, {blocks, static_cast<unsigned>(threads), 0, stream_, &cooperative, 1}, arguments...);
  }

  // Kept until the call ends; torch's allocator then hands it out again in the order of the stream.
  std::byte* allocate(int64_t bytes) {
    memory_.push_back(new_empty(like_, {bytes}, torch::headeronly::ScalarType::Byte));
    return static_cast<std::byte*>(memory_.back().mutable_data_ptr());
  }

  template <class Out, class Element>
  void multiply(const Matrix<Out>& out, const Matrix<const Element>& a, const Matrix<const Element>& b) {
    multiply_by_torch(out, a, b, like_.device());
  }

  // out += a b.
  template <class Element>
  void multiply_add(const Matrix<Element>& out, const Matrix<const Element>& a, const Matrix<const Element>& b) {
    const Tensor sum = tensor_of(out, like_.device());
    TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(sum.get(), sum.get(), tensor_of(a, like_.device()).get(),
                                                     tensor_of(b, like_.device()).get(), 1.0, 1.0));
  }

 private:
  template <class... Parameters>
  static void start(void (*kernel)(Parameters...), const cudaLaunchConfig_t& config,
                    std::type_identity_t<Parameters>... arguments) {
    void* pointers[] = {&arguments...};
    STD_CUDA_CHECK(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), pointers));
  }

  template <auto kernel>
  int resident_blocks(int threads) const {
    // Asking takes microseconds, as long as a small call.
    static std::array<std::atomic<int>, 64> known{};
    std::atomic<int>* remembered = index_ < static_cast<int>(known.size()) ? &known[index_] : nullptr;
    if (remembered != nullptr && remembered->load(std::memory_order_relaxed) > 0) return remembered->load();
    int of_one = 0, processors = 0;
    STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_one, kernel, threads, 0));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index_));
    const int blocks = of_one * processors;
    if (remembered != nullptr) remembered->store(blocks, std::memory_order_relaxed);
    return blocks;
  }

  Tensor like_;
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  std::vector<Tensor> memory_;
};

}  // namespace fewshot_ext
