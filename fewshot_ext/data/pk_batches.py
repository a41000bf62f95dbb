"""P x K batches, of a few images from each of many classes, as pair and proxy losses want them."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from fewshot_ext._random import derive_generator


class PKBatches(Sampler[Tensor]):
    """Yields batches of K images from each of P classes, all of a class side by side.

    Classes are drawn without replacement until fewer than P are left, then all are shuffled again, so that each is seen
    about equally often. The images of a class are drawn without replacement within a batch; a class of fewer than K
    repeats them. Batches depend on ``seed`` and on the epoch given to ``set_epoch`` and on nothing else, as those of
    :class:`fewshot_ext.data.ShuffledBatches` do.

    Args:
        labels: ``[N]`` int64 class of each image, on the CPU.
        classes: P, classes a batch.
        samples: K, images a class.
        seed: a non-negative integer.
        batches: batches an epoch; as many as fill N images, and at least one, where None.

    Raises:
        TypeError: labels that are no tensor of int64.
        ValueError: labels of another shape or device, a count below 1, fewer classes than ``classes``.

    Example:
        >>> import torch
        >>> labels = torch.arange(5).repeat_interleave(10)
        >>> batches = PKBatches(labels, classes=3, samples=2, seed=0)
        >>> len(batches)
        8
        >>> batch = next(iter(batches))
        >>> labels[batch].unique(return_counts=True)[1]
        tensor([2, 2, 2])
    """

    def __init__(self, labels: Tensor, classes: int, samples: int, seed: int, *, batches: int | None = None) -> None:
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
            found = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
            raise TypeError(f"labels: expected a tensor of torch.int64, got {found}")
        if labels.dim() != 1 or labels.device.type != "cpu":
            raise ValueError(f"labels: expected shape [N] on the CPU, got {list(labels.shape)} on {labels.device}")
        if batches is None:
            batches = max(1, len(labels) // max(1, classes * samples))
        for name, value in (("classes", classes), ("samples", samples), ("batches", batches)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        sizes = labels.unique(return_counts=True)[1].tolist()
        if len(sizes) < classes:
            raise ValueError(f"classes {classes} asks for more than there are: {len(sizes)}")
        self.members = labels.argsort(stable=True).split(sizes)
        self.classes, self.samples, self.seed, self.batches = classes, samples, seed, batches
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the batches of the next pass; Lightning calls this before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Tensor]:
        generator = derive_generator(self.seed, self.epoch)
        drawn = 0
        while True:
            shuffled = torch.randperm(len(self.members), generator=generator)
            for chosen in shuffled.split(self.classes):
                if len(chosen) < self.classes:
                    break
                if drawn == self.batches:
                    return
                drawn += 1
                yield torch.cat([self._draw(self.members[index], generator) for index in chosen])

    def _draw(self, members: Tensor, generator: torch.Generator) -> Tensor:
        order = torch.randperm(len(members), generator=generator)
        return members[order.repeat(-(-self.samples // len(order)))[: self.samples]]
