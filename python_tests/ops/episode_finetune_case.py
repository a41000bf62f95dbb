"""What episode fine-tuning promises, for the contract tests."""

import math
from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

import fewshot_ext
from fewshot_ext import reference

from .contract import BadInput, Bounds, OperatorCase, Problem, entry, option, replaced
from .layouts import LAYOUTS, with_layout

NAMES = ("support", "support_target", "query", "weight", "order")
NORM_FLOOR = 1e-12  # of torch.nn.functional.normalize

EPISODES = (1, 2)
# Around the numbers of vectors and classes that the kernels take at once (4, 5, 8), and beyond.
SUPPORT = (1, 2, 4, 7, 11)
QUERIES = (0, 1, 5, 9)
WAYS = (2, 3, 5, 8, 9, 17)
DIMENSIONS = (1, 3, 8, 31, 64, 70)
STEPS = (0, 1, 2)
BATCH_SIZES = (1, 2, 4, 5, 9, 50)


def draw(
    episodes: int,
    way: int,
    support: int,
    queries: int,
    dimensions: int,
    steps: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    **options,
) -> Problem:
    """Features about 1 long, as far as SGD on their inner products should be stable; labels at random."""
    generator = torch.Generator().manual_seed(seed)

    def features(count: int) -> Tensor:
        drawn = torch.randn(episodes, count, dimensions, generator=generator, dtype=torch.float64)
        return (drawn + 0.5) / math.sqrt(dimensions)

    tensors = {
        "support": features(support),
        "support_target": torch.randint(way, (episodes, support), generator=generator),
        "query": features(queries),
        "weight": features(way),
        "order": torch.rand(episodes, steps, support, generator=generator).argsort(-1),
    }
    return Problem(tensors, {"steps": steps, **options}).to(dtype)


def with_special_rows(features: Tensor, kind: str) -> Tensor:
    if kind == "zero rows":
        features[:, ::2] = 0
    elif kind == "tiny rows":  # below the norm's floor, where the dtype reaches that far
        features[:, ::2] *= 0.5 * NORM_FLOOR
    elif kind == "same rows":
        features[:, 1:] = features[:, :1]
    return features


@st.composite
def _problems(drawn, dtype: torch.dtype) -> Problem:
    cosine = drawn(st.booleans())
    problem = draw(
        drawn(st.sampled_from(EPISODES)),
        drawn(st.sampled_from(WAYS)),
        drawn(st.sampled_from(SUPPORT)),
        drawn(st.sampled_from(QUERIES)),
        drawn(st.sampled_from(DIMENSIONS)),
        drawn(st.sampled_from(STEPS)),
        seed=drawn(st.integers(0, 2**32)),
        similarity="cosine" if cosine else "dot",
        scale=drawn(st.sampled_from((1.0, 5.0, 10.0))),
        margin=drawn(st.sampled_from((-0.5, -0.3, 0.0, 0.2))),
        batch_size=drawn(st.sampled_from(BATCH_SIZES)),
        lr=drawn(st.sampled_from((0.0, 0.01, 0.1))),
        momentum=drawn(st.sampled_from((0.0, 0.5, 0.9))),
        dampening=drawn(st.sampled_from((0.0, 0.9, -0.5))),
        weight_decay=drawn(st.sampled_from((0.0, 1e-3, 0.1))),
        check=drawn(st.booleans()),
    )
    tensors = {}
    for name, tensor in problem.tensors.items():
        if name in ("support", "query"):
            tensor = with_special_rows(tensor, drawn(st.sampled_from(("plain", "zero rows", "tiny rows", "same rows"))))
        layout = drawn(st.sampled_from(LAYOUTS))
        if layout != "contiguous":
            tensor = with_layout(tensor.flatten(0, -2), layout).unflatten(0, tensor.shape[:-1])
        tensors[name] = tensor
    return Problem(tensors, problem.options)


def loop(*, way: int | None = None, check: bool = False, generator: None = None, **arguments) -> Tensor:
    return reference.finetune_episodes(**arguments)


