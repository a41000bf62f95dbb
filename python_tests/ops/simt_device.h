// The emulator as the Device that the package's launch code is written against, for bindings in several files.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "common/half.h"
#include "common/matrix.h"
#include "simt/launch.h"

namespace fewshot_ext {

inline uint64_t next_seed = 0;               // every launch has a schedule of its own
inline std::map<std::string, int> launches;  // by kernel

class SimtDevice {
 public:
  explicit SimtDevice(int most_blocks) : most_blocks_(most_blocks) {}

  template <auto kernel, class... Arguments>
  void launch(dim3 grid, dim3 block, const Arguments&... arguments) {
    launch_with_shared<kernel>(grid, block, 0, arguments...);
  }

  template <auto kernel, class... Arguments>
  void launch_with_shared(dim3 grid, dim3 block, int64_t bytes, const Arguments&... arguments) {
    ++launches[simt::name_of<kernel>()];
    simt::launch<kernel>(grid, block, static_cast<size_t>(bytes), next_seed++, arguments...);
  }

  template <auto kernel, class... Arguments>
  void launch_cooperative(int64_t most_blocks, int threads, const Arguments&... arguments) {
    ++launches[simt::name_of<kernel>()];
    const auto blocks = static_cast<unsigned>(std::min<int64_t>(most_blocks, most_blocks_));
    simt::launch_cooperative<kernel>(blocks, static_cast<unsigned>(threads), 0, next_seed++, arguments...);
  }

  // Filled with NaNs, which make a read before the first write show.
  std::byte* allocate(int64_t bytes) {
    const size_t lines = static_cast<size_t>(bytes) / sizeof(Line) + 1;
    memory_.emplace_back(lines);
    std::memset(memory_.back().data(), 0xff, lines * sizeof(Line));
    return memory_.back().data()->bytes;
  }

  // cuBLAS is not what is tested: host code, which the emulator need not follow.
  template <class Out, class Element>
  void multiply(const Matrix<Out>& out, const Matrix<const Element>& a, const Matrix<const Element>& b) {
    sum_products(out, a, b, false);
  }

  template <class Element>
  void multiply_add(const Matrix<Element>& out, const Matrix<const Element>& a, const Matrix<const Element>& b) {
    sum_products(out, a, b, true);
  }

 private:
  struct alignas(64) Line {
    std::byte bytes[64];
  };

  template <class Out, class Element>
  __attribute__((no_sanitize("thread"))) static void sum_products(const Matrix<Out>& out,
                                                                  const Matrix<const Element>& a,
                                                                  const Matrix<const Element>& b, bool add) {
    for (int64_t i = 0; i < out.rows; ++i) {
      for (int64_t j = 0; j < out.columns; ++j) {
        Out sum = add ? out.data[i * out.row_stride + j * out.column_stride] : Out(0);
        for (int64_t k = 0; k < a.columns; ++k)
          sum += Out(to_accumulate(a.data[i * a.row_stride + k * a.column_stride])) *
                 Out(to_accumulate(b.data[k * b.row_stride + j * b.column_stride]));
        out.data[i * out.row_stride + j * out.column_stride] = sum;
      }
    }
  }

  int most_blocks_;
  std::vector<std::vector<Line>> memory_;
};

// Tensors come from Python as addresses of host memory, by the names of a problem's fields.
template <class T = void>
T* pointer(const pybind11::dict& fields, const char* name) {
  return reinterpret_cast<T*>(fields[name].cast<uintptr_t>());
}

// Each binds its operators. In files of their own, because their kernels take long to compile.
void bind_margin_softmax(pybind11::module_& module);
void bind_emd(pybind11::module_& module);
void bind_episode_finetune(pybind11::module_& module);

}  // namespace fewshot_ext
