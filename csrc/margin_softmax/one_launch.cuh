// Margin softmax of a few classes in one launch: all tiles of the logits, a barrier of the whole grid, then all tiles
// of both gradients. At few-shot sizes a launch costs as much as the arithmetic. N x C logits wait in a workspace,
// small enough to stay in the L2 cache.
#pragma once

#include "common/grid_barrier.cuh"
#include "common/tile_product.cuh"
#include "margin_softmax/device_rows.cuh"

namespace fewshot_ext {

template <class Storage>
struct OneLaunch {
  using T = Accumulate<Storage>;
  static constexpr int tile = TileProduct::tile, threads = TileProduct::threads;

  Rows<T> rows;
  const Storage* features;  // [N, D]
  int64_t features_stride;
  const Storage* weight;  // [C, D]
  int64_t weight_stride;
  int samples, classes, dimensions;
  bool cosine, features_in_fours, weight_in_fours;
  Storage* grad_features;  // [N, D] or null
  Storage* grad_weight;    // [C, D] or null

  // Workspace
  T* logits;            // [N, C]
  T* inverse_features;  // [N]
  T* inverse_weight;    // [C]
  PartOfRow<T>* parts;  // [N, class tiles], of the forward pass

  __host__ __device__ static int tiles(int size) { return (size + tile - 1) / tile; }
  __host__ __device__ int sample_tiles() const { return tiles(samples); }
  __host__ __device__ int class_tiles() const { return tiles(classes); }
  __host__ __device__ int dimension_tiles() const { return tiles(dimensions); }

  __host__ __device__ int logit_items() const { return sample_tiles() * class_tiles(); }
  __host__ __device__ int result_items() const { return rows.upstream == nullptr ? 1 : 0; }
  __host__ __device__ int weight_items() const {
    return grad_weight != nullptr ? class_tiles() * dimension_tiles() : 0;
  }
  __host__ __device__ int feature_items() const {
    return grad_features != nullptr ? sample_tiles() * dimension_tiles() : 0;
  }
  __host__ __device__ int gradient_items() const { return result_items() + weight_items() + feature_items(); }
};

namespace one_launch {

// A factor whose rows are vectors to be normalized: |x|^2 of its line adds up on the way.
template <class Storage>
struct LoadVectors : LoadMatrix<Storage, true> {
  using T = Accumulate<Storage>;
  T squares = 0;

  __device__ __forceinline__ Four<T> operator()(int k) {
    const Four<T> values = LoadMatrix<Storage, true>::operator()(k);
#pragma unroll
    for (int i = 0; i < 4; ++i) squares += values.at[i] * values.at[i];
    return values;
  }
};

template <class Storage, class T = Accumulate<Storage>>
__device__ void logits_tile(const OneLaunch<Storage>& p, int item, T* memory) {
  FEWSHOT_EXT_SHARED(T, inverse_of_class, [TileProduct::tile]);
  const int sample_tile = item / p.class_tiles(), class_tile = item % p.class_tiles();
  LoadVectors<Storage> x{
      {p.features, p.features_stride, p.samples, p.dimensions, sample_tile * p.tile, 0, p.features_in_fours}};
  LoadVectors<Storage> w{
      {p.weight, p.weight_stride, p.classes, p.dimensions, class_tile * p.tile, 0, p.weight_in_fours}};
  Four<T> products = TileProduct::multiply<T>(p.dimensions, x, w, memory);

  const int line = TileProduct::line(), first = TileProduct::first();
  const T inverse_x = p.cosine ? inverse_norm(warp_sum<8>(x.squares)) : T(1);
  const T inverse_w = p.cosine ? inverse_norm(warp_sum<8>(w.squares)) : T(1);
  const int i = sample_tile * p.tile + line, j = class_tile * p.tile + first;
  if (first == 0) {
    inverse_of_class[line] = inverse_w;
    if (class_tile == 0 && i < p.samples) p.inverse_features[i] = inverse_x;
    if (sample_tile == 0 && class_tile * p.tile + line < p.classes)
      p.inverse_weight[class_tile * p.tile + line] = inverse_w;
  }
  __syncthreads();

  const int target = i < p.samples ? p.rows.target_class(i) : -1;
#pragma unroll
  for (int c = 0; c < 4; ++c) products.at[c] *= p.rows.scale * inverse_x * inverse_of_class[first + c];
  PartOfRow<T> part = PartOfRow<T>::empty();
  part.add(products, j, p.classes - j, target);
  part.template add_lanes<8>();
  if (i < p.samples) {
    store_four(p.logits + int64_t(i) * p.classes + j, products, p.classes - j, p.classes % 4 == 0);
    if (first == 0 && p.rows.upstream == nullptr) p.parts[int64_t(i) * p.class_tiles() + class_tile] = part;
  }
}

// The row over all classes, from what the tiles found.
template <class Storage, class T = Accumulate<Storage>>
__device__ PartOfRow<T> join_parts(const OneLaunch<Storage>& p, int i) {
  PartOfRow<T> row = PartOfRow<T>::empty();
  for (int t = 0; t < p.class_tiles(); ++t) row.add(p.parts[int64_t(i) * p.class_tiles() + t]);
  return row;
}

template <class Storage, class T = Accumulate<Storage>>
__device__ T target_logit(const OneLaunch<Storage>& p, int i) {
  const int target = p.rows.target_class(i);
  return target >= 0 ? p.logits[int64_t(i) * p.classes + target] : T(0);
}

// By one block, so that the sum over the rows has one order.
template <class Storage>
__device__ void results(const OneLaunch<Storage>& p, int64_t counted) {
  using T = Accumulate<Storage>;
  T total = 0;
  for (int i = threadIdx.x; i < p.samples; i += p.threads)
    total += p.rows.finish(i, join_parts(p, i), target_logit(p, i));
  total = block_sum<OneLaunch<Storage>::threads>(total);
  if (threadIdx.x == 0 && p.rows.reduction != Reduction::none)
    *p.rows.loss = p.rows.reduction == Reduction::mean ? total / T(counted) : total;
}

// What the entries of dL/ds need to know about their sample.
template <class T>
struct Sample {
  GradientCoefficients<T> row;
  T inverse;
  int target;
};

template <class Storage, class T = Accumulate<Storage>>
__device__ Sample<T> sample(const OneLaunch<Storage>& p, int i, T row_weight) {
  if (i >= p.samples) return {GradientCoefficients<T>::none(T(0)), T(0), -1};
  T others, at_target;
  if (p.rows.upstream != nullptr) {
    others = p.rows.statistics[i];
    at_target = p.rows.statistics[p.samples + i];
    row_weight = p.rows.upstream[i];
  } else {
    const PartOfRow<T> row = join_parts(p, i);
    others = row.max + std::log(row.sum_exp);
    at_target = target_logit(p, i) - p.rows.scale * p.rows.margin;
    if (p.rows.label(i) == Label::invalid) others = PartOfRow<T>::infinity - PartOfRow<T>::infinity;
  }
  return {p.rows.coefficients(i, others, at_target, row_weight), p.inverse_features[i], p.rows.target_class(i)};
}

// dL/ds / (|x_i| |w_j|) as factor of the features' gradient: samples x classes, k runs over the classes.
template <class Storage>
struct LoadForFeatures {
  static constexpr bool along_k = true;
  using T = Accumulate<Storage>;

