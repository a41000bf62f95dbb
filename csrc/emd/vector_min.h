// Minima of vectors. Included inside FEWSHOT_EXT_TARGET_BEGIN ... END; see common/isa.h.
#pragma once

#include "common/simd.h"

namespace fewshot_ext::FEWSHOT_EXT_ISA {

template <class T>
FEWSHOT_EXT_INLINE Vector<T> smaller(const Vector<T>& a, const Vector<T>& b) {
  return a < b ? a : b;
}

template <class T>
FEWSHOT_EXT_INLINE Vector<T> larger(const Vector<T>& a, const Vector<T>& b) {
  return a > b ? a : b;
}

template <class T>
using IntVector = typename Simd<T>::IntVector;

// Numbers as integers in the same order, and back again.
template <class T>
FEWSHOT_EXT_INLINE IntVector<T> in_order(const IntVector<T>& bits) {
  using Int = typename Simd<T>::Int;
  return bits ^ (bits >> (8 * sizeof(T) - 1) & std::numeric_limits<Int>::max());
}

// Values as integers in the same order, with the numbers in `index` in place of their last bits, those of `mask`: the
// number then travels with the minimum at no cost. Minima of integers take fewer cycles, too.
template <class T>
FEWSHOT_EXT_INLINE IntVector<T> pack_index(const Vector<T>& values, const IntVector<T>& index,
                                           typename Simd<T>::Int mask) {
  IntVector<T> bits;
  std::memcpy(&bits, &values, sizeof(bits));
  return (in_order<T>(bits) & ~mask) | index;
}

// The value that was packed, up to its last bits.
template <class T>
FEWSHOT_EXT_INLINE Vector<T> unpacked(const IntVector<T>& packed) {
  const IntVector<T> bits = in_order<T>(packed);
  Vector<T> values;
  std::memcpy(&values, &bits, sizeof(bits));
  return values;
}

// 0, 1, 2, ... in a constant: GCC fills a vector that a loop sets lane by lane with one masked move a lane.
template <class IntegerVector, class Integer, int... lane>
FEWSHOT_EXT_INLINE IntegerVector count_lanes(std::integer_sequence<int, lane...>) {
  return IntegerVector{Integer(lane)...};
}

template <class T>
FEWSHOT_EXT_INLINE IntVector<T> lane_numbers() {
  return count_lanes<IntVector<T>, typename Simd<T>::Int>(std::make_integer_sequence<int, Simd<T>::lanes>());
}

template <class T, int distance = Simd<T>::lanes / 2>
FEWSHOT_EXT_INLINE T horizontal_min(const Vector<T>& v) {
  if constexpr (distance == 0)
    return v[0];
  else
    return horizontal_min<T, distance / 2>(smaller<T>(v, swap_lanes<T, distance>(v)));
}

template <class Integers>
FEWSHOT_EXT_INLINE Integers smaller_of(const Integers& a, const Integers& b) {
  return a < b ? a : b;
}

template <class T, int distance, class Integers>
FEWSHOT_EXT_INLINE Integers swap_integers(const Integers& v) {
  Vector<T> lanes;
  std::memcpy(&lanes, &v, sizeof(v));
  lanes = swap_lanes<T, distance>(lanes);
  Integers swapped;
  std::memcpy(&swapped, &lanes, sizeof(v));
  return swapped;
}

// The lowest of all lanes, in each of them.
template <class T, class Integers, int distance = Simd<T>::lanes / 2>
FEWSHOT_EXT_INLINE Integers lowest_in_lanes(const Integers& v) {
  if constexpr (distance == 0)
    return v;
  else
    return lowest_in_lanes<T, Integers, distance / 2>(smaller_of(v, swap_integers<T, distance>(v)));
}

// The two lowest of `best` and `second` together, in each lane, where no lane of `second` is below the same lane of
// `best`.
template <class T, int distance = Simd<T>::lanes / 2>
FEWSHOT_EXT_INLINE void two_lowest_in_lanes(IntVector<T>& best, IntVector<T>& second) {
  if constexpr (distance > 0) {
    const IntVector<T> other = swap_integers<T, distance>(best), larger = best > other ? best : other;
    second = smaller_of(smaller_of(second, larger), swap_integers<T, distance>(second));
    best = smaller_of(best, other);
    two_lowest_in_lanes<T, distance / 2>(best, second);
  }
}

}  // namespace fewshot_ext::FEWSHOT_EXT_ISA
