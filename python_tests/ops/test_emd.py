"""What is particular to the Earth Mover's Distance; test_contract.py has what every operator promises."""

import functools
import itertools
import sys

import pytest
import torch
from emd_peers import highs
from emd_problems import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import fewshot_ext
from fewshot_ext import EMD, _library, reference
from fewshot_ext.ops.emd import CERTIFICATE_TOLERANCE, MOST_POINTS_ON_CUDA
from fewshot_ext.ops.emd_certificate import certificate

from .contract import BACKENDS, DTYPES, on_backends, threads
from .emd_case import BAD_INPUTS, NAMES, planted
from .emd_case import emd as case

ON_ALL = on_backends([backend for backend in BACKENDS if case.missing_on(backend) == backend.missing])
EACH_FAMILY = pytest.mark.parametrize("family", FAMILIES)
PROBLEMS = 40  # of an example: with 14 families and 60 examples 33,600 in all
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}  # for up to some hundred points
POINTS = (1, 2, 3, 4, 5, 7, 9, 12, 16, 25)


def instances(family, problems, n, m, seed=0, dtype=torch.float64):
    drawn = FAMILIES[family](problems, n, m, torch.Generator().manual_seed(seed))
    return tuple(tensor.to(dtype) for tensor in drawn)


def assert_certified(problem, result):
    tolerance = TOLERANCE[result.value.dtype]
    found = certificate(*problem, result, tolerance)
    bad = ~found.holds(tolerance)
    assert not bad.any(), {name: part[bad][0].item() for name, part in found._asdict().items()}


def scale_of(cost, supply):
    """What the value of each problem is measured against."""
    return (cost.abs().amax((1, 2)) * supply.sum(1)).double()


@EACH_FAMILY
def test_every_family_is_solved_to_its_certificate(family):
    """Each problem by its certificate and against itself transposed and permuted, one of each example by HiGHS."""
    solved = 0

    @given(
        n=st.sampled_from(POINTS),
        m=st.sampled_from(POINTS),
        seed=st.integers(0, 2**32),
        dtype=st.sampled_from((torch.float64, torch.float64, torch.float32)),
    )
    def check(n, m, seed, dtype):
        nonlocal solved
        problem = cost, supply, demand = instances(family, PROBLEMS, n, m, seed, dtype)
        result = fewshot_ext.emd(*problem)
        solved += PROBLEMS
        assert_certified(problem, result)
        tolerance = 4 * TOLERANCE[dtype] * scale_of(cost, supply)

        transposed = fewshot_ext.emd(cost.mT, demand, supply)
        assert ((transposed.value - result.value).abs() <= tolerance).all()
        rows, columns = (torch.randperm(k, generator=torch.Generator().manual_seed(seed)) for k in (n, m))
        permuted = fewshot_ext.emd(cost[:, rows][:, :, columns], supply[:, rows], demand[:, columns])
        assert ((permuted.value - result.value).abs() <= tolerance).all()

        one = seed % PROBLEMS
        expected = highs(*(tensor[one].double().numpy() for tensor in problem))
        assert abs(result.value[one].item() - expected) <= 1e-6 * scale_of(cost, supply)[one]

    check()
    assert solved >= settings().max_examples * PROBLEMS


@ON_ALL
@EACH_FAMILY
def test_families_on_every_backend(family, backend):
    with backend.activate():
        for dtype in (torch.float32, torch.float64):
            for n, m in ((5, 5), (25, 25), (33, 32), (40, 70)):
                problem = instances(family, 20, n, m, dtype=dtype)
                assert_certified(problem, fewshot_ext.emd(*problem))


@ON_ALL
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_integer_problems_are_solved_exactly(backend, dtype):
    """Integer costs and masses have an integer optimum: a gap below 1 leaves no other."""
    for n, m in ((3, 4), (9, 9), (25, 14)):
        for family in ("integer", "tied"):
            problem = cost, supply, demand = instances(family, 100, n, m, dtype=dtype)
            with backend.activate():
                value, flow, supply_dual, demand_dual = fewshot_ext.emd(*problem)
            assert torch.equal(value, value.round()) and torch.equal(flow, flow.round())
            assert torch.equal(value, (cost * flow).sum((1, 2)))
            assert torch.equal(flow.sum(2), supply) and torch.equal(flow.sum(1), demand) and (flow >= 0).all()
            dual = (supply_dual * supply).sum(1) + (demand_dual * demand).sum(1)
            assert (value - dual).abs().max() < 0.1
            assert (cost - supply_dual[:, :, None] - demand_dual[:, None]).min() * supply.sum(1).max() > -0.1


