"""The gradients of the Earth Mover's Distance: identities that they obey, and independent ways to the same numbers."""

import pytest
import torch
from emd_peers import quadratic_layer
from emd_problems import FAMILIES
from torch import Tensor

import fewshot_ext

from .emd_case import planted

EACH_FAMILY = pytest.mark.parametrize("family", FAMILIES)


def leaves(family: str, problems: int, n: int, m: int, seed: int = 0) -> list[Tensor]:
    drawn = FAMILIES[family](problems, n, m, torch.Generator().manual_seed(seed))
    return [tensor.clone().requires_grad_() for tensor in drawn]


def relative(found: Tensor, expected: Tensor, scale: Tensor) -> float:
    return float(((found - expected).abs() / scale).max())


@EACH_FAMILY
def test_envelope(family):
    """The gradient of the value is the flow to the cost, and the duals to the marginals."""
    problem = leaves(family, 5, 6, 8)
    result = fewshot_ext.emd(*problem)
    upstream = torch.tensor([1.0, -2.0, 0.0, 0.5, 4.0], dtype=torch.float64)  # exact in products
    gradients = torch.autograd.grad(result.value, problem, upstream)
    for gradient, part in zip(gradients, (result.flow, result.supply_dual, result.demand_dual), strict=True):
        assert torch.equal(gradient, upstream.view(-1, *[1] * (part.dim() - 1)) * part)


@pytest.mark.parametrize("n, m", ((3, 3), (4, 6), (7, 2), (1, 5), (5, 1)))
def test_gradcheck_through_softmax(n, m):
    """Marginals as networks make them. Random costs and masses are away from degenerate vertices."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(3, *shape, dtype=torch.float64, generator=generator) for shape in ((n, m), (n,), (m,))]

    def outputs(cost, supply_logits, demand_logits):
        return fewshot_ext.emd(cost, supply_logits.softmax(-1), demand_logits.softmax(-1))[:2]

    assert torch.autograd.gradcheck(outputs, [tensor.requires_grad_() for tensor in inputs])


@EACH_FAMILY
def test_homogeneous_in_the_cost_and_in_the_masses(family):
    """value(tC) = t value(C) = value of masses t a and t b; Euler's relation says the same of the gradients."""
    cost, supply, demand = problem = leaves(family, 5, 6, 8)
    result = fewshot_ext.emd(*problem)
    grad_cost, grad_supply, grad_demand = torch.autograd.grad(result.value.sum(), problem)
    scale = cost.abs().amax((1, 2)).clamp_min(1e-300) * supply.sum(1)
    for factor in (0.3, 7.0):
        assert relative(fewshot_ext.emd(factor * cost, supply, demand).value, factor * result.value, scale) < 1e-12
        scaled = fewshot_ext.emd(cost, factor * supply, factor * demand).value
        assert relative(scaled, factor * result.value, scale) < 1e-12
    assert relative((grad_cost * cost).sum((1, 2)), result.value, scale) < 1e-12
    euler = (grad_supply * supply).sum(1) + (grad_demand * demand).sum(1)
    assert relative(euler, result.value, scale) < 1e-12


@EACH_FAMILY
def test_gradients_are_subgradients(family):
    """The value is concave in the cost and convex in the marginals: at every vertex, degenerate ones too, its tangent
    lies above, or below."""
    problem = leaves(family, 20, 6, 5)
    value = fewshot_ext.emd(*problem).value
    gradients = torch.autograd.grad(value.sum(), problem)
    others = leaves(family, 20, 6, 5, seed=1)
    cost, supply, demand = (tensor.detach() for tensor in problem)
    for part in (1e-6, 0.1, 1.0):
        moved = [torch.lerp(ours, other, part).detach() for ours, other in zip(problem, others, strict=True)]
        steps = [(there - here).detach() for there, here in zip(moved, problem, strict=True)]
        largest = max(cost.abs().max(), moved[0].abs().max())
        rounding = 1e-12 * float(largest * max(supply.sum(1).max(), moved[1].sum(1).max())) + 1e-300

        above = value + (gradients[0] * steps[0]).sum((1, 2))
        assert (fewshot_ext.emd(moved[0], supply, demand).value <= above + rounding).all()
        below = value + (gradients[1] * steps[1]).sum(1) + (gradients[2] * steps[2]).sum(1)
        assert (fewshot_ext.emd(cost, *moved[1:]).value >= below - rounding).all()


