"""The class-parallel margin softmax on two processes, forward + backward, against one process and against all logits.

    python benchmarks/bench_class_parallel.py

Every contender computes the same loss over all classes in float32, with gradients to features and weight, and is
compared with float64 before anything is timed. All processes have one thread each, so that two ranks have twice the
cores of the one process: what they take beyond half its time is communication and the second computation of the
logits (8NDC operations instead of 6NDC). "all logits" is the same division of the classes in plain PyTorch, which
stores the logits of the shard and lets autograd work. Memory is the rise of a rank's resident memory during one
forward + backward, less the two gradients that any method must return.
"""

import datetime
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import harness
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import fewshot_ext
from fewshot_ext.parallel import ClassParallelMarginLoss
from fewshot_ext.parallel._collectives import Batches

MARGIN, SCALE = -0.3, 30.0
RANKS = 2
OURS, PLAIN, ONE = "fewshot_ext, 2 ranks", "all logits, 2 ranks", "fewshot_ext, 1 process"
TIMEOUT = datetime.timedelta(minutes=5)


@dataclass(frozen=True)
class Case:
    samples: int
    dimensions: int
    classes: int


class Step:
    """One forward + backward of a contender over ``ranks`` processes, in this one of them."""

    def __init__(self, case: Case, name: str, ranks: int) -> None:
        self.case, self.ranks = case, ranks
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(case.samples, case.dimensions, generator=generator)
        weight = torch.randn(case.classes, case.dimensions, generator=generator)
        target = torch.randint(case.classes, (case.samples,), generator=generator)
        rank = dist.get_rank() if ranks > 1 else 0
        rows, classes = (size // ranks for size in (case.samples, case.classes))
        self.own, self.shard = (slice(rank * size, (rank + 1) * size) for size in (rows, classes))
        # As large as the parts, without the rest of the memory behind them.
        self.features, self.target = features[self.own].clone().requires_grad_(), target[self.own].clone()
        own_weight = weight[self.shard].clone()
        if name == OURS:
            module = ClassParallelMarginLoss(case.dimensions, case.classes, MARGIN, SCALE, backbone_gradients="sum")
            with torch.no_grad():
                module.weight.to_local().copy_(own_weight)
            self.weight, self.loss = module.weight, lambda: module(self.features, self.target)
        else:
            self.weight = own_weight.requires_grad_()
            function = all_logits_loss if name == PLAIN else fewshot_ext.margin_cosine_loss
            self.loss = lambda: function(self.features, self.weight, self.target, MARGIN, SCALE)

    def __call__(self) -> Tensor:
        self.drop_gradients()
        loss = self.loss()
        loss.backward()
        return loss.detach()

    def drop_gradients(self) -> None:
        self.features.grad = self.weight.grad = None

    def error(self) -> float:
        """Largest relative error, in norm, of loss and gradients against one process in float64."""
        whole = Step(self.case, ONE, 1)
        features, weight = (x.detach().double().requires_grad_() for x in (whole.features, whole.weight))
        expected = fewshot_ext.margin_cosine_loss(features, weight, whole.target, MARGIN, SCALE)
        expected.backward()
        loss, gradient = self(), self.weight.grad
        pairs = (
            (loss, expected.detach()),
            (self.features.grad, features.grad[self.own]),
            (gradient.to_local() if hasattr(gradient, "to_local") else gradient, weight.grad[self.shard]),
        )
        return max(float((got.double() - right).norm() / right.norm()) for got, right in pairs)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, batches: Batches) -> Tensor:
        ctx.batches = batches
        return batches.gather(rows)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.batches.scatter_sum(gradient), None


class _Sum(torch.autograd.Function):
    """Over the ranks; the loss made of it is one for all of them, so that its gradient is each term's."""

    @staticmethod
    def forward(ctx, term: Tensor) -> Tensor:
        total = term.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


def all_logits_loss(features: Tensor, weight: Tensor, target: Tensor, margin: float, scale: float) -> Tensor:
    """Equation 8 as it reads, with the classes divided among the ranks."""
    batches = Batches([len(features)] * dist.get_world_size(), dist.group.WORLD)
    features, target = _Gather.apply(features, batches), batches.gather(target)
    logits = scale * F.linear(F.normalize(features), F.normalize(weight))
    local = target - dist.get_rank() * len(weight)
    owned = (local >= 0) & (local < len(weight))
    column = local.clamp(0, len(weight) - 1)[:, None]
    logits = logits.scatter_add(1, column, torch.where(owned, -scale * margin, 0.0)[:, None].to(logits.dtype))
    largest = logits.detach().amax(dim=1)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    total = _Sum.apply((logits - largest[:, None]).exp().sum(dim=1))
    at_target = _Sum.apply(logits.gather(1, column)[:, 0].where(owned, torch.zeros(())))
    return (largest + total.log() - at_target).mean()