@ON_ALL
@pytest.mark.parametrize("n, m", ((1, 1), (1, 6), (6, 1), (4, 9), (17, 16)))
def test_all_results_of_problems_with_one_solution(backend, n, m):
    """Value, flow and duals, and the flow of the permuted problem is the permuted flow."""
    problem = planted(4, n, m)
    expected = reference.emd(**problem.tensors)
    with backend.activate():
        result = fewshot_ext.emd(**problem.tensors)
        torch.testing.assert_close(tuple(result), expected)
        rows, columns = (torch.randperm(k, generator=torch.Generator().manual_seed(0)) for k in (n, m))
        cost, supply, demand = problem.tensors.values()
        permuted = fewshot_ext.emd(cost[:, rows][:, :, columns], supply[:, rows], demand[:, columns])
        assert torch.equal(permuted.flow, result.flow[:, rows][:, :, columns])
        assert torch.equal(fewshot_ext.emd(cost.mT, demand, supply).flow, result.flow.mT)


@pytest.mark.parametrize("n, m", ((196, 196), (300, 40), (1, 1024), (1024, 1024)))
def test_large_problems(n, m):
    problem = instances("uniform", 1, n, m, dtype=torch.float32)
    assert_certified(problem, fewshot_ext.emd(*problem))


def test_results():
    cost, supply, demand = instances("uniform", 3, 4, 5)
    result = fewshot_ext.emd(cost, supply, demand)
    assert type(result) is EMD and EMD._fields == ("value", "flow", "supply_dual", "demand_dual")
    assert [tuple(part.shape) for part in result] == [(3,), (3, 4, 5), (3, 4), (3, 5)]
    torch.testing.assert_close(result.supply_dual.mean(1), result.demand_dual.mean(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype):
    """Half types lose nothing beyond the rounding of the inputs, and masses made here are not rounded to them."""
    cost = instances("uniform", 3, 7, 9)[0].to(dtype)
    supply, demand = (torch.rand(3, points, generator=torch.Generator().manual_seed(0)).to(dtype) for points in (7, 9))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for arguments in ({}, {"supply": supply, "demand": demand, "normalize": True}):
        result = fewshot_ext.emd(cost, **arguments, check=True)
        assert all(part.dtype == wide for part in result)
        widened = {name: x.to(wide) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
        torch.testing.assert_close(tuple(result), tuple(fewshot_ext.emd(cost.to(wide), **widened)), rtol=0, atol=0)


def test_missing_marginals_are_uniform():
    cost, supply, demand = instances("assignment", 3, 4, 6)
    expected = fewshot_ext.emd(cost, supply, demand).value
    for arguments in ({}, {"supply": supply}, {"demand": demand}, {"normalize": True}, {"demand": demand[0]}):
        torch.testing.assert_close(fewshot_ext.emd(cost, **arguments).value, expected)


@pytest.mark.parametrize(
    "shapes",
    (
        ((), (), ()),
        ((3,), (), ()),
        ((2, 3), (3,), ()),
        ((2, 1), (3,), (2, 3)),
        ((), (4,), ()),
        ((1, 2), (3, 1), (1, 1)),
        ((0,), (), ()),
        ((2, 0, 3), (3,), (0, 1)),
    ),
    ids=str,
)
def test_batch_dimensions_broadcast(shapes):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, batch, size in zip(NAMES, shapes, ((4, 5), (4,), (5,)), strict=True):
        tensors[name] = torch.rand(*batch, *size, dtype=torch.float64, generator=generator, requires_grad=True)
    batch = torch.broadcast_shapes(*shapes)
    result = fewshot_ext.emd(**tensors, normalize=True, check=True)
    assert [tuple(part.shape) for part in result] == [batch, (*batch, 4, 5), (*batch, 4), (*batch, 5)]
    result.value.square().sum().backward()
    for index in itertools.product(*map(range, batch)):
        one = [
            tensors[name].detach().expand(*batch, *size)[index]
            for name, size in zip(NAMES, ((4, 5), (4,), (5,)), strict=True)
        ]
        alone = fewshot_ext.emd(*one, normalize=True)
        torch.testing.assert_close([part[index] for part in result], list(alone))
    for tensor in tensors.values():
        assert tensor.grad.shape == tensor.shape and (tensor.grad != 0).any() == (0 not in batch)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_masses_that_nearly_agree(dtype):
    """Within the tolerance the demand is scaled to the supply's mass."""
    cost, supply, demand = instances("uniform", 5, 6, 7, dtype=dtype)
    result = fewshot_ext.emd(cost, supply, demand * (1 + 5e-5), check=True)
    torch.testing.assert_close(result.value, fewshot_ext.emd(cost, supply, demand).value)
    torch.testing.assert_close(result.flow.sum((1, 2)), supply.sum(1))


def test_points_without_mass_change_nothing():
    cost, supply, demand = instances("uniform", 6, 5, 6)
    padded = [torch.nn.functional.pad(cost, (0, 3, 0, 2), value=-7.0)]
    padded += [torch.nn.functional.pad(supply, (0, 2)), torch.nn.functional.pad(demand, (0, 3))]
    inside, outside = ([tensor.requires_grad_() for tensor in problem] for problem in ((cost, supply, demand), padded))
    result, expected = fewshot_ext.emd(*outside, check=True), fewshot_ext.emd(*inside)
    torch.testing.assert_close(result.value, expected.value)
    torch.testing.assert_close(result.flow[:, :5, :6], expected.flow)
    assert (result.flow[:, 5:] == 0).all() and (result.flow[:, :, 6:] == 0).all()
    (grad,), (expected_grad,) = (
        torch.autograd.grad(r.value.sum(), p[:1]) for r, p in ((result, outside), (expected, inside))
    )
    torch.testing.assert_close(grad[:, :5, :6], expected_grad)


@pytest.mark.parametrize("count", (1, 2, 3))
def test_threads_change_nothing(count):
    problem = instances("tied", 500, 9, 8)
    with threads(1):
        expected = fewshot_ext.emd(*problem)
    with threads(count):
        for part, single in zip(fewshot_ext.emd(*problem), expected, strict=True):
            assert torch.equal(part, single)


@functools.cache
def _solution():
    problem = instances("uniform", 4, 5, 6)
    return problem, fewshot_ext.emd(*problem)


def _cycle(flow):
    """Two flows more and two less: the marginals stay."""
    flow = flow.clone()
    flow[2, 0, 0] += 0.5
    flow[2, 1, 1] += 0.5
    flow[2, 0, 1] -= 0.5
    flow[2, 1, 0] -= 0.5
    return flow


def _shifted(tensor, by):
    tensor = tensor.clone()
    tensor[2] += by
    return tensor


CORRUPTIONS = {
    "mass added": lambda problem, result: result._replace(flow=_shifted(result.flow, 1e-9)),
    "negative flow": lambda problem, result: result._replace(flow=_cycle(result.flow)),
    "feasible but not optimal": lambda problem, result: result._replace(
        flow=problem[1][:, :, None] * problem[2][:, None] / problem[1].sum(1)[:, None, None],
        value=(problem[0] * problem[1][:, :, None] * problem[2][:, None] / problem[1].sum(1)[:, None, None]).sum(
            (1, 2)
        ),
    ),
    "value": lambda problem, result: result._replace(value=_shifted(result.value, 1e-9)),
    "duals too high": lambda problem, result: result._replace(supply_dual=_shifted(result.supply_dual, 1e-9)),
    "duals too low": lambda problem, result: result._replace(demand_dual=_shifted(result.demand_dual, -1e-9)),
    "NaN": lambda problem, result: result._replace(flow=_shifted(result.flow, float("nan"))),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_certificate_notices(corruption):
    problem, result = _solution()
    tolerance = CERTIFICATE_TOLERANCE[torch.float64]
    assert certificate(*problem, result).holds(tolerance).all()
    holds = certificate(*problem, CORRUPTIONS[corruption](problem, result)).holds(tolerance)
    assert holds.tolist() == [corruption != "feasible but not optimal"] * 2 + [False] + [
        corruption != "feasible but not optimal"
    ]


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_check_raises_for_a_wrong_solution(corruption, monkeypatch):
    problem, result = _solution()
    wrong = [part.unflatten(0, (2, 2)) for part in CORRUPTIONS[corruption](problem, result)]
    found = *wrong, None, torch.zeros(2, 2)
    monkeypatch.setattr(sys.modules["fewshot_ext.ops.emd"], "_call_emd", lambda *tensors: found)
    first = (0, 0) if corruption == "feasible but not optimal" else (1, 0)
    batches = [tensor.unflatten(0, (2, 2)) for tensor in problem]
    fewshot_ext.emd(*batches)
    with pytest.raises(RuntimeError) as raised:
        fewshot_ext.emd(*batches, check=True)
    for text in (f"batch index {first}, n = 5, m = 6", "marginal_residual", "min_reduced_cost", "gap", "torch.save("):
        assert text in str(raised.value)


def test_first_bad_problem_is_named_by_its_index():
    cost, supply, demand = (tensor.unflatten(0, (2, 3)) for tensor in instances("uniform", 6, 4, 5))
    supply, demand = supply.clone(), demand.clone()
    demand[1, 2] *= 2
    demand[1, 0, 3] = -1.0
    supply[1, 1] = 0
    for check in (False, True):
        with pytest.raises(ValueError, match=r"demand: .* got -1.0 at \[3\] at batch index \(1, 0\) \(total mass of"):
            fewshot_ext.emd(cost, supply, demand, check=check)
    with pytest.raises(ValueError) as raised:
        fewshot_ext.emd(torch.eye(2), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    assert "at batch index () (total mass of supply 3, of demand 5); normalize=True" in str(raised.value)


@pytest.mark.parametrize("bad", [bad for bad in BAD_INPUTS if bad.reads_values], ids=lambda bad: bad.name)
def test_kernel_refuses_values_that_compiled_code_did_not_check(bad):
    problem = case.examples[0]
    compiled = torch.compile(fewshot_ext.emd, fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError):
        compiled(**{**problem.arguments(), "normalize": False, **bad.change(problem.tensors)})


@pytest.mark.parametrize(
    "change",
    (
        lambda c, a, b: (c[0], a, b),
        lambda c, a, b: (c[0], a[0], b[0, :4]),
        lambda c, a, b: (c[0, 0], a[0], b[0]),
        lambda c, a, b: (c, a[:1], b),
        lambda c, a, b: (c, a, b[:, :4]),
        lambda c, a, b: (c.mT, a, b),
        lambda c, a, b: (c.float(), a, b),
        lambda c, a, b: (c.long(), a.long(), b.long()),
        lambda c, a, b: (c[:, :0], a[:, :0], b),
    ),
)
def test_kernel_refuses_what_would_read_foreign_memory(change):
    with pytest.raises(RuntimeError):
        torch.ops.fewshot_ext.emd(*change(*planted(6, 4, 5).tensors.values()))


def test_a_problem_without_a_batch_dimension_has_the_results_of_one_with():
    problems = planted(1, 4, 5).tensors.values()
    alone = torch.ops.fewshot_ext.emd(*(tensor[0] for tensor in problems))
    for result, expected in zip(alone, torch.ops.fewshot_ext.emd(*problems), strict=True):
        assert torch.equal(result, expected[0])


def test_public_names():
    assert {"EMD", "emd"} <= set(fewshot_ext.__all__)


def test_more_points_than_the_cuda_kernels_take(monkeypatch):
    """The error names the argument before any native call; a fake tensor stands in for one on a GPU."""
    monkeypatch.setattr(_library, "require_cuda", lambda device: None)
    with FakeTensorMode():
        for shape in ([2, MOST_POINTS_ON_CUDA + 1, 3], [2, 3, MOST_POINTS_ON_CUDA + 1]):
            with pytest.raises(ValueError, match="cost: expected n and m of at most 1024 on CUDA devices, got shape"):
                fewshot_ext.emd(torch.empty(shape, device="cuda"))
        fits = fewshot_ext.emd(torch.empty(2, MOST_POINTS_ON_CUDA, 3, device="cuda"))
        assert fits.flow.shape == (2, MOST_POINTS_ON_CUDA, 3)


@ON_ALL
def test_pivots(backend):
    """None where the first tree is the only one, some where the start is wrong, and the same in every run."""
    with backend.activate():
        for n, m in ((1, 1), (1, 7), (6, 1)):
            problem = (tensor.to(backend.device) for tensor in instances("uniform", 5, n, m))
            *_, pivots = torch.ops.fewshot_ext.emd(*problem)
            assert pivots.tolist() == [0] * 5
        problem = [tensor.to(backend.device) for tensor in instances("uniform", 20, 12, 12)]
        first, second = (torch.ops.fewshot_ext.emd(*problem)[-1] for _ in range(2))
        assert torch.equal(first, second) and first.min() >= 0 and first.max() > 0
