// Rows so long that products of their elements leave the range of the working type. Their direction is found all the
// same, after a multiplication by a power of two. Included inside FEWSHOT_EXT_TARGET_BEGIN ... END; see isa.h.
#pragma once

#include "common/half.h"

namespace fewshot_ext::FEWSHOT_EXT_ISA {

// From |x|^2, infinity where that overflowed. Far inside the range, so that factors of 1 / (|x| |w|) leave small
// gradients their digits too. Short rows need no such care: below 1e-12 they are divided by a constant.
template <class T>
constexpr bool is_long(T squares) {
  return squares > T(sizeof(T) == sizeof(float) ? 0x1p40 : 0x1p512);
}

// The power of two that brings the largest element of a long row to between 8 and 16: a normal number at any length,
// so that flush-to-zero leaves it alone. 1 for a row that is not long, or not finite.
template <class T, class Storage>
T scale_of_long_row(const Storage* row, int64_t dimensions) {
  T squares = 0, largest = 0;
  for (int64_t k = 0; k < dimensions; ++k) {
    const T x = to_accumulate(row[k]);
    squares += x * x;
    largest = std::max(largest, std::abs(x));
  }
  if (!is_long(squares) || largest > std::numeric_limits<T>::max()) return T(1);
  int exponent = 0;
  std::frexp(largest, &exponent);
  return std::ldexp(T(1), 4 - exponent);
}

}  // namespace fewshot_ext::FEWSHOT_EXT_ISA
