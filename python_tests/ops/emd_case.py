"""What the Earth Mover's Distance promises, for the contract tests."""

import math
from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

import fewshot_ext
from fewshot_ext import reference

from .contract import BadInput, Bounds, OperatorCase, Problem, entry, option, replaced
from .layouts import LAYOUTS, with_layout

NAMES = ("cost", "supply", "demand")
# The reference solves dense systems of the incidence matrix; HiGHS stops within such roundings of a vertex.
REFERENCE_UNIT = 2.0**-44

PROBLEMS = (1, 2, 4)
POINTS = (1, 2, 3, 5, 8, 13)


def linear_program(*, check: bool = False, **arguments) -> tuple[Tensor, ...]:
    return reference.emd(**arguments)


def _random_tree(n: int, m: int, generator: torch.Generator) -> list[tuple[int, int]]:
    """The arcs of a spanning tree of the complete bipartite graph: each node joins one drawn from the other side."""
    supplies, demands = torch.randperm(n, generator=generator).tolist(), torch.randperm(m, generator=generator).tolist()
    placed = ([supplies.pop()], [demands.pop()])
    arcs = [(placed[0][0], placed[1][0])]
    waiting = [(0, node) for node in supplies] + [(1, node) for node in demands]
    for index in torch.randperm(len(waiting), generator=generator).tolist():
        side, node = waiting[index]
        others = placed[1 - side]
        other = others[int(torch.randint(len(others), (), generator=generator))]
        arcs.append((node, other) if side == 0 else (other, node))
        placed[side].append(node)
    return arcs


def planted(
    problems: int,
    n: int,
    m: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    shared: str = "nothing",
    cost_unit: float = 1.0,
    mass_unit: float = 1.0,
    **options,
) -> Problem:
    """Problems built around their solutions, which are unique and not degenerate by a wide margin.

    Costs and masses are small multiples of their units and exact in every dtype: a rounding cannot change the basis.

    Args:
        shared: "cost" or "marginals" are those of all problems, with a stride of 0 over the batch.
        cost_unit, mass_unit: powers of 2.
    """
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator).double()

    trees = [_random_tree(n, m, generator) for _ in range(1 if shared != "nothing" else problems)]
    basic = torch.zeros(len(trees), n, m, dtype=torch.bool)
    for index, arcs in enumerate(trees):
        basic[index][tuple(zip(*arcs, strict=True))] = True
    slack = integers(1, 16, 1 if shared == "cost" else problems, n, m) * ~basic
    duals = integers(-16, 16, len(slack), n, 1) + integers(-16, 16, len(slack), 1, m)
    flow = integers(1, 4, 1 if shared == "marginals" else problems, n, m) * basic
    cost, supply, demand = cost_unit / 4 * (duals + slack), mass_unit * flow.sum(2), mass_unit * flow.sum(1)
    tensors = {"cost": cost.expand(problems, n, m), "supply": supply.expand(problems, n)}
    tensors["demand"] = demand.expand(problems, m)
    return Problem(tensors, options).to(dtype)


