// What a failed call of torch says, of those for memory above all.
//
// By the stable ABI of torch 2.11 a call that fails throws the text of its own source, and what torch said is lost.
// Torch from 2.13 on keeps that, and tells it where it is asked, by a function that a library for 2.11 has to look up.
// An earlier torch prints it on standard error. What asks for memory therefore says how much:
// fewshot_ext/_native_errors.py asks once more, and hears why there is none.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

namespace fewshot_ext {

// What torch said of the call that failed last in this thread; empty where it keeps nothing.
inline std::string said_by_torch() {
  using Ask = const char* (*)();
  static const auto ask = reinterpret_cast<Ask>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  const char* said = ask == nullptr ? nullptr : ask();
  return said == nullptr ? "" : said;
}

namespace torch_calls {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What a tensor of these sizes takes; as much as there can be of one that no number tells.
inline int64_t bytes_of(IntHeaderOnlyArrayRef sizes, ScalarType type) {
  int64_t bytes = static_cast<int64_t>(
      aoti_torch_dtype_element_size(torch::stable::detail::to<int32_t>(torch::stable::detail::from(type))));
  for (const int64_t size : sizes) {
    if (__builtin_mul_overflow(bytes, size, &bytes)) return std::numeric_limits<int64_t>::max();
  }
  return bytes;
}

// `call()`, which makes a tensor of these sizes on the device of `like`. The text of the failure is read in
// fewshot_ext/_native_errors.py.
template <class Call>
Tensor asking(const Tensor& like, IntHeaderOnlyArrayRef sizes, ScalarType type, Call call) {
  try {
    return call();
  } catch (const std::runtime_error&) {
    if (!said_by_torch().empty()) throw;
    const std::string device = like.is_cpu() ? "cpu" : "cuda:" + std::to_string(like.get_device_index());
    throw std::runtime_error("allocation of " + std::to_string(bytes_of(sizes, type)) + " bytes on " + device +
                             " failed; torch printed why on standard error");
  }
}

}  // namespace torch_calls

// `Operator<&function>::call` is the function, with what torch said in place of the source text of a call that failed.
template <auto function>
struct Operator;

template <class Result, class... Arguments, Result (*function)(Arguments...)>
struct Operator<function> {
  static Result call(Arguments... arguments) {
    try {
      return function(std::move(arguments)...);
    } catch (const std::runtime_error& error) {
      const std::string text = error.what();
      if (text.find("API call failed at") == std::string::npos) throw;
      const std::string said = said_by_torch();
      throw std::runtime_error(said.empty() ? text + "; torch printed why on standard error" : said);
    }
  }
};

}  // namespace fewshot_ext

// A kernel of an operator as the dispatcher takes it.
#define FEWSHOT_EXT_KERNEL(function) TORCH_BOX((&::fewshot_ext::Operator<(function)>::call))
