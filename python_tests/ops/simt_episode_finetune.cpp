// Episode fine-tuning on the emulator, for Python.
#include "common/dtype.h"
#include "episode_finetune/gpu.h"
#include "simt_device.h"

namespace py = pybind11;

namespace fewshot_ext {
namespace {

template <class Storage>
void finetune_of(const py::dict& fields, FinetuneForm form) {
  EpisodeFinetuneProblem<Storage, Accumulate<Storage>> problem;
  problem.episodes = fields["episodes"].cast<int64_t>();
  problem.support_size = fields["support_size"].cast<int64_t>();
  problem.query_size = fields["query_size"].cast<int64_t>();
  problem.dimensions = fields["dimensions"].cast<int64_t>();
  problem.way = fields["way"].cast<int64_t>();
  problem.passes = fields["passes"].cast<int64_t>();
  problem.settings = {fields["cosine"].cast<bool>(),      fields["scale"].cast<double>(),
                      fields["margin"].cast<double>(),    fields["batch_size"].cast<int64_t>(),
                      fields["lr"].cast<double>(),        fields["momentum"].cast<double>(),
                      fields["dampening"].cast<double>(), fields["weight_decay"].cast<double>()};
  problem.support = pointer<const Storage>(fields, "support");
  problem.query = pointer<const Storage>(fields, "query");
  const auto support_strides = fields["support_strides"].cast<std::vector<int64_t>>();
  const auto query_strides = fields["query_strides"].cast<std::vector<int64_t>>();
  for (int k = 0; k < 2; ++k) {
    problem.support_strides[k] = support_strides[k];
    problem.query_strides[k] = query_strides[k];
  }
  problem.target = pointer<const int64_t>(fields, "target");
  problem.weight = pointer<const Accumulate<Storage>>(fields, "weight");
  problem.order = pointer<const int64_t>(fields, "order");
  problem.scores = pointer<Accumulate<Storage>>(fields, "scores");
  SimtDevice device(1);
  finetune_episodes_on_gpu<Storage>(device, problem, form);
}

void finetune(int dtype, const py::dict& fields, int form) {
  switch (static_cast<Dtype>(dtype)) {
    case Dtype::float32:
      return finetune_of<float>(fields, static_cast<FinetuneForm>(form));
    case Dtype::float64:
      return finetune_of<double>(fields, static_cast<FinetuneForm>(form));
    case Dtype::bfloat16:
      return finetune_of<BFloat16>(fields, static_cast<FinetuneForm>(form));
    case Dtype::float16:
      return finetune_of<Float16>(fields, static_cast<FinetuneForm>(form));
  }
}

void draw(int dtype, const py::dict& fields) {
  EpisodeDraws draws;
  draws.seed = static_cast<uint64_t>(fields["seed"].cast<int64_t>());
  draws.episodes = fields["episodes"].cast<int64_t>();
  draws.way = fields["way"].cast<int64_t>();
  draws.dimensions = fields["dimensions"].cast<int64_t>();
  draws.passes = fields["passes"].cast<int64_t>();
  draws.support_size = fields["support_size"].cast<int64_t>();
  draws.weight = pointer(fields, "weight");
  draws.order = pointer<int64_t>(fields, "order");
  SimtDevice device(1);
  if (static_cast<Dtype>(dtype) == Dtype::float64)
    draw_episodes_on_gpu<double>(device, draws);
  else
    draw_episodes_on_gpu<float>(device, draws);
}

}  // namespace

void bind_episode_finetune(py::module_& module) {
  module.def("finetune_episodes", &finetune);
  module.def("draw_episodes", &draw);
}

}  // namespace fewshot_ext
