// The register tile every matrix product of the CPU kernels is made of, and the packing it wants.
// Included inside FEWSHOT_EXT_TARGET_BEGIN ... END; see isa.h.
//
// A tile holds up to tile_rows rows of two vectors in registers and walks the inner dimension once: two loads of B, one
// broadcast of A a row, two multiply-adds a row. Callers fuse around it: a tile's result lies in the first-level cache
// when they read it back, so no fusion needs to live inside the loop.
#pragma once

#include "common/half.h"
#include "common/simd.h"

namespace fewshot_ext::FEWSHOT_EXT_ISA {

// Accumulators, two vectors of B and one broadcast fill the register file: 2 * 14 + 3 of 32, 2 * 6 + 3 of 16.
constexpr int tile_rows = FEWSHOT_EXT_VECTOR_BYTES == 64 ? 14 : 6;

template <class T>
constexpr int panel_width = 2 * Simd<T>::lanes;

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// Rows of a panel packed by pack_transposed: whole vectors, at least tile_rows.
template <class T>
constexpr int packed_rows = static_cast<int>(round_up(tile_rows, Simd<T>::lanes));

// Cuts n rows into tiles of nearly equal height: 32 rows give 11, 11, 10 rather than 14, 14, 4.
struct Tiles {
  int64_t n, count;
  explicit Tiles(int64_t rows) : n(rows), count(divide_up(rows, tile_rows)) {}
  int64_t begin(int64_t tile) const { return n * tile / count; }
  int rows(int64_t tile) const { return static_cast<int>(begin(tile + 1) - begin(tile)); }
};

// Where a tile finds A: element (row, k) lies at k / inner * outer_step + k % inner * k_step + row * row_step.
template <class T>
struct TileA {
  const T* data;
  int64_t k_step;
  int64_t inner;
  int64_t outer_step;
};

// And B: row k of a panel, panel_width elements, lies at k * row_step, the next panel panel_step further.
template <class T>
struct Panels {
  const T* data;
  int64_t panel_step;
  int64_t row_step;
};

// C[row][0 .. panel_width) (+)= sum_k A(row, k) B[k][0 .. panel_width), for `inner_size` values of k.
template <class T, int Rows, int RowStep>
void tile_product(int64_t inner_size, TileA<T> a, const T* b, int64_t b_step, T* c, int64_t c_stride, bool accumulate) {
  constexpr int lanes = Simd<T>::lanes;
  Vector<T> sum[Rows][2];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
    sum[r][0] = accumulate ? load(c + r * c_stride) : Vector<T>{};
    sum[r][1] = accumulate ? load(c + r * c_stride + lanes) : Vector<T>{};
  }
  while (inner_size > 0) {
    const int64_t steps = inner_size < a.inner ? inner_size : a.inner;
    const T* at = a.data;
    for (int64_t k = 0; k < steps; ++k) {
      const Vector<T> b0 = load(b), b1 = load(b + lanes);
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        const T broadcast = at[r * RowStep];
        sum[r][0] += b0 * broadcast;
        sum[r][1] += b1 * broadcast;
      }
      at += a.k_step;
      b += b_step;
    }
    a.data += a.outer_step;
    inner_size -= steps;
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
    store(c + r * c_stride, sum[r][0]);
    store(c + r * c_stride + lanes, sum[r][1]);
  }
}

// tile_product with panel `panel` of B, for a height known only at run time.
template <class T, int RowStep, int Rows = tile_rows>
FEWSHOT_EXT_INLINE void tile_product(int rows, int64_t inner_size, const TileA<T>& a, const Panels<T>& b, int64_t panel,
                                     T* c, int64_t c_stride, bool accumulate) {
  if constexpr (Rows > 1) {
    if (rows != Rows) return tile_product<T, RowStep, Rows - 1>(rows, inner_size, a, b, panel, c, c_stride, accumulate);
  }
  tile_product<T, Rows, RowStep>(inner_size, a, b.data + panel * b.panel_step, b.row_step, c, c_stride, accumulate);
}

// Source rows [rows, columns], source_stride apart -> to[columns][width], zero beyond `rows`; and the sum of squares of
// each row, [width], which costs nothing while the rows pass through registers.
// `scratch` holds lanes * columns elements, used where the source needs converting.
template <class T, class Storage>
void pack_transposed(const Storage* source, int64_t source_stride, int64_t rows, int64_t columns, int width, T* to,
                     T* squares, T* scratch) {
  constexpr int lanes = Simd<T>::lanes;
  for (int first = 0; first < width; first += lanes) {
    const int64_t height = rows - first < lanes ? (rows > first ? rows - first : 0) : lanes;
    const T* from;
    int64_t from_stride;
    if constexpr (std::is_same_v<T, Storage>) {
      from = source + first * source_stride;
      from_stride = source_stride;
    } else {
      for (int64_t r = 0; r < height; ++r)
        for (int64_t c = 0; c < columns; ++c)
          scratch[r * columns + c] = to_accumulate(source[(first + r) * source_stride + c]);
      from = scratch;
      from_stride = columns;
    }
    Vector<T> total{};
    int64_t column = 0;
    for (; column + lanes <= columns; column += lanes) {
      Vector<T> square[lanes];
      for (int64_t r = 0; r < lanes; ++r) square[r] = r < height ? load(from + r * from_stride + column) : Vector<T>{};
      Transpose<T>::run(square);
      Vector<T> part{};  // summed in two levels, for accuracy
      for (int k = 0; k < lanes; ++k) {
        part += square[k] * square[k];
        store(to + (column + k) * width + first, square[k]);
      }
      total += part;
    }
    for (; column < columns; ++column) {
      T* tail = to + column * width + first;
      for (int64_t r = 0; r < lanes; ++r) tail[r] = r < height ? from[r * from_stride + column] : T(0);
      total += load(tail) * load(tail);
    }
    store(squares + first, total);
  }
}

// Whether rows can serve as operand B where they lie.
template <class T, class Storage>
constexpr bool panels_as_they_lie(int64_t columns) {
  return std::is_same_v<T, Storage> && columns % panel_width<T> == 0;
}

// Source rows [rows, columns] as operand B: packed to[column / panel_width][rows][panel_width], panels `panel_step`
// apart, with zeros beyond `columns`; or, where `to` is null, as they lie.
template <class T, class Storage>
Panels<T> pack_panels(const Storage* source, int64_t source_stride, int64_t rows, int64_t columns, T* to,
                      int64_t panel_step) {
  constexpr int width = panel_width<T>;
  if constexpr (std::is_same_v<T, Storage>) {
    if (!to) return {source, width, source_stride};
  }
  for (int64_t r = 0; r < rows; ++r) {
    const Storage* row = source + r * source_stride;
    for (int64_t first = 0; first < columns; first += width) {
      T* panel = to + first / width * panel_step + r * width;
      const int64_t count = columns - first < width ? columns - first : width;
      for (int64_t k = 0; k < count; ++k) panel[k] = to_accumulate(row[first + k]);
      for (int64_t k = count; k < width; ++k) panel[k] = T(0);
    }
  }
  return {to, panel_step, width};
}

}  // namespace fewshot_ext::FEWSHOT_EXT_ISA
