// A first basis for the simplex. Included inside FEWSHOT_EXT_TARGET_BEGIN ... END; see common/isa.h.
//
// Vogel's approximation with the regrets of rows: the row that would lose most by its second-best column is served
// first. Costs are taken relative to the mean and the lowest of their column: without that, rows compete for the
// columns that are cheap for everybody. It halves the pivots that a start from the cheapest columns, row by row, leaves
// to do.
#pragma once

#include "common/cancellation.h"
#include "common/simd.h"
#include "emd/vector_min.h"

namespace fewshot_ext::FEWSHOT_EXT_ISA {

template <class Float>
class RegretStart {
  using Int = typename Simd<Float>::Int;
  using IntV = IntVector<Float>;
  using V = Vector<Float>;
  static constexpr int lanes = Simd<Float>::lanes;
  typedef int32_t Eight __attribute__((vector_size(32)));
  // Beyond every cost, and twice it is still finite.
  static constexpr Float closed = std::numeric_limits<Float>::max() / 4;

 public:
  template <class Arena>
  void lay_out(Arena& arena, int64_t most_rows, int64_t stride) {
    const int64_t padded_rows = round_up(most_rows, std::max<int64_t>(lanes, 8));
    offset_ = arena.template take<Float>(stride);
    regret_ = arena.template take<Int>(padded_rows);
    best_ = arena.template take<int32_t>(padded_rows);
    second_ = arena.template take<int32_t>(padded_rows);
  }

  // Calls serve(row, column) for each arc of the basis; it returns whether the row has no mass left. A column that has
  // none left while the row still has is closed; no arc but the last uses up both. False: was told to stop.
  template <class Serve>
  bool run(const Float* cost, int64_t stride, int64_t rows, int64_t columns, Cancellation& cancellation,
           const Serve& serve) {
    cost_ = cost;
    stride_ = stride;
    row_mask_ = index_mask(rows);
    column_mask_ = index_mask(stride);
    const int64_t padded_rows = round_up(rows, std::max<int64_t>(lanes, 8));
    set_offsets(rows, columns);
    for (int64_t i = 0; i < rows; ++i) rank_columns(i);
    for (int64_t i = rows; i < padded_rows; ++i) close_row(i);
    for (int64_t arcs = rows + columns - 1; arcs > 0; --arcs) {
      if (arcs % 64 == 0 && cancellation.requested()) return false;
      IntV lowest = load_int<Float>(regret_);
      for (int64_t i = lanes; i < padded_rows; i += lanes) lowest = smaller_of(load_int<Float>(regret_ + i), lowest);
      const int64_t i = static_cast<int64_t>(lowest_in_lanes<Float>(lowest)[0] & row_mask_);
      const int64_t j = best_[i];
      if (serve(i, j)) {
        close_row(i);
        continue;
      }
      put(offset_, j, splat(closed));
      for (int64_t first = 0; first < padded_rows; first += 64) {
        for (uint64_t stale = rows_with(static_cast<int32_t>(j), first, std::min<int64_t>(padded_rows, first + 64));
             stale; stale &= stale - 1)
          rank_columns(first + __builtin_ctzll(stale));
      }
    }
    return true;
  }

 private:
  // array[at] = value, which all lanes of `value` have, by a store of all the lanes that the next load of them asks
  // for: from a narrower one it would have to wait until memory has it.
  template <class Integers, class T>
  static FEWSHOT_EXT_INLINE void put(T* array, int64_t at, const Integers& value) {
    constexpr int count = sizeof(Integers) / sizeof(T);
    using Integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
    typedef Integer Numbers __attribute__((vector_size(sizeof(Integers))));
    const auto lane = static_cast<uint64_t>(at) % count;
    Integers v;
    std::memcpy(&v, array + (static_cast<uint64_t>(at) - lane), sizeof(v));
    const Numbers numbers = count_lanes<Numbers, Integer>(std::make_integer_sequence<int, count>());
    v = numbers == static_cast<Integer>(lane) ? value : v;
    std::memcpy(array + (static_cast<uint64_t>(at) - lane), &v, sizeof(v));
  }

  static int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

  // Numbers of rows and columns travel in the last bits of the values that are compared.
  static Int index_mask(int64_t count) {
    return count <= 1 ? 0 : static_cast<Int>((int64_t(1) << (64 - __builtin_clzll(uint64_t(count - 1)))) - 1);
  }

  void set_offsets(int64_t rows, int64_t columns) {
    const Float share = Float(0.5) / static_cast<Float>(rows);
    for (int64_t c = 0; c < stride_; c += lanes) {
      V lowest = load(cost_ + c), sum = lowest;
      for (int64_t i = 1; i < rows; ++i) {
        const V v = load(cost_ + i * stride_ + c);
        lowest = smaller<Float>(v, lowest);
        sum += v;
      }
      store(offset_ + c, lowest * Float(-0.5) - sum * share);
    }
    for (int64_t j = columns; j < stride_; ++j) offset_[j] = 0;
  }

  void rank_columns(int64_t i) {
    IntV column = lane_numbers<Float>();
    IntV best = IntV{} + std::numeric_limits<Int>::max(), second = best;
    const Float* row = cost_ + i * stride_;
    for (int64_t c = 0; c < stride_; c += lanes) {
      const IntV packed = pack_index<Float>(load(row + c) + load(offset_ + c), column, column_mask_);
      second = smaller_of(packed > best ? packed : best, second);
      best = smaller_of(packed, best);
      column += Int(lanes);
    }
    two_lowest_in_lanes<Float>(best, second);
    const V regret = unpacked<Float>(best) - unpacked<Float>(second);
    put(regret_, i, pack_index<Float>(regret, IntV{} + static_cast<Int>(i), row_mask_));
    put_columns(i, best & column_mask_, second & column_mask_);
  }

  void put_columns(int64_t i, const IntV& best, const IntV& second) {
    put(best_, i, Eight{} + static_cast<int32_t>(best[0]));
    put(second_, i, Eight{} + static_cast<int32_t>(second[0]));
  }

  // Those of at most 64 rows [begin, end) that rank the column first or second, as bits.
  uint64_t rows_with(int32_t column, int64_t begin, int64_t end) const {
    typedef int8_t EightBytes __attribute__((vector_size(8)));
    uint64_t found = 0;
    for (int64_t r = begin; r < end; r += 8) {
      Eight first, second;
      std::memcpy(&first, best_ + r, sizeof(first));
      std::memcpy(&second, second_ + r, sizeof(second));
      const EightBytes equal = __builtin_convertvector((first == column) | (second == column), EightBytes);
      uint64_t bytes;
      std::memcpy(&bytes, &equal, sizeof(bytes));
      // The product brings one bit of each byte together in the highest byte.
      found |= ((bytes & 0x0101010101010101u) * 0x0102040810204080u >> 56) << (r - begin);
    }
    return found;
  }

  void close_row(int64_t i) {
    put(regret_, i, IntV{} + std::numeric_limits<Int>::max());
    put_columns(i, IntV{} - 1, IntV{} - 1);
  }

  const Float* cost_;
  int64_t stride_;
  Int row_mask_, column_mask_;
  Float* offset_;    // [stride]: added to the costs of a column; `closed` once it has no demand left
  Int* regret_;      // [padded rows]: lowest minus second-lowest cost, the row's number in its last bits
  int32_t* best_;    // [padded rows]: the columns of these two costs, -1 once the row has no supply left
  int32_t* second_;  // [padded rows]
};

}  // namespace fewshot_ext::FEWSHOT_EXT_ISA
