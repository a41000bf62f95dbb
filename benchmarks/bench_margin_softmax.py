"""Margin softmax on the CPU, forward + backward, against eager, torch.compile and pytorch-metric-learning.

    python benchmarks/bench_margin_softmax.py

Every contender computes the same loss from float32 features and weights that both require gradients, and is compared
with the float64 reference before anything is timed. The floor is the arithmetic of the three matrix products, 6NDC
operations, at the rate that oneDNN reaches on a product of the same N and D in the same run. Memory is the rise of
resident memory during one forward + backward, less the two gradients that any method must return.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import harness
import torch
from torch import Tensor

import fewshot_ext
from fewshot_ext import reference

MARGIN, SCALE = -0.3, 30.0
FLOOR_CLASSES = 4096  # enough for oneDNN's full rate, few enough that its output stays out of the way

OURS, EAGER, COMPILED, PML, FLOOR = "fewshot_ext", "eager", "torch.compile", "pytorch-metric-learning", "floor"


@dataclass(frozen=True)
class Case:
    samples: int
    dimensions: int
    classes: int


CASES = [
    Case(256, 512, 64),
    Case(256, 640, 351),
    Case(256, 512, 1000),
    Case(512, 512, 20_000),
    Case(512, 512, 100_000),
]


class Problem:
    """Inputs of one case, and the call forward + backward for a loss function.

    ``by_columns`` lays the weight out as the transpose of a contiguous [D, C], for a peer that keeps it so: neither it
    nor its gradient is then copied on the way.
    """

    def __init__(self, case: Case, by_columns: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.features = torch.randn(case.samples, case.dimensions, generator=generator).requires_grad_()
        weight = torch.randn(case.classes, case.dimensions, generator=generator)
        self.weight = (weight.t().contiguous().t() if by_columns else weight).requires_grad_()
        self.target = torch.randint(case.classes, (case.samples,), generator=generator)

    def step(self, loss_function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        self.drop_gradients()
        loss = loss_function(self.features, self.weight, self.target)
        loss.backward()
        return loss.detach()

    def drop_gradients(self) -> None:
        self.features.grad = self.weight.grad = None


def metric_learning_loss(case: Case) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """CosFaceLoss, which takes any margin; it owns its weight, [D, C], so the benchmark's weight goes into it."""
    try:
        from pytorch_metric_learning.losses import CosFaceLoss
    except ImportError:
        return None
    module = CosFaceLoss(case.classes, case.dimensions, margin=MARGIN, scale=SCALE)
    del module._parameters["W"]

    def loss(features: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        module.W = weight.t()
        return module(features, target)

    return loss


def contenders(case: Case) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    def eager(features: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return reference.margin_cosine_loss(features, weight, target, MARGIN, SCALE)

    def ours(features: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return fewshot_ext.margin_cosine_loss(features, weight, target, MARGIN, SCALE)

    torch.compiler.reset()
    named = {OURS: ours, EAGER: eager, COMPILED: torch.compile(eager, fullgraph=True, dynamic=False)}
    peer = metric_learning_loss(case)
    return named if peer is None else {**named, PML: peer}


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


def check(problems: dict[str, Problem], functions: dict[str, Callable]) -> dict[str, float]:
    """Largest relative error (in norm) of loss and gradients against float64; refuses to time a wrong contender."""
    features, weight = (x.detach().double() for x in (problems[OURS].features, problems[OURS].weight))
    features.requires_grad_(), weight.requires_grad_()
    loss = reference.margin_cosine_loss(features, weight, problems[OURS].target, MARGIN, SCALE)
    loss.backward()
    errors = {}
    for name, function in functions.items():
        problem = problems[name]
        value = problem.step(function)
        errors[name] = max(
            relative_error(value, loss.detach()),
            relative_error(problem.features.grad, features.grad),
            relative_error(problem.weight.grad, weight.grad),
        )
        if errors[name] > 1e-4:
            sys.exit(f"{name} is wrong by {errors[name]:.2e}: nothing to time")
    return errors


def memory_step(case: Case, name: str) -> Callable[[], None]:
    """One forward + backward that starts and ends without gradients."""
    problem, function = Problem(case, by_columns=name == PML), contenders(case)[name]

    def step() -> None:
        problem.step(function)
        problem.drop_gradients()

    return step


def gemm(case: Case) -> tuple[Callable[[], Tensor], float]:
    """A product at oneDNN's rate, and how many times its arithmetic a forward + backward needs."""
    classes = min(case.classes, FLOOR_CLASSES)
    a, b = torch.randn(case.samples, case.dimensions), torch.randn(classes, case.dimensions)
    times = 3 * case.classes / classes
    return lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""), times


def main() -> None:
    options = harness.parser(__doc__.splitlines()[0], results="margin_softmax_cpu").parse_args()
    torch.set_num_threads(options.threads)
    machine = harness.machine("pytorch-metric-learning")
    rows, table = [], []
    for case in CASES:
        problem, functions = Problem(case), contenders(case)
        problems = {name: Problem(case, by_columns=True) if name == PML else problem for name in functions}
        errors = check(problems, functions)
        product, products = gemm(case)
        calls = {name: partial(problems[name].step, function) for name, function in functions.items()}
        timings = harness.interleaved({**calls, FLOOR: product}, seconds=options.seconds)
        floor = timings[FLOOR].p50 * products
        gradients = 4 * case.dimensions * (case.samples + case.classes)
        memory = {}
        for name in functions:
            peak = harness.peak_memory(memory_step, case, name)
            memory[name] = None if peak is None else (peak - gradients) / 2**20
        for name in functions:
            timing = timings[name]
            rows.append(
                {
                    "samples": case.samples,
                    "dimensions": case.dimensions,
                    "classes": case.classes,
                    "contender": name,
                    "p20_ms": f"{timing.p20:.4f}",
                    "p50_ms": f"{timing.p50:.4f}",
                    "p80_ms": f"{timing.p80:.4f}",
                    "turns": timing.turns,
                    "floor_ms": f"{floor:.4f}",
                    "times_floor": f"{timing.p50 / floor:.3f}",
                    "times_fewshot_ext": f"{timing.p50 / timings[OURS].p50:.3f}",
                    "extra_memory_mib": "" if memory[name] is None else f"{memory[name]:.1f}",
                    "relative_error": f"{errors[name]:.1e}",
                    **machine,
                }
            )
        table.append(
            [
                f"{case.samples}, {case.dimensions}, {case.classes}",
                *(harness.significant(timings[name].p50) if name in timings else "" for name in (EAGER, PML, COMPILED)),
                f"**{harness.significant(timings[OURS].p50)}**",
                harness.significant(floor),
                f"{timings[OURS].p50 / floor:.2f}",
                f"{timings[COMPILED].p50 / timings[OURS].p50:.2f}",
                *("" if memory[name] is None else f"{memory[name]:.0f}" for name in (COMPILED, OURS)),
            ]
        )
        print(harness.markdown_table(HEADER, table[-1:]), flush=True)
    caption = (
        f"`{harness.command()}` on {machine['device']}, {machine['threads']} threads, torch {machine['torch']}; "
        "float32, forward + backward, median in ms, memory in MiB beyond the gradients.\n\n"
    )
    text = caption + harness.markdown_table(HEADER, table)
    harness.report(text, rows, options.save)


HEADER = [
    "N, D, C",
    "eager",
    "pytorch-metric-learning CosFaceLoss",
    "torch.compile",
    "fewshot_ext",
    "floor",
    "times the floor",
    "faster than torch.compile",
    "memory torch.compile",
    "memory fewshot_ext",
]

if __name__ == "__main__":
    main()
