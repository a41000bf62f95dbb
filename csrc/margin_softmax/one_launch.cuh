// Margin softmax of a few classes in one launch: all tiles of the products, then the rows, then all tiles of both
// gradients, with a barrier of the whole grid between these steps. At few-shot sizes a launch costs as much as the
// arithmetic. N x C products wait in a workspace, small enough to stay in the L2 cache.
//
// The rows could do without a barrier of their own: the last of a row's tiles to arrive could finish it, by a counter.
// Until that block knows that it is the last one it waits about as long as a barrier takes, for its writes and for the
// counter; a counter would have to be zero before the launch, which is another launch; and where tiles are sliced a
// second one would have to tell when the slices are complete. After a barrier all blocks share the rows, too.
#pragma once

#include "common/grid_barrier.cuh"
#include "common/matrix_tile_product.cuh"
#include "margin_softmax/device_rows.cuh"

namespace fewshot_ext {

namespace one_launch {

constexpr int tile = Tile::size, threads = Tile::threads, warps = threads / warp_lanes;

}  // namespace one_launch

template <class Storage>
struct OneLaunch {
  using T = Accumulate<Storage>;

  Rows<T> rows;
  const Storage* features;  // [N, D]
  int64_t features_stride;
  const Storage* weight;  // [C, D]
  int64_t weight_stride;
  int samples, classes, dimensions;
  bool cosine, features_in_fours, weight_in_fours;
  Storage* grad_features;  // [N, D] or null
  Storage* grad_weight;    // [C, D] or null

  int slices, slice_dimensions;

  // Workspace. Rows of classes lie a multiple of four apart, so that they are read and written in fours.
  int pitch;
  T* products;          // [slices, N, pitch] x_i . w_j over the slice; the first slice becomes the logits, then dL/ds
  T* inverse_features;  // [N]
  T* inverse_weight;    // [pitch], 0 beyond the last class
  T* counted;           // [] how many rows the mean is over
  T* losses;            // [N]
  T* dots;              // [N] sum over j of dL/ds_ij l_ij
  T* terms;             // [N, pitch] these products, whose sum over i each class needs

  __host__ __device__ static int tiles(int size) { return (size + one_launch::tile - 1) / one_launch::tile; }
  __host__ __device__ int sample_tiles() const { return tiles(samples); }
  __host__ __device__ int class_tiles() const { return tiles(classes); }
  __host__ __device__ int dimension_tiles() const { return tiles(dimensions); }

  __host__ __device__ bool forward() const { return rows.upstream == nullptr; }
  __host__ __device__ bool gradients() const { return grad_features != nullptr || grad_weight != nullptr; }
  __host__ __device__ bool mean() const { return forward() && rows.reduction == Reduction::mean; }

  __host__ __device__ int product_items() const { return sample_tiles() * class_tiles() * slices; }
  __host__ __device__ int norm_items() const { return (samples + pitch + one_launch::warps - 1) / one_launch::warps; }
  __host__ __device__ int first_items() const { return product_items() + norm_items() + (mean() ? 1 : 0); }

  __host__ __device__ int result_items() const { return forward() && rows.reduction != Reduction::none ? 1 : 0; }
  __host__ __device__ int weight_items() const {
    return grad_weight != nullptr ? class_tiles() * dimension_tiles() : 0;
  }
  __host__ __device__ int feature_items() const {
    return grad_features != nullptr ? sample_tiles() * dimension_tiles() : 0;
  }
  __host__ __device__ int last_items() const { return result_items() + weight_items() + feature_items(); }