def _bounds(problem: Problem, upstream: Sequence[Tensor], operand_error: float) -> Bounds:
    """Eight times the error of torch's own loop in float32, the largest of a problem's, and the rounding of scores."""
    exact = loop(**problem.to(torch.float64).arguments())
    single = loop(**problem.to(torch.float32).arguments())
    error = (single.double() - exact).abs().amax() if exact.numel() else 0.0
    query, dimensions = problem.tensors["query"].double(), problem.tensors["query"].shape[-1]
    # Trained classifiers are hardly longer than 30 where the features are about 1 long.
    largest = 1.0 if problem.options.get("similarity", "cosine") == "cosine" else 30 * query.norm(dim=-1, keepdim=True)
    eps = torch.finfo(torch.float32).eps
    bound = 8 * error + eps * (math.sqrt(dimensions) + 4) * largest
    accumulate = torch.float64 if problem.tensors["support"].dtype == torch.float64 else torch.float32
    # The reference has the rounding of float64 too.
    bound = bound * (2 if accumulate == torch.float64 else 1) * torch.finfo(accumulate).eps / eps
    return Bounds((torch.zeros_like(exact) + bound,), {})


def _overloads(problem: Problem):
    operators = torch.ops.fewshot_ext
    arguments = tuple(problem.tensors[name] for name in NAMES)
    seed = torch.tensor([12345])
    return [
        (operators.finetune_episodes.default, (*arguments, True, 5.0, -0.3, 2, 0.1, 0.9, 0.9, 1e-3)),
        (operators.draw_episodes.default, (arguments[0], seed, 3, 4)),
    ]


def _bad_values() -> list[BadInput]:
    """On the CPU they raise by themselves, on a GPU with ``check``."""
    found = []
    for name, change, message in (
        ("label 3", entry("support_target", (1, 2), 3), "support_target: expected labels in [0, 3), got 3 at [1, 2]"),
        ("label -1", entry("support_target", (4, 0), -1), "support_target: expected labels in [0, 3), got -1 at"),
        ("order beyond", entry("order", (2, 1, 3), 5), "order: expected rows that are permutations of 0 .. 4, got ["),
        ("order below", entry("order", (2, 1, 3), -1), "] at [2, 1]"),
        ("order far off", entry("order", (0, 0, 0), 2**40), "order: expected rows that are permutations"),
        ("order twice", replaced("order", lambda o: o.clamp_min(1)), "order: expected rows that are permutations"),
    ):
        found.append(BadInput(name, change, ValueError, message, reads_values=True))
        checked = lambda tensors, change=change: {**change(tensors), "check": True}  # noqa: E731
        found.append(BadInput(f"{name}, looked for", checked, ValueError, message))
    return found


def _bad_settings() -> list[BadInput]:
    found = []
    for name, value, error, message in (
        ("scale", 0.0, ValueError, "scale: expected a number above 0, got 0.0"),
        ("scale", math.nan, ValueError, "scale: expected a finite number, got nan"),
        ("margin", math.inf, ValueError, "margin: expected a finite number, got inf"),
        ("margin", "0.3", TypeError, "margin: expected a number, got str"),
        ("lr", -0.1, ValueError, "lr: expected at least 0, got -0.1"),
        ("lr", None, TypeError, "lr: expected a number, got NoneType"),
        ("momentum", -0.5, ValueError, "momentum: expected at least 0, got -0.5"),
        ("dampening", math.nan, ValueError, "dampening: expected a finite number, got nan"),
        ("weight_decay", -1.0, ValueError, "weight_decay: expected at least 0, got -1.0"),
        ("steps", -1, ValueError, "steps: expected at least 0, got -1"),
        ("steps", 1.5, TypeError, "steps: expected an integer, got float"),
        ("batch_size", 0, ValueError, "batch_size: expected at least 1, got 0"),
        ("batch_size", True, TypeError, "batch_size: expected an integer, got bool"),
        ("similarity", "euclidean", ValueError, "similarity: expected one of cosine, dot, got 'euclidean'"),
        ("similarity", None, TypeError, "similarity: expected one of cosine, dot, got NoneType"),
        ("way", 4, ValueError, "weight: expected 4 classes as way says, got shape [6, 3, 4]"),
        ("way", 3.0, TypeError, "way: expected an integer, got float"),
        ("generator", 7, TypeError, "generator: expected a torch.Generator, got int"),
        ("check", 1, TypeError, "check: expected True or False, got int"),
    ):
        found.append(BadInput(f"{name} {value}", option(name, value), error, message))
    return found


