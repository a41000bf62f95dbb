// The package's CUDA kernels, run by the emulator, for Python: tensors come as addresses of host memory.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "emd/gpu.h"
#include "margin_softmax/gpu.h"
#include "scale_gradients/kernels.cuh"
#include "simt/launch.h"
#include "simt/python.h"

namespace py = pybind11;
using namespace fewshot_ext;

namespace {

uint64_t next_seed = 0;               // every launch has a schedule of its own
std::map<std::string, int> launches;  // by kernel

class SimtDevice {
 public:
  explicit SimtDevice(int most_blocks) : most_blocks_(most_blocks) {}

  template <auto kernel, class... Arguments>
  void launch(dim3 grid, dim3 block, const Arguments&... arguments) {
    ++launches[simt::name_of<kernel>()];
    simt::launch<kernel>(grid, block, 0, next_seed++, arguments...);
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
  __attribute__((no_sanitize("thread"))) void multiply(const Matrix<Out>& out, const Matrix<const Element>& a,
                                                       const Matrix<const Element>& b) {
    for (int64_t i = 0; i < out.rows; ++i) {
      for (int64_t j = 0; j < out.columns; ++j) {
        Out sum = 0;
        for (int64_t k = 0; k < a.columns; ++k)
          sum += Out(to_accumulate(a.data[i * a.row_stride + k * a.column_stride])) *
                 Out(to_accumulate(b.data[k * b.row_stride + j * b.column_stride]));
        out.data[i * out.row_stride + j * out.column_stride] = sum;
      }
    }
  }

 private:
  struct alignas(64) Line {
    std::byte bytes[64];
  };
  int most_blocks_;
  std::vector<std::vector<Line>> memory_;
};

template <class T = void>
T* pointer(const py::dict& fields, const char* name) {
  return reinterpret_cast<T*>(fields[name].cast<uintptr_t>());
}

void margin_softmax(const py::dict& fields, const std::string& kernel, int most_blocks, int64_t chunk_samples,
                    int64_t chunk_products) {
  MarginSoftmaxProblem problem;
  problem.samples = fields["samples"].cast<int64_t>();
  problem.classes = fields["classes"].cast<int64_t>();
  problem.dimensions = fields["dimensions"].cast<int64_t>();
  problem.dtype = static_cast<Dtype>(fields["dtype"].cast<int>());
  problem.features = pointer(fields, "features");
  problem.features_stride = fields["features_stride"].cast<int64_t>();
  problem.weight = pointer(fields, "weight");
  problem.weight_stride = fields["weight_stride"].cast<int64_t>();
  problem.target = pointer<int64_t>(fields, "target");
  problem.margin = fields["margin"].cast<double>();
  problem.scale = fields["scale"].cast<double>();
  problem.label_smoothing = fields["label_smoothing"].cast<double>();
  problem.ignore_index = fields["ignore_index"].cast<int64_t>();
  problem.cosine = fields["cosine"].cast<bool>();
  problem.reduction = static_cast<Reduction>(fields["reduction"].cast<int>());
  problem.loss = pointer(fields, "loss");
  problem.prediction = pointer<int64_t>(fields, "prediction");
  problem.row_statistics = pointer(fields, "row_statistics");
  problem.grad_features = pointer(fields, "grad_features");
  problem.grad_weight = pointer(fields, "grad_weight");
  problem.grad_loss = pointer(fields, "grad_loss");

  SimtDevice device(most_blocks);
  MarginSoftmaxPlan plan;
  plan.kernel = kernel == "chunked" ? MarginSoftmaxKernel::chunked : MarginSoftmaxKernel::one_launch;
  plan.chunk_samples = chunk_samples;
  plan.chunk_products = chunk_products;
  margin_softmax_on_gpu(device, problem, plan);
}

void scale_both(int dtype, const std::vector<std::pair<uintptr_t, int64_t>>& gradients, uintptr_t factor) {
  SimtDevice device(1);
  void* const values[] = {reinterpret_cast<void*>(gradients[0].first), reinterpret_cast<void*>(gradients[1].first)};
  const int64_t counts[] = {gradients[0].second, gradients[1].second};
  const void* by = reinterpret_cast<const void*>(factor);
  switch (static_cast<Dtype>(dtype)) {
    case Dtype::float32:
      return scale_gradients_on_gpu<float>(device, values, counts, by);
    case Dtype::float64:
      return scale_gradients_on_gpu<double>(device, values, counts, by);
    case Dtype::bfloat16:
      return scale_gradients_on_gpu<BFloat16>(device, values, counts, by);
    case Dtype::float16:
      return scale_gradients_on_gpu<Float16>(device, values, counts, by);
  }
}

void copy_strides(const py::dict& fields, const char* name, int64_t* strides) {
  for (const auto stride : fields[name].cast<std::vector<int64_t>>()) *strides++ = stride;
}

template <class Storage>
void emd_of(const py::dict& fields) {
  EmdProblem<Storage, Accumulate<Storage>> problem;
  problem.batch = fields["batch"].cast<int64_t>();
  problem.suppliers = fields["suppliers"].cast<int64_t>();
  problem.consumers = fields["consumers"].cast<int64_t>();
  problem.cost = pointer<const Storage>(fields, "cost");
  problem.supply = pointer<const Storage>(fields, "supply");
  problem.demand = pointer<const Storage>(fields, "demand");
  copy_strides(fields, "cost_strides", problem.cost_strides);
  copy_strides(fields, "supply_strides", problem.supply_strides);
  copy_strides(fields, "demand_strides", problem.demand_strides);
  problem.value = pointer<Accumulate<Storage>>(fields, "value");
  problem.flow = pointer<Accumulate<Storage>>(fields, "flow");
  problem.supply_dual = pointer<Accumulate<Storage>>(fields, "supply_dual");
  problem.demand_dual = pointer<Accumulate<Storage>>(fields, "demand_dual");
  problem.basis = pointer<int32_t>(fields, "basis");
  SimtDevice device(1);
  emd_on_gpu<Storage>(device, problem);
}

void emd(int dtype, const py::dict& fields) {
  switch (static_cast<Dtype>(dtype)) {
    case Dtype::float32:
      return emd_of<float>(fields);
    case Dtype::float64:
      return emd_of<double>(fields);
    case Dtype::bfloat16:
      return emd_of<BFloat16>(fields);
    case Dtype::float16:
      return emd_of<Float16>(fields);
  }
}

template <class T>
void emd_flow_backward_of(const py::dict& fields) {
  EmdFlowBackwardProblem<T> problem;
  problem.batch = fields["batch"].cast<int64_t>();
  problem.suppliers = fields["suppliers"].cast<int64_t>();
  problem.consumers = fields["consumers"].cast<int64_t>();
  problem.grad_flow = pointer<const T>(fields, "grad_flow");
  copy_strides(fields, "grad_flow_strides", problem.grad_flow_strides);
  problem.basis = pointer<const int32_t>(fields, "basis");
  problem.grad_supply = pointer<T>(fields, "grad_supply");
  problem.grad_demand = pointer<T>(fields, "grad_demand");
  SimtDevice device(1);
  emd_flow_backward_on_gpu(device, problem);
}

void emd_flow_backward(int dtype, const py::dict& fields) {
  return static_cast<Dtype>(dtype) == Dtype::float64 ? emd_flow_backward_of<double>(fields)
                                                     : emd_flow_backward_of<float>(fields);
}

}  // namespace

PYBIND11_MODULE(simt_kernels_of_fewshot_ext, module) {
  simt::register_errors(module);
  module.def("margin_softmax", &margin_softmax);
  module.def("scale_gradients", &scale_both);
  module.def("emd", &emd);
  module.def("emd_flow_backward", &emd_flow_backward);
  module.def("set_seed", [](uint64_t seed) { next_seed = seed; });
  module.def("launches", [] { return launches; });
}
