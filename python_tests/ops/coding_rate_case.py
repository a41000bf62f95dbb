"""What the coding rate promises, for the contract tests."""

import math
from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

import fewshot_ext
from fewshot_ext import reference

from .contract import BadInput, Bounds, OperatorCase, Problem, option, replaced
from .layouts import LAYOUTS, with_layout

NAMES = ("embeddings",)
SIZES = (1, 2, 3, 5, 8, 13, 21)
VALUES = ("normal", "unit rows", "collapsed", "one direction lost", "zeros")


def drawn_embeddings(values: str, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(shape, generator=generator, dtype=torch.float64)
    if values == "zeros":
        return torch.zeros_like(embeddings)
    if values == "one direction lost":
        embeddings[..., -1] = 0
    if values == "collapsed":
        embeddings = embeddings[..., :1, :].expand(shape)
    return embeddings if values == "normal" else torch.nn.functional.normalize(embeddings, dim=-1)


def problem(values: str, *shape: int, seed: int = 0, unit: float = 1.0, **options) -> Problem:
    return Problem({"embeddings": unit * drawn_embeddings(values, *shape, seed=seed)}, options)


@st.composite
def _problems(drawn, dtype: torch.dtype) -> Problem:
    batch = drawn(st.sampled_from(((), (1,), (3,), (2, 2))))
    found = problem(
        drawn(st.sampled_from(VALUES)),
        *batch,
        drawn(st.sampled_from(SIZES)),
        drawn(st.sampled_from(SIZES)),
        seed=drawn(st.integers(0, 2**32)),
        unit=drawn(st.sampled_from((2.0**-8, 1.0, 2.0**3))),
        eps=drawn(st.sampled_from((0.25, 0.5, 2.0))),
        alpha=drawn(st.sampled_from((None, None, 2.0**-10, 1.0, 40.0))),
    ).to(dtype)
    embeddings = found.tensors["embeddings"]
    rows = with_layout(embeddings.flatten(0, -2), drawn(st.sampled_from(LAYOUTS)))
    return Problem({"embeddings": rows.unflatten(0, embeddings.shape[:-1])}, found.options)


def _bounds(problem: Problem, upstream: Sequence[Tensor], operand_error: float) -> Bounds:
    """The Gram matrix and the factorization are off by at most E with |E| <= (n + D) u tr M. No eigenvalue of M lies
    below 1: the inverse is off by at most |E|, and Z M^-1 has no singular value above 1 / (2 sqrt(alpha))."""
    embeddings = problem.tensors["embeddings"].double()
    samples, dimensions = embeddings.shape[-2:]
    alpha = problem.options.get("alpha") or dimensions / (max(samples, 1) * problem.options.get("eps", 0.5) ** 2)
    accumulate = torch.float64 if problem.tensors["embeddings"].dtype == torch.float64 else torch.float32
    smaller = min(samples, dimensions)
    trace = smaller + alpha * embeddings.square().sum((-2, -1))
    # The reference factorizes the D x D matrix in float64.
    unit = torch.finfo(accumulate).eps / 2 + 2 * torch.finfo(torch.float64).eps
    error = (samples + dimensions + 4) * unit * trace
    gradient = upstream[0].abs() * error * math.sqrt(alpha) / 2
    return Bounds(
        (math.sqrt(smaller) * error,),
        {"embeddings": gradient[..., None, None].expand_as(embeddings)},
    )


def _overloads(problem: Problem):
    embeddings = problem.tensors["embeddings"]
    alpha = torch.linspace(0.5, 2, len(embeddings), device=embeddings.device)
    return [(torch.ops.fewshot_ext.coding_rate.default, (embeddings, alpha))]


def _bad_numbers() -> list[BadInput]:
    found = []
    for name in ("eps", "alpha"):
        for value, error, message in (
            (0, ValueError, "expected a number above 0, got 0"),
            (-0.5, ValueError, "expected a number above 0, got -0.5"),
            (math.nan, ValueError, "expected a finite number, got nan"),
            (math.inf, ValueError, "expected a finite number, got inf"),
            ("0.5", TypeError, "expected a number, got str"),
            (True, TypeError, "expected a number, got bool"),
        ):
            found.append(BadInput(f"{name} {value!r}", option(name, value), error, f"{name}: {message}"))
    return found


BAD_INPUTS = (
    *_bad_numbers(),
    BadInput("no eps", option("eps", None), TypeError, "eps: expected a number, got NoneType"),
    BadInput(
        "embeddings a list",
        lambda t: {"embeddings": t["embeddings"].tolist()},
        TypeError,
        "embeddings: expected a tensor [..., n, D], got list",
    ),
    BadInput(
        "one sample alone",
        replaced("embeddings", lambda z: z[0, 0]),
        ValueError,
        "embeddings: expected shape [..., n, D], got [8]",
    ),
    BadInput("integers", replaced("embeddings", lambda z: z.long()), TypeError, "embeddings: expected dtype float32"),
    BadInput("complex", replaced("embeddings", lambda z: z.cfloat()), TypeError, "got torch.complex64"),
)

coding_rate = OperatorCase(
    name="coding_rate",
    function=fewshot_ext.coding_rate,
    reference=reference.coding_rate,
    differentiable=NAMES,
    problems=_problems,
    bounds=_bounds,
    examples=(
        problem("normal", 6, 5, 8),
        problem("unit rows", 5, 7, 4, seed=1, eps=0.25),
        problem("collapsed", 5, 4, 4, seed=2, alpha=3.0),
    ),
    large=problem("unit rows", 4, 96, 160).to(torch.float32),
    empty=(
        problem("normal", 0, 4, 5),
        problem("normal", 3, 0, 5),
        problem("normal", 2, 3, 4, 0),
        problem("zeros", 0, 0),
    ),
    overloads=_overloads,
    dynamic={"embeddings": {0: "N", 1: "n", 2: "D"}},
    bad_inputs=BAD_INPUTS,
    batched=NAMES,
    kernels=(),
    autocast_to_float32=True,
)
