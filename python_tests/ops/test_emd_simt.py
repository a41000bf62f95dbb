"""The CUDA kernels of the Earth Mover's Distance, on the emulator: each solution is judged by its own certificate."""

import shutil

import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor

import fewshot_ext  # noqa: F401, loads the operators

from ..simt import build
from .simt_backend import emd, emd_flow_backward, emulated, kernels

pytestmark = pytest.mark.skipif(
    shutil.which(build.CXX) is None, reason=f"no compiler {build.CXX} for the emulator's kernels"
)

NAMES = ("value", "flow", "supply_dual", "demand_dual", "basis", "pivots")
# A warp takes up to 64 nodes, blocks of two sizes up to 128 and beyond.
SMALL = ((1, 1), (1, 5), (6, 1), (5, 7), (25, 25), (15, 49), (49, 15), (63, 1), (1, 63), (32, 32))
LARGE = ((33, 32), (49, 49), (127, 1), (1, 128), (100, 60), (3, 256))


def draw(kind: str, batch: int, n: int, m: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    def integers(high, *shape):
        return torch.randint(high, shape, generator=generator).double()

    cost, supply, demand = 2 * rand(batch, n, m) - 1, rand(batch, n) + 0.01, rand(batch, m) + 0.01
    if kind == "constant":
        cost = torch.full_like(cost, -3.25)
    elif kind == "uniform masses":
        supply, demand = torch.full_like(supply, 1 / n), torch.full_like(demand, 1 / m)
    elif kind == "ties":
        cost = integers(3, batch, n, m)
        supply, demand = integers(3, batch, n) + 1, integers(3, batch, m) + 1
    elif kind == "zero masses":
        supply[:, 1::2] = 0
        demand[:, : m // 2] = 0
        cost[:, :, :1] = -5
    elif kind == "zeros":
        cost.zero_()
    elif kind == "spread":
        supply, demand = 10 ** (8 * rand(batch, n)), 10 ** (8 * rand(batch, m))
    elif kind == "tiny costs":
        cost *= 1e-6
    elif kind == "large costs":
        cost *= 1e6
    elif kind == "offset":
        cost += 1000
    elif kind == "points":
        points, others = rand(batch, n, 2), rand(batch, m, 2)
        cost = (points[:, :, None] - others[:, None]).norm(dim=-1)
        supply, demand = (supply - 0.6).clamp(min=1e-3), (demand - 0.6).clamp(min=1e-3)
    elif kind == "sorted":
        cost = (torch.arange(n)[:, None] - torch.arange(m)).abs().double().expand(batch, n, m)
    else:
        assert kind == "random"
    supply = supply.to(dtype).double()  # so that rounding leaves the masses alike
    demand = (demand * (supply.sum(1) / demand.sum(1))[:, None]).to(dtype)
    return cost.to(dtype), supply.to(dtype), demand


KINDS = (
    "random",
    "constant",
    "zeros",
    "uniform masses",
    "ties",
    "zero masses",
    "spread",
    "tiny costs",
    "large costs",
    "offset",
    "points",
    "sorted",
)


def assert_optimal(cost: Tensor, supply: Tensor, demand: Tensor, results: tuple[Tensor, ...]) -> None:
    """Feasible on both sides and without a gap, in float64, up to the rounding of the results' dtype."""
    value, flow, u, v = (x.double() for x in results[:4])
    basis, pivots = results[4:]
    n, m = cost.shape[1:]
    eps = torch.finfo(results[0].dtype).eps
    cost, supply, demand = cost.double(), supply.double(), demand.double()
    mass, size = supply.sum(1), cost.abs().amax((1, 2))
    demand = demand * (mass / demand.sum(1))[:, None]

    assert (flow >= 0).all()
    rounding = 8 * eps + (n + m) * 1e-15
    assert ((flow.sum(2) - supply).abs().amax(1) <= rounding * mass).all()
    assert ((flow.sum(1) - demand).abs().amax(1) <= rounding * mass).all()
    assert (flow.sum(2)[supply == 0] == 0).all() and (flow.sum(1)[demand == 0] == 0).all()
    # Duals may exceed the costs they are made of.
    scale = torch.stack([size, u.abs().amax(1), v.abs().amax(1)]).amax(0)
    rounding = 4 * eps + (n + m) * 2e-15
    assert ((cost - u[:, :, None] - v[:, None]).amin((1, 2)) >= -rounding * scale).all()
    of_duals = (u * supply).sum(1) + (v * demand).sum(1)
    rounding = 8 * eps + (n + m) * 1e-14
    assert ((value - of_duals).abs() <= rounding * scale * mass).all()
    assert ((value - (cost * flow).sum((1, 2))).abs() <= rounding * scale * mass).all()
    means = [(dual * (mass > 0)).sum(1) / (mass > 0).sum(1) for dual, mass in ((u, supply), (v, demand))]
    assert ((means[0] - means[1]).abs() <= 4 * eps * scale).all()

    assert (pivots >= 0).all()

    for arcs, flow_of_one, *masses in zip(basis.tolist(), flow.flatten(1), supply, demand, strict=True):
        outside = torch.ones(n * m, dtype=torch.bool)
        for place, arc in enumerate(arcs):
            cell = arc if arc >= 0 else -1 - arc
            assert (arc >= 0) == bool(masses[0][cell // m] > 0 and masses[1][cell % m] > 0), place
            outside[cell] = False
            arcs[place] = cell
        assert_grows_from_supplier_0(arcs, n, m)
        assert (flow_of_one[outside] == 0).all()


def assert_grows_from_supplier_0(arcs: list[int], n: int, m: int) -> None:
    reached = {0}
    for arc in arcs:
        ends = {arc // m, n + arc % m}
        assert 0 <= arc < n * m and len(ends & reached) == 1
        reached |= ends
    assert len(reached) == n + m


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n, m", SMALL + LARGE)
def test_optimal(n, m, kind, dtype):
    problem = draw(kind, 4 if n + m <= 64 else 1, n, m, dtype, seed=n + m)
    assert_optimal(*problem, emd(*problem))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("kind", ("random", "points"))
@pytest.mark.parametrize("n, m", ((7, 5), (25, 25), (15, 49), (49, 15), (63, 1), (40, 30), (70, 100)))
def test_ordinary_problems_are_not_left_to_the_exact_kernel(n, m, kind, dtype):
    """Which is many times slower, and would hide whatever is wrong with the others."""
    problem = draw(kind, 3 if n + m <= 64 else 1, n, m, dtype, seed=n + m)
    pivots, all_pivots = (emd(*problem, exact=exact)[-1] for exact in (False, True))
    assert (pivots >= 0).all() and torch.equal(pivots, all_pivots)


@pytest.mark.parametrize("n, m", ((100, 100), (256, 256), (3, 1024), (300, 20)))
def test_optimal_large(n, m):
    problem = draw("points", 1, n, m, torch.float32)
    assert_optimal(*problem, emd(*problem))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n, m", ((9, 7), (25, 25), (40, 30)))
def test_value_equals_that_of_a_linear_program(n, m, kind):
    problem = draw(kind, 2, n, m, torch.float64, seed=1)
    for value, cost, supply, demand in zip(emd(*problem)[0], *problem, strict=True):
        # In the range that the tolerances of HiGHS, 1e-7 throughout, are made for.
        scale, mass = max(float(cost.abs().max()), 1e-300), float(supply.sum())
        marginals = torch.cat([torch.eye(n).repeat_interleave(m, dim=1), torch.eye(m).repeat(1, n)])
        masses = torch.cat([supply / supply.sum(), demand / demand.sum()])
        # One equation follows from the others, up to a rounding that HiGHS would take for a contradiction.
        found = linprog(
            (cost / scale).flatten().numpy(), A_eq=marginals[:-1].numpy(), b_eq=masses[:-1].numpy(), method="highs"
        )
        assert found.status == 0, found.message
        assert float(value) / (scale * mass) == pytest.approx(found.fun, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("n, m", ((25, 25), (40, 30)))
def test_value_of_integers_is_exact(n, m):
    for seed in range(3):
        cost, supply, demand = draw("ties", 4, n, m, torch.float64, seed)
        demand = torch.randint(1, 4, demand.shape).double()
        short = supply.sum(1) - demand.sum(1)
        supply[:, 0] += (-short).clamp(min=0)
        demand[:, 0] += short.clamp(min=0)
        value, flow, *_ = emd(cost, supply, demand)
        assert torch.equal(flow, flow.round()) and torch.equal(value, (cost * flow).sum((1, 2)))


@pytest.mark.parametrize("n, m", ((7, 12), (40, 30)))
def test_ends_of_the_range(n, m):
    cost, supply, demand = draw("random", 2, n, m, torch.float64)
    expected = emd(cost, supply, demand)
    for of_cost, of_mass in ((1.0, 2.0**-1000), (1.0, 2.0**1000), (2.0**-1000, 1.0), (2.0**1000, 1.0)):
        results = emd(cost * of_cost, supply * of_mass, demand * of_mass)
        scales = (of_cost * of_mass, of_mass, of_cost, of_cost)
        for result, scale, other in zip(results, scales, expected, strict=False):
            torch.testing.assert_close(result / scale, other, rtol=0, atol=1e-12)
    # Beyond it, no numbers rather than wrong ones.
    results = emd(cost * 1.7e308, supply, demand)
    assert all(x.isnan().all() or x.isfinite().all() for x in results[:4])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("n, m", ((25, 25), (40, 30)))
def test_half_types_are_solved_like_float32(n, m, dtype):
    cost, _, _ = draw("random", 3, n, m, dtype)
    supply = torch.randint(1, 16, (3, n), generator=torch.Generator().manual_seed(0)).to(dtype)
    demand = torch.full((3, m), 0.25, dtype=dtype) * (supply.double().sum(1, keepdim=True) * 4 / m).to(dtype)
    supply[:, 0] += (demand.double().sum(1) - supply.double().sum(1)).to(dtype)
    problem = cost, supply, demand
    if ((supply.double().sum(1) / demand.double().sum(1) - 1).abs() > 1e-4).any():
        pytest.fail("the drawn masses differ")
    assert_same(emd(*problem), emd(*(x.float() for x in problem)))


def assert_same(results, others):
    for name, result, other in zip(NAMES, results, others, strict=True):
        torch.testing.assert_close(result, other, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("n, m", ((25, 25), (6, 40), (40, 30), (100, 80)))
def test_schedules_give_the_same_bits(n, m):
    problem = draw("ties", 6 if n + m <= 64 else 1, n, m, torch.float32)
    kernels().set_seed(0)
    expected = emd(*problem)
    for seed in range(1, 6):
        kernels().set_seed(seed)
        assert_same(emd(*problem), expected)


@pytest.mark.parametrize("n, m", ((7, 12), (40, 30)))
def test_strides(n, m):
    cost, supply, demand = draw("random", 3, n, m, torch.float32)
    expected = emd(cost, supply, demand)
    transposed = cost.transpose(1, 2).contiguous().transpose(1, 2)
    every_other = [x.repeat_interleave(2, 1)[:, ::2] for x in (supply, demand)]
    assert_same(emd(transposed, *every_other), expected)
    shared = [x[:1].expand(x.shape) for x in (cost, supply, demand)]
    assert_same(emd(*shared), [x[:1].expand(x.shape) for x in expected])


@pytest.mark.parametrize("n, m", ((25, 25), (40, 30)))
def test_operators_agree_with_those_of_the_cpu(n, m):
    """Through the dispatcher; where the optimum is unique, its flow is, too."""
    problem = draw("random", 2, n, m, torch.float64)
    grad = torch.randn(2, n, m, dtype=torch.float64)
    results = torch.ops.fewshot_ext.emd(*problem)
    gradients = torch.ops.fewshot_ext.emd_flow_backward(grad, results[4])
    with emulated("one_launch"):
        others = torch.ops.fewshot_ext.emd(*problem)
        torch.testing.assert_close(others[:4], results[:4], rtol=1e-12, atol=1e-12)
        assert torch.equal(others[4].sort().values, results[4].sort().values)
        torch.testing.assert_close(
            torch.ops.fewshot_ext.emd_flow_backward(grad, others[4]), gradients, rtol=1e-12, atol=1e-12
        )


def _spoil(problem, what):
    cost, supply, demand = problem
    if what == "cost":
        cost[1, 2, 3] = -float("inf")
    elif what == "nan cost":
        cost[1, 0, 0] = float("nan")
    elif what == "negative supply":
        supply[1, 2] = -1e-3
    elif what == "infinite demand":
        demand[1, 2] = float("inf")
    elif what == "nan demand":
        demand[1, -1] = float("nan")
    elif what == "unequal":
        demand[1] *= 1.0003
    else:
        supply[1], demand[1] = 0, 0


@pytest.mark.parametrize(
    "what", ("cost", "nan cost", "negative supply", "infinite demand", "nan demand", "unequal", "no mass")
)
@pytest.mark.parametrize("n, m", ((7, 12), (40, 30)))
def test_bad_problem_is_poisoned_alone(n, m, what):
    problem = draw("random", 3, n, m, torch.float32)
    expected = emd(*problem)
    _spoil(problem, what)
    results = emd(*problem)
    for result in results[:4]:
        assert result[1].isnan().all()
    assert_grows_from_supplier_0(results[4][1].tolist(), n, m)
    assert_same([x[::2] for x in results], [x[::2] for x in expected])
    gradients = emd_flow_backward(torch.ones(3, n, m), results[4])
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("n, m", ((7, 12), (40, 30)))
def test_demand_within_tolerance_is_rescaled(n, m):
    cost, supply, demand = draw("random", 2, n, m, torch.float64)
    problem = cost, supply, demand * 1.00005
    results = emd(*problem)
    assert_optimal(*problem, results)
    torch.testing.assert_close(results[0], emd(cost, supply, demand)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("n, m", ((1, 1), (5, 1), (1, 6), (25, 25), (63, 1), (40, 30), (256, 256), (1024, 1024)))
def test_flow_backward(n, m, dtype):
    """y_i + z_j = G_ij on the tree, by its definition: on any tree, in any order that grows from supplier 0."""
    batch = 5
    generator = torch.Generator().manual_seed(n)
    bases = []
    for b in range(batch):
        rows, columns = [0], []
        rest = [(torch.rand((), generator=generator).item(), v) for v in range(1, n + m)]
        arcs = []
        for _, v in sorted(rest, key=lambda node: (node[1] != n, node[0] if b else node[1] % n)):
            others = columns if v < n else rows
            other = others[torch.randint(len(others), (), generator=generator)]
            arcs.append(v * m + other if v < n else other * m + v - n)
            (rows if v < n else columns).append(v if v < n else v - n)
        assert_grows_from_supplier_0(arcs, n, m)
        bases.append(arcs)
    basis = torch.tensor(bases, dtype=torch.int32)
    grad = torch.randn(batch, m, n, generator=generator, dtype=dtype).transpose(1, 2)
    y, z = emd_flow_backward(grad, basis)
    sums = (y[:, :, None] + z[:, None]).flatten(1).gather(1, basis.long())
    expected = grad.flatten(1).gather(1, basis.long())
    scale = max(float(y.abs().max()), float(z.abs().max()), 1.0)
    torch.testing.assert_close(sums, expected, rtol=0, atol=4 * torch.finfo(dtype).eps * scale + 1e-14 * (n + m))
    torch.testing.assert_close(y.mean(1), z.mean(1), rtol=0, atol=8 * torch.finfo(dtype).eps * scale)


def test_flow_backward_reads_nothing_out_of_bounds():
    """Whatever a direct call passes as a basis; what is no tree gives no numbers."""
    basis = torch.tensor([[2**30, -5, 3, 0], [0, 1, 2, 3], [6, 0, 1, -(2**31)]], dtype=torch.int32)
    y, z = emd_flow_backward(torch.ones(3, 2, 3), basis)
    for gradient in (y, z):
        assert gradient[1].isfinite().all() and gradient[::2].isnan().all()


def test_no_problems():
    assert [tuple(x.shape) for x in emd(torch.ones(0, 2, 3), torch.ones(0, 2), torch.ones(0, 3))] == [
        (0,),
        (0, 2, 3),
        (0, 2),
        (0, 3),
        (0, 4),
        (0,),
    ]
    assert emd_flow_backward(torch.ones(0, 2, 3), torch.ones(0, 4, dtype=torch.int32))[0].shape == (0, 2)
