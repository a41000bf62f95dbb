"""The few-shot protocol: features once, then accuracy over many episodes with its interval."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from fewshot_ext._validation import check_count, check_counts, plain_numbers
from fewshot_ext.data import Episodes
from fewshot_ext.heads.vectors import HEADS, Head
from fewshot_ext.models.matching import check_finite_maps

# Features are copied for their episodes: few of them at a time keep the copies small and let the caller draw progress.
_EPISODES_AT_ONCE = 100
# Copies of maps are large: much more than this is slow to allocate, much less lets few episodes of DeepEMD with several
# shots advance together.
_FEATURE_BYTES_AT_ONCE = 2**26


@dataclass(frozen=True)
class ProtocolConfig:
    """Which episodes are drawn.

    Args:
        episodes: how many for each number of shots; one number for all, or one for each.
        way: classes an episode.
        shots: support images a class; each value is an evaluation of its own.
        queries: query images a class.
        open_set: further classes of each episode that have queries and no support images.

    Raises:
        ValueError: a value below 1, a negative ``open_set``, no shots, a number of shots given twice, or numbers of
            episodes for other shots.

    Example:
        >>> ProtocolConfig(episodes=(5000, 600), shots=(1, 5)).episodes_by_shot
        {1: 5000, 5: 600}
    """

    episodes: int | tuple[int, ...] = 600
    way: int = 5
    shots: tuple[int, ...] = (1, 5)
    queries: int = 16
    open_set: int = 0

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_count("way", self.way, 2)
        check_count("queries", self.queries, 1)
        check_count("open_set", self.open_set, 0)
        check_counts("shots", self.shots, 1)
        if not self.shots or len(set(self.shots)) < len(self.shots):
            raise ValueError(f"shots: expected at least one number of shots, and none twice, got {list(self.shots)}")
        if isinstance(self.episodes, tuple):
            check_counts("episodes", self.episodes, 1)
            if len(self.episodes) != len(self.shots):
                raise ValueError(
                    f"episodes: expected one number, or one for each of {list(self.shots)} shots, "
                    f"got {list(self.episodes)}"
                )
        else:
            check_count("episodes", self.episodes, 1)

    @property
    def episodes_by_shot(self) -> dict[int, int]:
        """The number of episodes for each number of shots."""
        counts = self.episodes if isinstance(self.episodes, tuple) else (self.episodes,) * len(self.shots)
        return dict(zip(self.shots, counts, strict=True))


def extract_features(
    model: nn.Module,
    images: Tensor,
    *,
    batch_size: int = 1024,
    dtype: torch.dtype = torch.float32,
    on_progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Features of all images, in evaluation mode and without gradients.

    Args:
        model: maps ``[B, C, H, W]`` uint8 to ``[B, D]``, as ``PreTraining`` does, or to maps ``[B, P, D]`` of P local
            features, as ``fewshot_ext.models.FCN`` does; its training mode is restored.
        images: ``[N, C, H, W]`` uint8, N >= 1, on any device.
        batch_size: images a forward pass.
        dtype: of what is returned.
        on_progress: called with the number of images done so far.

    Returns:
        ``[N, D]`` or ``[N, P, D]`` on the device of the model. They are written where they stay: nothing but one
        batch is there twice.
    """
    batch_size = check_count("batch_size", batch_size, 1)
    tensor = next(chain(model.parameters(), model.buffers()), images)
    was_training = model.training
    model.eval()
    features, done = None, 0
    try:
        with torch.inference_mode():
            for batch in images.split(batch_size):
                part = model(batch.to(tensor.device))
                if features is None:
                    features = part.new_empty(len(images), *part.shape[1:], dtype=dtype)
                features[done : done + len(part)] = part
                done += len(batch)
                if on_progress:
                    on_progress(done)
            return features
    finally:
        model.train(was_training)


def episode_accuracies(features: Tensor, episodes: Episodes, **settings) -> Tensor:
    """Accuracy of a head on the queries of each episode.

    Args:
        features, episodes, settings: as ``episode_scores`` takes them.

    Returns:
        ``[E]`` float64 in [0, 1], on the CPU.

    Raises:
        As ``episode_scores``.
    """
    scores = episode_scores(features, episodes, **settings)
    return (scores.argmax(-1) == query_target(episodes)).double().mean(1)


