"""The Earth Mover's Distance at any range of costs and masses, judged by rational arithmetic, by SciPy's assignment and
by hand. The faults are those of version 0.1."""

import math
import random
import subprocess
import sys
from fractions import Fraction

import pytest
import torch
from emd_problems import EXTREME_FAMILIES
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import fewshot_ext
from fewshot_ext.ops.emd_certificate import certificate

from .contract import BACKENDS, Backend, on_backends
from .exact_transport import optimum

CPU = on_backends([backend for backend in BACKENDS if backend.name.startswith("cpu-")])
# The emulator's two, and the GPU's, differ in margin softmax alone.
EVERYWHERE = on_backends([backend for backend in BACKENDS if not backend.name.endswith("-chunked")])
# Of the value, relative to the optimum: in float32 the rounding of the result.
ACCURACY = {torch.float64: 1e-12, torch.float32: 1.2e-7}
FLOAT64 = {"dtype": torch.float64}


def assignment_value(cost: Tensor) -> float:
    """The optimum for masses of 1, summed without rounding."""
    rows, columns = linear_sum_assignment(cost.double().numpy())
    return math.fsum(cost.double()[rows, columns].tolist())


def solve(backend: Backend, cost: Tensor, *masses: Tensor, **options: object) -> fewshot_ext.EMD:
    """By the kernels of ``backend``, from and to tensors on the CPU. A GPU raises where it is told to look."""
    found = fewshot_ext.emd(
        *(tensor.to(backend.device) for tensor in (cost, *masses)),
        **{"check": not backend.name.startswith("cpu-"), **options},
    )
    return fewshot_ext.EMD(*(part.cpu() for part in found))


def draws(backend: Backend, count: int) -> int:
    return count if backend.name.startswith("cpu-") else count // 4


def value_for_ones(backend: Backend, cost: Tensor) -> float:
    masses = cost.new_ones(len(cost))
    with backend.activate():
        return solve(backend, cost, masses, masses, check=True).value.item()


@EVERYWHERE
@pytest.mark.parametrize("largest", (1e3, 1e12, 1e16, 1e20, 1e100, 1e300))
def test_fault_1_a_cost_that_dwarfs_the_rest(backend, largest):
    cost = torch.tensor([[3, 5, largest], [6, 3, 5], [largest, 5, 3]], **FLOAT64)
    assert value_for_ones(backend, cost) == 9


@EVERYWHERE
@pytest.mark.parametrize("dtype, largest", ((torch.float64, 1e11), (torch.float64, 1e200), (torch.float32, 1e10)))
def test_fault_1_an_outlier_among_many(backend, dtype, largest):
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(100, 100, generator=generator, dtype=dtype)
    for place in ((3, 4), (50, 0)):
        cost[place] = largest
    assert value_for_ones(backend, cost) == pytest.approx(assignment_value(cost), rel=ACCURACY[dtype], abs=0)


@EVERYWHERE
def test_fault_1_costs_of_every_size(backend):
    cost = torch.exp(6 * torch.randn(60, 60, generator=torch.Generator().manual_seed(0), **FLOAT64))
    assert value_for_ones(backend, cost) == pytest.approx(assignment_value(cost), rel=1e-13, abs=0)


def padded(tensor: Tensor, value: float, extra: int = 5) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, extra) * tensor.dim(), value=value)


@EVERYWHERE
@pytest.mark.parametrize("padding", (1e20, -1e300, math.inf))
def test_fault_2_costs_of_points_without_mass(backend, padding):
    cost = torch.rand(20, 20, generator=torch.Generator().manual_seed(0), **FLOAT64)
    masses = torch.full((20,), 1 / 20, **FLOAT64)
    with backend.activate():
        expected = solve(backend, cost, masses, masses)
        found = solve(backend, padded(cost, padding), padded(masses, 0), padded(masses, 0), check=True)
    assert expected.value.item() == pytest.approx(assignment_value(cost) / 20, rel=1e-12)
    for part, inside in zip(found, expected, strict=True):
        assert torch.equal(part[tuple(slice(size) for size in inside.shape)], inside)


