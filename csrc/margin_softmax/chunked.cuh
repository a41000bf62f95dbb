// Margin softmax of many classes: the kernels between the matrix products that cuBLAS computes, one chunk of samples
// and classes at a time. See gpu.h for their order.
#pragma once

#include "margin_softmax/device_rows.cuh"

namespace fewshot_ext {

namespace chunked {
constexpr int threads = 256;
constexpr int warps = threads / warp_lanes;

// Of a block that goes through a row of a chunk: one for four classes, in whole warps.
constexpr unsigned threads_for(int64_t classes) {
  const int64_t wanted = ((classes + 3) / 4 + warp_lanes - 1) / warp_lanes * warp_lanes;
  return static_cast<unsigned>(wanted < threads ? wanted : threads);
}
}  // namespace chunked

// 1 / |x| of every row, and where wanted the rows times it; one warp a row.
template <class Storage>
struct InverseNorms {
  using T = Accumulate<Storage>;
  const Storage* vectors;  // [rows, dimensions]
  int64_t stride;
  int64_t rows, dimensions;
  bool cosine, fours;
  T* inverse;           // [rows]
  Storage* normalized;  // [rows, dimensions] or null
};

template <class Storage>
__global__ void __launch_bounds__(chunked::threads) margin_softmax_inverse_norms(InverseNorms<Storage> p) {
  using T = Accumulate<Storage>;
  const int64_t row = int64_t(blockIdx.x) * chunked::warps + threadIdx.x / warp_lanes;
  const int lane = threadIdx.x % warp_lanes;
  if (row >= p.rows) return;
  const Storage* x = p.vectors + row * p.stride;
  const T inverse = inverse_norm(x, p.dimensions, p.fours, p.cosine);
  if (lane == 0) p.inverse[row] = inverse;
  if (p.normalized == nullptr) return;
  for (int64_t k = 4 * lane; k < p.dimensions; k += 4 * warp_lanes) {
    Four<T> values = load_four(x + k, p.dimensions - k, p.fours);
#pragma unroll
    for (int c = 0; c < 4; ++c) values.at[c] *= inverse;
    store_four(p.normalized + row * p.dimensions + k, values, p.dimensions - k, p.dimensions % 4 == 0);
  }
}

// A chunk of the products x_i . w_j and what its logits need to know.
template <class T>
struct Chunk {
  Rows<T> rows;
  T* products;  // [samples, classes] of the chunk
  int64_t first_sample, samples;
  int64_t first_class, classes;
  const T* inverse_features;  // [N]
  const T* inverse_weight;    // [C]

  // The classes from j on; samples and classes are counted within the chunk.
  __device__ __forceinline__ Four<T> inverse_of_classes(int64_t j) const {
    return load_four(inverse_weight + first_class + j, classes - j, classes % 4 == 0 && first_class % 4 == 0);
  }