def _partial(problems: int, n: int, m: int) -> Problem:
    """Masses that differ, and numbers that do not tie."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"cost": (n, m), "supply": (n,), "demand": (m,)}
    tensors = {
        name: torch.rand(problems, *shape, dtype=torch.float64, generator=generator) for name, shape in shapes.items()
    }
    return Problem(tensors, {"partial": True})


@st.composite
def _problems(drawn, dtype: torch.dtype) -> Problem:
    problem = planted(
        drawn(st.sampled_from(PROBLEMS)),
        drawn(st.sampled_from(POINTS)),
        drawn(st.sampled_from(POINTS)),
        seed=drawn(st.integers(0, 2**32)),
        dtype=dtype,
        shared=drawn(st.sampled_from(("nothing", "cost", "marginals"))),
        cost_unit=drawn(st.sampled_from((2.0**-8, 1.0, 2.0**8))),
        mass_unit=drawn(st.sampled_from((2.0**-6, 1.0, 2.0**5))),
        normalize=drawn(st.booleans()),
        check=drawn(st.booleans()),
    )
    tensors = {}
    for name, tensor in problem.tensors.items():
        layout = drawn(st.sampled_from(LAYOUTS))
        if layout != "contiguous" and 0 not in tensor.stride():
            tensor = with_layout(tensor.flatten(0, -2), layout).unflatten(0, tensor.shape[:-1])
        tensors[name] = tensor
    return Problem(tensors, problem.options)


def _bounds(problem: Problem, upstream: Sequence[Tensor], operand_error: float) -> Bounds:
    """Flows are alternating sums of masses, duals alternating sums of costs, over at most n + m - 1 arcs of a tree."""
    cost, supply, demand = (problem.tensors[name].double() for name in NAMES)
    accumulate = torch.float64 if problem.tensors["cost"].dtype == torch.float64 else torch.float32
    unit = torch.finfo(accumulate).eps / 2 + REFERENCE_UNIT
    arcs = sum(cost.shape[1:])
    total = supply.sum(-1)
    normalize = problem.options.get("normalize", False)
    mass, divisor = (torch.ones_like(total), total) if normalize else (total, torch.ones_like(total))
    grad_value, grad_flow = upstream[0].abs(), upstream[1].abs().amax((-2, -1))
    grad_duals = sum(part.abs().sum(-1) for part in upstream[2:])
    largest_cost = cost.abs().amax((-2, -1))

    flow = 4 * arcs * unit * mass
    dual = (4 * arcs**2 * unit * largest_cost)[:, None]
    marginal = 8 * arcs**2 * unit * (grad_value * largest_cost + grad_flow) / divisor
    return Bounds(
        (largest_cost * flow, flow[:, None, None].expand_as(cost), dual.expand_as(supply), dual.expand_as(demand)),
        {
            "cost": (grad_value * flow + 4 * arcs * unit * grad_duals)[:, None, None].expand_as(cost),
            "supply": marginal[:, None].expand_as(supply),
            "demand": marginal[:, None].expand_as(demand),
        },
    )


def _overloads(problem: Problem):
    operators = torch.ops.fewshot_ext
    arguments = tuple(problem.tensors[name] for name in NAMES)
    *_, basis, _ = operators.emd(*(tensor.detach() for tensor in arguments))
    grad_flow = torch.linspace(-1, 1, arguments[0].numel(), device=basis.device).view(arguments[0].shape)
    return [
        (operators.emd.default, arguments),
        (operators.emd_flow_backward.default, (grad_flow.requires_grad_(arguments[0].requires_grad), basis)),
        (operators.emd_tree_flow.default, (*arguments[1:], basis)),
    ]


def _bad_values() -> list[BadInput]:
    """On the CPU they raise by themselves, on a GPU with ``check``."""
    found = []
    for name, change, message in (
        ("NaN cost", entry("cost", (3, 1, 2), math.nan), "cost: expected finite entries or inf, got nan at [1, 2] at"),
        ("cost below all", entry("cost", (3, 1, 2), -math.inf), "cost: expected finite entries or inf, got -inf"),
        ("negative supply", entry("supply", (4, 2), -0.5), "supply: expected finite entries of at least 0, got -0.5"),
        ("negative demand", entry("demand", (4, 2), -0.5), "demand: expected finite entries of at least 0, got -0.5"),
        ("NaN supply", entry("supply", (2, 3), math.nan), "got nan at [3] at batch index (2,)"),
        ("infinite demand", entry("demand", (2, 3), math.inf), "got inf at [3] at batch index (2,)"),
        ("all supplies negative", replaced("supply", lambda a: -a), "supply: expected finite entries of at least 0"),
        ("no supply", entry("supply", (5,), 0.0), "supply: expected a total mass above 0, got 0 at batch index (5,)"),
        ("no demand", entry("demand", (5,), 0.0), "demand: expected a total mass above 0, got 0 at batch index (5,)"),
        (
            "masses differ",
            lambda t: {"demand": t["demand"].detach() * 1.001, "normalize": False},
            "demand: expected the total mass of supply up to 0.0001 of it, got another at batch index (0,) (total mass",
        ),
        (
            "masses of one problem differ",
            lambda t: {**entry("demand", (2, 0), 500.0)(t), "normalize": False},
            "at batch index (2,) (total mass of supply",
        ),
    ):
        found.append(BadInput(name, change, ValueError, message, reads_values=True))
        checked = lambda tensors, change=change: {**change(tensors), "check": True}  # noqa: E731
        found.append(BadInput(f"{name}, looked for", checked, ValueError, message))
    return found


# For float64 problems: 6 of 4 supplies and 5 demands.
BAD_INPUTS = (
    *_bad_values(),
    BadInput("cost a list", lambda t: {"cost": t["cost"].tolist()}, TypeError, "cost: expected a tensor [..., n, m]"),
    BadInput("supply a list", lambda t: {"supply": [1.0]}, TypeError, "supply: expected a tensor [..., n], got list"),
    BadInput("demand a number", lambda t: {"demand": 1.0}, TypeError, "demand: expected a tensor [..., m], got float"),
    BadInput("cost of rank 1", replaced("cost", lambda c: c[0, 0]), ValueError, "cost: expected shape [..., n, m]"),
    BadInput("supply of rank 0", replaced("supply", lambda a: a[0, 0]), ValueError, "supply: expected shape [..., n]"),
    BadInput("demand of rank 0", replaced("demand", lambda b: b[0, 0]), ValueError, "demand: expected shape [..., m]"),
    BadInput("sides swapped", replaced("cost", lambda c: c.mT), ValueError, "supply: expected shape [..., 5] to fit"),
    BadInput("a demand missing", replaced("demand", lambda b: b[:, 1:]), ValueError, "demand: expected shape [..., 5]"),
    BadInput("no supplies", replaced("cost", lambda c: c[:, :0]), ValueError, "cost: expected at least one point"),
    BadInput("no demands", replaced("cost", lambda c: c[:, :, :0]), ValueError, "on each side, got shape [6, 4, 0]"),
    BadInput("batches differ", replaced("cost", lambda c: c[:5]), ValueError, "supply [6, 4], demand [6, 5]"),
    BadInput("integer cost", replaced("cost", lambda c: c.long()), TypeError, "cost: expected dtype float32"),
    BadInput("integer supply", replaced("supply", lambda a: a.long()), TypeError, "supply: expected dtype float32"),
    BadInput("complex demand", replaced("demand", lambda b: b.cfloat()), TypeError, "demand: expected dtype float32"),
    BadInput(
        "dtypes differ",
        replaced("supply", lambda a: a.float()),
        TypeError,
        "supply: expected dtype torch.float64 as cost has, got torch.float32",
    ),
    BadInput("devices differ", replaced("demand", lambda b: b.to("meta")), ValueError, "demand: expected device"),
    BadInput("normalize a number", option("normalize", 1), TypeError, "normalize: expected True or False, got int"),
    BadInput("partial a number", option("partial", 1), TypeError, "partial: expected True or False, got int"),
    BadInput("check a string", option("check", "yes"), TypeError, "check: expected True or False, got str"),
)

emd = OperatorCase(
    name="emd",
    function=fewshot_ext.emd,
    reference=linear_program,
    differentiable=NAMES,
    problems=_problems,
    bounds=_bounds,
    # Normalized, because numerical derivatives leave the masses equal only so.
    examples=(
        planted(6, 4, 5, normalize=True),
        planted(6, 7, 3, seed=1, normalize=True, check=True),
        planted(5, 1, 4, seed=2, normalize=True),
        _partial(5, 4, 3),
    ),
    large=planted(32, 6, 7, dtype=torch.float32),
    empty=(planted(0, 4, 5), planted(0, 4, 5, normalize=True, check=True)),
    overloads=_overloads,
    dynamic={"cost": {0: "N", 1: "n", 2: "m"}, "supply": {0: "N", 1: "n"}, "demand": {0: "N", 1: "m"}},
    bad_inputs=BAD_INPUTS,
    no_forward_mode=None,
    batched=NAMES,
    kernels=("cpu", "simt-one_launch", "cuda"),  # the emulator's two differ in margin softmax alone
    autocast_to_float32=True,
)