  // Where there are few tiles, several blocks share one, each with a slice of the dimensions. Which is decided by the
  // sizes alone, so that the sums have one order on every GPU: up to two blocks for each of the 108 to 132
  // multiprocessors of those it is made for. Each row reads all slices, so there should not be too many.
  void slice() {
    constexpr int blocks = 256, most_slices = 16, depth = TileProduct<T, false>::depth;
    const int stages = (dimensions + depth - 1) / depth;
    int wanted = blocks / (sample_tiles() * class_tiles());
    wanted = wanted < 1 ? 1 : wanted < most_slices ? wanted : most_slices;
    const int stages_each = (stages + wanted - 1) / wanted;
    slice_dimensions = stages_each * depth;
    slices = (stages + stages_each - 1) / stages_each;
  }
};

namespace one_launch {

template <bool allow_tf32, class Storage, class T = Accumulate<Storage>>
__device__ void products_tile(const OneLaunch<Storage>& p, int item, T* memory) {
  const int first_class = item % p.class_tiles() * tile,
            first_sample = item / p.class_tiles() % p.sample_tiles() * tile;
  const int slice = item / p.class_tiles() / p.sample_tiles(), begin = slice * p.slice_dimensions;
  const LoadMatrix<Storage, true> x{p.features, p.features_stride,  p.samples, p.dimensions, first_sample,
                                    0,          p.features_in_fours};
  const LoadMatrix<Storage, true> w{p.weight, p.weight_stride,  p.classes, p.dimensions, first_class,
                                    0,        p.weight_in_fours};
  const int end = min(begin + p.slice_dimensions, p.dimensions);
  const Four<T> products = TileProduct<T, allow_tf32>::multiply(begin, end, x, w, memory);
  const int i = first_sample + Tile::line(), j = first_class + Tile::first();
  if (i < p.samples)
    store_four(p.products + (int64_t(slice) * p.samples + i) * p.pitch + j, products, p.classes - j, true);
}

// Eight rows of features and weight, one a warp.
template <class Storage, class T = Accumulate<Storage>>
__device__ void norms(const OneLaunch<Storage>& p, int item) {
  const int row = item * warps + threadIdx.x / warp_lanes, j = row - p.samples;
  if (j >= p.pitch) return;
  T inverse = 0;
  if (j < 0)
    inverse = inverse_norm(p.features + row * p.features_stride, p.dimensions, p.features_in_fours, p.cosine);
  else if (j < p.classes)
    inverse = inverse_norm(p.weight + j * p.weight_stride, p.dimensions, p.weight_in_fours, p.cosine);
  if (threadIdx.x % warp_lanes == 0) *(j < 0 ? p.inverse_features + row : p.inverse_weight + j) = inverse;
}

// The fours of a row that a lane has in a warp's passes over it. Several are under way from memory together.
constexpr int at_once = 4, pass = at_once * 4 * warp_lanes;

// From the sums of the slices the logits of sample i, and what they are together, for the warp's first lane.
template <class Storage, class T = Accumulate<Storage>>
__device__ PartOfRow<T> logits_of_row(const OneLaunch<Storage>& p, int i, int target, T* logits) {
  const T scale = p.rows.scale * p.inverse_features[i];
  const int64_t slice = int64_t(p.samples) * p.pitch;
  PartOfRow<T> row = PartOfRow<T>::empty();
  for (int first = threadIdx.x % warp_lanes * 4; first < p.classes; first += pass) {
    Four<T> sums[at_once] = {}, inverse[at_once];
#pragma unroll
    for (int u = 0; u < at_once; ++u) {
      const int j = first + u * 4 * warp_lanes;
      inverse[u] = load_four(p.inverse_weight + j, p.classes - j, true);
    }
#pragma unroll 4
    for (int s = 0; s < p.slices; ++s) {
#pragma unroll
      for (int u = 0; u < at_once; ++u) {
        const int j = first + u * 4 * warp_lanes;
        const Four<T> part = load_four(logits + s * slice + j, p.classes - j, true);
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[u].at[c] += part.at[c];
      }
    }
#pragma unroll
    for (int u = 0; u < at_once; ++u) {
      const int j = first + u * 4 * warp_lanes;
      if (j >= p.classes) break;
#pragma unroll
      for (int c = 0; c < 4; ++c) sums[u].at[c] *= scale * inverse[u].at[c];
      if (p.forward()) row.add(sums[u], j, p.classes - j, target);
      store_four(logits + j, sums[u], p.classes - j, true);
    }
  }
  row.template add_lanes<warp_lanes>();
  return row;
}

// dL/ds in place of the logits; zeros beyond the last class, so that nobody after has to look where it is.
template <class Storage, class T = Accumulate<Storage>>
__device__ void gradient_of_row(const OneLaunch<Storage>& p, int i, int target, T* logits,
                                const GradientCoefficients<T>& row) {
  const int lane = threadIdx.x % warp_lanes;
  T dot = 0;
  for (int first = 4 * lane; first < p.classes; first += pass) {
    Four<T> entries[at_once];
#pragma unroll
    for (int u = 0; u < at_once; ++u) {
      const int j = first + u * 4 * warp_lanes;
      entries[u] = load_four(logits + j, p.classes - j, true);
    }
#pragma unroll
    for (int u = 0; u < at_once; ++u) {
      const int j = first + u * 4 * warp_lanes;
      if (j >= p.classes) break;
      Four<T> terms;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const T g = gradient_entry(row, entries[u].at[c], j + c == target);
        terms.at[c] = j + c < p.classes ? g * entries[u].at[c] : T(0);
        entries[u].at[c] = j + c < p.classes ? g : T(0);
        dot += terms.at[c];
      }
      store_four(logits + j, entries[u], p.classes - j, true);
      store_four(p.terms + int64_t(i) * p.pitch + j, terms, p.classes - j, true);
    }
  }
  dot = warp_sum(dot);
  if (lane == 0) p.dots[i] = dot;
}

// All that is to be known of a sample, by a warp.
template <class Storage, class T = Accumulate<Storage>>
__device__ void finish_row(const OneLaunch<Storage>& p, int i) {
  const int target = p.rows.target_class(i);
  T* const logits = p.products + int64_t(i) * p.pitch;
  const PartOfRow<T> row = logits_of_row(p, i, target, logits);
  __syncwarp();  // the target's logit is another lane's

  T others, at_target, weight;
  if (p.forward()) {
    const T target_logit = target >= 0 ? logits[target] : T(0);
    if (threadIdx.x % warp_lanes == 0) p.losses[i] = p.rows.finish(i, row, target_logit);
    const auto sums = p.rows.sums(i, row, target_logit);
    others = __shfl_sync(all_lanes, sums.others, 0);
    at_target = sums.at_target;
    weight = p.mean() ? T(1) / *p.counted : T(1);
  } else {
    others = p.rows.statistics[i];
    at_target = p.rows.statistics[p.samples + i];
    weight = p.rows.upstream[i];
  }
  __syncwarp();  // all have read the target's logit
  if (p.gradients()) gradient_of_row(p, i, target, logits, p.rows.coefficients(i, others, at_target, weight));
}

// By one block, so that the sum over the rows has one order.
template <class Storage, class T = Accumulate<Storage>>
__device__ void total_loss(const OneLaunch<Storage>& p) {
  T total = 0;
  for (int i = threadIdx.x; i < p.samples; i += threads) total += p.losses[i];
  total = block_sum<threads>(total);
  if (threadIdx.x == 0) *p.rows.loss = p.mean() ? total / *p.counted : total;
}

// dL/ds / |w_j| as factor of the features' gradient: samples x classes, k runs over the classes. What all of a row is
// divided by comes after the product: factors of 1 / (|x_i| |w_j|) would leave the range of float32 sooner.
template <class Storage>
struct LoadForFeatures {
  static constexpr bool along_k = true, fits_tf32 = false;
  using T = Accumulate<Storage>;
  struct Fetched {
    Four<T> entries, inverse;
  };

