// Margin softmax on the emulator, for Python.
#include <utility>

#include "margin_softmax/gpu.h"
#include "scale_gradients/kernels.cuh"
#include "simt_device.h"

namespace py = pybind11;

namespace fewshot_ext {
namespace {

void margin_softmax(const py::dict& fields, const std::string& kernel, int most_blocks, int64_t chunk_samples,
                    int64_t chunk_products, int64_t bytes) {
  MarginSoftmaxProblem problem;
  problem.samples = fields["samples"].cast<int64_t>();
  problem.classes = fields["classes"].cast<int64_t>();
  problem.total_classes = fields["total_classes"].cast<int64_t>();
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
  problem.allow_tf32 = fields["allow_tf32"].cast<bool>();
  problem.reduction = static_cast<Reduction>(fields["reduction"].cast<int>());
  problem.loss = pointer(fields, "loss");
  problem.prediction = pointer<int64_t>(fields, "prediction");
  problem.row_statistics = pointer(fields, "row_statistics");
  problem.grad_features = pointer(fields, "grad_features");
  problem.grad_weight = pointer(fields, "grad_weight");
  problem.grad_loss = pointer(fields, "grad_loss");

  SimtDevice device(most_blocks);
  MarginSoftmaxPlan plan;
  plan.kernel = margin_softmax_kernel(kernel);
  plan.bytes = bytes;
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

}  // namespace

void bind_margin_softmax(py::module_& module) {
  module.def("margin_softmax", &margin_softmax);
  module.def("margin_softmax_bytes", [](const std::string& mebibytes, int64_t classes) {
    MarginSoftmaxProblem problem;
    problem.classes = classes;
    return margin_softmax_bytes(mebibytes, problem);
  });
  module.def("scale_gradients", &scale_both);
}

}  // namespace fewshot_ext