  const OneLaunch<Storage>& p;
  const Sample<T>& sample;  // of line()
  int i;
  T dot = 0;  // sum over j of dL/ds_ij s_ij, over the thread's classes

  __device__ __forceinline__ Four<T> operator()(int k) {
    const int j = k + TileProduct::first();
    const int count = i < p.samples ? p.classes - j : 0;
    const bool fours = p.classes % 4 == 0;
    Four<T> entries = load_four(p.logits + int64_t(i) * p.classes + j, count, fours);
    const Four<T> inverse = load_four(p.inverse_weight + j, count, fours);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const T g = gradient_entry(sample.row, entries.at[c], j + c == sample.target);
      dot += c < count ? g * entries.at[c] : T(0);
      entries.at[c] = c < count ? g * (sample.inverse * inverse.at[c]) : T(0);
    }
    return entries;
  }
};

// The same as factor of the weight's gradient: classes x samples, k runs over the samples.
template <class Storage>
struct LoadForWeight {
  static constexpr bool along_k = false;
  using T = Accumulate<Storage>;

  const OneLaunch<Storage>& p;
  Sample<T>* samples;  // [threads], shared
  T row_weight;
  int first_class;
  Four<T> inverse = {};
  Four<T> dot = {};  // sum over i of dL/ds_ij s_ij, over the thread's samples

  __device__ __forceinline__ Four<T> operator()(int k) {
    if (k % p.threads == 0) {
      __syncthreads();
      const Sample<T> own = sample(p, k + static_cast<int>(threadIdx.x), row_weight);
      samples[threadIdx.x] = own;
      __syncthreads();
    }
    const int i = k + TileProduct::line(), j = first_class + TileProduct::first();
    const int count = i < p.samples ? p.classes - j : 0;
    Four<T> entries = load_four(p.logits + int64_t(i) * p.classes + j, count, p.classes % 4 == 0);
    const Sample<T>& of = samples[i % p.threads];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const T g = gradient_entry(of.row, entries.at[c], j + c == of.target);
      dot.at[c] += c < count ? g * entries.at[c] : T(0);
      entries.at[c] = c < count ? g * (of.inverse * inverse.at[c]) : T(0);
    }
    return entries;
  }
};

// raw - factor * vector, for the four elements of the thread.
template <class Storage, class T = Accumulate<Storage>>
__device__ void store_gradient(const OneLaunch<Storage>& p, const Four<T>& raw, const Storage* vector, bool fours,
                               T factor, Storage* gradient, int dimension) {
  const int count = p.dimensions - dimension;
  Four<T> values = load_four(vector + dimension, count, fours);
#pragma unroll
  for (int c = 0; c < 4; ++c) values.at[c] = raw.at[c] - factor * values.at[c];
  store_four(gradient + dimension, values, count, p.dimensions % 4 == 0);
}