  const OneLaunch<Storage>& p;
  int i;

  __device__ __forceinline__ Fetched fetch(int k) const {
    const int j = k + Tile::first(), count = i < p.samples ? p.classes - j : 0;
    return {fetch_four(p.products + int64_t(i) * p.pitch + j, count, true),
            fetch_four(p.inverse_weight + j, count, true)};
  }

  __device__ __forceinline__ Four<T> form(const Fetched& fetched) const {
    Four<T> entries;
#pragma unroll
    for (int c = 0; c < 4; ++c) entries.at[c] = fetched.entries.at[c] * fetched.inverse.at[c];
    return entries;
  }
};

// dL/ds / |x_i| as factor of the weight's gradient: classes x samples, k runs over the samples.
template <class Storage>
struct LoadForWeight {
  static constexpr bool along_k = false, fits_tf32 = false;
  using T = Accumulate<Storage>;
  struct Fetched {
    Four<T> entries, terms;
    T inverse;
  };

  const OneLaunch<Storage>& p;
  int j;
  Four<T> dot = {};  // sum over i of dL/ds_ij l_ij, over the thread's samples

  __device__ __forceinline__ Fetched fetch(int k) const {
    const int i = k + Tile::line(), count = i < p.samples ? p.classes - j : 0;
    const int64_t at = int64_t(i) * p.pitch + j;
    return {fetch_four(p.products + at, count, true), fetch_four(p.terms + at, count, true),
            i < p.samples ? p.inverse_features[i] : T(0)};
  }

  __device__ __forceinline__ Four<T> form(const Fetched& fetched) {
    Four<T> entries;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      dot.at[c] += fetched.terms.at[c];
      entries.at[c] = fetched.entries.at[c] * fetched.inverse;
    }
    return entries;
  }
};

// inverse raw - projected vector, for the four elements of the thread.
template <class Storage, class T = Accumulate<Storage>>
__device__ void store_gradient(const OneLaunch<Storage>& p, const Four<T>& raw, T inverse, T dot, const Storage* vector,
                               bool fours, Storage* gradient, int dimension) {
  const int count = p.dimensions - dimension;
  const T projected = p.cosine ? dot / p.rows.scale * projection(inverse) : T(0);
  Four<T> values = load_four(vector + dimension, count, fours);
#pragma unroll
  for (int c = 0; c < 4; ++c) values.at[c] = inverse * raw.at[c] - projected * values.at[c];
  store_four(gradient + dimension, values, count, p.dimensions % 4 == 0);
}

