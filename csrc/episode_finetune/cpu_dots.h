// Inner products between two lists of vectors. Included inside FEWSHOT_EXT_TARGET_BEGIN ... END; see common/isa.h.
#pragma once

#include "common/simd.h"
#include "episode_finetune/problem.h"

namespace fewshot_ext::FEWSHOT_EXT_ISA {

// The accumulators of a block of products, and the vectors that enter it, fill the registers.
constexpr int dot_rows = FEWSHOT_EXT_VECTOR_BYTES == 64 ? 4 : 2;
constexpr int dot_columns = 5;

// Up to a vector of elements, as T; zeros beyond `count`.
template <class T, class From>
FEWSHOT_EXT_INLINE Vector<T> load_as(const From* from) {
  if constexpr (std::is_same_v<T, From>) {
    return load(from);
  } else {
    typedef From Narrow __attribute__((vector_size(Simd<T>::lanes * sizeof(From))));
    Narrow narrow;
    std::memcpy(&narrow, from, sizeof(narrow));
    return __builtin_convertvector(narrow, Vector<T>);
  }
}

template <class T, class From>
FEWSHOT_EXT_INLINE Vector<T> load_as(const From* from, int64_t count) {
  From part[Simd<T>::lanes] = {};
  std::memcpy(part, from, static_cast<size_t>(count) * sizeof(From));
  return load_as<T>(part);
}

// dot[m][n] = a_m . b_n, summed in T.
template <class T, class From, int columns = dot_columns>
void dot_block(int count, const From* const* a, const From* const* b, int64_t dimensions, T (*dot)[dot_columns]) {
  if constexpr (columns > 1) {
    if (count != columns) return dot_block<T, From, columns - 1>(count, a, b, dimensions, dot);
  }
  constexpr int64_t lanes = Simd<T>::lanes;
  Vector<T> sum[dot_rows][columns] = {};
  const int64_t whole = dimensions / lanes * lanes;
  for (int64_t k = 0; k < whole; k += lanes) {
    Vector<T> left[dot_rows];
#pragma GCC unroll 8
    for (int m = 0; m < dot_rows; ++m) left[m] = load_as<T>(a[m] + k);
#pragma GCC unroll 8
    for (int n = 0; n < columns; ++n) {
      const Vector<T> right = load_as<T>(b[n] + k);
#pragma GCC unroll 8
      for (int m = 0; m < dot_rows; ++m) sum[m][n] += left[m] * right;
    }
  }
  if (whole < dimensions) {
    for (int n = 0; n < columns; ++n) {
      const Vector<T> right = load_as<T>(b[n] + whole, dimensions - whole);
      for (int m = 0; m < dot_rows; ++m) sum[m][n] += load_as<T>(a[m] + whole, dimensions - whole) * right;
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < dot_rows; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < columns; ++n) dot[m][n] = sum_in_lanes<T>(sum[m][n])[0];
}

// visit(m, n, a_m . b_n) for every pair.
template <class T, class From, class Visit>
void each_dot(const From* const* a, int64_t a_count, const From* const* b, int64_t b_count, int64_t dimensions,
              const Visit& visit) {
  // Groups of nearly equal size: six columns are three and three, not five and one.
  const int64_t groups = (b_count + dot_columns - 1) / dot_columns;
  for (int64_t first = 0; first < a_count; first += dot_rows) {
    const From* rows[dot_rows];
    const int64_t count = std::min<int64_t>(dot_rows, a_count - first);
    for (int64_t m = 0; m < dot_rows; ++m) rows[m] = a[first + std::min(m, count - 1)];
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t begin = b_count * group / groups, end = b_count * (group + 1) / groups;
      T dot[dot_rows][dot_columns];
      dot_block<T>(static_cast<int>(end - begin), rows, b + begin, dimensions, dot);
      for (int64_t m = 0; m < count; ++m)
        for (int64_t n = begin; n < end; ++n) visit(first + m, n, dot[m][n - begin]);
    }
  }
}

template <class T, class From>
T squared_norm(const From* row, int64_t dimensions) {
  constexpr int64_t lanes = Simd<T>::lanes;
  Vector<T> sum[4] = {};
  int64_t k = 0;
  for (; k + 4 * lanes <= dimensions; k += 4 * lanes) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Vector<T> x = load_as<T>(row + k + i * lanes);
      sum[i] += x * x;
    }
  }
  for (; k < dimensions; k += lanes) {
    const Vector<T> x = load_as<T>(row + k, std::min(lanes, dimensions - k));
    sum[0] += x * x;
  }
  return sum_in_lanes<T>((sum[0] + sum[1]) + (sum[2] + sum[3]))[0];
}

// to [dimensions] = sum_i factors_i vectors_i.
template <class From>
void combine(const double* factors, const From* const* vectors, int64_t count, int64_t dimensions, double* to) {
  constexpr int64_t lanes = Simd<double>::lanes, block = 4;
  int64_t k = 0;
  for (; k + block * lanes <= dimensions; k += block * lanes) {
    Vector<double> sum[block] = {};
    for (int64_t i = 0; i < count; ++i)
#pragma GCC unroll 4
      for (int64_t j = 0; j < block; ++j) sum[j] += factors[i] * load_as<double>(vectors[i] + k + j * lanes);
#pragma GCC unroll 4
    for (int64_t j = 0; j < block; ++j) store(to + k + j * lanes, sum[j]);
  }
  for (; k < dimensions; k += lanes) {
    const int64_t rest = std::min(lanes, dimensions - k);
    Vector<double> sum{};
    for (int64_t i = 0; i < count; ++i) sum += factors[i] * load_as<double>(vectors[i] + k, rest);
    std::memcpy(to + k, &sum, static_cast<size_t>(rest) * sizeof(double));
  }
}

// 1 / |x|, as torch.nn.functional.normalize has it, from |x|^2; not a number where that has overflowed.
template <class T>
T inverse_norm(T squares) {
  if (squares > std::numeric_limits<T>::max()) return std::numeric_limits<T>::quiet_NaN();
  return T(1) / std::max(std::sqrt(squares), T(finetune_norm_floor));
}

// dL/dw = (raw - projection * (raw . w) w) for cosines. Below the floor of the norm w is divided by a constant.
template <class T>
T projection(T inverse) {
  return inverse < T(1 / finetune_norm_floor) ? inverse * inverse : T(0);
}

}  // namespace fewshot_ext::FEWSHOT_EXT_ISA
