"""Margin softmax on a GPU, forward + backward, against its peers; run by gpu_report.py.

Every contender gets features and weight that both require gradients, and leaves both gradients freshly allocated. Peers
that take no margin are fed normalized features times the scale and normalized weights inside the timed call, since the
operator normalizes too; they are named "no margin" and compared with the reference without one.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from operator import attrgetter

import gpu_comparison
import torch
import torch.nn.functional as F
from bench_margin_softmax import CASES, COMPILED, EAGER, MARGIN, OURS, SCALE, Case
from gpu_comparison import Comparison, Contender, Goal, Outcome, ahead, copy_ms, microseconds, number, peer, within
from harness import Timing
from torch import Tensor

import fewshot_ext
from fewshot_ext import reference

ONE_LAUNCH, ONE_PASS, CHUNKED = f"{OURS} (one launch)", f"{OURS} (one pass)", f"{OURS} (chunked)"
TORCH_LINEAR = "torch linear_cross_entropy (no margin)"
CCE = "cut-cross-entropy (no margin)"
LIGER, LIGER_16 = "liger-kernel (no margin)", "liger-kernel, chunk_mem_const=16 (no margin)"
LIGER_CUTEDSL, QUACK = "liger-kernel, cutedsl (no margin)", "QuACK (no margin)"

# Largest relative error, in norm, of the loss and of both gradients. Twice or more of what eager shows at any of the
# cases: it rounds its logits to the dtype, and with few classes a negative margin leaves gradients that are small
# differences.
TOLERANCE = {"float32": 1e-4, "tf32": 5e-3, "bfloat16": 1e-1, "float16": 2e-2}
SMALL = 1000  # classes, up to which one launch is what the operator chooses; one pass is timed beside it
COUNTS, CHECKS = "it counts its targets on the host", "it checks its targets on the host"
REFERENCE_BYTES = 60  # for each logit and each number of the inputs, about, to compute the reference in float64

LARGEST = "4096,4096,128256,bfloat16"  # the size at which QuACK and liger-kernel quote themselves
GOALS_FIRST = ("256,512,64,float32", "256,640,351,float32", "512,512,100000,bfloat16", LARGEST)
LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


def jobs(quick: bool) -> list[str]:
    """N,D,C,dtype: those with goals first, then dtype by dtype."""
    cases = [case for case in CASES if not quick or case.classes in (64, 1000)]
    every = [f"{c.samples},{c.dimensions},{c.classes},{dtype}" for dtype in gpu_comparison.DTYPES for c in cases]
    return sorted([*every, *([] if quick else [LARGEST])], key=lambda job: job not in GOALS_FIRST)


def title(job: str) -> str:
    *sizes, dtype = job.split(",")
    return f"{', '.join(sizes)} in {dtype}"


def parse(job: str) -> tuple[Case, str]:
    *sizes, dtype = job.split(",")
    return Case(*map(int, sizes)), dtype


class Inputs:
    def __init__(self, case: Case, dtype: torch.dtype, device, generator: torch.Generator) -> None:
        def normal(rows: int) -> Tensor:
            return torch.randn(rows, case.dimensions, generator=generator, device=device).to(dtype).requires_grad_()

        self.features, self.weight = normal(case.samples), normal(case.classes)
        self.target = torch.randint(case.classes, (case.samples,), generator=generator, device=device)

    def run(self, function: LossFunction) -> tuple[Tensor, Tensor, Tensor]:
        return forward_backward(function, self.features, self.weight, self.target)

    def exact(self, margin: float) -> tuple[Tensor, Tensor, Tensor]:
        features, weight = (tensor.detach().double().requires_grad_() for tensor in (self.features, self.weight))
        loss = partial(reference.margin_cosine_loss, margin=margin, scale=SCALE)
        return forward_backward(loss, features, weight, self.target)


def forward_backward(function: LossFunction, features: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    loss = function(features, weight, target)
    loss.backward()
    results = loss.detach(), features.grad, weight.grad
    features.grad = weight.grad = None
    return results


def without_margin(name: str, package: str, function: Callable, **facts) -> Contender:
    def normalizing(module) -> LossFunction:
        linear_cross_entropy = function(module)
        return lambda features, weight, target: linear_cross_entropy(
            SCALE * F.normalize(features, dim=1), F.normalize(weight, dim=1), target
        )

    return peer(name, package, normalizing, variant=0.0, **facts)


def torch_linear_cross_entropy(torch) -> LossFunction:
    """Without options it is eager by another name: the logits are stored."""
    return partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions())


def liger(module, **settings: object) -> LossFunction:
    """Its default chunk holds as many logits as the features hold numbers: 4 rows of 100,000 classes."""
    function = module.LigerFusedLinearCrossEntropyFunction
    # Functions of autograd take arguments by position alone, and this one keeps gaining some.
    _, _, _, _, *optional = inspect.signature(function.forward).parameters.values()
    if unknown := settings.keys() - {parameter.name for parameter in optional}:
        raise TypeError(f"this version takes no {', '.join(unknown)}")
    arguments = [settings.get(parameter.name, parameter.default) for parameter in optional]
    return lambda features, weight, target: function.apply(features, weight, target, *arguments)[0]


def liger_cutedsl(module) -> LossFunction:
    """Its CuTe DSL kernel for Hopper, which gives the losses one by one."""
    function = module.LigerFusedScaledCrossEntropySM90Function
    return lambda features, weight, target: function.apply(features, weight, target).mean()


def ours(features: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return fewshot_ext.margin_cosine_loss(features, weight, target, MARGIN, SCALE)


def eager(features: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return reference.margin_cosine_loss(features, weight, target, MARGIN, SCALE)


def contenders(case: Case, dtype: str, device: str) -> list[Contender]:
    """The operator's own kernels first: if one hangs, the report has the reason before the time is spent."""
    few, many = ((ONE_LAUNCH, "one_launch"), (ONE_PASS, "one_pass")), ((ONE_PASS, "one_pass"), (CHUNKED, "chunked"))
    found = []
    if device == "cuda":
        for name, value in few if case.classes <= SMALL else many:
            forced = {"FEWSHOT_EXT_MARGIN_SOFTMAX_KERNEL": value}
            found.append(Contender(name, ours, variant=MARGIN, environment=forced))
    torch.compiler.reset()  # else the cases would count towards torch's limit of recompilations
    compiled = torch.compile(eager, fullgraph=True, dynamic=False)
    found += [
        Contender(OURS, ours, variant=MARGIN),
        Contender(EAGER, eager, variant=MARGIN),
        Contender(COMPILED, compiled, variant=MARGIN, compiles=True),
    ]
    half = dtype in ("bfloat16", "float16")
    too_old = "" if hasattr(F, "linear_cross_entropy") else f"torch {torch.__version__} has none, 2.13 is the first"
    not_cce = "" if half else "its backward pass takes bfloat16 and float16 alone"
    not_cutedsl = "" if dtype == "bfloat16" else "it takes bfloat16 alone"
    not_quack = "" if half else "its products take bfloat16 and float16 alone"
    cce, quack = attrgetter("linear_cross_entropy"), attrgetter("chunked_linear_cross_entropy")
    larger = partial(liger, chunk_mem_const=16)
    counts, compiled_checks = {"waits": COUNTS}, {"waits": CHECKS, "compiles": True}
    peers = [
        (TORCH_LINEAR, "torch", torch_linear_cross_entropy, too_old, {}),
        (CCE, "cut_cross_entropy", cce, not_cce, counts),
        (LIGER, "liger_kernel.ops.fused_linear_cross_entropy", liger, "", counts),
        (LIGER_16, "liger_kernel.ops.fused_linear_cross_entropy", larger, "", counts),
        (LIGER_CUTEDSL, "liger_kernel.ops.cutedsl.ops", liger_cutedsl, not_cutedsl, compiled_checks),
        (QUACK, "quack.linear_cross_entropy", quack, not_quack, {"compiles": True}),
    ]
    if case.classes <= case.dimensions:  # its chunk holds all logits anyway
        peers = [peer for peer in peers if peer[0] != LIGER_16]
    return found + [
        without_margin(name, package, function, unless=unless, **facts)
        for name, package, function, unless, facts in peers
    ]