  // Logits of sample i, zero beyond the last class.
  __device__ __forceinline__ Four<T> logits(int64_t i, int64_t j, const Four<T>& inverse) const {
    Four<T> values = load_four(products + i * classes + j, classes - j, classes % 4 == 0);
    const T factor = rows.scale * inverse_features[first_sample + i];
#pragma unroll
    for (int c = 0; c < 4; ++c) values.at[c] *= factor * inverse.at[c];
    return values;
  }
};

// Adds a chunk to what is known of its rows; one block a row.
template <class T>
struct RowStatistics {
  Chunk<T> chunk;
  PartOfRow<T>* parts;  // [N]
  T* target_logits;     // [N]
};

template <class T>
__global__ void __launch_bounds__(chunked::threads, 1) margin_softmax_row_statistics(RowStatistics<T> p) {
  FEWSHOT_EXT_SHARED(PartOfRow<T>, of_warp, [chunked::warps]);
  const int64_t i = blockIdx.x, row = p.chunk.first_sample + i;
  const int64_t target = p.chunk.rows.target_class(row);
  PartOfRow<T> part = PartOfRow<T>::empty();
  for (int64_t j = 4 * threadIdx.x; j < p.chunk.classes; j += 4 * blockDim.x) {
    const Four<T> logits = p.chunk.logits(i, j, p.chunk.inverse_of_classes(j));
    part.add(logits, p.chunk.first_class + j, p.chunk.classes - j, target);
#pragma unroll
    for (int c = 0; c < 4; ++c)
      if (j + c < p.chunk.classes && p.chunk.first_class + j + c == target) p.target_logits[row] = logits.at[c];
  }
  part.template add_lanes<warp_lanes>();
  if (threadIdx.x % warp_lanes == 0) of_warp[threadIdx.x / warp_lanes] = part;
  __syncthreads();
  if (threadIdx.x != 0) return;
  PartOfRow<T> all = p.chunk.first_class == 0 ? PartOfRow<T>::empty() : p.parts[row];
  for (unsigned warp = 0; warp < blockDim.x / warp_lanes; ++warp) all.add(of_warp[warp]);
  p.parts[row] = all;
}

// Loss, statistics and predictions in the forward pass; in both passes the coefficients of the gradient. One block, so
// that the sum over the rows has one order.
template <class T>
struct FinishRows {
  Rows<T> rows;
  const PartOfRow<T>* parts;              // [N]
  const T* target_logits;                 // [N]
  GradientCoefficients<T>* coefficients;  // [N] or null
  T* operand_scale;                       // [], or null where 1 is right
};

template <class T>
__global__ void __launch_bounds__(1024) margin_softmax_finish_rows(FinishRows<T> p) {
  constexpr int threads = 1024;
  const bool forward = p.rows.upstream == nullptr, mean = p.rows.reduction == Reduction::mean;
  const int64_t counted = forward && mean ? p.rows.template count<threads>() : 1;
  T total = 0, largest = 0;
  for (int64_t i = threadIdx.x; i < p.rows.samples; i += threads) {
    if (forward) {
      const T target_logit = p.rows.target_class(i) >= 0 ? p.target_logits[i] : T(0);
      total += p.rows.finish(i, p.parts[i], target_logit);
    }
    if (p.coefficients == nullptr) continue;
    const T weight = forward ? T(1) / T(counted) : p.rows.upstream[i];
    p.coefficients[i] = p.rows.coefficients(i, p.rows.statistics[i], p.rows.statistics[p.rows.samples + i], weight);
    const T magnitude = std::abs(p.coefficients[i].probability);
    if (magnitude > largest) largest = magnitude;
  }
  if (forward && p.rows.reduction != Reduction::none) {
    total = block_sum<threads>(total);
    if (threadIdx.x == 0) *p.rows.loss = mean ? total / T(counted) : total;
  }
  if (p.operand_scale != nullptr) {
    largest = block_reduce<threads>(largest, [](T a, T b) { return a > b ? a : b; });
    if (threadIdx.x == 0) *p.operand_scale = operand_scale(largest);
  }
}

// Logits -> dL/ds, as factor of the products that give the gradients.
template <class T, class Operand>
struct SoftmaxGradient {
  Chunk<T> chunk;
  const GradientCoefficients<T>* coefficients;  // [N]
  const T* operand_scale;                       // null where the other factor is plain vectors
  Operand* gradient;                            // [samples, classes] of the chunk; may be the products themselves
};

template <class T, class Operand>
__global__ void __launch_bounds__(chunked::threads) margin_softmax_gradient(SoftmaxGradient<T, Operand> p) {
  const int64_t i = blockIdx.y, row = p.chunk.first_sample + i;
  const int64_t j = 4 * (int64_t(blockIdx.x) * blockDim.x + threadIdx.x);
  if (j >= p.chunk.classes) return;
  const GradientCoefficients<T> coefficients = p.coefficients[row];
  const int64_t target = p.chunk.rows.target_class(row) - p.chunk.first_class;
  const T factor = p.operand_scale != nullptr ? *p.operand_scale : p.chunk.inverse_features[row];
  const Four<T> inverse = p.chunk.inverse_of_classes(j);
  Four<T> entries = p.chunk.logits(i, j, inverse);
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    entries.at[c] = factor * gradient_entry(coefficients, entries.at[c], j + c == target);
    if (p.operand_scale == nullptr) entries.at[c] *= inverse.at[c];
  }
  store_four(p.gradient + i * p.chunk.classes + j, entries, p.chunk.classes - j, p.chunk.classes % 4 == 0);
}

// sum += part.
template <class T>
__global__ void __launch_bounds__(chunked::threads) margin_softmax_accumulate(T* sum, const T* part, int64_t count) {
  const int64_t k = int64_t(blockIdx.x) * chunked::threads + threadIdx.x;
  if (k < count) sum[k] += part[k];
}

// What the products gave -> the gradient: takes out the part along each vector, which only changes its norm. One warp
// a vector.
template <class Storage>
struct ProjectGradient {
  using T = Accumulate<Storage>;
  const T* raw;            // [rows, dimensions]; may be the gradient itself
  const Storage* vectors;  // [rows, dimensions]
  int64_t stride;
  int64_t rows, dimensions;
  const T* inverse;        // [rows]
  const T* operand_scale;  // as in SoftmaxGradient
  bool cosine, fours;
  Storage* gradient;  // [rows, dimensions]
};

template <class Storage>
__global__ void __launch_bounds__(chunked::threads) margin_softmax_project(ProjectGradient<Storage> p) {
  using T = Accumulate<Storage>;
  const int64_t row = int64_t(blockIdx.x) * chunked::warps + threadIdx.x / warp_lanes;
  const int lane = threadIdx.x % warp_lanes;
  if (row >= p.rows) return;
  const T inverse = p.inverse[row];
  const T factor = p.operand_scale != nullptr ? inverse / *p.operand_scale : T(1);
  const T* raw = p.raw + row * p.dimensions;
  const Storage* x = p.vectors + row * p.stride;
  const bool raw_fours = p.dimensions % 4 == 0;

  T along = 0;
  if (p.cosine) {
    for (int64_t k = 4 * lane; k < p.dimensions; k += 4 * warp_lanes) {
      const Four<T> g = load_four(raw + k, p.dimensions - k, raw_fours);
      const Four<T> values = load_four(x + k, p.dimensions - k, p.fours);
#pragma unroll
      for (int c = 0; c < 4; ++c) along += g.at[c] * values.at[c];
    }
    along = warp_sum(along) * factor * projection(inverse);
  }
  for (int64_t k = 4 * lane; k < p.dimensions; k += 4 * warp_lanes) {
    Four<T> g = load_four(raw + k, p.dimensions - k, raw_fours);
    const Four<T> values = load_four(x + k, p.dimensions - k, p.fours);
#pragma unroll
    for (int c = 0; c < 4; ++c) g.at[c] = g.at[c] * factor - along * values.at[c];
    store_four(p.gradient + row * p.dimensions + k, g, p.dimensions - k, raw_fours);
  }
}

}  // namespace fewshot_ext
