"""The few-shot protocol: features once, then accuracy over many episodes with its interval."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fewshot_ext._checks import check_at_least, check_finite, check_fraction, check_positive
from fewshot_ext.data import Episodes
from fewshot_ext.evaluation.finetune import finetune_episodes

# Classifiers and momenta of this many 5-way episodes at D = 256 fill about 1.3 MB: they stay in a core's
# cache.
_EPISODES_AT_ONCE = 100


@dataclass(frozen=True)
class ProtocolConfig:
    """Which episodes are drawn.

    Args:
        episodes: how many for each number of shots.
        way: classes an episode.
        shots: support images a class; each value is an evaluation of its own.
        queries: query images a class.

    Raises:
        ValueError: a value below 1, no shots, or a number of shots given twice.
    """

    episodes: int = 600
    way: int = 5
    shots: tuple[int, ...] = (1, 5)
    queries: int = 16

    def __post_init__(self) -> None:
        check_at_least("episodes", self.episodes, 1)
        check_at_least("way", self.way, 2)
        check_at_least("queries", self.queries, 1)
        if not self.shots or len(set(self.shots)) < len(self.shots):
            raise ValueError(f"shots must name at least one number of shots, and none twice, got {list(self.shots)}")
        for shot in self.shots:
            check_at_least("shots", shot, 1)


@dataclass(frozen=True)
class FineTuningConfig:
    """Fine-tuning of the episode's classifier, by default the official protocol; see ``finetune_episodes``.

    Args:
        scale: multiplies the similarities before the softmax.
        margin: subtracted from the similarity with the true class (the paper's Fig. 9 varies it).
        steps: passes over the support set.
        batch_size: support images a minibatch.
        lr: learning rate of SGD.
        momentum: of SGD.
        dampening: of SGD.
        weight_decay: of SGD.

    Raises:
        ValueError: a value out of range; the message names it.
    """

    scale: float = 5.0
    margin: float = 0.0
    steps: int = 100
    batch_size: int = 4
    lr: float = 0.01
    momentum: float = 0.9
    dampening: float = 0.9
    weight_decay: float = 1e-3

    def __post_init__(self) -> None:
        check_positive("scale", self.scale)
        check_finite("margin", self.margin)
        check_at_least("steps", self.steps, 1)
        check_at_least("batch_size", self.batch_size, 1)
        check_positive("lr", self.lr)
        check_fraction("momentum", self.momentum)
        check_fraction("dampening", self.dampening)
        check_at_least("weight_decay", self.weight_decay, 0)


def extract_features(model: nn.Module, images: Tensor, *, batch_size: int = 1024) -> Tensor:
    """Features of all images, in evaluation mode and without gradients.

    Args:
        model: maps ``[B, C, H, W]`` uint8 to ``[B, D]``, as ``PreTraining`` does; its training mode is
            restored.
        images: ``[N, C, H, W]`` uint8, on any device.
        batch_size: images a forward pass.

    Returns:
        ``[N, D]`` float32 on the device of the model.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            return torch.cat([model(batch.to(device)).float() for batch in images.split(batch_size)])
    finally:
        model.train(was_training)


def episode_accuracies(
    features: Tensor,
    episodes: Episodes,
    *,
    similarity: Literal["cosine", "softmax"] = "cosine",
    config: FineTuningConfig = FineTuningConfig(),
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Accuracy of fine-tuned classifiers on the queries of each episode.

    Args:
        features: ``[N, D]``, one row an image.
        episodes: index tensors into the rows of ``features``.
        similarity: that of the pre-training.
        config: see ``FineTuningConfig``.
        seed: decides initial classifiers and the order of the passes: two backbones evaluated with the same
            seed and episodes meet the same conditions, so their difference may be taken episode by episode.
        on_progress: called with the number of episodes done so far.

    Returns:
        ``[E]`` float64 in [0, 1], on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    way, shot = episodes.support.shape[1:]
    accuracies, done = [], 0
    for support, query in zip(
        episodes.support.to(features.device).split(_EPISODES_AT_ONCE),
        episodes.query.to(features.device).split(_EPISODES_AT_ONCE),
        strict=True,
    ):
        target = torch.arange(way, device=features.device)
        scores = finetune_episodes(
            features[support.flatten(1)],
            target.repeat_interleave(shot).expand(len(support), -1),
            features[query.flatten(1)],
            similarity=similarity,
            generator=generator,
            **asdict(config),
        )
        truth = target.repeat_interleave(query.shape[2])
        accuracies.append((scores.argmax(-1) == truth).double().mean(1).cpu())
        done += len(support)
        if on_progress:
            on_progress(done)
    return torch.cat(accuracies)


def mean_and_interval(values: Tensor) -> tuple[float, float]:
    """Mean over episodes and the half-width of its 95 % interval, 1.96 sigma / sqrt(E); 0 where E = 1.

    Example:
        >>> mean_and_interval(torch.tensor([0.5, 0.5, 0.5]))
        (0.5, 0.0)
    """
    if len(values) < 2:
        return values.mean().item(), 0.0
    return values.mean().item(), 1.96 * values.std(correction=0).item() / math.sqrt(len(values))
