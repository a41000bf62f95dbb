"""The oracle itself, against enumeration, scipy's HiGHS and numerical derivatives."""

import itertools
import sys

import pytest
import torch
from emd_peers import highs
from emd_problems import FAMILIES

import fewshot_ext
from fewshot_ext import reference

from ..ops.emd_case import planted


@pytest.mark.parametrize("points", (1, 2, 4, 5))
def test_equal_masses_are_the_assignment_problem(points):
    cost = torch.randn(points, points, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = torch.arange(points)
    totals = {order: cost[rows, list(order)].mean() for order in itertools.permutations(range(points))}
    best = min(totals, key=totals.get)
    value, flow, *_ = reference.emd(cost)
    torch.testing.assert_close(value, totals[best])
    torch.testing.assert_close(flow, torch.eye(points, dtype=torch.float64)[list(best)] / points)


def test_equals_highs_called_by_hand():
    cost, supply, demand = FAMILIES["uniform"](5, 4, 6, torch.Generator().manual_seed(0))
    value, *_ = reference.emd(cost, supply, demand)
    expected = [highs(*problem) for problem in zip(cost.numpy(), supply.numpy(), demand.numpy(), strict=True)]
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64))


def test_duals_prove_the_value():
    cost, supply, demand = FAMILIES["uniform"](5, 4, 6, torch.Generator().manual_seed(0))
    value, flow, supply_dual, demand_dual = reference.emd(cost, supply, demand)
    torch.testing.assert_close(flow.sum(2), supply)
    torch.testing.assert_close(flow.sum(1), demand)
    torch.testing.assert_close((supply_dual * supply).sum(1) + (demand_dual * demand).sum(1), value)
    assert (cost - supply_dual[:, :, None] - demand_dual[:, None, :]).min() > -1e-9
    torch.testing.assert_close(supply_dual.mean(1), demand_dual.mean(1))


def test_gradients_are_those_of_its_results():
    problem = planted(2, 3, 4, normalize=True)
    inputs = [tensor.requires_grad_() for tensor in problem.tensors.values()]
    assert torch.autograd.gradcheck(lambda *tensors: reference.emd(*tensors, normalize=True), inputs)


def test_gradients_of_marginals_leave_their_difference_out():
    """A change of one mass alone has no meaning; equal means say how it counts."""
    problem = planted(3, 4, 6)
    marginals = [problem.tensors[name].requires_grad_() for name in ("supply", "demand")]
    value, flow, *_ = reference.emd(**problem.tensors)
    for output in (value.sum(), flow.square().sum()):
        grad_supply, grad_demand = torch.autograd.grad(output, marginals, retain_graph=True)
        torch.testing.assert_close(grad_supply.mean(1), grad_demand.mean(1))


def test_forbidden_arcs_are_not_used():
    cost = torch.tensor([[1.0, 0.0], [5.0, 2.0]], dtype=torch.float64)
    cost[0, 1] = float("inf")
    value, flow, *_ = reference.emd(cost)
    torch.testing.assert_close(flow, torch.eye(2, dtype=torch.float64) / 2)
    assert value.item() == pytest.approx(1.5)


@pytest.mark.parametrize("factor", (0.4, 2.5))
def test_partial_equals_the_operator(factor):
    """Value, flow, duals and gradients, on either side of equal masses."""
    generator = torch.Generator().manual_seed(0)
    cost, supply, demand = (
        torch.rand(3, *shape, dtype=torch.float64, generator=generator) for shape in ((4, 5), (4,), (5,))
    )
    inputs = [
        tensor.detach().requires_grad_()
        for tensor in (cost, factor * supply, demand * supply.sum(-1, keepdim=True) / demand.sum(-1, keepdim=True))
    ]
    results = [function(*inputs, partial=True) for function in (reference.emd, fewshot_ext.emd)]
    torch.testing.assert_close(results[0], tuple(results[1]))
    upstream = torch.randn(3, 4, 5, dtype=torch.float64, generator=generator)
    gradients = [torch.autograd.grad(value.sum() + (flow * upstream).sum(), inputs) for value, flow, *_ in results]
    torch.testing.assert_close(*gradients)


def test_missing_cvxpy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cvxpy", None)
    with pytest.raises(ImportError, match=r"'cvxpy' is missing; pip install 'fewshot_ext\[test\]'"):
        reference.emd(torch.zeros(2, 2))
