// Margin softmax of many classes in one pass: a kernel that turns complete rows of products into losses and gradients
// between the matrix products that cuBLAS computes, one chunk of samples at a time. See gpu.h for the order.
#pragma once

#include "margin_softmax/device_rows.cuh"

namespace fewshot_ext {

namespace one_pass {
// Threads of the block that a row has. Of long rows one block fills a multiprocessor: those under way, one a block, are
// then few enough to stay in the L2 cache, where the second look at a row finds it. Known to the compiler, because only
// then it has the loads of several steps under way together.
constexpr int long_row = 1024, short_row = 128, most_of_short_row = 2048;  // threads, threads, classes

// Rows begin at multiples of this many elements: every access is four elements wide, and none crosses a row.
constexpr int64_t pitch_of(int64_t classes) { return (classes + 31) / 32 * 32; }

// Logits are kept in units of log 2, in which an exponential is one instruction.
template <class T>
constexpr T log2_of_e = T(1.4426950408889634074);
template <class T>
constexpr T log_of_2 = T(0.69314718055994530942);
}  // namespace one_pass

// What the rows of a call share: the factor of the mean, and that of the operands. One block.
template <class T>
struct Prepare {
  Rows<T> rows;
  T* row_weight;     // [], 1 / counted rows; null in the backward pass
  T* operand_scale;  // [] or null
};

template <class T>
__global__ void __launch_bounds__(1024) margin_softmax_prepare(Prepare<T> p) {
  constexpr int threads = 1024;
  T largest = 0;
  if (p.row_weight != nullptr) {
    const bool mean = p.rows.reduction == Reduction::mean;
    const int64_t counted = mean ? p.rows.template count<threads>() : 1;
    largest = T(1) / T(counted);
    if (threadIdx.x == 0) *p.row_weight = largest;
  } else if (p.operand_scale != nullptr) {
    for (int64_t i = threadIdx.x; i < p.rows.samples; i += threads)
      if (p.rows.label(i) != Label::ignored) largest = std::fmax(largest, std::abs(p.rows.upstream[i]));
    largest = block_reduce<threads>(largest, [](T a, T b) { return a > b ? a : b; });
  }
  if (p.operand_scale != nullptr && threadIdx.x == 0) *p.operand_scale = operand_scale(largest * p.rows.scale);
}

// A chunk of complete rows.
template <class Storage>
struct CompleteRows {
  using T = Accumulate<Storage>;
  Rows<T> rows;
  int64_t first_sample;
  T* products;                // [samples, pitch]: x_i . w_j, in whose place the gradient comes, as Storage
  int64_t pitch;              // a multiple of 4
  const T* inverse_features;  // [N]
  const T* inverse_weight;    // [pitch], of which the last may be anything
  const T* row_weight;        // [], of the forward pass
  const T* operand_scale;     // null where the other factor is plain vectors
  bool gradient;              // wanted
  T* losses;                  // [N], of the forward pass
};

namespace one_pass {

// The logits of one thread, in units of log 2. The target's takes no part in max and sum.
template <class T, bool smoothing, bool prediction>
struct Part {
  T max = PartOfRow<T>::lowest, sum = 0;  // of 2^(logit - max)
  T sum_logits = 0;
  T best = -PartOfRow<T>::infinity;
  int best_class = PartOfRow<T>::no_class;

  // Those of the classes from j on, of which the first `count` exist.
  __device__ __forceinline__ void add(Four<T> logits, int j, int count, int target) {
    if (count < 4) {
#pragma unroll
      for (int c = 0; c < 4; ++c) logits.at[c] = c < count ? logits.at[c] : -PartOfRow<T>::infinity;
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if constexpr (smoothing) sum_logits += c < count ? logits.at[c] : T(0);
      if constexpr (prediction) {
        best_class = logits.at[c] > best ? j + c : best_class;
        best = logits.at[c] > best ? logits.at[c] : best;
      }
    }
    const unsigned at = static_cast<unsigned>(target - j);
    if (at < 4) {
#pragma unroll
      for (int c = 0; c < 4; ++c)
        logits.at[c] = at == static_cast<unsigned>(c) ? -PartOfRow<T>::infinity : logits.at[c];
    }
    T top = max;
#pragma unroll
    for (int c = 0; c < 4; ++c) top = logits.at[c] > top ? logits.at[c] : top;
    sum *= std::exp2(max - top);
    max = top;
#pragma unroll
    for (int c = 0; c < 4; ++c) sum += std::exp2(logits.at[c] - top);
  }

