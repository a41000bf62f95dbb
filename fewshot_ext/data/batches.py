"""Shuffled mini-batches as index tensors, a function of the seed and the epoch alone."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from fewshot_ext._random import derive_generator
from fewshot_ext.data.archive import ImageArchive


class ShuffledBatches(Sampler[Tensor]):
    """Yields every index below ``length`` once an epoch, in random order, ``batch_size`` at a time.

    The order depends on ``seed`` and on the epoch given to ``set_epoch`` and on nothing else, so that a run
    resumed from a checkpoint sees the batches that the unbroken run would have seen.

    Args:
        length: number of images.
        batch_size: images a batch. The last batch is the rest; a rest of one image is dropped, because batch
            normalization has no variance to offer on it.
        seed: a non-negative integer.

    Raises:
        ValueError: fewer than two images, or a batch size below 2.
    """

    def __init__(self, length: int, batch_size: int, seed: int) -> None:
        if length < 2:
            raise ValueError(f"training needs at least 2 images, got {length}")
        if batch_size < 2:
            raise ValueError(f"batch_size: expected at least 2, got {batch_size}")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next pass; Lightning calls this before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(self.length, self.batch_size)
        return full + (rest > 1)

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.randperm(self.length, generator=derive_generator(self.seed, self.epoch))
        batches = order.split(self.batch_size)
        return iter(batches[: len(self)])


def training_batches(archive: ImageArchive, batch_size: int, seed: int, epoch: int = 0) -> DataLoader:
    """A loader of shuffled ``(images [B, C, H, W] uint8, labels [B] int64)``, each one slice of the archive.

    Args:
        archive: the images.
        batch_size, seed: see ``ShuffledBatches``.
        epoch: the first epoch that the loader will be asked for.
    """
    sampler = ShuffledBatches(len(archive), batch_size, seed)
    sampler.set_epoch(epoch)
    # Without a generator of its own a DataLoader draws from the global one whenever it is iterated, and so
    # would shift the augmentation that follows.
    return DataLoader(archive, batch_size=None, sampler=sampler, generator=torch.Generator())
