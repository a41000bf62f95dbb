// The products of tile_product.cuh by matrix instructions, for factors of float32 and half types.
#pragma once

#include "common/mma.cuh"
#include "common/tile_product.cuh"

namespace fewshot_ext {

// In tf32, whatever the factors are. Half types fit into it, so that their products are exact; a factor of float32 is
// split in two, or where that is `allowed` rounded. A product then takes one instruction where both factors fit, two
// where one does and three where none does, and errs no more than one of float32 does. Of half types alone there are
// instructions of twice the depth, but these are 8 of the 190 instructions that a warp issues for a stage of them. To
// round dL/ds to bfloat16 would save a quarter of its gradients' instructions and cost all digits beyond the third;
// float16 has no range for it.
//
// The block's warps form four groups of two. Each group takes a quarter of every stage of the inner dimension, each of
// its warps half of the tile's columns; the quarters are added up at the end.
template <bool allowed>
struct MatrixTileProduct {
  using Layout = MmaLayout<float>;

  static constexpr int slabs = 2;  // of a stage
  static constexpr int depth = slabs * Tile::slab;
  static constexpr int warp_columns = 16, column_groups = Tile::size / warp_columns;
  static constexpr int groups = Tile::threads / 32 / column_groups, group_depth = depth / groups;
  static constexpr int fragments_m = Tile::size / Layout::rows, fragments_n = warp_columns / Layout::columns;
  static constexpr int stages_together = 32 / group_depth;  // k of a sum within the instructions; mma.cuh says why
  static_assert(group_depth % Layout::depth == 0 && fragments_n % 2 == 0 && stages_together > 0);

  // A factor lies in shared memory as its loader hands it over, in fours along k or along the tile. Rows are longer by
  // so much that neither writes of fours nor reads of fragments meet in a bank.
  static constexpr int along_row = depth + 4, across_row = Tile::size + 8;
  static constexpr int factor = depth * across_row;  // elements, of the larger kind

  struct Memory {
    alignas(16) float at[2 * 2 * factor];  // two stages of both factors; at the end the groups' sums
  };
  static_assert(factor >= Tile::size * along_row && 2 * 2 * factor >= groups * Tile::size * across_row);

  template <class Loader>
  __device__ static __forceinline__ int place(int k, int column) {
    return Loader::along_k ? column * along_row + k : k * across_row + column;
  }

  // As PlainTileProduct::multiply.
  template <class LoadA, class LoadB>
  __device__ static Four<float> multiply(int begin, int end, LoadA& load_a, LoadB& load_b, float* memory) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int group = warp / column_groups, first_column = warp % column_groups * warp_columns;

    Stage<LoadA, slabs> a;
    Stage<LoadB, slabs> b;
    const auto put_stage = [&](float* to) {
#pragma unroll
      for (int s = 0; s < slabs; ++s) {
        put<LoadA>(to, s, load_a.form(a.fetched[s]));
        put<LoadB>(to + factor, s, load_b.form(b.fetched[s]));
      }
    };

    FragmentC together[fragments_m][fragments_n] = {}, sum[fragments_m][fragments_n] = {};
    const auto add_up = [&] {
#pragma unroll
      for (int m = 0; m < fragments_m; ++m)
#pragma unroll
        for (int n = 0; n < fragments_n; ++n)
#pragma unroll
          for (int i = 0; i < Layout::elements_c; ++i) sum[m][n].at[i] += together[m][n].at[i];
    };

    a.fetch(load_a, begin);
    b.fetch(load_b, begin);
    put_stage(memory);
    __syncthreads();
    int stage = 0;
    for (int k = begin; k < end; k += depth) {
      const bool more = k + depth < end;
      if (more) {
        a.fetch(load_a, k + depth);
        b.fetch(load_b, k + depth);
      }
      const float* in_a = memory + stage % 2 * 2 * factor;
      const float* in_b = in_a + factor;
#pragma unroll
      for (int step = 0; step < group_depth; step += Layout::depth)
        multiply_step<LoadA, LoadB>(together, in_a, in_b, group * group_depth + step, first_column, lane);
      ++stage;
      if (stage % stages_together == 0) {
        add_up();
#pragma unroll
        for (int m = 0; m < fragments_m; ++m)
#pragma unroll
          for (int n = 0; n < fragments_n; ++n) together[m][n] = {};
      }
      if (more) put_stage(memory + stage % 2 * 2 * factor);
      __syncthreads();
    }
    add_up();

    float* const part = memory + group * Tile::size * across_row;
#pragma unroll
    for (int m = 0; m < fragments_m; ++m)
#pragma unroll
      for (int n = 0; n < fragments_n; ++n)
#pragma unroll
        for (int i = 0; i < Layout::elements_c; i += 2) {  // two neighbors
          const Place at = Layout::of_c(lane, i);
          const int column = first_column + n * Layout::columns + at.column;
          *reinterpret_cast<float2*>(part + (m * Layout::rows + at.row) * across_row + column) =
              float2{sum[m][n].at[i], sum[m][n].at[i + 1]};
        }
    __syncthreads();
    Four<float> result{};
#pragma unroll
    for (int g = 0; g < groups; ++g) {
      const Four<float> of_group =
          Four<float>::read(memory + (g * Tile::size + Tile::line()) * across_row + Tile::first());
#pragma unroll
      for (int c = 0; c < 4; ++c) result.at[c] += of_group.at[c];
    }
    __syncthreads();
    return result;
  }

