"""Episode fine-tuning in plain PyTorch with all episodes at once: what a good user of torch would write."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """Of ``fewshot_ext.finetune_episodes``, with cosines."""

    scale: float = 5.0
    margin: float = 0.0
    batch_size: int = 4
    lr: float = 0.01
    momentum: float = 0.9
    dampening: float = 0.9
    weight_decay: float = 1e-3


PROTOCOL = Settings()
Step = Callable[[Tensor, Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]


def step(
    images: Tensor, truth: Tensor, weight: Tensor, velocity: Tensor, first: bool, of: Settings = PROTOCOL
) -> tuple[Tensor, Tensor]:
    """Unit images ``[E, B, D]``, one-hot labels ``[E, B, way]`` -> the next weight and velocity ``[E, way, D]``."""
    kept, taken = (0.0, 1.0) if first else (of.momentum, 1 - of.dampening)
    inverse_norm = weight.norm(dim=-1).clamp_min(1e-12).reciprocal()  # [E, way]
    scores = torch.bmm(images, weight.mT) * inverse_norm.unsqueeze(1)
    error = (torch.softmax(of.scale * (scores - of.margin * truth), -1) - truth) * (of.scale / images.shape[1])
    error = error * inverse_norm.unsqueeze(1)
    # d cos(w, x) / d w = (x - cos(w, x) w / |w|) / |w| for unit x: its second part decays w.
    shrink = of.weight_decay - ((error * scores).sum(1) * inverse_norm).unsqueeze(-1)
    velocity = torch.baddbmm(velocity, error.mT, images, beta=kept, alpha=taken) + taken * shrink * weight
    return weight - of.lr * velocity, velocity


def batched(
    support: Tensor,
    support_target: Tensor,
    query: Tensor,
    weight: Tensor,
    order: Tensor,
    step: Step = step,
    batch_size: int = PROTOCOL.batch_size,
) -> Tensor:
    """The softmax gradient is written out rather than recorded, and a step is two batched products."""
    support, query = (torch.nn.functional.normalize(features, dim=-1) for features in (support, query))
    one_hot = torch.nn.functional.one_hot(support_target, weight.shape[1]).to(support.dtype)
    episodes = torch.arange(len(support), device=support.device).unsqueeze(1)
    velocity, first = torch.zeros_like(weight), True
    for minibatch in (batch for batches in order.unbind(1) for batch in batches.split(batch_size, dim=1)):
        weight, velocity = step(support[episodes, minibatch], one_hot[episodes, minibatch], weight, velocity, first)
        first = False
    return torch.bmm(query, torch.nn.functional.normalize(weight, dim=-1).mT)