def query_target(episodes: Episodes) -> Tensor:
    """``[way * queries]`` int64, the classes of the queries of each episode as ``episode_scores`` has them.

    Example:
        >>> empty = torch.zeros(1, 2, 0)
        >>> query_target(Episodes(support=empty, query=torch.zeros(1, 2, 3), classes=empty))
        tensor([0, 0, 0, 1, 1, 1])
    """
    return torch.arange(episodes.query.shape[1]).repeat_interleave(episodes.query.shape[2])


def episode_scores(
    features: Tensor,
    episodes: Episodes,
    *,
    head: Head = HEADS["finetune"],
    base_mean: Tensor | None = None,
    seed: int = 0,
    unknown: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Scores of a head for the queries of each episode.

    Args:
        features: ``[N, D]``, one row an image; ``[N, P, D]`` for a head that takes maps of P local features.
        episodes: index tensors into the rows of ``features``.
        head: the classifier; by default the official fine-tuning for a cosine backbone.
        base_mean: ``[D]`` mean feature of the base classes, for heads that need it.
        seed: decides what is random in the head: two backbones evaluated with the same seed and episodes meet
            the same conditions, so their difference may be taken episode by episode.
        unknown: the last so many classes of each episode, whose support images are left out and whose queries are of
            none of the others.
        on_progress: called with the number of episodes done so far.

    Returns:
        ``[E, way * queries, way - unknown]`` on the CPU, the queries class by class; see ``Head`` for what the scores
        mean.

    Raises:
        ValueError: maps for a head that takes vectors or the other way round, features that are not finite, or a head
            without the ``base_mean`` that it needs.
    """
    if features.dim() != 2 + head.takes_maps:
        taken = "maps [N, P, D]" if head.takes_maps else "vectors [N, D]"
        raise ValueError(f"features: expected {taken} for {type(head).__name__}, got {list(features.shape)}")
    check_finite_maps(features=features)
    generator = torch.Generator().manual_seed(seed)
    way, shot = episodes.support.shape[1] - unknown, episodes.support.shape[2]
    target = torch.arange(way, device=features.device)
    episode_bytes = features[0].nbytes * (way * shot + episodes.query[0].numel())
    at_once = max(1, min(_EPISODES_AT_ONCE, _FEATURE_BYTES_AT_ONCE // episode_bytes))
    parts, done = [], 0
    for support, query in zip(
        episodes.support[:, :way].to(features.device).split(at_once),
        episodes.query.to(features.device).split(at_once),
        strict=True,
    ):
        scores = head(
            features[support.flatten(1)],
            target.repeat_interleave(shot).expand(len(support), -1),
            features[query.flatten(1)],
            way,
            base_mean=base_mean,
            generator=generator,
        )
        parts.append(scores.cpu())
        done += len(support)
        if on_progress:
            on_progress(done)
    return torch.cat(parts)


def check_map_memory(
    map_memory: float, images: int, shape: Sequence[int], dtype: torch.dtype, purpose: str, *, pixels: int = 0
) -> None:
    """Holds what the maps of all images take against what they may.

    Args:
        map_memory: the limit, in GiB.
        images: how many there are.
        shape: regions and channels of an image's maps.
        dtype: in which they are kept.
        purpose: what they are for; the message says it.
        pixels: bytes of pictures that are kept beside them.

    Raises:
        ValueError: it is more; the message says how much is needed.

    Example:
        >>> check_map_memory(1.0, 10_000, (25, 640), torch.float32, "re-ranking")
    """
    regions, channels = shape
    size = (images * regions * channels * dtype.itemsize + pixels) / 2**30
    if size > map_memory:
        beside = f" and {pixels / 2**30:.2f} GiB of pictures" if pixels else ""
        smaller = ", keep them in map_dtype float16" if dtype == torch.float32 else ""
        raise ValueError(
            f"map_memory: expected at least {math.ceil(100 * size) / 100} GiB for {purpose}, with {regions} x "
            f"{channels} numbers for each of {images} images{beside}, got {map_memory:g}; raise it{smaller} or take "
            "fewer regions"
        )


def mean_and_interval(values: Tensor) -> tuple[float, float]:
    """Mean over episodes and the half-width of its 95 % interval, 1.96 sigma / sqrt(E); 0 where E = 1.

    Example:
        >>> mean_and_interval(torch.tensor([0.5, 0.5, 0.5]))
        (0.5, 0.0)
    """
    if len(values) < 2:
        return values.mean().item(), 0.0
    return values.mean().item(), 1.96 * values.std(correction=0).item() / math.sqrt(len(values))
