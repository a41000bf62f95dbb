// Which of the three ways a call takes on a GPU, and how much memory it may use on it.
#pragma once

#include <algorithm>
#include <charconv>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>

#include "margin_softmax/one_pass.cuh"
#include "margin_softmax/problem.h"

namespace fewshot_ext {

enum class MarginSoftmaxKernel { one_launch, one_pass, chunked };

// By the name that the environment and the tests give it.
inline std::optional<MarginSoftmaxKernel> margin_softmax_kernel(std::string_view name) {
  if (name == "one_launch") return MarginSoftmaxKernel::one_launch;
  if (name == "one_pass") return MarginSoftmaxKernel::one_pass;
  if (name == "chunked") return MarginSoftmaxKernel::chunked;
  return std::nullopt;
}

// How a call is carried out; the defaults suit GPUs, the tests set others to reach every branch on small problems.
struct MarginSoftmaxPlan {
  std::optional<MarginSoftmaxKernel> kernel;  // by size where nobody says
  int64_t chunk_samples = 4096;
  int64_t chunk_products = int64_t(1) << 22;  // 16 MiB in float32: a chunk stays in the L2 cache between kernels
  std::optional<int64_t> bytes;               // of complete rows, at least one; see complete_rows

  // One launch pays as long as its arithmetic costs less than cuBLAS's launches. Where that ends is reckoned, not
  // measured: 2^27 multiply-adds take three times over about as long as ten launches.
  static bool is_small(const MarginSoftmaxProblem& p) {
    return p.samples <= 2048 && p.classes <= 2048 && p.samples * p.classes * p.dimensions <= int64_t(1) << 27;
  }

  // 32-bit indices, and sums over the rows by one block.
  static bool fits_one_launch(const MarginSoftmaxProblem& p) {
    return p.samples <= 65536 && p.classes <= 65536 && p.samples * p.classes <= int64_t(1) << 26 &&
           p.dimensions <= int64_t(1) << 24;
  }

  static int64_t bytes_of_row(const MarginSoftmaxProblem& p) {
    return one_pass::pitch_of(p.classes) * (p.dtype == Dtype::float64 ? sizeof(double) : sizeof(float));
  }

  // How many complete rows of products may be in memory at once: 64 MiB of them, or as many as the features have
  // dimensions, which take as much as the weight's gradient, up to 1 GiB. For every chunk of rows adds to all of that
  // gradient, and with a few rows this would take longer than what is done with the products.
  int64_t complete_rows(const MarginSoftmaxProblem& p) const {
    const int64_t least = int64_t(64) << 20, most = int64_t(1) << 30, row = bytes_of_row(p);
    return bytes.value_or(std::clamp(p.grad_weight != nullptr ? p.dimensions * row : 0, least, most)) / row;
  }

  // With a few rows at a time the weight would be read too often; chunks of classes then do better, by an estimate.
  MarginSoftmaxKernel choose(const MarginSoftmaxProblem& p) const {
    if (kernel) return *kernel;
    if (is_small(p)) return MarginSoftmaxKernel::one_launch;
    return bytes || complete_rows(p) >= std::min<int64_t>(p.samples, 64) ? MarginSoftmaxKernel::one_pass
                                                                         : MarginSoftmaxKernel::chunked;
  }
};

// What the environment allows complete rows of products, from its number of MiB.
inline int64_t margin_softmax_bytes(const std::string& mebibytes, const MarginSoftmaxProblem& problem) {
  const std::string name = "FEWSHOT_EXT_MARGIN_SOFTMAX_MIB";
  int64_t count = 0;
  const char* const end = mebibytes.data() + mebibytes.size();
  const auto [rest, error] = std::from_chars(mebibytes.data(), end, count);
  if (error != std::errc() || rest != end || count < 1 || count > int64_t(1) << 30)
    throw std::runtime_error(name + ": expected a number of MiB from 1 to 2^30, got " + mebibytes);
  const int64_t least = (MarginSoftmaxPlan::bytes_of_row(problem) + (1 << 20) - 1) >> 20;
  if (count < least)
    throw std::runtime_error(name + ": expected at least " + std::to_string(least) + ", which one row of " +
                             std::to_string(problem.classes) + " classes takes, got " + mebibytes);
  return count << 20;
}

}  // namespace fewshot_ext
