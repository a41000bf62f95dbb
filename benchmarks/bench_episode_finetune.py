"""Episode fine-tuning on the CPU, against the loop of torch.optim.SGD and plain PyTorch with all episodes at once.

    python benchmarks/bench_episode_finetune.py

The protocol of Negative Margin Matters in float32: 600 episodes of 5 classes and 16 queries a class, 100 passes in
minibatches of 4. Every contender gets the same initial classifiers and orders and is compared with the loop in float64
before anything is timed. The peers are slow: a call of them trains a few of the episodes, and its time is scaled up.
The loop has one thread, for with more of them its small tensors only wait.
The floor reads every feature once, by torch's own sum. A last column draws classifiers and orders too.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import harness
import torch
from episode_finetune_peers import batched, step
from torch import Tensor

import fewshot_ext
from fewshot_ext import reference

EPISODES, WAY, QUERIES, PASSES = 600, 5, 16, 100
LOOPED, TOGETHER = 1, 100  # episodes of a call of the loop, and of the plain versions
JUDGED = 2  # episodes that are compared with the loop in float64
WRONG = 1e-5  # largest difference of a cosine

OURS, DRAWN, LOOP, BATCHED, COMPILED, FLOOR = (
    "fewshot_ext",
    "fewshot_ext with draws",
    "torch.optim.SGD",
    "plain PyTorch, 100 episodes at once",
    "its step by torch.compile",
    "floor",
)


@dataclass(frozen=True)
class Case:
    shot: int
    dimensions: int


CASES = [Case(shot, dimensions) for dimensions in (512, 640, 1600) for shot in (1, 5)]


class Episodes:
    """Features as a network leaves them, not negative, around the centers of their classes."""

    def __init__(self, case: Case, episodes: int = EPISODES) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, case.dimensions, generator=generator)

        centers = normal(episodes, WAY, 1)
        self.support, self.query = (
            (centers + normal(episodes, WAY, count)).relu().flatten(1, 2) for count in (case.shot, QUERIES)
        )
        self.target = torch.arange(WAY).repeat_interleave(case.shot).expand(episodes, -1)
        seed = torch.zeros(1, dtype=torch.int64)
        self.weight, self.order = torch.ops.fewshot_ext.draw_episodes(self.support, seed, WAY, PASSES)

    def first(self, count: int) -> dict[str, Tensor]:
        return {
            "support": self.support[:count],
            "support_target": self.target[:count],
            "query": self.query[:count],
            "weight": self.weight[:count],
            "order": self.order[:count],
        }

    def read(self) -> Tensor:
        return self.support.sum() + self.query.sum() + self.weight.sum()

    def with_draws(self) -> Tensor:
        return fewshot_ext.finetune_episodes(self.support, self.target, self.query, way=WAY)


@dataclass(frozen=True)
class Contender:
    function: Callable[..., Tensor]
    episodes: int
    threads: int | None = None  # None: all

    def call(self, episodes: Episodes) -> Callable[[], Tensor]:
        arguments, threads = episodes.first(self.episodes), self.threads or torch.get_num_threads()

        def call() -> Tensor:
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                return self.function(**arguments)
            finally:
                torch.set_num_threads(before)

        return call


def contenders() -> dict[str, Contender]:
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=False)
    return {
        OURS: Contender(fewshot_ext.finetune_episodes, EPISODES),
        LOOP: Contender(reference.finetune_episodes, LOOPED, threads=1),
        BATCHED: Contender(batched, TOGETHER),
        COMPILED: Contender(partial(batched, step=compiled), TOGETHER),
    }


def check(episodes: Episodes, named: dict[str, Contender]) -> dict[str, float]:
    """Largest difference of a score from the loop in float64; refuses to time a wrong contender."""
    judged = episodes.first(JUDGED)
    double = {name: x.double() if x.is_floating_point() else x for name, x in judged.items()}
    exact = reference.finetune_episodes(**double)
    errors = {}
    for name, contender in named.items():
        scores = contender.call(episodes)()[:JUDGED]
        errors[name] = float((scores.double() - exact[: len(scores)]).abs().max())
        if not errors[name] <= WRONG:
            sys.exit(f"{name} is wrong by {errors[name]:.2e}: nothing to time")
    return errors


HEADER = ["shot, D", LOOP, BATCHED, COMPILED, OURS, DRAWN, FLOOR, "faster than the loop", "faster than torch.compile"]


def main() -> None:
    options = harness.parser(__doc__.splitlines()[0], results="episode_finetune_cpu").parse_args()
    torch.set_num_threads(options.threads)
    machine = harness.machine()
    rows: list[dict[str, object]] = []
    table = []
    for case in CASES:
        episodes, named = Episodes(case), contenders()
        errors = check(episodes, named)
        calls = {name: contender.call(episodes) for name, contender in named.items()}
        calls |= {DRAWN: episodes.with_draws, FLOOR: episodes.read}
        # The slow ones would leave the fast ones a few turns: each group has its own, ours in both.
        slow = harness.interleaved({name: calls[name] for name in named}, seconds=options.seconds / 2, turns=3)
        fast = harness.interleaved({name: calls[name] for name in (OURS, DRAWN, FLOOR)}, seconds=options.seconds / 2)
        timings = {**slow, **fast}
        scale = {name: EPISODES / named[name].episodes if name in named else 1.0 for name in timings}
        medians = {name: scale[name] * timing.p50 for name, timing in timings.items()}
        against = {name: medians[name] / slow[OURS].p50 for name in (LOOP, BATCHED, COMPILED)}
        for name, timing in timings.items():
            row: dict[str, object] = {"shot": case.shot, "dimensions": case.dimensions, "contender": name}
            row.update({f"{part}_ms": f"{scale[name] * getattr(timing, part):.3f}" for part in ("p20", "p50", "p80")})
            row.update(turns=timing.turns, episodes_a_call=round(EPISODES / scale[name]))
            row["times_fewshot_ext"] = f"{against.get(name, medians[name] / fast[OURS].p50):.2f}"
            row["largest_error"] = f"{errors[name]:.1e}" if name in errors else ""
            rows.append({**row, **machine})
        cells = [harness.significant(medians[name]) for name in (LOOP, BATCHED, COMPILED, OURS, DRAWN, FLOOR)]
        table.append([f"{case.shot}, {case.dimensions}", *cells, f"{against[LOOP]:.0f}", f"{against[COMPILED]:.1f}"])
        print(harness.markdown_table(HEADER, table[-1:]), flush=True)
    text = (
        f"`{harness.command()}` on {machine['device']}, {machine['threads']} threads, torch {machine['torch']}; "
        f"float32, {EPISODES} episodes of {WAY} classes and {QUERIES} queries a class, {PASSES} passes, median in ms. "
        f"Of the loop {LOOPED} episode is timed, on one thread, and of the plain versions {TOGETHER}, scaled up.\n\n"
        f"{harness.markdown_table(HEADER, table)}"
    )
    harness.report(text, rows, options.save)


if __name__ == "__main__":
    main()
