// Binding of the Earth Mover's Distance for any device: tensors in, EmdProblem out, the device's kernels called.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <tuple>
#include <type_traits>

#include "common/half.h"
#include "common/new_tensor.h"
#include "emd/problem.h"

namespace fewshot_ext {

namespace emd_tensors {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// fewshot_ext/ops raises the errors that name arguments; these keep a direct call from reading foreign memory.
inline void check(const Tensor& cost, const Tensor& supply, const Tensor& demand) {
  const int64_t row = cost.dim() - 2, column = row + 1;
  STD_TORCH_CHECK((row == 0 || row == 1) && supply.dim() == row + 1 && demand.dim() == row + 1,
                  "expected cost [B, n, m], supply [B, n], demand [B, m], or all without B");
  const int64_t n = cost.size(row), m = cost.size(column);
  STD_TORCH_CHECK((row == 0 || (supply.size(0) == cost.size(0) && demand.size(0) == cost.size(0))) &&
                      supply.size(row) == n && demand.size(row) == m,
                  "cost, supply and demand do not fit together");
  STD_TORCH_CHECK(n >= 1 && m >= 1 && n <= std::numeric_limits<int32_t>::max() / m,
                  "cost: expected [B, n, m] with n and m at least 1 and n * m below 2^31, got n = ", n, ", m = ", m);
  STD_TORCH_CHECK(cost.device() == supply.device() && cost.device() == demand.device(),
                  "cost, supply and demand are on different devices");
  STD_TORCH_CHECK(cost.scalar_type() == supply.scalar_type() && cost.scalar_type() == demand.scalar_type(),
                  "cost, supply and demand differ in dtype");
}

// The batch dimension may be missing.
template <int dimensions>
void copy_strides(const Tensor& tensor, int64_t (&strides)[dimensions]) {
  const int64_t missing = dimensions - tensor.dim();
  for (int64_t k = missing; k < dimensions; ++k) strides[k] = tensor.stride(k - missing);
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Kernels, class Storage>
void solve(const Tensor& cost, const Tensor& supply, const Tensor& demand, bool partial, Results& results) {
  using Accumulate = std::conditional_t<std::is_same_v<Storage, double>, double, float>;
  EmdProblem<Storage, Accumulate> problem;
  const int64_t row = cost.dim() - 2;
  problem.batch = row == 0 ? 1 : cost.size(0);
  problem.suppliers = cost.size(row);
  problem.consumers = cost.size(row + 1);
  problem.partial = partial;
  problem.cost = static_cast<const Storage*>(cost.const_data_ptr());
  problem.supply = static_cast<const Storage*>(supply.const_data_ptr());
  problem.demand = static_cast<const Storage*>(demand.const_data_ptr());
  copy_strides(cost, problem.cost_strides);
  copy_strides(supply, problem.supply_strides);
  copy_strides(demand, problem.demand_strides);
  auto& [value, flow, supply_dual, demand_dual, basis, pivots] = results;
  problem.value = static_cast<Accumulate*>(value.mutable_data_ptr());
  problem.flow = static_cast<Accumulate*>(flow.mutable_data_ptr());
  problem.supply_dual = static_cast<Accumulate*>(supply_dual.mutable_data_ptr());
  problem.demand_dual = static_cast<Accumulate*>(demand_dual.mutable_data_ptr());
  problem.basis = static_cast<int32_t*>(basis.mutable_data_ptr());
  problem.pivots = static_cast<int32_t*>(pivots.mutable_data_ptr());
  Kernels::run(problem, cost);
}

// `Kernels::run(problem, cost)` solves the batch on the device of `cost`.
template <class Kernels>
Results forward(Tensor cost, Tensor supply, Tensor demand, bool partial) {
  check(cost, supply, demand);
  // A problem that comes without a batch dimension gets results without.
  const bool one = cost.dim() == 2;
  const int64_t batch = one ? 1 : cost.size(0), n = cost.size(one ? 0 : 1), m = cost.size(one ? 1 : 2);
  STD_TORCH_CHECK(!partial || (n >= 2 && m >= 2), "cost: expected a dummy on each side");
  const ScalarType accumulate = cost.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const auto make = [&](std::initializer_list<int64_t> sizes, ScalarType type) {
    return new_empty(cost, sizes.begin() + one, sizes.size() - one, type);
  };
  Results results{
      make({batch}, accumulate),    make({batch, n, m}, accumulate),           make({batch, n}, accumulate),
      make({batch, m}, accumulate), make({batch, n + m - 1}, ScalarType::Int), make({batch}, ScalarType::Int)};
  if (batch == 0) return results;
  switch (cost.scalar_type()) {
    case ScalarType::Float:
      solve<Kernels, float>(cost, supply, demand, partial, results);
      break;
    case ScalarType::Double:
      solve<Kernels, double>(cost, supply, demand, partial, results);
      break;
    case ScalarType::BFloat16:
      solve<Kernels, BFloat16>(cost, supply, demand, partial, results);
      break;
    case ScalarType::Half:
      solve<Kernels, Float16>(cost, supply, demand, partial, results);
      break;
    default:
      STD_TORCH_CHECK(false, "cost: expected float32, float64, bfloat16 or float16");
  }
  return results;
}

template <class Kernels, class Accumulate>
void sweep(const Tensor& grad_flow, const Tensor& basis, Tensor& grad_supply, Tensor& grad_demand) {
  EmdFlowBackwardProblem<Accumulate> problem;
  problem.batch = grad_flow.size(0);
  problem.suppliers = grad_flow.size(1);
  problem.consumers = grad_flow.size(2);
  problem.grad_flow = static_cast<const Accumulate*>(grad_flow.const_data_ptr());
  copy_strides(grad_flow, problem.grad_flow_strides);
  problem.basis = static_cast<const int32_t*>(basis.const_data_ptr());
  problem.grad_supply = static_cast<Accumulate*>(grad_supply.mutable_data_ptr());
  problem.grad_demand = static_cast<Accumulate*>(grad_demand.mutable_data_ptr());
  Kernels::run_flow_backward(problem, grad_flow);
}

template <class Kernels>
std::tuple<Tensor, Tensor> flow_backward(Tensor grad_flow, Tensor basis) {
  STD_TORCH_CHECK(grad_flow.dim() == 3 && grad_flow.size(1) >= 1 && grad_flow.size(2) >= 1,
                  "grad_flow: expected [B, n, m] with n and m at least 1");
  const int64_t batch = grad_flow.size(0), n = grad_flow.size(1), m = grad_flow.size(2);
  STD_TORCH_CHECK(basis.dim() == 2 && basis.size(0) == batch && basis.size(1) == n + m - 1 &&
                      basis.scalar_type() == ScalarType::Int && basis.device() == grad_flow.device(),
                  "basis: expected int32 [B, n + m - 1] as the forward pass returned it");
  basis = make_contiguous(basis);
  Tensor grad_supply = new_empty(grad_flow, {batch, n}, grad_flow.scalar_type());
  Tensor grad_demand = new_empty(grad_flow, {batch, m}, grad_flow.scalar_type());
  if (batch > 0) {
    switch (grad_flow.scalar_type()) {
      case ScalarType::Float:
        sweep<Kernels, float>(grad_flow, basis, grad_supply, grad_demand);
        break;
      case ScalarType::Double:
        sweep<Kernels, double>(grad_flow, basis, grad_supply, grad_demand);
        break;
      default:
        STD_TORCH_CHECK(false, "grad_flow: expected the accumulation dtype, float32 or float64");
    }
  }
  return {grad_supply, grad_demand};
}

}  // namespace emd_tensors
}  // namespace fewshot_ext
