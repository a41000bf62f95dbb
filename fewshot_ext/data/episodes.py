"""Seeded few-shot episodes as index tensors, all drawn at once."""

from dataclasses import dataclass

import torch
from torch import Tensor

_MOST_KEYS = 8_000_000


@dataclass(frozen=True, eq=False)
class Episodes:
    """Index tensors of E episodes; every index points into the image set that they were drawn from.

    Attributes:
        support: ``[E, way, shot]`` int64, images to learn from.
        query: ``[E, way, queries]`` int64, images to classify; never among the support of the same episode.
        classes: ``[E, way]`` int64, the class behind each row. The episode's own label is the row's number.
    """

    support: Tensor
    query: Tensor
    classes: Tensor

    def __len__(self) -> int:
        return len(self.classes)


def sample_episodes(
    labels: Tensor,
    episodes: int,
    *,
    way: int = 5,
    shot: int = 1,
    queries: int = 16,
    generator: torch.Generator,
) -> Episodes:
    """Draws N-way K-shot episodes: classes uniformly without replacement, then images of each class likewise.

    Args:
        labels: ``[N]`` int64 class of each image, on the CPU.
        episodes: number of episodes E.
        way: classes an episode.
        shot: support images a class.
        queries: query images a class.
        generator: a CPU generator; the same state gives the same episodes on every device.

    Raises:
        ValueError: a count below 1, fewer classes than ``way``, or a class with too few images for the shots
            and queries; the message names the smallest class and its size.

    Example:
        >>> labels = torch.arange(5).repeat_interleave(20)
        >>> sample_episodes(labels, 3, shot=1, generator=torch.Generator().manual_seed(0)).query.shape
        torch.Size([3, 5, 16])
    """
    for name, value in (("episodes", episodes), ("way", way), ("shot", shot), ("queries", queries)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    present, labels = labels.unique(return_inverse=True)
    counts = labels.bincount()
    if len(present) < way:
        raise ValueError(f"way {way} asks for more classes than there are: {len(present)}")
    if counts.min() < shot + queries:
        smallest = counts.argmin()
        raise ValueError(
            f"{shot} shots and {queries} queries need {shot + queries} images a class, "
            f"but class {present[smallest].item()} holds {counts[smallest].item()}"
        )

    # members[c, r] is the r-th image of class c; short classes are padded, and the padding sorts last below.
    order = labels.argsort(stable=True)
    rank = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[order]]
    members = torch.zeros(len(present), int(counts.max()), dtype=torch.int64)
    members[labels[order], rank] = order

    classes = torch.rand(episodes, len(present), generator=generator).argsort(1)[:, :way]
    # Some episodes at a time: a random key for every image of every class of all of them is gigabytes for MNIST.
    chunk = max(1, _MOST_KEYS // (way * members.shape[1]))
    images = torch.cat([_draw(members, counts, part, shot + queries, generator) for part in classes.split(chunk)])
    return Episodes(support=images[..., :shot], query=images[..., shot:], classes=present[classes])


def _draw(members: Tensor, counts: Tensor, classes: Tensor, images: int, generator: torch.Generator) -> Tensor:
    """``images`` different members of each class, ``[E, way, images]``: those with the smallest random keys."""
    keys = torch.rand(*classes.shape, members.shape[1], generator=generator)
    padding = torch.arange(members.shape[1]) >= counts[classes].unsqueeze(-1)
    drawn = keys.masked_fill_(padding, 2.0).topk(images, largest=False, sorted=True).indices
    return members[classes.unsqueeze(-1), drawn]