def products(case: Case, sets: list[Inputs], generator: torch.Generator) -> dict[str, list[gpu_comparison.Call]]:
    """The three matrix products that nobody gets around, with the logits stored by rows and by columns."""
    x, w = sets[-1].features, sets[-1].weight

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, device=x.device).to(x.dtype)

    by_rows, by_columns = matrix(case.samples, case.classes), matrix(case.classes, case.samples)
    logits, logits_t, grad_x, grad_w = (torch.empty_like(like.detach()) for like in (by_rows, by_columns, x, w))
    vectors = [(inputs.features.detach(), inputs.weight.detach()) for inputs in sets]
    mm = torch.mm
    return {
        "logits, rows": [partial(mm, x, w.t(), out=logits) for x, w in vectors],
        "logits, columns": [partial(mm, w, x.t(), out=logits_t) for x, w in vectors],
        "features, rows": [partial(mm, by_rows, w, out=grad_x) for _, w in vectors],
        "features, columns": [partial(mm, by_columns.t(), w, out=grad_x) for _, w in vectors],
        "weight, rows": [partial(mm, by_rows.t(), x, out=grad_w) for x, _ in vectors],
        "weight, columns": [partial(mm, by_columns, x, out=grad_w) for x, _ in vectors],
    }


def time_of_products(timings: Mapping[str, Timing]) -> float:
    """Milliseconds of the three, each in the better layout."""
    best: dict[str, float] = {}
    for name, timing in timings.items():
        product = name.partition(",")[0]
        best[product] = min(timing.p50, best.get(product, math.inf))
    return sum(best.values())