@EVERYWHERE
def test_fault_3_gradients_beside_huge_padding(backend):
    cost = torch.full((3, 3), 1e9)
    cost[:2, :2] = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    supply = torch.tensor([0.3, 0.7, 0.0], requires_grad=True)
    demand = torch.tensor([0.6, 0.4, 0.0], requires_grad=True)
    with backend.activate():
        value = solve(backend, cost, supply, demand).value
        of_supply, of_demand = torch.autograd.grad(value, (supply, demand))
    assert of_supply[0] - of_supply[1] == -1 and of_demand[0] - of_demand[1] == 1
    assert of_supply[:2].mean() == of_demand[:2].mean()


@EVERYWHERE
def test_padding_has_no_part_in_the_gradient_of_the_flow(backend):
    generator = torch.Generator().manual_seed(0)
    cost, upstream = (torch.rand(4, 5, generator=generator, **FLOAT64) for _ in range(2))
    masses = [torch.rand(points, generator=generator, **FLOAT64) for points in (4, 5)]

    def gradients(flow_upstream, cost, *marginals):
        marginals = [marginal.requires_grad_() for marginal in marginals]
        with backend.activate():
            flow = solve(backend, cost, *marginals, normalize=True).flow
            return torch.autograd.grad(flow, marginals, flow_upstream)

    expected = gradients(upstream, cost, *(mass.clone() for mass in masses))
    # Points without mass come first as well: a basis begins with supplier 0.
    before = torch.nn.functional.pad
    found = gradients(
        before(padded(upstream, 1e6), (1, 0, 1, 0), value=-1e6),
        before(padded(cost, 1e20), (1, 0, 1, 0), value=1e20),
        *(before(padded(mass, 0), (1, 0)) for mass in masses),
    )
    for part, inside in zip(found, expected, strict=True):
        torch.testing.assert_close(part[1 : 1 + len(inside)], inside)


@pytest.fixture
def flush_to_zero():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor always computes with denormal numbers")
    yield
    torch.set_flush_denormal(False)


def cases_near_zero() -> list[Tensor]:
    points = torch.tensor([[1.0, 2.0], [1.0, 2.0], [3.0, 0.0]])
    coincident = (points[:, None] - points).square().sum(-1)
    return [
        torch.ones(2, 2),
        torch.zeros(1, 5),
        torch.zeros(7, 1),
        coincident,
        torch.full((9, 9), 1e-44),
        torch.eye(40),
    ]


@CPU
def test_fault_4_flushing_denormal_numbers_changes_no_bit(backend, flush_to_zero):
    with backend.activate():
        for cost in cases_near_zero():
            for dtype in (torch.float32, torch.float64):
                flushed = fewshot_ext.emd(cost.to(dtype))
                torch.set_flush_denormal(False)
                expected = fewshot_ext.emd(cost.to(dtype))
                torch.set_flush_denormal(True)
                for part, other in zip(flushed, expected, strict=True):
                    assert part.numpy().tobytes() == other.numpy().tobytes()


def test_the_callers_mode_stays_as_it_was(flush_to_zero):
    fewshot_ext.emd(torch.ones(2, 2))
    assert (torch.full((1,), 1e-38) / 100).item() == 0


@EVERYWHERE
@pytest.mark.parametrize("dtype, mass", ((torch.float32, 3e38), (torch.float64, 1.7e308), (torch.float16, 6e4)))
def test_fault_6_masses_whose_sum_overflows(backend, dtype, mass):
    cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=dtype)
    masses = torch.full((2,), mass, dtype=dtype, requires_grad=True)
    with backend.activate():
        value = solve(backend, cost, masses, masses, normalize=True, check=True).value
        assert value.item() == 0
        assert torch.autograd.grad(value, masses)[0].isfinite().all()
        assert solve(backend, cost, masses, masses, check=True).value.item() == 0
        with pytest.raises(ValueError, match="demand: expected the total mass of supply"):
            solve(backend, cost, masses, masses / 2)


def drawn_number(choice: random.Random, spread: float) -> float:
    return choice.random() * 10.0 ** choice.uniform(-spread, spread)


