"""Accuracies of many runs: means over seeds and episodes, and differences on the same episodes."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewshot_ext.evaluation import mean_and_interval

Row = Mapping[str, Any]


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows that have these values.

    Example:
        >>> select([{"seed": 0, "shot": 1}, {"seed": 1, "shot": 1}], seed=1)
        [{'seed': 1, 'shot': 1}]
    """
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def values(rows: Iterable[Row], key: str) -> list[Any]:
    """The different values of a column, in rising order."""
    return sorted({row[key] for row in rows})


def shots(rows: Iterable[Row]) -> list[int]:
    """The numbers of shots, in rising order; 0 comes last, which is the classifier of the training without episodes."""
    return sorted({row["shot"] for row in rows}, key=lambda shot: shot or math.inf)


def setting(row: Row, *, way: bool = False) -> str:
    """What was classified, in words; ``way`` with the number of classes.

    Example:
        >>> setting({"way": 5, "shot": 1}), setting({"way": 5, "shot": 1}, way=True)
        ('1-shot', '5-way 1-shot')
        >>> setting({"way": 64, "shot": 0}), setting({"way": 64, "shot": 0}, way=True)
        ('all 64', 'all 64 classes')
    """
    if not row["shot"]:
        return f"all {row['way']} classes" if way else f"all {row['way']}"
    return f"{row['way']}-way {row['shot']}-shot" if way else f"{row['shot']}-shot"


def per_episode(row: Row) -> Tensor:
    """``[episodes]`` float64, in percent; of a row with shot 0 ``[classes]``."""
    return torch.tensor(row["correct"], dtype=torch.float64) * (100 / row["queries"])


def mean_accuracy(rows: Sequence[Row]) -> tuple[float, float]:
    """Mean over the episodes of all rows and half-width of its 95 % interval, in percent."""
    return mean_and_interval(torch.cat([per_episode(row) for row in rows]))


@dataclass(frozen=True)
class Difference:
    """How far one arm lies above another on the same seeds and episodes, in percentage points.

    Attributes:
        mean: over the episodes of all seeds.
        interval: half-width of its 95 % interval; it covers the draw of episodes, not that of weights and batches.
        by_seed: the mean of each seed, which shows how far training runs scatter.
    """

    mean: float
    interval: float
    by_seed: tuple[float, ...]


def difference(rows: Sequence[Row], others: Sequence[Row]) -> Difference:
    """``rows`` less ``others``, paired by seed and episode; seeds that only one of them has are left out.

    Raises:
        ValueError: no seed is in both.
    """
    ours, theirs = ({row["seed"]: per_episode(row) for row in side} for side in (rows, others))
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        raise ValueError("rows and others: expected a shared seed, got none")
    paired = [ours[seed] - theirs[seed] for seed in seeds]
    return Difference(*mean_and_interval(torch.cat(paired)), tuple(part.mean().item() for part in paired))
