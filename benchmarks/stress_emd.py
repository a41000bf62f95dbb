"""Hammers the Earth Mover's Distance with random and adversarial problems, and judges each by its certificate.

    python -m benchmarks.stress_emd --minutes 5

Prints how many problems it tried, the worst figures of their certificates, and the failures: problems whose solver gave
up, whose certificate does not hold, or that have no solution and got one. The certificate's error is that of the value,
relative to the optimum. A fifth of the calls run in the mode that flushes denormal numbers. Each failure is saved, and
the exit status is 1 if there is any.
"""

import argparse
import collections
import sys
import time
from pathlib import Path

import torch

import fewshot_ext
from fewshot_ext.ops.emd import CERTIFICATE_TOLERANCE
from fewshot_ext.ops.emd_certificate import Certificate, certificate

from .emd_problems import EXTREME_FAMILIES, FAMILIES, Instances

CELLS = 1 << 18  # of all costs of one call
ACCURACY = {torch.float32: 1e-6, torch.float64: 1e-12}  # of the value, relative to the optimum
EXTREME_CELLS = 1 << 12  # likewise, where certificates may need integers
POINTS = 300  # of one side, at most


def draw(generator: torch.Generator) -> tuple[str, Instances]:
    """A batch of a family, roughened: scaled, rounded, thinned out, and in another order of memory."""

    def chance(probability: float) -> bool:
        return float(torch.rand((), generator=generator)) < probability

    def exponent(low: float, high: float) -> float:
        return float(10 ** (low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64)))

    families = EXTREME_FAMILIES if chance(0.5) else FAMILIES
    names = list(families)
    name = names[int(torch.randint(len(names), (), generator=generator))]
    highest = float(torch.tensor(float(POINTS if chance(0.1) else 40)).log10())
    n, m = (round(exponent(0, highest)) for _ in range(2))
    problems = max(1, min(2000, (EXTREME_CELLS if families is EXTREME_FAMILIES else CELLS) // (n * m)))
    cost, supply, demand = families[name](problems, n, m, generator)
    if families is EXTREME_FAMILIES:
        return name, (cost, supply, demand)
    if chance(0.2):
        cost = (cost * 8).round() / 8
    if chance(0.2):
        # A point of a side of several keeps its mass, or a problem would have none.
        supply, demand = (side * (torch.rand(side.shape, generator=generator) < 0.5) for side in (supply, demand))
        supply[:, 0] += 1
        demand[:, -1] += 1
        demand = demand * (supply.sum(1) / demand.sum(1)).unsqueeze(1)
    if chance(0.3):
        cost = cost * exponent(-6, 6)
    if chance(0.3):
        mass = exponent(-6, 6)
        supply, demand = supply * mass, demand * mass
    if chance(0.3):
        cost = cost.mT.contiguous().mT
    return name, (cost, supply, demand)


def in_range(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In another dtype, with finite numbers well inside its range: sums and products of them are in it too."""
    most, least = torch.finfo(dtype).max ** 0.9, torch.finfo(dtype).smallest_normal ** 0.9
    return tensor.where(tensor.isinf(), tensor.clamp(-most, most)).where(tensor.abs() >= least, 0).to(dtype)


def completed(problem: Instances, result: fewshot_ext.EMD) -> tuple[Instances, fewshot_ext.EMD]:
    """A partial problem and its solution with what is not moved, on arcs to and from dummies that cost nothing: as the
    certificate takes partial problems."""
    rounding = 4 * torch.finfo(result.value.dtype).eps * problem[1].sum(1, keepdim=True).double()
    cost, supply, demand, value, flow, supply_dual, demand_dual = (part.double() for part in (*problem, *result))
    more = supply.sum(1, keepdim=True) - demand.sum(1, keepdim=True)
    stays, lacks = (supply - flow.sum(2)) * (more > 0), (demand - flow.sum(1)) * (more < 0)
    # What rounding leaves is no flow.
    stays, lacks = (part.where(part > rounding, 0) for part in (stays, lacks))
    pad = torch.nn.functional.pad
    flow = torch.cat([torch.cat([flow, stays.unsqueeze(2)], 2), pad(lacks, (0, 1)).unsqueeze(1)], 1)
    marginals = torch.cat([supply, (-more).clamp(min=0)], 1), torch.cat([demand, more.clamp(min=0)], 1)
    whole = fewshot_ext.EMD(value, flow, pad(supply_dual, (0, 1)), pad(demand_dual, (0, 1)))
    return (pad(cost, (0, 1, 0, 1)), *marginals), whole


class Tally:
    """Counts, and the worst figures of the certificates of one dtype."""

    def __init__(self, tolerance: float, accuracy: float) -> None:
        self.tolerance, self.accuracy = tolerance, accuracy
        self.problems = collections.Counter[str]()
        self.failures = 0
        self.worst = Certificate(*torch.zeros(5, dtype=torch.float64))

    def judge(self, family: str, problem: Instances, flush: bool) -> bool:
        self.problems[family] += len(problem[0])
        torch.set_flush_denormal(flush)
        try:
            result = fewshot_ext.emd(*problem, partial=family == "partial")
        except (RuntimeError, ValueError) as error:
            if family == "infeasible" and "no flow avoids the forbidden arcs" in str(error):
                return True
            print(f"{family} {list(problem[0].shape)} {problem[0].dtype}: {error}", flush=True)
            self.failures += 1
            return False
        finally:
            torch.set_flush_denormal(False)
        if family == "infeasible":
            print(f"{family} {list(problem[0].shape)} {problem[0].dtype}: solved", flush=True)
            self.failures += 1
            return False
        partial = family == "partial"
        if partial:
            problem, result = completed(problem, result)
        found = certificate(*problem, result, self.accuracy, partial=partial)
        failed = int((~found.holds(self.tolerance) | (found.error > self.accuracy)).sum())
        self.failures += failed
        low, high = torch.minimum, torch.maximum
        worse = zip((high, low, low, high, high), self.worst, found, strict=True)
        self.worst = Certificate(*(pick(old, part.min() if pick is low else part.max()) for pick, old, part in worse))
        return failed == 0

    def report(self, name: str) -> None:
        figures = ", ".join(f"{figure} {float(value):.1e}" for figure, value in self.worst._asdict().items())
        total = sum(self.problems.values())
        print(
            f"{name}: {total:,} problems, {self.failures} failures; worst {figures}; "
            f"tolerance {self.tolerance:g}, of the error {self.accuracy:g}"
        )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--minutes", type=float, default=5.0)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--output", type=Path, default=Path("emd_failures"), help="directory for problems that fail")
    arguments = options.parse_args()
    generator = torch.Generator().manual_seed(arguments.seed)
    tallies = {dtype: Tally(tolerance, ACCURACY[dtype]) for dtype, tolerance in CERTIFICATE_TOLERANCE.items()}
    end = time.monotonic() + 60 * arguments.minutes
    while time.monotonic() < end:
        family, exact = draw(generator)
        flush = float(torch.rand((), generator=generator)) < 0.2
        for dtype, tally in tallies.items():
            problem = tuple(in_range(tensor, dtype) for tensor in exact)
            if not tally.judge(family, problem, flush):
                arguments.output.mkdir(parents=True, exist_ok=True)
                path = arguments.output / f"{family}_{sum(tally.problems.values())}_{str(dtype)[6:]}.pt"
                torch.save(dict(zip(("cost", "supply", "demand"), problem, strict=True)), path)
                print(f"saved {path}", flush=True)
    for dtype, tally in tallies.items():
        tally.report(str(dtype))
    families = sum((tally.problems for tally in tallies.values()), collections.Counter[str]())
    print("by family: " + ", ".join(f"{name} {count:,}" for name, count in sorted(families.items())))
    failures = sum(tally.failures for tally in tallies.values())
    print(f"{sum(families.values()):,} problems, {failures} failures")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