def drawn_problem(choice: random.Random, spread: float):
    """Small, of every kind of number."""
    n, m = choice.randint(1, 5), choice.randint(1, 5)
    kind = choice.choice(("any sign", "integers", "ties", "an outlier"))

    def cost() -> float:
        if kind == "integers":
            return float(choice.randint(0, 2 ** choice.choice((3, 20, 53))))
        if kind == "ties":
            return choice.choice((0.0, 1.0, 2.0, 10.0**spread, 10.0**-spread))
        if kind == "an outlier":
            return 10.0**spread if choice.random() < 0.3 else choice.random()
        return drawn_number(choice, spread) * choice.choice((-1, 1, 1))

    costs = [[cost() for _ in range(m)] for _ in range(n)]
    units = 2 * max(n, m)
    sides = [[0.0] * n, [0.0] * m]
    if choice.random() < 0.5:
        for _ in range(units):
            for side in sides:
                side[choice.randrange(len(side))] += 1.0
    else:
        masses = choice.choice((0.0, 1.0, spread / 2))
        sides = [[drawn_number(choice, masses) for _ in side] for side in sides]
        factor = sum(sides[0]) / sum(sides[1])
        sides[1] = [x * factor for x in sides[1]]
    return costs, *sides


@EVERYWHERE
@pytest.mark.parametrize("spread", (0.0, 1.0, 10.0, 100.0, 280.0))
def test_equals_rational_arithmetic(backend, spread):
    choice = random.Random(spread)
    solved = 0
    for _ in range(draws(backend, 300)):
        problem = drawn_problem(choice, spread)
        expected = optimum(*problem)
        if not abs(expected) < Fraction(1.7e308) or 0 < abs(expected) < Fraction(1e-290):
            continue
        tensors = [torch.tensor(part, **FLOAT64) for part in problem]
        with backend.activate():
            result = solve(backend, *tensors, check=True)
        difference = abs(Fraction(result.value.item()) - expected)
        assert difference <= Fraction(1e-12) * abs(expected), (problem, float(expected), result.value.item())
        solved += 1
    assert solved > draws(backend, 200)


@EVERYWHERE
def test_check_takes_right_results_of_subnormal_costs(backend):
    for dtype, cost in ((torch.float32, 1e-42), (torch.float64, 3e-320)):
        costs = cost * torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
        ones = torch.ones(2, dtype=dtype)
        with backend.activate():
            result = solve(backend, costs.to(dtype), ones, ones, check=True)
        assert result.value.item() == 2 * costs.to(dtype)[0, 1].item()


@EVERYWHERE
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_a_value_beyond_the_type_is_refused_by_name(backend, dtype):
    largest = torch.finfo(dtype).max
    cost = torch.zeros(3, 2, 2, dtype=dtype)
    cost[1] = 0.9 * largest
    masses = torch.full((2,), 1.0, dtype=dtype)
    refused = r"cost: expected a value and duals within the range .*, at batch index \(1,\)"
    with backend.activate():
        with pytest.raises(ValueError, match=refused):
            solve(backend, cost, masses, masses)
        value = solve(backend, cost, masses / 4, masses / 4, check=True).value
    assert value[1].item() == pytest.approx(0.45 * largest)


@EVERYWHERE
@pytest.mark.parametrize("family", sorted({*EXTREME_FAMILIES} - {"infeasible", "partial"}))
def test_extreme_families_are_solved_to_their_certificates(backend, family):
    for seed, (n, m) in enumerate(((3, 3), (7, 4), (12, 12), (1, 6), (20, 9))):
        problem = EXTREME_FAMILIES[family](12, n, m, torch.Generator().manual_seed(seed))
        with backend.activate():
            found = certificate(*problem, solve(backend, *problem))
        assert found.holds(1e-12).all(), {name: part.max().item() for name, part in found._asdict().items()}