class Ranks:
    """Processes of one group; each keeps one step between calls."""

    def __init__(self, processes: list[ProcessPoolExecutor]) -> None:
        self._processes = processes

    def __call__(self, function: Callable[..., object], *arguments: object) -> list[object]:
        return [call.result() for call in [each.submit(function, *arguments) for each in self._processes]]


@contextmanager
def started(count: int, threads: int) -> Iterator[Ranks]:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            ProcessPoolExecutor(1, context, _join_group, (rank, count, str(Path(folder) / "store"), threads))
            for rank in range(count)
        ]
        try:
            yield Ranks(processes)
        finally:
            for process in processes:
                process.shutdown()


_steps: dict[str, Step] = {}  # of a rank


def _join_group(rank: int, count: int, store: str, threads: int) -> None:
    torch.set_num_threads(threads)
    if count > 1:
        store = dist.FileStore(store, count)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=TIMEOUT)


def _prepare(case: Case, name: str, ranks: int) -> float:
    _steps[name] = Step(case, name, ranks)
    return _steps[name].error()


def _run(name: str) -> None:
    _steps[name]()
    _steps[name].drop_gradients()


def _memory_step(case: Case, name: str, ranks: int) -> Callable[[], None]:
    _steps[name] = Step(case, name, ranks)
    return lambda: _run(name)


def memory(case: Case, name: str, ranks: int, threads: int) -> float | None:
    """MiB of the rank that takes the most."""
    with started(ranks, threads) as of_each:
        peaks = of_each(harness.peak_memory_here, threads, _memory_step, case, name, ranks)
    if None in peaks:
        return None
    gradients = 4 * case.dimensions * (case.samples + case.classes) // ranks
    return (max(peaks) - gradients) / 2**20


def main() -> None:
    options = harness.parser(__doc__.splitlines()[0], results="class_parallel_cpu")
    options.add_argument("--classes", type=int, default=100_000, help="an even number of them")
    options.set_defaults(threads=1)
    options = options.parse_args()
    if options.classes < 2 or options.classes % RANKS:
        sys.exit(f"--classes: expected an even number above 0, got {options.classes}")
    torch.set_num_threads(options.threads)
    case = Case(512, 512, options.classes)
    ranks_of = {OURS: RANKS, PLAIN: RANKS, ONE: 1}
    with started(RANKS, options.threads) as two, started(1, options.threads) as one:
        of_each = {name: two if ranks > 1 else one for name, ranks in ranks_of.items()}
        errors = {name: max(of_each[name](_prepare, case, name, ranks)) for name, ranks in ranks_of.items()}
        wrong = {name: error for name, error in errors.items() if not error < 1e-4}
        if wrong:
            sys.exit(f"wrong, so that there is nothing to time: {wrong}")
        timings = harness.interleaved(
            {name: lambda name=name: of_each[name](_run, name) for name in ranks_of}, seconds=options.seconds
        )
    machine = harness.machine()
    rows, table = [], []
    for name, ranks in ranks_of.items():
        timing, extra = timings[name], memory(case, name, ranks, options.threads)
        rows.append(
            {
                "samples": case.samples,
                "dimensions": case.dimensions,
                "classes": case.classes,
                "contender": name,
                "ranks": ranks,
                "p20_ms": f"{timing.p20:.4f}",
                "p50_ms": f"{timing.p50:.4f}",
                "p80_ms": f"{timing.p80:.4f}",
                "turns": timing.turns,
                "times_fewshot_ext": f"{timing.p50 / timings[OURS].p50:.3f}",
                "extra_memory_mib_per_rank": "" if extra is None else f"{extra:.1f}",
                "relative_error": f"{errors[name]:.1e}",
                **machine,
            }
        )
        table.append(
            [
                name,
                harness.significant(timing.p50),
                f"{timing.p50 / timings[OURS].p50:.2f}",
                "" if extra is None else f"{extra:.0f}",
                f"{errors[name]:.0e}",
            ]
        )
    text = (
        f"`{harness.command()}` on {machine['device']}, threads a process: {machine['threads']}, torch "
        f"{machine['torch']}; N = {case.samples}, D = {case.dimensions}, C = {case.classes}, float32, forward + "
        "backward, median in ms, memory of a rank in MiB beyond its gradients.\n\n"
        + harness.markdown_table(HEADER, table)
    )
    harness.report(text, rows, options.save)


HEADER = ["contender", "time", f"times {OURS}", "memory a rank", "relative error"]

if __name__ == "__main__":
    main()
