"""One run over several processes: each takes its share of the same batches."""

import atexit
import time
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from fewshot_ext.data import ShuffledBatches


class RankBatches(Sampler[Tensor]):
    """The part of every shuffled batch that one of ``world_size`` processes trains on.

    Together the processes see the batches of one process, with one exception: a last batch with fewer images than
    processes is dropped, because every process must take part in every step.

    Args:
        batches: the batches of one process.
        rank: this process, in [0, ``world_size``).
        world_size: how many there are.

    Raises:
        ValueError: full batches with fewer than two images for a process.

    Example:
        >>> [len(batch) for batch in RankBatches(ShuffledBatches(14, 8, seed=0), rank=1, world_size=4)]
        [2, 2]
    """

    def __init__(self, batches: ShuffledBatches, rank: int, world_size: int) -> None:
        if batches.batch_size < 2 * world_size:
            raise ValueError(
                f"batch_size {batches.batch_size} is shared by {world_size} processes: "
                f"it has to be at least {2 * world_size}, 2 for each"
            )
        self.batches, self.rank, self.world_size = batches, rank, world_size

    def set_epoch(self, epoch: int) -> None:
        """See ``ShuffledBatches``."""
        self.batches.set_epoch(epoch)

    def __len__(self) -> int:
        rest = self.batches.length % self.batches.batch_size
        return len(self.batches) - (1 < rest < self.world_size)

    def __iter__(self) -> Iterator[Tensor]:
        for _, batch in zip(range(len(self)), self.batches, strict=False):
            yield batch.tensor_split(self.world_size)[self.rank]

    def total(self, batch_index: int) -> int:
        """Images of batch number ``batch_index`` over all processes."""
        return min(self.batches.batch_size, self.batches.length - batch_index * self.batches.batch_size)


def share_batches(loader: DataLoader, rank: int, world_size: int) -> DataLoader:
    """The loader of one of ``world_size`` processes, from the loader of one process; see ``RankBatches``."""
    sampler = RankBatches(loader.sampler, rank, world_size)
    return DataLoader(loader.dataset, batch_size=None, sampler=sampler, generator=torch.Generator())


def let_gloo_finish() -> None:
    """Has this process wait a moment at its end, while gloo's threads drop the tensors of their last exchange.

    Up to Python 3.13 a thread that does so while the interpreter ends aborts the process, though all is done and
    written: pytorch/pytorch#190489. Torch has no call that waits for these threads.
    """
    atexit.register(time.sleep, 0.2)
