// The package's CUDA kernels, run by the emulator, as a Python module.
#include "simt/python.h"
#include "simt_device.h"

PYBIND11_MODULE(simt_kernels_of_fewshot_ext, module) {
  simt::register_errors(module);
  fewshot_ext::bind_margin_softmax(module);
  fewshot_ext::bind_emd(module);
  fewshot_ext::bind_episode_finetune(module);
  module.def("set_seed", [](uint64_t seed) { fewshot_ext::next_seed = seed; });
  module.def("fix_sums", [](uint64_t seed) { simt::fix_sums(seed); });
  module.def("launches", [] { return fewshot_ext::launches; });
}