def judged(cost: Tensor, supply: Tensor, demand: Tensor, flow: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return certificate(cost, supply, demand, ((cost * flow).sum(), flow, u, v)).error


def test_the_certificate_measures_against_the_optimum():
    """What version 0.1 gave for fault 1, with duals that pass as long as a violation of 14 is small beside 1e20."""
    cost = torch.tensor([[3, 5, 1e20], [6, 3, 5], [1e20, 5, 3]], **FLOAT64)
    ones = torch.ones(3, **FLOAT64)
    wrong = torch.tensor([[0.0, 1, 0], [1, 0, 0], [0, 0, 1]], **FLOAT64)
    zero = torch.zeros(3, **FLOAT64)
    assert judged(cost, ones, ones, torch.eye(3, **FLOAT64), zero, zero) < 1e-12
    assert judged(cost, ones, ones, wrong, zero, zero) >= 5 / 14


def forbidden(choice: random.Random, costs: list[list[float]], density: float) -> list[list[float]]:
    return [[math.inf if choice.random() < density else c for c in row] for row in costs]


@EVERYWHERE
@pytest.mark.parametrize("density", (0.1, 0.4, 0.7, 0.95))
@pytest.mark.parametrize("spread", (0.0, 100.0))
def test_forbidden_arcs_equal_rational_arithmetic(backend, density, spread):
    choice = random.Random(density + spread)
    refused = solved = 0
    while refused + solved < draws(backend, 150):
        costs, supply, demand = drawn_problem(choice, spread)
        costs = forbidden(choice, costs, density)
        # Integer masses: whether a flow exists is then no question of rounding.
        if any(x != round(x) or x > 100 for x in (*supply, *demand)):
            continue
        tensors = [torch.tensor(part, **FLOAT64) for part in (costs, supply, demand)]
        expected = optimum(costs, supply, demand)
        if expected is None:
            refusal = pytest.raises(ValueError, match=r"cost: no flow avoids the forbidden arcs, at batch index \(\)")
            with backend.activate(), refusal:
                solve(backend, *tensors)
            refused += 1
            continue
        cost, supply, demand = (tensor.clone().requires_grad_() for tensor in tensors)
        with backend.activate():
            result = solve(backend, cost, supply, demand, check=True)
        assert abs(Fraction(result.value.item()) - expected) <= Fraction(1e-12) * abs(expected)
        assert (result.flow[cost.isinf()] == 0).all()
        gradients = torch.autograd.grad(result.value, (cost, supply, demand))
        for gradient, part in zip(gradients, (result.flow, result.supply_dual, result.demand_dual), strict=True):
            assert torch.equal(gradient, part) and gradient.isfinite().all()
        solved += 1
    assert refused > 0 or density < 0.4
    assert solved > 0 or density > 0.9


@EVERYWHERE
def test_the_first_problem_without_a_flow_is_named(backend):
    cost = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    cost[1, 1, 2] = math.inf
    cost[1, 2, :, 0] = math.inf
    with backend.activate():
        with pytest.raises(ValueError, match=r"cost: no flow avoids the forbidden arcs, at batch index \(1, 1\)"):
            solve(backend, cost)
        with pytest.raises(ValueError, match="no flow avoids"):
            solve(backend, torch.full((1, 3), math.inf))


@EVERYWHERE
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_rounded_masses_do_not_end_up_on_forbidden_arcs(backend, dtype):
    """0.1 + 0.2 is not 0.3: blocks miss each other by a rounding, and nothing else is allowed between them."""
    inside = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=dtype)
    cost = torch.full((3, 2), math.inf, dtype=dtype)
    cost[:2, 0], cost[2, 1] = inside[:2, 0], inside[2, 1]
    supply = torch.tensor([0.1, 0.2, 0.7], dtype=dtype)
    with backend.activate():
        result = solve(backend, cost, supply, torch.tensor([0.3, 0.7], dtype=dtype), check=True)
        assert result.value.item() == pytest.approx(0.1 + 0.6 + 4.2, rel=1e-6)
        assert (result.flow[cost.isinf()] == 0).all()
        with pytest.raises(ValueError, match="no flow avoids the forbidden arcs"):
            solve(backend, cost, supply, torch.tensor([0.301, 0.699], dtype=dtype))


@EVERYWHERE
@pytest.mark.parametrize("place", (0, 1, 2))  # the first is where trees grow from
def test_a_small_mass_without_an_arc_is_no_rounding(backend, place):
    cost, supply, demand = torch.ones(3, 2, **FLOAT64), torch.ones(3, **FLOAT64), torch.ones(2, **FLOAT64)
    cost[place], supply[place] = math.inf, 1e-18
    with backend.activate(), pytest.raises(ValueError, match="no flow avoids the forbidden arcs"):
        solve(backend, cost, supply, demand)


@EVERYWHERE
@pytest.mark.parametrize("spread", (0.0, 1.0, 100.0))
@pytest.mark.parametrize("density", (0.0, 0.3))
def test_partial_transport_equals_rational_arithmetic(backend, spread, density):
    choice = random.Random(spread + density)
    solved = 0
    while solved < draws(backend, 150):
        costs, supply, demand = drawn_problem(choice, spread)
        costs = forbidden(choice, costs, density)
        factor = choice.choice((0.25, 0.5, 1.0, 3.0, 1e6))
        demand = [x * factor for x in demand]
        expected = optimum(costs, supply, demand, partial=True)
        if expected is None or 0 < abs(expected) < Fraction(1e-290):
            continue
        cost, a, b = (torch.tensor(part, requires_grad=True, **FLOAT64) for part in (costs, supply, demand))
        with backend.activate():
            result = solve(backend, cost, a, b, partial=True)
        assert abs(Fraction(result.value.item()) - expected) <= Fraction(1e-12) * abs(expected)
        flow = result.flow.detach()
        less, more = (a, b) if a.sum() <= b.sum() else (b, a)
        moved = flow.sum((1, 0)[less is a]), flow.sum((0, 1)[less is a])
        assert ((moved[0] - more).max() <= 1e-12 * more.sum()) and (moved[1] - less).abs().max() <= 1e-12 * less.sum()
        solved += 1


