// Kernels of matrix instructions and asynchronous copies: right ones, and such with one slip each, which a test has to
// see.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/mma.cuh"

namespace fewshot_ext {

// Registers as they are: one instruction a block of one warp.
template <class T>
__global__ void multiply_registers(const FragmentA<T>* a,  // [blocks, 32]
                                   const FragmentB<T>* b,  // [blocks, 32]
                                   FragmentC* c) {         // [blocks, 32]
  const unsigned i = blockIdx.x * 32 + threadIdx.x;
  FragmentC sum = c[i];
  if constexpr (std::is_same_v<T, Tf32>)
    mma_m16n8k8(sum, a[i], b[i]);
  else
    mma_m16n8k16(sum, a[i], b[i]);
  c[i] = sum;
}

// Four matrices of 8 rows, in the order in which lanes point to them.
template <bool transposed>
__global__ void load_registers(const uint4* rows,          // [32]
                               FragmentA<uint16_t>* to) {  // [32]
  FEWSHOT_EXT_SHARED(uint4, tile, [32]);
  const unsigned lane = threadIdx.x;
  tile[31 - lane] = rows[lane];
  __syncwarp();
  FragmentA<uint16_t> loaded;
  if constexpr (transposed)
    ldmatrix_x4_trans(loaded.at[0], loaded.at[1], loaded.at[2], loaded.at[3], &tile[31 - lane]);
  else
    ldmatrix_x4(loaded.at[0], loaded.at[1], loaded.at[2], loaded.at[3], &tile[31 - lane]);
  to[lane] = loaded;
}

// How a kernel multiplies: as it should, or with one slip.
enum class Way {
  right,
  threefold,           // of float32, in three products of tf32
  threefold_in_slabs,  // of k, added up outside of the matrix instructions
  swapped_registers_of_a,
  swapped_registers_of_b,
  exchanged_elements,  // of one register
  exchanged_factors,
  transposed_result,
  unrounded,
  without_small_terms,
  threefold_without_rounding,
};

template <Way way>
__device__ void multiply(FragmentC& c, const FragmentA<float>& a, const FragmentB<float>& b) {
  if constexpr (way == Way::threefold || way == Way::threefold_in_slabs) {
    mma_m16n8k8(c, split_to_tf32(a), split_to_tf32(b));
  } else if constexpr (way == Way::threefold_without_rounding) {
    // The rest of what is cut off would be right, that of what is rounded is what this takes.
    const auto x = split_to_tf32(a);
    const auto y = split_to_tf32(b);
    mma_m16n8k8(c, {bit_cast<FragmentA<Tf32>>(a), x.small}, {bit_cast<FragmentB<Tf32>>(b), y.small});
  } else if constexpr (way == Way::without_small_terms) {
    mma_m16n8k8(c, split_to_tf32(a).big, split_to_tf32(b).big);
  } else if constexpr (way == Way::unrounded) {
    mma_m16n8k8(c, bit_cast<FragmentA<Tf32>>(a), bit_cast<FragmentB<Tf32>>(b));
  } else {
    mma_m16n8k8(c, round_to_tf32(a), round_to_tf32(b));
  }
}

template <Way way, class Half>
__device__ void multiply(FragmentC& c, const FragmentA<Half>& a, const FragmentB<Half>& b) {
  mma_m16n8k16(c, a, b);
}

// Registers whose elements `read` gives, from the first one's low bits on.
template <class T, class Fragment, class Read>
__device__ void gather(Fragment& fragment, Read read) {
  constexpr int packed = 4 / sizeof(T), bits = 8 * sizeof(T);
#pragma unroll
  for (int i = 0; i < Fragment::registers; ++i) {
    fragment.at[i] = 0;
#pragma unroll
    for (int e = 0; e < packed; ++e) {
      using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
      fragment.at[i] |= static_cast<uint32_t>(bit_cast<Bits>(read(i * packed + e))) << e * bits;
    }
  }
}

template <class T, class Visit>
__device__ void each_of_c(Visit visit) {
#pragma unroll
  for (int i = 0; i < MmaLayout<T>::elements_c; ++i) visit(i, MmaLayout<T>::of_c(threadIdx.x, i));
}

// c += a b by one warp, the fragments read from global memory element by element.
template <class T, Way way>
__global__ void multiply_by_layout(const T* __restrict__ a,  // [16, depth]
                                   const T* __restrict__ b,  // [depth, 8]
                                   float* __restrict__ c,    // [16, 8]
                                   int depth) {
  using Layout = MmaLayout<T>;
  const int lane = threadIdx.x;
  FragmentC sum;
  each_of_c<T>([&](int i, Place at) { sum.at[i] = c[at.row * 8 + at.column]; });
  FragmentC slab = {};
  for (int k = 0; k < depth; k += Layout::depth) {
    FragmentA<T> x;
    FragmentB<T> y;
    gather<T>(x, [&](int element) {
      const Place at = Layout::of_a(lane, way == Way::exchanged_elements ? element ^ 1 : element);
      return a[at.row * depth + k + at.column];
    });
    gather<T>(y, [&](int element) {
      const Place at = Layout::of_b(lane, element);
      return b[(k + at.row) * 8 + at.column];
    });
    const auto swap = [](uint32_t& one, uint32_t& other) {
      const uint32_t kept = one;
      one = other;
      other = kept;
    };
    if constexpr (way == Way::swapped_registers_of_a) swap(x.at[1], x.at[2]);
    if constexpr (way == Way::swapped_registers_of_b) swap(y.at[0], y.at[1]);
    if constexpr (way == Way::exchanged_factors) {
      swap(x.at[0], y.at[0]);
      swap(x.at[2], y.at[1]);
    }
    multiply<way>(way == Way::threefold_in_slabs ? slab : sum, x, y);
    if (way == Way::threefold_in_slabs && (k + Layout::depth) % 32 == 0) {
      each_of_c<T>([&](int i, Place) { sum.at[i] += slab.at[i]; });
      slab = {};
    }
  }
  each_of_c<T>([&](int i, Place at) {
    if constexpr (way == Way::transposed_result) at = {at.column, at.row};
    c[at.row * 8 + at.column] = sum.at[i];
  });
}

enum class Stored { by_rows, by_columns };

// How a kernel brings its tiles in.
enum class Load {
  right,
  row_of_the_other_factor,
  row_past_the_tile,
  misaligned_rows,
  without_barrier,
  overwritten_without_barrier,
  plain_for_transposed,
  from_global_memory,
  lane_missing,
};

// c = a b by one warp, the fragments read by ldmatrix from tiles in shared memory that are stored as the factors are.
template <class T, Stored stored_a, Stored stored_b, Load load = Load::right>
__global__ void multiply_loaded(const T* a,  // [16, depth], by columns [depth, 16]
                                const T* b,  // [depth, 16], by columns [16, depth]
                                float* c,    // [16, 16]
                                int depth) {
  using Layout = MmaLayout<T>;
  constexpr int step = Layout::depth, stride = step + (load == Load::misaligned_rows ? 1 : 16 / sizeof(T));
  struct alignas(16) Tile {
    T at[16][stride];
  };
  FEWSHOT_EXT_SHARED(Tile, tiles, [2]);
  const int lane = threadIdx.x;

  FragmentC sum[2] = {};
  for (int k = 0; k < depth; k += step) {
    const auto fill = [&](Tile& tile, const T* from, bool along_k) {
      for (int i = lane; i < 16 * step; i += 32)
        tile.at[i / step][i % step] =
            along_k ? from[i / step * depth + k + i % step] : from[(k + i / step) * 16 + i % step];
    };
    fill(tiles[0], a, stored_a == Stored::by_rows);
    fill(tiles[1], b, stored_b == Stored::by_columns);
    if constexpr (load != Load::without_barrier) __syncwarp();
    if (load == Load::lane_missing && lane == 7) return;

    const auto place = [&](Tile& tile, Place at) {
      if constexpr (load == Load::row_past_the_tile) at.row += 8 * (k / step);
      return &tile.at[0][0] + at.row * stride + at.column;
    };
    FragmentA<T> x;
    FragmentB<T> y[2];
    if constexpr (load == Load::from_global_memory) {
      ldmatrix_x4(x, a + lane * 16);
    } else if constexpr (stored_a == Stored::by_rows) {
      const Place at = load == Load::row_of_the_other_factor ? Layout::row_for_b(lane) : Layout::row_for_a(lane);
      ldmatrix_x4(x, place(tiles[0], at));
    } else if constexpr (load == Load::plain_for_transposed) {
      ldmatrix_x4(x, place(tiles[0], Layout::row_for_transposed_a(lane)));
    } else {
      ldmatrix_x4_trans(x, place(tiles[0], Layout::row_for_transposed_a(lane)));
    }
    if constexpr (stored_b == Stored::by_columns)
      ldmatrix_x4(y[0], y[1], place(tiles[1], Layout::row_for_b(lane)));
    else
      ldmatrix_x4_trans(y[0], y[1], place(tiles[1], Layout::row_for_transposed_b(lane)));
    for (int n = 0; n < 2; ++n) multiply<Way::right>(sum[n], x, y[n]);
    if constexpr (load != Load::overwritten_without_barrier) __syncwarp();
  }
  for (int n = 0; n < 2; ++n) each_of_c<T>([&](int i, Place at) { c[at.row * 16 + n * 8 + at.column] = sum[n].at[i]; });
}

// c = a b, by a block of two warps with 16 rows each. While a step of k is multiplied, the next one is on its way.
// With 1 pending group, which is that next step; more are a fault.
template <int pending, bool synchronized_before, bool synchronized_after>
__global__ void multiply_pipelined(const BFloat16* __restrict__ a,  // [32, stride], of a row the first `depth`
                                   const BFloat16* __restrict__ b,  // [16, stride], by columns
                                   float* __restrict__ c,           // [32, 16]
                                   int depth, int stride) {
  using Layout = MmaLayout<BFloat16>;
  constexpr int step = Layout::depth, chunk = 8, width = step + chunk;
  struct alignas(16) Stage {
    BFloat16 a[32][width], b[16][width];
  };
  FEWSHOT_EXT_SHARED(Stage, stages, [2]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto copy = [&](int k) {
    Stage& stage = stages[k / step % 2];
    const int row = threadIdx.x / 2, column = threadIdx.x % 2 * chunk;
    const int left = depth - k - column, bytes = 2 * (left < 0 ? 0 : left < chunk ? left : chunk);
    cp_async(&stage.a[row][column], a + (bytes > 0 ? row * stride + k + column : 0), bytes);
    if (row < 16) cp_async(&stage.b[row][column], b + (bytes > 0 ? row * stride + k + column : 0), bytes);
  };

  FragmentC sum[2] = {};
  copy(0);
  cp_async_commit();
  for (int k = 0; k < depth; k += step) {
    if (k + step < depth) copy(k + step);
    cp_async_commit();  // of nothing at the end, so that one may always be pending
    cp_async_wait<pending>();
    if constexpr (synchronized_before) __syncthreads();
    const Stage& stage = stages[k / step % 2];
    const Place in_a = Layout::row_for_a(lane), in_b = Layout::row_for_b(lane);
    FragmentA<BFloat16> x;
    FragmentB<BFloat16> y[2];
    ldmatrix_x4(x, &stage.a[16 * warp + in_a.row][in_a.column]);
    ldmatrix_x4(y[0], y[1], &stage.b[in_b.row][in_b.column]);
    for (int n = 0; n < 2; ++n) mma_m16n8k16(sum[n], x, y[n]);
    if constexpr (synchronized_after) __syncthreads();
  }
  for (int n = 0; n < 2; ++n)
    for (int i = 0; i < 4; ++i) {
      const Place at = Layout::of_c(lane, i);
      c[(16 * warp + at.row) * 16 + 8 * n + at.column] = sum[n].at[i];
    }
}

// One lane of a warp takes another path to the same instruction. x and y are [threads] here and below.
__global__ void multiply_at_two_places(const float* x, float* y) {
  FragmentC c = {};
  if (threadIdx.x % 32 != 7)
    mma_m16n8k16(c, FragmentA<BFloat16>{}, FragmentB<BFloat16>{});
  else
    mma_m16n8k16(c, FragmentA<BFloat16>{}, FragmentB<BFloat16>{});
  y[threadIdx.x] = x[threadIdx.x] + c.at[0];
}

__global__ void multiply_without_a_lane(const float* x, float* y) {
  FragmentC c = {};
  if (threadIdx.x % 32 != 7) mma_m16n8k8(c, FragmentA<Tf32>{}, FragmentB<Tf32>{});
  y[threadIdx.x] = x[threadIdx.x] + c.at[0];
}

// Each lane points to the row it has written itself, but others get it.
__global__ void load_ones_own_rows_without_barrier(const float* x, float* y) {
  FEWSHOT_EXT_SHARED(uint4, rows, [64]);
  rows[threadIdx.x] = make_uint4(1, 2, 3, 4);
  FragmentA<uint16_t> loaded;
  ldmatrix_x4(loaded.at[0], loaded.at[1], loaded.at[2], loaded.at[3], &rows[threadIdx.x]);
  y[threadIdx.x] = x[threadIdx.x] + static_cast<float>(loaded.at[0]);
}

// One lane points past the end, and is the one to be named.
__global__ void load_one_row_too_far(const float* x, float* y) {
  FEWSHOT_EXT_SHARED(uint4, rows, [64]);
  rows[threadIdx.x] = make_uint4(1, 2, 3, 4);
  __syncwarp();
  FragmentA<uint16_t> loaded;
  const unsigned row = threadIdx.x + (threadIdx.x == 45 ? 32 : 0);
  ldmatrix_x4(loaded.at[0], loaded.at[1], loaded.at[2], loaded.at[3], &rows[0] + row);
  y[threadIdx.x] = x[threadIdx.x] + static_cast<float>(loaded.at[0]);
}

}  // namespace fewshot_ext