template <class Storage, class T = Accumulate<Storage>>
__device__ void features_tile(const OneLaunch<Storage>& p, int item, T row_weight, Sample<T>* samples, T* memory) {
  const int first_sample = item / p.dimension_tiles() * p.tile, first_dimension = item % p.dimension_tiles() * p.tile;
  __syncthreads();
  if (threadIdx.x < p.tile) {
    const Sample<T> own = sample(p, first_sample + static_cast<int>(threadIdx.x), row_weight);
    samples[threadIdx.x] = own;
  }
  __syncthreads();

  const int line = TileProduct::line(), i = first_sample + line;
  LoadForFeatures<Storage> entries{p, samples[line], i};
  const LoadMatrix<Storage, false> w{p.weight, p.weight_stride, p.classes,        p.dimensions,
                                     0,        first_dimension, p.weight_in_fours};
  const Four<T> raw = TileProduct::multiply<T>(p.classes, entries, w, memory);
  const T dot = warp_sum<8>(entries.dot);
  if (i >= p.samples) return;
  const T factor = p.cosine ? dot / p.rows.scale * projection(samples[line].inverse) : T(0);
  store_gradient(p, raw, p.features + i * p.features_stride, p.features_in_fours, factor,
                 p.grad_features + int64_t(i) * p.dimensions, first_dimension + TileProduct::first());
}

template <class Storage, class T = Accumulate<Storage>>
__device__ void weight_tile(const OneLaunch<Storage>& p, int item, T row_weight, Sample<T>* samples, T* memory) {
  const int first_class = item / p.dimension_tiles() * p.tile, first_dimension = item % p.dimension_tiles() * p.tile;
  LoadForWeight<Storage> entries{p, samples, row_weight, first_class};
  for (int c = 0; c < 4; ++c) {
    const int j = first_class + TileProduct::first() + c;
    if (j < p.classes) entries.inverse.at[c] = p.inverse_weight[j];
  }
  const LoadMatrix<Storage, false> x{p.features, p.features_stride, p.samples,          p.dimensions,
                                     0,          first_dimension,   p.features_in_fours};
  const Four<T> raw = TileProduct::multiply<T>(p.samples, entries, x, memory);

  // Each thread has the sums of its line of samples: those of a warp meet in its first eight lanes, and the warps
  // in shared memory.
  constexpr int warps = OneLaunch<Storage>::threads / warp_lanes;
  FEWSHOT_EXT_SHARED(T, dots, [warps][TileProduct::tile]);
  const int warp = threadIdx.x / warp_lanes, lane = threadIdx.x % warp_lanes;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    T dot = entries.dot.at[c];
    dot += __shfl_xor_sync(all_lanes, dot, 8);
    dot += __shfl_xor_sync(all_lanes, dot, 16);
    if (lane < 8) dots[warp][TileProduct::first() + c] = dot;
  }
  __syncthreads();
  const int line = TileProduct::line(), j = first_class + line;
  if (j < p.classes) {
    T dot = 0;
    for (int w = 0; w < warps; ++w) dot += dots[w][line];
    const T factor = p.cosine ? dot / p.rows.scale * projection(p.inverse_weight[j]) : T(0);
    store_gradient(p, raw, p.weight + j * p.weight_stride, p.weight_in_fours, factor,
                   p.grad_weight + int64_t(j) * p.dimensions, first_dimension + TileProduct::first());
  }
}

}  // namespace one_launch

// A cooperative launch of any number of blocks of OneLaunch<Storage>::threads.
template <class Storage>
__global__ void __launch_bounds__(TileProduct::threads) margin_softmax_one_launch(OneLaunch<Storage> p) {
  using T = Accumulate<Storage>;
  FEWSHOT_EXT_SHARED(TileProduct::Memory<T>, memory, );
  FEWSHOT_EXT_SHARED(one_launch::Sample<T>, samples, [TileProduct::threads]);

  for (int item = blockIdx.x; item < p.logit_items(); item += gridDim.x) one_launch::logits_tile(p, item, memory.at);
  const bool mean = p.rows.upstream == nullptr && p.rows.reduction == Reduction::mean;
  const int64_t counted = mean ? p.rows.template count<OneLaunch<Storage>::threads>() : 1;
  const T row_weight = T(1) / T(counted);

  grid_barrier();

  for (int item = blockIdx.x; item < p.gradient_items(); item += gridDim.x) {
    int index = item;
    if (index < p.result_items()) {
      one_launch::results(p, counted);
      continue;
    }
    index -= p.result_items();
    if (index < p.weight_items()) {
      one_launch::weight_tile(p, index, row_weight, samples, memory.at);
      continue;
    }
    one_launch::features_tile(p, index - p.weight_items(), row_weight, samples, memory.at);
  }
}

}  // namespace fewshot_ext