@EACH_FAMILY
def test_gradient_of_the_flow_solves_the_tree(family):
    """y_i + z_j = G_ij wherever mass flows, with y and z of one mean over the points with mass; the cost gets zeros."""
    problem = leaves(family, 20, 6, 5)
    flow = fewshot_ext.emd(*problem).flow
    upstream = torch.randn(flow.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grad_cost, y, z = torch.autograd.grad(flow, problem, upstream)
    assert (grad_cost == 0).all()
    used = flow.detach() > 1e-9 * problem[1].detach().sum(1)[:, None, None]
    assert used.any((1, 2)).all()
    torch.testing.assert_close((y[:, :, None] + z[:, None])[used], upstream[used])
    means = [(part * (mass > 0)).sum(1) / (mass > 0).sum(1) for part, mass in zip((y, z), problem[1:], strict=True)]
    torch.testing.assert_close(*means)


def test_flow_moves_as_its_gradient_says():
    """Between vertices the flow is linear in the marginals: a step within the basis has no second order."""
    problem = planted(8, 5, 6)
    cost, supply, demand = problem.tensors.values()
    generator = torch.Generator().manual_seed(0)
    steps = [torch.rand(tensor.shape, dtype=torch.float64, generator=generator) for tensor in (supply, demand)]
    steps = [0.01 * (step - step.mean(1, keepdim=True)) for step in steps]
    upstream = torch.randn(cost.shape, dtype=torch.float64, generator=generator)

    supply, demand = supply.clone().requires_grad_(), demand.clone().requires_grad_()
    flow = fewshot_ext.emd(cost, supply, demand).flow
    y, z = torch.autograd.grad(flow, (supply, demand), upstream)
    moved = fewshot_ext.emd(cost, (supply + steps[0]).detach(), (demand + steps[1]).detach()).flow
    expected = (y * steps[0]).sum(1) + (z * steps[1]).sum(1)
    torch.testing.assert_close(((moved - flow.detach()) * upstream).sum((1, 2)), expected)


def test_duals_move_as_their_gradient_says():
    """Within the basis the duals are linear in the cost, and know nothing of the masses."""
    cost, supply, demand = problem = list(planted(8, 5, 6).tensors.values())
    generator = torch.Generator().manual_seed(0)
    step, *upstream = (torch.rand(t.shape, dtype=torch.float64, generator=generator) - 0.5 for t in problem)
    leaves = [tensor.clone().requires_grad_() for tensor in problem]
    duals = fewshot_ext.emd(*leaves)[2:]
    grad_cost, *grad_marginals = torch.autograd.grad(duals, leaves, upstream)
    assert all((gradient == 0).all() for gradient in grad_marginals)
    moved = fewshot_ext.emd(cost + 0.01 * step, supply, demand)[2:]
    change = sum(((there - here) * g).sum(1) for there, here, g in zip(moved, duals, upstream, strict=True))
    torch.testing.assert_close((grad_cost * 0.01 * step).sum((1, 2)), change.detach())


def test_hessian_of_the_value():
    """Of cost and marginals together the value is bilinear within a basis: forward and reverse mode, in any order, give
    the mixed differences that say so, and zeros beside them."""
    problem = [tensor[0] for tensor in planted(1, 3, 4).tensors.values()]
    generator = torch.Generator().manual_seed(0)
    steps = [0.01 * (torch.rand(t.shape, dtype=torch.float64, generator=generator) - 0.5) for t in problem]
    steps[1:] = (step - step.mean() for step in steps[1:])

    def value(cost, supply, demand):
        return fewshot_ext.emd(cost, supply, demand).value

    def moved(*by):
        return value(*(t + factor * step for t, factor, step in zip(problem, by, steps, strict=True)))

    mixed = moved(1, 1, 1) - moved(1, 0, 0) - moved(0, 1, 1) + moved(0, 0, 0)
    for outer in (torch.func.jacrev, torch.func.jacfwd):
        for inner in (torch.func.jacrev, torch.func.jacfwd):
            hessian = outer(inner(value, argnums=(0, 1, 2)), argnums=(0, 1, 2))(*problem)
            along = [[torch.tensordot(part, step, step.dim()) for part, step in zip(row, steps)] for row in hessian]  # noqa: B905
            along = [[(part * left).sum() for part in row] for row, left in zip(along, steps)]  # noqa: B905
            torch.testing.assert_close(along[0][1] + along[0][2], mixed)
            torch.testing.assert_close(along[1][0] + along[2][0], mixed)
            assert (hessian[0][0] == 0).all() and all((hessian[i][j] == 0).all() for i in (1, 2) for j in (1, 2))


def test_graphs_of_gradients_hold_the_right_gradients():
    problem = leaves("uniform", 3, 4, 5)

    def loss(*tensors):
        value, flow, supply_dual, demand_dual = fewshot_ext.emd(*tensors)
        squares = flow.square().sum((-2, -1)) + supply_dual.square().sum(-1) + demand_dual.square().sum(-1)
        return (value.square() + squares).sum()

    expected = torch.autograd.grad(loss(*problem), problem)
    torch.testing.assert_close(torch.autograd.grad(loss(*problem), problem, create_graph=True), expected)
    plain = [tensor.detach() for tensor in problem]
    positions = (0, 1, 2)
    torch.testing.assert_close(torch.func.grad(loss, argnums=positions)(*plain), expected)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss, argnums=positions))(*plain), expected)


