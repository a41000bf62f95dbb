// Binds kernels with one fault each for Python: x and y are [threads] to all of them.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "simt/cuda.h"

namespace fewshot_ext {

namespace py = pybind11;

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <auto kernel>
Array<float> run_faulty_together(const Array<float>& x, uint64_t seed, int blocks, size_t dynamic_shared_bytes) {
  Array<float> y(x.shape(0));
  simt::launch_cooperative<kernel>(blocks, static_cast<unsigned>(x.shape(0)), dynamic_shared_bytes, seed, x.data(),
                                   y.mutable_data());
  return y;
}

template <auto kernel>
Array<float> run_faulty(const Array<float>& x, uint64_t seed, int blocks, size_t dynamic_shared_bytes) {
  Array<float> y(x.shape(0));
  simt::launch<kernel>(blocks, static_cast<unsigned>(x.shape(0)), dynamic_shared_bytes, seed, x.data(),
                       y.mutable_data());
  return y;
}

// By pointers of one type, so that pybind11 is instantiated once for all of them.
inline void bind_faulty(py::module_& module, const char* name,
                        Array<float> (*run)(const Array<float>&, uint64_t, int, size_t)) {
  module.def(name, run, py::arg("x"), py::arg("seed"), py::arg("blocks") = 1, py::arg("dynamic_shared_bytes") = 0);
}

template <auto kernel>
void bind_faulty(py::module_& module, const char* name) {
  bind_faulty(module, name, &run_faulty<kernel>);
}

template <auto kernel>
void bind_faulty_together(py::module_& module, const char* name) {
  bind_faulty(module, name, &run_faulty_together<kernel>);
}

}  // namespace fewshot_ext
