"""Learning-rate schedules: warm-up and cosine of the negative-margin paper, SGD in steps of DeepEMD."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from fewshot_ext.training.config import PreTrainingConfig
    from fewshot_ext.training.meta_config import MetaTrainingConfig


def warmup_cosine(
    step: int, *, total_steps: int, warmup_steps: int, peak: float, minimum: float, warmup_multiplier: float
) -> float:
    """Learning rate at ``step``: a linear warm-up to ``peak``, then half a cosine down to ``minimum``.

    Args:
        step: optimizer steps taken so far; beyond ``total_steps`` the rate stays at ``minimum``.
        total_steps: length of the whole schedule.
        warmup_steps: length of the linear part; 0 starts at ``peak``.
        peak: rate at the end of the warm-up.
        minimum: rate at ``total_steps``.
        warmup_multiplier: the first rate is ``peak / warmup_multiplier``.

    Example:
        >>> warmup_cosine(0, total_steps=100, warmup_steps=25, peak=1.6, minimum=0.0, warmup_multiplier=16.0)
        0.1
    """
    if step < warmup_steps:
        return peak * (1 + (warmup_multiplier - 1) * step / warmup_steps) / warmup_multiplier
    decay_steps = max(total_steps - warmup_steps, 1)
    progress = min((step - warmup_steps) / decay_steps, 1.0)
    return minimum + (peak - minimum) * (1 + math.cos(math.pi * progress)) / 2


class WarmupCosine:
    """:func:`warmup_cosine` as a factor of ``LambdaLR``, whose state keeps when a step's rate is set.

    Args:
        settings: the keywords of :func:`warmup_cosine`.
    """

    # The official negative-margin code sets a step's rate after the step: the first two steps have the first rate.
    delay = 1

    def __init__(self, **settings: float) -> None:
        self._settings = settings

    def __call__(self, step: int) -> float:
        return warmup_cosine(max(step - self.delay, 0), **self._settings)

    @classmethod
    def upgrade(cls, state: dict[str, Any]) -> None:
        """Has the schedule of a run of version 0.1, which set a step's rate before the step, go on as it began."""
        if state.get("lr_lambdas") == [None]:
            state["lr_lambdas"] = [{"delay": 0}]


def sgd_in_steps(
    parameters: Iterable[nn.Parameter], config: "PreTrainingConfig | MetaTrainingConfig"
) -> dict[str, Any]:
    """SGD whose rate falls every ``decay_epochs`` epochs, as Lightning takes it from ``configure_optimizers``."""
    optimizer = torch.optim.SGD(
        parameters,
        lr=config.learning_rate,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, config.decay_epochs, config.decay)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}