def test_jacobian_of_the_flow():
    cost, supply, demand = (tensor[0].detach() for tensor in leaves("uniform", 1, 3, 4))

    def flow(logits):
        return fewshot_ext.emd(cost, logits.softmax(-1), demand / demand.sum()).flow

    jacobian = torch.func.jacrev(flow)(supply)
    for index in range(3):
        step = 1e-6 * torch.eye(3, dtype=torch.float64)[index]
        torch.testing.assert_close(jacobian[..., index], (flow(supply + step) - flow(supply - step)) / 2e-6)


def test_vmap_over_any_dimension_and_twice():
    cost, supply, demand = (tensor.detach() for tensor in leaves("uniform", 6, 4, 5))
    expected = fewshot_ext.emd(cost, supply, demand)
    mapped = torch.func.vmap(fewshot_ext.emd, in_dims=(2, 1, 0))(cost.movedim(0, 2), supply.mT, demand)
    torch.testing.assert_close(tuple(mapped), tuple(expected))

    nested = [tensor.unflatten(0, (2, 3)) for tensor in (cost, supply, demand)]
    twice = torch.func.vmap(torch.func.vmap(fewshot_ext.emd))(*nested)
    torch.testing.assert_close([part.flatten(0, 1) for part in twice], list(expected))

    shared = torch.func.vmap(fewshot_ext.emd, in_dims=(0, None, None))(cost, supply[0], demand[0])
    torch.testing.assert_close(tuple(shared), tuple(fewshot_ext.emd(cost, supply[0], demand[0])))


@pytest.mark.parametrize("dynamic", (False, True))
def test_compiled_results_are_named(dynamic):
    problem = leaves("uniform", 3, 4, 5)
    compiled = torch.compile(fewshot_ext.emd, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    result, expected = compiled(*problem), fewshot_ext.emd(*problem)
    assert isinstance(result, fewshot_ext.EMD)
    torch.testing.assert_close(tuple(result), tuple(expected))
    outputs = [(value.sum() + flow.square().sum()) for value, flow, *_ in (result, expected)]
    torch.testing.assert_close(*(torch.autograd.grad(output, problem) for output in outputs))


def test_equals_a_quadratic_program_of_vanishing_regularization():
    """The gradient that DeepEMD trains on, to similarities and to weights: its solver adds a small multiple of |F|^2,
    and differentiates the conditions of optimality."""
    pytest.importorskip("cvxpylayers")
    n, m = 3, 4
    program = quadratic_layer(n, m)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        similarity = torch.rand(n, m, dtype=torch.float64, generator=generator).requires_grad_()
        weights = [torch.rand(points, dtype=torch.float64, generator=generator).requires_grad_() for points in (n, m)]
        inputs = (similarity, *weights)

        def normalized():
            return [weight / weight.sum() for weight in weights]  # noqa: B023

        regular = program(1 - similarity, *normalized())
        expected = torch.autograd.grad((regular * similarity).sum(), inputs)
        score = 1 - fewshot_ext.emd(1 - similarity, *normalized()).value
        torch.testing.assert_close(torch.autograd.grad(score, inputs), expected, rtol=1e-3, atol=1e-3)


def test_derivatives_of_flow_and_duals_beside_points_without_mass():
    torch.manual_seed(0)
    cost = torch.rand(4, 5, dtype=torch.float64)
    supply = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64) * (torch.rand(4, dtype=torch.float64) + 0.1)
    demand = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0], dtype=torch.float64) * (torch.rand(5, dtype=torch.float64) + 0.1)
    supply, demand = supply / supply.sum(), demand / demand.sum()
    for first in (supply, supply.flip(0).roll(1), supply.roll(-1)):  # the root of the basis with and without mass

        def of_cost(cost, first=first):
            _, _, supply_dual, demand_dual = fewshot_ext.emd(cost, first, demand)
            return supply_dual[first > 0], demand_dual[demand > 0]

        torch.autograd.gradcheck(of_cost, cost.clone().requires_grad_(), check_forward_ad=True)
        change = torch.where(first > 0, 1.0, 0.0) * torch.tensor([1.0, -2.0, 3.0, -4.0], dtype=torch.float64)
        change = change - torch.where(first > 0, change.sum() / 3, 0)
        flow = torch.func.jvp(lambda masses: fewshot_ext.emd(cost, masses, demand).flow, (first,), (change,))[1]
        moved, back = (fewshot_ext.emd(cost, first + step * change, demand).flow for step in (1e-6, -1e-6))
        torch.testing.assert_close(flow, (moved - back) / 2e-6, rtol=1e-6, atol=1e-6)
