// Every operator schema of the package, and nothing else. Kernels register themselves beside their code; fake, autograd
// and vmap rules are in fewshot_ext/ops/.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fewshot_ext, m) {
  m.def(
      "margin_softmax(Tensor features, Tensor weight, Tensor target, float margin, float scale, "
      "float label_smoothing, int ignore_index, bool cosine, int total_classes, int reduction, bool features_grad, "
      "bool weight_grad, bool return_prediction, bool allow_tf32=False) "
      "-> (Tensor loss, Tensor prediction, Tensor row_statistics, Tensor grad_features, Tensor grad_weight)");
  m.def(
      "margin_softmax_backward(Tensor grad_loss, Tensor features, Tensor weight, Tensor target, "
      "Tensor row_statistics, float margin, float scale, float label_smoothing, int ignore_index, bool cosine, "
      "int total_classes, bool features_grad, bool weight_grad, bool allow_tf32=False) "
      "-> (Tensor grad_features, Tensor grad_weight)");
  m.def("scale_gradients_(Tensor(a!) first, Tensor(b!) second, Tensor factor) -> ()");
  m.def(
      "emd(Tensor cost, Tensor supply, Tensor demand, bool partial=False) "
      "-> (Tensor value, Tensor flow, Tensor supply_dual, Tensor demand_dual, Tensor basis, Tensor pivots)");
  m.def("emd_flow_backward(Tensor grad_flow, Tensor basis) -> (Tensor grad_supply, Tensor grad_demand)");
  m.def(
      "finetune_episodes(Tensor support, Tensor support_target, Tensor query, Tensor weight, Tensor order, bool "
      "cosine, "
      "float scale, float margin, int batch_size, float lr, float momentum, float dampening, float weight_decay) "
      "-> Tensor");
  m.def("draw_episodes(Tensor support, Tensor seed, int way, int steps) -> (Tensor weight, Tensor order)");
}
