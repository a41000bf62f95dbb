"""Episode fine-tuning on a GPU against plain PyTorch with all episodes at once; run by gpu_report.py.

The protocol of bench_episode_finetune.py: 600 episodes, 5 classes, 16 queries a class, 100 passes in minibatches of 4,
in float32, with classifiers and orders given. The loop of torch.optim.SGD takes minutes for them and is left out.
"""

from collections.abc import Callable
from functools import partial

import gpu_comparison
import torch
from bench_episode_finetune import COMPILED, EPISODES, OURS, PASSES, QUERIES, WAY
from episode_finetune_peers import batched, step
from gpu_comparison import Comparison, Contender, Goal, ahead, copy_ms, floor_text, within
from torch import Tensor

import fewshot_ext

PLAIN = "plain PyTorch, all episodes at once"
SPAN, DIRECT = f"{OURS} (span)", f"{OURS} (direct)"
TOLERANCE = 1e-4  # largest relative error of the scores, in norm
GOAL_JOB, GOALS_MS = "5,512", (5.0, 1.5)
QUICK_EPISODES, QUICK_PASSES = 8, 3


def jobs(quick: bool) -> list[str]:
    """shot,D: the one with a goal first."""
    return [GOAL_JOB] if quick else [GOAL_JOB, "1,512", "5,640", "5,1600", "1,1600"]


def title(job: str) -> str:
    shot, dimensions = job.split(",")
    return f"{WAY}-way {shot}-shot, D = {dimensions}"


class Inputs:
    def __init__(self, job: str, quick: bool, device, generator: torch.Generator) -> None:
        shot, dimensions = map(int, job.split(","))
        episodes, passes = (QUICK_EPISODES, QUICK_PASSES) if quick else (EPISODES, PASSES)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dimensions, generator=generator, device=device)

        centers = normal(episodes, WAY, 1)
        support, query = ((centers + normal(episodes, WAY, count)).relu().flatten(1, 2) for count in (shot, QUERIES))
        target = torch.arange(WAY, device=device).repeat_interleave(shot).repeat(episodes, 1)
        seed = torch.randint(2**62, (1,), generator=generator, device=device).cpu()
        weight, order = torch.ops.fewshot_ext.draw_episodes(support, seed, WAY, passes)
        self.tensors = support, target, query, weight, order

    def run(self, function: Callable[..., Tensor]) -> tuple[Tensor]:
        return (function(*self.tensors),)

    def exact(self, variant: None) -> tuple[Tensor]:
        return (batched(*(x.double() if x.is_floating_point() else x for x in self.tensors)),)

    def nbytes(self) -> int:
        """Every input read and every score written once."""
        support, _, query, *_ = self.tensors
        return sum(tensor.nbytes for tensor in self.tensors) + support.itemsize * query.shape[0] * query.shape[1] * WAY


def ours(support: Tensor, target: Tensor, query: Tensor, weight: Tensor, order: Tensor) -> Tensor:
    passes = order.shape[1]
    return fewshot_ext.finetune_episodes(support, target, query, weight=weight, order=order, steps=passes)


def contenders(device: str) -> list[Contender]:
    found = []
    if device == "cuda":
        for name, form in ((SPAN, "span"), (DIRECT, "direct")):
            forced = {"FEWSHOT_EXT_EPISODE_FINETUNE_FORM": form}
            found.append(Contender(name, ours, environment=forced))
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=False)
    return [
        *found,
        Contender(OURS, ours),
        Contender(PLAIN, batched),
        Contender(COMPILED, partial(batched, step=compiled), compiles=True),
    ]


def measure(job: str, bench) -> list[dict]:
    generator = gpu_comparison.generator(bench.device)
    torch.set_float32_matmul_precision("highest")
    # One set fills more than a cache.
    sets = [Inputs(job, bench.quick, bench.device.device, generator) for _ in range(2)]
    comparison = Comparison(bench, sets, TOLERANCE)
    outcomes = [comparison.prepare(contender) for contender in contenders(bench.device.name)]
    comparison.time(outcomes, {})
    floor = copy_ms(sets[0].nbytes(), bench.rates)
    common = {"case": title(job), "input_sets": len(sets)}
    return list(gpu_comparison.rows_of(outcomes, OURS, common, {"floor_ms": floor}))


TEXT = f"""Medians of one call for {EPISODES} episodes, {QUERIES} queries a class, {PASSES} passes in minibatches
of 4. {gpu_comparison.KINDS_TEXT}
The floor reads every input and writes every score once, at the rate of a large copy.

"""


def caption(rows: list[dict]) -> str:
    return f"Floor {floor_text(rows[0])}."


def goals(rows: list[dict]) -> list[Goal]:
    """For an H100; torch's own loop takes a minute for the same on a core."""
    case = title(GOAL_JOB)
    return [
        *(within(rows, case, OURS, limit, "ms", f"{EPISODES} episodes in at most") for limit in GOALS_MS),
        ahead(rows, case, OURS, (PLAIN, COMPILED), "ms", "plain PyTorch and torch.compile"),
    ]
