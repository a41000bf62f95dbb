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

// Values with the numbers in `index` in place of their last bits, those of `mask`: the number then travels with the
// minimum at no cost.
template <class T, class IndexVector>
FEWSHOT_EXT_INLINE Vector<T> pack_index(const Vector<T>& values, const IndexVector& index,
                                        typename Simd<T>::Uint mask) {
  typename Simd<T>::UintVector bits;
  std::memcpy(&bits, &values, sizeof(bits));
  bits = (bits & ~mask) | index;
  Vector<T> packed;
  std::memcpy(&packed, &bits, sizeof(bits));
#if defined(__x86_64__)
  // Hidden from GCC, which would otherwise turn the minimum that follows into a comparison and a masked "or".
  asm("" : "+x"(packed));
#endif
  return packed;
}

// 0, 1, 2, ... in a constant: GCC fills a vector that a loop sets lane by lane with one masked move a lane.
template <class IntegerVector, class Integer, int... lane>
FEWSHOT_EXT_INLINE IntegerVector count_lanes(std::integer_sequence<int, lane...>) {
  return IntegerVector{Integer(lane)...};
}

template <class T>
FEWSHOT_EXT_INLINE typename Simd<T>::UintVector lane_numbers() {
  return count_lanes<typename Simd<T>::UintVector, typename Simd<T>::Uint>(
      std::make_integer_sequence<int, Simd<T>::lanes>());
}

template <class T, int distance = Simd<T>::lanes / 2>
FEWSHOT_EXT_INLINE T horizontal_min(const Vector<T>& v) {
  if constexpr (distance == 0)
    return v[0];
  else
    return horizontal_min<T, distance / 2>(smaller<T>(v, swap_lanes<T, distance>(v)));
}

// The two lowest numbers of `best` and `second` together, where no lane of `second` is below the same lane of `best`.
template <class T, int distance = Simd<T>::lanes / 2>
FEWSHOT_EXT_INLINE void horizontal_two_lowest(const Vector<T>& best, const Vector<T>& second, T& lowest, T& next) {
  if constexpr (distance == 0) {
    lowest = best[0];
    next = second[0];
  } else {
    const Vector<T> other = swap_lanes<T, distance>(best);
    const Vector<T> rest = smaller<T>(second, swap_lanes<T, distance>(second));
    horizontal_two_lowest<T, distance / 2>(smaller<T>(best, other), smaller<T>(larger<T>(best, other), rest), lowest,
                                           next);
  }
}

}  // namespace fewshot_ext::FEWSHOT_EXT_ISA