  // In units of 1.
  __device__ PartOfRow<T> natural() const {
    return {max * log_of_2<T>, sum, sum_logits * log_of_2<T>, best * log_of_2<T>, best_class};
  }
};

}  // namespace one_pass

// One block a row. In the forward pass it goes through the row twice, for the loss and for the gradient; the backward
// pass knows the sums.
template <class Storage, int threads, bool backward, bool smoothing, bool prediction>
__global__ void __launch_bounds__(threads, 1) margin_softmax_one_pass(CompleteRows<Storage> p) {
  using T = Accumulate<Storage>;
  constexpr int step = 4 * threads, warps = threads / warp_lanes;
  static_assert(warps <= warp_lanes, "the first warp joins what the warps found");
  const int64_t row = p.first_sample + blockIdx.x;
  T* const products = p.products + blockIdx.x * p.pitch;
  const int classes = static_cast<int>(p.rows.classes), target = p.rows.target_class(row);
  const T inverse = p.inverse_features[row];
  const T factor = p.rows.scale * inverse * one_pass::log2_of_e<T>;
  // Two accesses of four elements each: those of several steps are under way together.
  const auto logits = [&](int j, Four<T>& inverse_weight) {
    Four<T> values = Four<T>::read(products + j);
    inverse_weight = Four<T>::read(p.inverse_weight + j);
#pragma unroll
    for (int c = 0; c < 4; ++c) values.at[c] *= factor * inverse_weight.at[c];
    return values;
  };

  FEWSHOT_EXT_SHARED(GradientCoefficients<T>, of_row, );
  if constexpr (backward) {
    if (threadIdx.x == 0) {
      const GradientCoefficients<T> found = p.rows.coefficients(
          row, p.rows.statistics[row], p.rows.statistics[p.rows.samples + row], p.rows.upstream[row]);
      of_row = found;
    }
  } else {
    one_pass::Part<T, smoothing, prediction> part;
#pragma unroll 2
    for (int j = 4 * threadIdx.x; j < classes; j += step) {
      Four<T> inverse_weight;
      part.add(logits(j, inverse_weight), j, classes - j, target);
    }
    FEWSHOT_EXT_SHARED(PartOfRow<T>, of_warp, [warps]);
    PartOfRow<T> all = part.natural();
    all.template add_lanes<warp_lanes>();
    if (threadIdx.x % warp_lanes == 0) of_warp[threadIdx.x / warp_lanes] = all;
    __syncthreads();
    if (threadIdx.x < warp_lanes) {
      all = threadIdx.x < warps ? of_warp[threadIdx.x] : PartOfRow<T>::empty();
      all.template add_lanes<warp_lanes>();
    }
    if (threadIdx.x == 0) {
      T target_logit = 0;
      if (target >= 0) target_logit = products[target] * (p.rows.scale * inverse * p.inverse_weight[target]);
      p.losses[row] = p.rows.finish(row, all, target_logit);
      const GradientCoefficients<T> found =
          p.rows.coefficients(row, p.rows.statistics[row], p.rows.statistics[p.rows.samples + row], *p.row_weight);
      of_row = found;
    }
  }
  if (!p.gradient) return;
  __syncthreads();

  const GradientCoefficients<T> coefficients = of_row;
  const T log_sum = coefficients.log_sum * one_pass::log2_of_e<T>;
  const T scaled = p.operand_scale != nullptr ? *p.operand_scale : inverse;
  Storage* const gradient = reinterpret_cast<Storage*>(products);
  for (int first = 0; first < classes; first += step) {
    const int j = first + 4 * threadIdx.x;
    Four<T> inverse_weight, entries{};
    if (j < classes) {
      entries = logits(j, inverse_weight);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        T entry = coefficients.probability * std::exp2(entries.at[c] - log_sum) - coefficients.uniform;
        if (j + c == target) entry = coefficients.at_target;
        entries.at[c] = entry * (p.operand_scale != nullptr ? scaled : scaled * inverse_weight.at[c]);
      }
    }
    // Entries that are narrower than products come to lie where others still have to be read, all of them in this step
    // or before.
    if constexpr (sizeof(Storage) < sizeof(T)) __syncthreads();
    if (j < classes) store_four(gradient + j, entries, 4, true);
  }
}

// The loss from those of the rows. One block, so that their sum has one order.
template <class T>
struct TotalLoss {
  const T* losses;  // [N]
  int64_t samples;
  const T* row_weight;  // []
  T* loss;              // []
};

template <class T>
__global__ void __launch_bounds__(1024) margin_softmax_total_loss(TotalLoss<T> p) {
  constexpr int threads = 1024;
  T total = 0;
  for (int64_t i = threadIdx.x; i < p.samples; i += threads) total += p.losses[i];
  total = block_sum<threads>(total);
  if (threadIdx.x == 0) *p.loss = total * *p.row_weight;
}

}  // namespace fewshot_ext