def measure(job: str, bench) -> list[dict]:
    case, name = parse(job)
    (dtype, precision), generator = gpu_comparison.DTYPES[name], gpu_comparison.generator(bench.device)
    count = gpu_comparison.input_sets(bench.device, (case.samples + case.classes) * case.dimensions * dtype.itemsize)
    torch.set_float32_matmul_precision(precision)
    needed = REFERENCE_BYTES * (case.samples * case.classes + (case.samples + case.classes) * case.dimensions)
    if needed > bench.device.memory:
        note = f"the float64 reference takes {needed / 2**30:.0f} GiB"
        outcomes, gemm = [Outcome(Contender("every contender"), notes=[note])], 0.0
    else:
        sets = [Inputs(case, dtype, bench.device.device, generator) for _ in range(count)]
        comparison = Comparison(bench, sets, TOLERANCE[name])
        outcomes = [comparison.prepare(contender) for contender in contenders(case, name, bench.device.name)]
        gemm = time_of_products(comparison.time(outcomes, products(case, sets, generator)))
    common = {
        "case": title(job),
        "samples": case.samples,
        "dimensions": case.dimensions,
        "classes": case.classes,
        "dtype": name,
        "input_sets": count,
    }
    return list(gpu_comparison.rows_of(outcomes, OURS, common, floor_columns(case, name, gemm, bench.rates)))


def floor_columns(case: Case, dtype: str, gemm: float, rates: Mapping[str, float]) -> dict[str, float]:
    """Least milliseconds by arithmetic and by traffic: every input read once, both gradients written once."""
    floors = {"gemm_ms": gemm}
    if rates:
        vectors = (case.samples + case.classes) * case.dimensions * gpu_comparison.DTYPES[dtype][0].itemsize
        operations = 6 * case.samples * case.dimensions * case.classes
        floors["square_gemm_ms"] = operations / rates[f"{dtype}_tflop_per_s"] / 1e9
        floors["copy_ms"] = copy_ms(2 * vectors + 8 * case.samples, rates)
    return {**floors, "floor_ms": max(gemm, floors.get("copy_ms", 0.0))}


TEXT = f"""N, D, C; medians of one forward + backward. {gpu_comparison.KINDS_TEXT}
The floor is the larger of the products and the traffic. Memory is the peak beyond inputs and gradients; the error is
the largest of loss and gradients, in norm, against float64.

"""


def caption(rows: list[dict]) -> str:
    names = ("gemm_ms", "square_gemm_ms", "copy_ms")
    gemm, square, copy = (microseconds(rows[0], name) or "not measured" for name in names)
    return (
        f"Floors in us: its three matrix products {gemm}; their arithmetic at the rate of a large square product "
        f"{square}; its least traffic {copy}. {rows[0]['input_sets']} sets of inputs."
    )


def goals(rows: list[dict]) -> list[Goal]:
    """For an H100: the device's time at few-shot sizes and what the host adds, the floor and the peers at many classes.

    Of two limits the first is that of the kernels as they are, the second that of the next.
    """
    first, second, large, largest = map(title, GOALS_FIRST)
    found = [
        *(within(rows, first, OURS, limit, "us") for limit in (25, 10)),
        *(within(rows, second, OURS, limit, "us") for limit in (25, 12)),
        within(rows, first, OURS, 60, "us", timing="host"),
    ]
    times_floor, measured = number(rows, large, OURS, "graph", "times_floor"), ""
    if times_floor is not None:
        measured = f"{times_floor:.2f} times"
        if square := number(rows, large, OURS, "graph", "square_gemm_ms"):
            of_square = number(rows, large, OURS, "graph") / square
            measured += f"; {of_square:.2f} times the arithmetic at the rate of a large square product"
    met = None if times_floor is None else times_floor <= 2
    found.append(Goal(f"{large}: at most 2 times the floor in a CUDA graph", measured, met))
    found += [within(rows, case, OURS, limit, "ms") for case, limit in ((large, 0.4), (largest, 20))]
    # Some peers wait for the host, so no graph holds them: the plain calls are what can be compared.
    peers = (CCE,), (LIGER, LIGER_16), (LIGER_CUTEDSL,), (QUACK,), (TORCH_LINEAR,)
    return found + [
        ahead(rows, case, OURS, names, "us", names[0], "stream") for case in (large, largest) for names in peers
    ]