# For float64 problems: 6 episodes of 5 support features, 2 queries, 3 classes, 4 dimensions, 2 steps.
BAD_INPUTS = (
    *_bad_values(),
    *_bad_settings(),
    BadInput("support a list", lambda t: {"support": [1.0]}, TypeError, "support: expected a tensor [E, S, D], got"),
    BadInput("query a list", lambda t: {"query": [1.0]}, TypeError, "query: expected a tensor [E, Q, D], got list"),
    BadInput("labels a list", lambda t: {"support_target": [0]}, TypeError, "support_target: expected a tensor [E, S]"),
    BadInput("weight a number", option("weight", 1.0), TypeError, "weight: expected a tensor [E, way, D], got float"),
    BadInput("order a list", option("order", [0]), TypeError, "order: expected a tensor [E, steps, S], got list"),
    BadInput("support of rank 2", replaced("support", lambda x: x[0]), ValueError, "support: expected shape [E, S, D]"),
    BadInput("query of rank 4", replaced("query", lambda x: x[None]), ValueError, "query: expected shape [E, Q, D]"),
    BadInput("labels of rank 1", replaced("support_target", lambda y: y[0]), ValueError, "support_target: expected"),
    BadInput(
        "labels missing", replaced("support_target", lambda y: y[:, 1:]), ValueError, "expected shape [6, 5], got"
    ),
    BadInput("episodes differ", replaced("query", lambda x: x[1:]), ValueError, "query: expected shape [6, Q, 4], got"),
    BadInput(
        "dimensions differ", replaced("query", lambda x: x[..., 1:]), ValueError, "query: expected shape [6, Q, 4]"
    ),
    BadInput("weight of rank 2", replaced("weight", lambda w: w[0]), ValueError, "weight: expected shape [E, way, D]"),
    BadInput(
        "weight too narrow", replaced("weight", lambda w: w[..., 1:]), ValueError, "weight: expected shape [6, 3, 4]"
    ),
    BadInput(
        "one class", replaced("weight", lambda w: w[:, :1]), ValueError, "way: expected at least 2 classes, got 1"
    ),
    BadInput("steps missing", replaced("order", lambda o: o[:, 1:]), ValueError, "order: expected shape [6, 2, 5]"),
    BadInput(
        "no support",
        lambda t: {name: t[name][..., :0, :] if name == "support" else t[name][..., :0] for name in NAMES[:2]},
        ValueError,
        "support: expected at least one image and one dimension, got shape [6, 0, 4]",
    ),
    BadInput(
        "no dimensions", replaced("support", lambda x: x[..., :0]), ValueError, "one dimension, got shape [6, 5, 0]"
    ),
    BadInput("integer support", replaced("support", lambda x: x.long()), TypeError, "support: expected dtype float32"),
    BadInput("complex query", replaced("query", lambda x: x.cfloat()), TypeError, "query: expected dtype float32"),
    BadInput(
        "float labels", replaced("support_target", lambda y: y.float()), TypeError, "support_target: expected dtype"
    ),
    BadInput("int32 order", replaced("order", lambda o: o.int()), TypeError, "order: expected dtype torch.int64, got"),
    BadInput(
        "dtypes differ", replaced("query", lambda x: x.float()), TypeError, "query: expected dtype torch.float64 as"
    ),
    BadInput(
        "weight in float32", replaced("weight", lambda w: w.float()), TypeError, "weight: expected dtype torch.float64"
    ),
    BadInput("devices differ", replaced("order", lambda o: o.to("meta")), ValueError, "order: expected device"),
    *(
        BadInput(
            f"gradient wanted of {name}",
            replaced(name, lambda x: x.clone().requires_grad_()),
            RuntimeError,
            f"{name}: fewshot_ext.finetune_episodes offers no gradient: its scores come out of a whole run of SGD. "
            "Detach it or call it under torch.no_grad().",
        )
        for name in ("support", "query", "weight")
    ),
)

finetune = OperatorCase(
    name="finetune_episodes",
    function=fewshot_ext.finetune_episodes,
    reference=loop,
    differentiable=(),
    problems=_problems,
    bounds=_bounds,
    examples=(
        draw(6, 3, 5, 2, 4, 2, batch_size=2, lr=0.1, margin=-0.3),
        draw(6, 3, 4, 3, 40, 3, seed=1, batch_size=3, similarity="dot", check=True),
    ),
    large=draw(12, 5, 25, 8, 64, 1, dtype=torch.float32),
    empty=(
        draw(0, 3, 5, 2, 4, 2, batch_size=2),
        draw(2, 3, 5, 0, 4, 2, batch_size=2),
        draw(2, 3, 5, 2, 4, 0, similarity="dot", check=True),
    ),
    overloads=_overloads,
    dynamic={
        "support": {0: "N", 2: "D"},
        "support_target": {0: "N"},
        "query": {0: "N", 1: "Q", 2: "D"},
        "weight": {0: "N", 2: "D"},
        "order": {0: "N"},
    },
    bad_inputs=BAD_INPUTS,
    batched=NAMES,
    kernels=("cpu", "simt-one_launch", "cuda"),  # the emulator's two differ in margin softmax alone
    autocast_to_float32=True,
)
