"""Episodes of a meta-training, to train on and to validate with."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from fewshot_ext._random import derive_generator
from fewshot_ext.data import ImageArchive, sample_episodes
from fewshot_ext.training.callbacks import Validation

# Ends the key of the training episodes' seed; shorter keys with the epoch in them are those of augmentation.
_TRAINING_EPISODES = 2


class EpisodeBatches(Sampler[Tensor]):
    """Yields episodes one by one, each the indices ``[way, shot + queries]`` of its images, the support first.

    They depend on ``seed`` and on the epoch given to ``set_epoch`` and on nothing else, so that a run resumed from a
    checkpoint sees the episodes that the unbroken run would have seen.

    Args:
        labels: ``[N]`` int64 class of each image, on the CPU.
        episodes: of one epoch.
        way, shot, queries: classes, support images and query images a class.
        seed: a non-negative integer.

    Raises:
        ValueError: a count below 1, fewer classes than ``way``, or a class with too few images.

    Example:
        >>> labels = torch.arange(5).repeat_interleave(20)
        >>> episodes = EpisodeBatches(labels, 3, way=5, shot=1, queries=15, seed=0)
        >>> [list(episode.shape) for episode in episodes]
        [[5, 16], [5, 16], [5, 16]]
    """

    def __init__(self, labels: Tensor, episodes: int, *, way: int, shot: int, queries: int, seed: int) -> None:
        self.labels, self.episodes, self.seed = labels, episodes, seed
        self._sizes = {"way": way, "shot": shot, "queries": queries}
        self.epoch = 0
        sample_episodes(labels, 1, **self._sizes, generator=torch.Generator())

    def set_epoch(self, epoch: int) -> None:
        """Chooses the episodes of the next pass; Lightning calls this before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.episodes

    def __iter__(self) -> Iterator[Tensor]:
        generator = derive_generator(self.seed, self.epoch, 0, _TRAINING_EPISODES)
        drawn = sample_episodes(self.labels, self.episodes, **self._sizes, generator=generator)
        return iter(torch.cat([drawn.support, drawn.query], -1))


class RankEpisodes(Sampler[Tensor]):
    """Every ``world_size``-th episode, from number ``rank`` on: the episodes of one of several processes.

    Example:
        >>> labels = torch.arange(2).repeat_interleave(4)
        >>> episodes = EpisodeBatches(labels, 6, way=2, shot=1, queries=1, seed=0)
        >>> shares = [list(RankEpisodes(episodes, rank, world_size=2)) for rank in (0, 1)]
        >>> all(torch.equal(whole, shares[k % 2][k // 2]) for k, whole in enumerate(episodes))
        True
    """

    def __init__(self, episodes: EpisodeBatches, rank: int, world_size: int) -> None:
        self.episodes, self.rank, self.world_size = episodes, rank, world_size

    def set_epoch(self, epoch: int) -> None:
        """See ``EpisodeBatches``."""
        self.episodes.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.episodes) // self.world_size

    def __iter__(self) -> Iterator[Tensor]:
        return islice(iter(self.episodes), self.rank, None, self.world_size)


def episode_loader(archive: ImageArchive, sampler: Sampler[Tensor]) -> DataLoader:
    """A loader of episodes, ``(images [way, shot + queries, C, H, W] uint8, labels [way, shot + queries] int64)``."""
    # Without a generator of its own a DataLoader draws from the global one whenever it is iterated.
    return DataLoader(archive, batch_size=None, sampler=sampler, generator=torch.Generator())


class EpisodeValidation(Validation):
    """Validation before the first epoch too, not only after the others.

    Args:
        module, archive, path, seed: as in ``Validation``.

    Attributes:
        start_accuracy: of the network that the run began with.
    """

    start_accuracy: float | None = None

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "start_accuracy": self.start_accuracy}

    def results(self) -> dict[str, float]:
        return {"start_validation_accuracy": self.start_accuracy, **super().results()}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.start_accuracy is None:
            found = self._measure(module) if trainer.is_global_zero else (0.0, 0.0)
            self.start_accuracy, _ = trainer.strategy.broadcast(found)
