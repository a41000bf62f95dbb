// A matrix in memory, for products.
#pragma once

#include <cstdint>

namespace fewshot_ext {

template <class Element>
struct Matrix {
  Element* data;
  int64_t rows, columns;
  int64_t row_stride, column_stride;

  Matrix transposed() const { return {data, columns, rows, column_stride, row_stride}; }
};

}  // namespace fewshot_ext