 private:
  template <class Loader>
  __device__ static __forceinline__ void put(float* memory, int slab, const Four<float>& values) {
    const int k = slab * Tile::slab;
    values.write(memory + (Loader::along_k ? place<Loader>(k + Tile::first(), Tile::line())
                                           : place<Loader>(k + Tile::line(), Tile::first())));
  }

  template <class Loader>
  __device__ static __forceinline__ void read(FragmentA<float>& a, const float* factor, int k, int row, int lane) {
    if constexpr (Loader::along_k) {
      const Place at = Layout::row_for_a(lane);
      ldmatrix_x4(a, factor + place<Loader>(k + at.column, row + at.row));
    } else {
#pragma unroll
      for (int i = 0; i < Layout::elements_a; ++i) {
        const Place at = Layout::of_a(lane, i);
        a.at[i] = bit_cast<uint32_t>(factor[place<Loader>(k + at.column, row + at.row)]);
      }
    }
  }

  template <class Loader>
  __device__ static __forceinline__ void read(FragmentB<float>& left, FragmentB<float>& right, const float* factor,
                                              int k, int column, int lane) {
    if constexpr (Loader::along_k) {
      const Place at = Layout::row_for_b(lane);
      ldmatrix_x4(left, right, factor + place<Loader>(k + at.column, column + at.row));
    } else {
#pragma unroll
      for (int i = 0; i < Layout::elements_b; ++i) {
        const Place at = Layout::of_b(lane, i);
        left.at[i] = bit_cast<uint32_t>(factor[place<Loader>(k + at.row, column + at.column)]);
        right.at[i] = bit_cast<uint32_t>(factor[place<Loader>(k + at.row, column + Layout::columns + at.column)]);
      }
    }
  }

  // A factor in tf32: itself, its rounding, or two parts.
  template <class Loader, template <class> class Fragment>
  __device__ static __forceinline__ auto in_tf32(const Fragment<float>& x) {
    if constexpr (Loader::fits_tf32)
      return bit_cast<Fragment<Tf32>>(x);
    else if constexpr (allowed)
      return split_to_tf32(x).big;
    else
      return split_to_tf32(x);
  }
  template <class Loader>
  static constexpr bool is_split = !Loader::fits_tf32 && !allowed;

  template <class Fragment>
  __device__ static __forceinline__ const Fragment& big(const Fragment& x) {
    return x;
  }
  template <class Fragment>
  __device__ static __forceinline__ const Fragment& big(const Split<Fragment>& x) {
    return x.big;
  }

  // sum += a b over the k of one instruction. Instructions that follow each other add to different sums, because each
  // takes as long as several of them until its sum can be added to; the small terms come first.
  template <class LoadA, class LoadB>
  __device__ static __forceinline__ void multiply_step(FragmentC (&sum)[fragments_m][fragments_n], const float* in_a,
                                                       const float* in_b, int k, int first_column, int lane) {
    FragmentA<float> read_a[fragments_m];
    FragmentB<float> read_b[fragments_n];
#pragma unroll
    for (int m = 0; m < fragments_m; ++m) read<LoadA>(read_a[m], in_a, k, m * Layout::rows, lane);
#pragma unroll
    for (int n = 0; n < fragments_n; n += 2)
      read<LoadB>(read_b[n], read_b[n + 1], in_b, k, first_column + n * Layout::columns, lane);

    using A = decltype(in_tf32<LoadA>(read_a[0]));
    using B = decltype(in_tf32<LoadB>(read_b[0]));
    A a[fragments_m];
    B b[fragments_n];
#pragma unroll
    for (int m = 0; m < fragments_m; ++m) a[m] = in_tf32<LoadA>(read_a[m]);
#pragma unroll
    for (int n = 0; n < fragments_n; ++n) b[n] = in_tf32<LoadB>(read_b[n]);

    const auto each = [&](auto multiply) {
#pragma unroll
      for (int m = 0; m < fragments_m; ++m)
#pragma unroll
        for (int n = 0; n < fragments_n; ++n) multiply(sum[m][n], a[m], b[n]);
    };
    if constexpr (is_split<LoadA>) each([](FragmentC& c, const A& x, const B& y) { mma_m16n8k8(c, x.small, big(y)); });
    if constexpr (is_split<LoadB>) each([](FragmentC& c, const A& x, const B& y) { mma_m16n8k8(c, big(x), y.small); });
    each([](FragmentC& c, const A& x, const B& y) { mma_m16n8k8(c, big(x), big(y)); });
  }
};

template <class T, bool allow_tf32>
using TileProduct =
    std::conditional_t<std::is_same_v<T, double>, PlainTileProduct<double>, MatrixTileProduct<allow_tf32>>;

}  // namespace fewshot_ext
