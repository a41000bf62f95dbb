// Four neighboring elements at a time: 16-byte accesses for float, 8-byte ones for half types.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/device.h"
#include "common/half.h"

namespace fewshot_ext {

// What a dtype is computed in on a GPU: double for double, float for the rest.
template <class Storage>
using Accumulate = std::conditional_t<std::is_same_v<Storage, double>, double, float>;

template <class T>
struct alignas(4 * sizeof(T)) Four {
  T at[4];

  using Wide = std::conditional_t<sizeof(T) == 2, uint2, uint4>;
  static constexpr int wides = static_cast<int>(4 * sizeof(T) / sizeof(Wide));

  __device__ static __forceinline__ Four read(const T* from) {
    Wide words[wides];
#pragma unroll
    for (int i = 0; i < wides; ++i) words[i] = reinterpret_cast<const Wide*>(from)[i];
    return bit_cast<Four>(words);
  }

  __device__ __forceinline__ void write(T* to) const {
    each_word([to](int i, const Wide& word) { reinterpret_cast<Wide*>(to)[i] = word; });
  }

  // By the intrinsic: the compiler may take a plain store apart to merge the parts with those of another branch.
  __device__ __forceinline__ void write_global(T* to) const {
    each_word([to](int i, const Wide& word) { __stwb(reinterpret_cast<Wide*>(to) + i, word); });
  }

 private:
  template <class Visit>
  __device__ __forceinline__ void each_word(Visit visit) const {
    struct Words {
      Wide at[wides];
    };
    const Words words = bit_cast<Words>(*this);
#pragma unroll
    for (int i = 0; i < wides; ++i) visit(i, words.at[i]);
  }
};

// Whether rows of `columns` elements, `stride` apart, can be read and written in fours throughout.
template <class T>
bool in_fours(const void* rows, int64_t stride, int64_t columns) {
  return reinterpret_cast<uintptr_t>(rows) % alignof(Four<T>) == 0 && stride % 4 == 0 && columns % 4 == 0;
}

// Elements 0..3 in global memory, of which the first `count` exist; zero for the others. In fours, either all exist or
// none.
template <class Storage>
__device__ __forceinline__ Four<Storage> fetch_four(const Storage* from, int64_t count, bool fours) {
  Four<Storage> read{};
  if (fours) {
    if (count > 0) read = Four<Storage>::read(from);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < count) read.at[i] = from[i];
  }
  return read;
}

template <class Storage, class T = Accumulate<Storage>>
__device__ __forceinline__ Four<T> accumulate_four(const Four<Storage>& read) {
  Four<T> values;
#pragma unroll
  for (int i = 0; i < 4; ++i) values.at[i] = to_accumulate(read.at[i]);
  return values;
}

template <class Storage, class T = Accumulate<Storage>>
__device__ __forceinline__ Four<T> load_four(const Storage* from, int64_t count, bool fours) {
  return accumulate_four(fetch_four(from, count, fours));
}

template <class Storage, class T>
__device__ __forceinline__ void store_four(Storage* to, const Four<T>& values, int64_t count, bool fours) {
  if (fours) {
    if (count > 0) {
      Four<Storage> written;
#pragma unroll
      for (int i = 0; i < 4; ++i) written.at[i] = from_accumulate<Storage>(values.at[i]);
      written.write_global(to);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < count) to[i] = from_accumulate<Storage>(values.at[i]);
  }
}

}  // namespace fewshot_ext