template <bool allow_tf32, class Storage, class T = Accumulate<Storage>>
__device__ void features_tile(const OneLaunch<Storage>& p, int item, T* memory) {
  const int first_sample = item / p.dimension_tiles() * tile, first_dimension = item % p.dimension_tiles() * tile;
  const int i = first_sample + Tile::line();
  const LoadForFeatures<Storage> entries{p, i};
  const LoadMatrix<Storage, false> w{p.weight, p.weight_stride, p.classes,        p.dimensions,
                                     0,        first_dimension, p.weight_in_fours};
  const Four<T> raw = TileProduct<T, allow_tf32>::multiply(0, p.classes, entries, w, memory);
  if (i < p.samples)
    store_gradient(p, raw, p.inverse_features[i], p.dots[i], p.features + i * p.features_stride, p.features_in_fours,
                   p.grad_features + int64_t(i) * p.dimensions, first_dimension + Tile::first());
}

template <bool allow_tf32, class Storage, class T = Accumulate<Storage>>
__device__ void weight_tile(const OneLaunch<Storage>& p, int item, T* memory) {
  const int first_class = item / p.dimension_tiles() * tile, first_dimension = item % p.dimension_tiles() * tile;
  LoadForWeight<Storage> entries{p, first_class + Tile::first()};
  const LoadMatrix<Storage, false> x{p.features, p.features_stride, p.samples,          p.dimensions,
                                     0,          first_dimension,   p.features_in_fours};
  const Four<T> raw = TileProduct<T, allow_tf32>::multiply(0, p.samples, entries, x, memory);

  // Each thread has the sums of its line of samples: those of a warp meet in its first eight lanes, and the warps
  // in shared memory.
  FEWSHOT_EXT_SHARED(T, dots, [warps][tile]);
  const int warp = threadIdx.x / warp_lanes, lane = threadIdx.x % warp_lanes;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    T dot = entries.dot.at[c];
    dot += __shfl_xor_sync(all_lanes, dot, 8);
    dot += __shfl_xor_sync(all_lanes, dot, 16);
    if (lane < 8) dots[warp][Tile::first() + c] = dot;
  }
  __syncthreads();
  const int line = Tile::line(), j = first_class + line;
  if (j < p.classes) {
    T dot = 0;
    for (int w = 0; w < warps; ++w) dot += dots[w][line];
    store_gradient(p, raw, p.inverse_weight[j], dot, p.weight + j * p.weight_stride, p.weight_in_fours,
                   p.grad_weight + int64_t(j) * p.dimensions, first_dimension + Tile::first());
  }
}

}  // namespace one_launch

// A cooperative launch of any number of blocks of one_launch::threads.
template <class Storage, bool allow_tf32>
__global__ void __launch_bounds__(one_launch::threads) margin_softmax_one_launch(OneLaunch<Storage> p) {
  using T = Accumulate<Storage>;
  using Memory = typename TileProduct<T, allow_tf32>::Memory;
  FEWSHOT_EXT_SHARED(Memory, memory, );

  for (int item = blockIdx.x; item < p.first_items(); item += gridDim.x) {
    if (const int norms = item - p.product_items(); norms < 0) {
      one_launch::products_tile<allow_tf32>(p, item, memory.at);
    } else if (norms < p.norm_items()) {
      one_launch::norms(p, norms);
    } else {
      const int64_t counted = p.rows.template count<one_launch::threads>();
      if (threadIdx.x == 0) *p.counted = T(counted);
    }
  }
  grid_barrier();

  // A row's neighbors go to other blocks: few rows then keep all multiprocessors busy.
  for (int i = threadIdx.x / warp_lanes * gridDim.x + blockIdx.x; i < p.samples; i += one_launch::warps * gridDim.x)
    one_launch::finish_row(p, i);
  if (p.last_items() == 0) return;
  grid_barrier();

  for (int item = blockIdx.x; item < p.last_items(); item += gridDim.x) {
    if (const int gradients = item - p.result_items(); gradients < 0)
      one_launch::total_loss(p);
    else if (gradients < p.weight_items())
      one_launch::weight_tile<allow_tf32>(p, gradients, memory.at);
    else
      one_launch::features_tile<allow_tf32>(p, gradients - p.weight_items(), memory.at);
  }
}

}  // namespace fewshot_ext