@EVERYWHERE
def test_partial_transport_leaves_the_dearest_mass(backend):
    """By hand: one unit of three moves, from where it is cheapest; what stays has the dual 0."""
    cost = torch.tensor([[1.0], [2.0], [4.0]], **FLOAT64)
    supply = torch.ones(3, requires_grad=True, **FLOAT64)
    demand = torch.full((1,), 1.5, requires_grad=True, **FLOAT64)
    with backend.activate():
        result = solve(backend, cost, supply, demand, partial=True, check=True)
        turned = solve(backend, cost.mT, demand, supply, partial=True)
    assert result.value.item() == turned.value.item() == 2.0
    assert result.flow.flatten().tolist() == [1.0, 0.5, 0.0]
    assert result.supply_dual.tolist() == [-1.0, 0.0, 0.0] and result.demand_dual.tolist() == [2.0]
    gradients = torch.autograd.grad(result.value, (supply, demand))
    assert [part.tolist() for part in gradients] == [[-1.0, 0.0, 0.0], [2.0]]


@EVERYWHERE
def test_check_takes_right_values_of_partial_transport_that_nearly_cancel(backend):
    """0.1 * -2 + (0.3 - 0.1) * 1: what stays, 0.8 - 0.3, is no number of float64. The value does not depend on it."""
    costs, supply, demand = [[-2.0], [1.0 + 2.0**-40]], [0.1, 0.7], [0.3]
    expected = optimum(costs, supply, demand, partial=True)
    tensors = [torch.tensor(part, **FLOAT64) for part in (costs, supply, demand)]
    with backend.activate():
        value = solve(backend, *tensors, partial=True, check=True).value.item()
        turned = solve(backend, tensors[0].mT, tensors[2], tensors[1], partial=True, check=True).value.item()
    assert value == turned == float(expected)


@EVERYWHERE
def test_partial_transport_of_a_batch_and_its_gradients(backend):
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.rand(3, *shape, generator=generator, **FLOAT64) for shape in ((4, 5), (4,), (5,))]
    inputs[1] *= torch.tensor([[0.4], [1.0], [3.0]], **FLOAT64)  # less, about as much, more

    def outputs(cost, supply, demand):
        return solve(backend, cost, supply, demand, partial=True)[:2]

    with backend.activate():
        assert torch.autograd.gradcheck(outputs, [tensor.requires_grad_() for tensor in inputs])
    with pytest.raises(ValueError, match="partial: expected False with normalize=True"):
        fewshot_ext.emd(inputs[0], partial=True, normalize=True)


@pytest.mark.parametrize("n, m", ((1, 100_000), (100_000, 1), (2, 30_000)))
def test_memory_grows_with_the_problem_alone(n, m):
    """Sets of nodes, of (n + m)^2 bits, would take a gigabyte for the first two."""
    resource = pytest.importorskip("resource")
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(n, m, generator=generator, **FLOAT64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    value, flow, u, v = fewshot_ext.emd(cost)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024
    assert value.item() == pytest.approx((u.mean() + v.mean()).item(), rel=1e-9)
    assert flow.sum().item() == pytest.approx(1)


INTERRUPTED = """
import signal, threading, time, torch, fewshot_ext
cost = torch.rand(5000, 5000)
signal.signal(signal.SIGINT, signal.default_int_handler)
began = []
def press():
    began.append(time.monotonic())
    signal.raise_signal(signal.SIGINT)
threading.Timer(0.5, press).start()
try:
    fewshot_ext.emd(cost)
except KeyboardInterrupt:
    print("interrupted", time.monotonic() - began[0])
"""


def test_a_signal_ends_a_long_solve():
    found = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=120)
    assert found.stdout.startswith("interrupted "), found.stderr
    assert float(found.stdout.split()[1]) < 2  # a second, and as much again for a busy machine
