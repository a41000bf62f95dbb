"""One typed, in-memory form for every image set: uint8 pixels, labels, class names and class split."""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Split(IntEnum):
    """The role of a class: pre-training (base), choosing settings (validation), or the test (novel)."""

    BASE = 0
    VALIDATION = 1
    NOVEL = 2


@dataclass(frozen=True, eq=False)
class ImageArchive:
    """Images of many classes, held in memory as uint8.

    Indexing with an int64 tensor gives ``(images, labels)`` of that batch, so an archive is a ``torch``
    dataset that fetches a whole batch at a time.

    Args:
        images: ``[N, C, H, W]`` uint8, N >= 1; C is 1 (grey) or 3 (RGB).
        labels: ``[N]`` int64, each in ``[0, classes)``.
        class_names: one name a class, all different.
        class_split: ``[classes]`` uint8, a ``Split`` value a class.

    Raises:
        TypeError: a tensor of the wrong dtype, or something that is not a tensor.
        ValueError: a wrong rank or length, a label or split value out of range, a class name given twice.

    Example:
        >>> archive = ImageArchive(
        ...     images=torch.zeros(4, 1, 8, 8, dtype=torch.uint8),
        ...     labels=torch.tensor([0, 0, 1, 1]),
        ...     class_names=("zero", "one"),
        ...     class_split=torch.tensor([Split.BASE, Split.NOVEL], dtype=torch.uint8),
        ... )
        >>> archive.subset(Split.NOVEL).class_names
        ('one',)
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    class_split: Tensor

    def __post_init__(self) -> None:
        for name, dtype, rank in (
            ("images", torch.uint8, 4),
            ("labels", torch.int64, 1),
            ("class_split", torch.uint8, 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, Tensor) or value.dtype != dtype:
                came = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"{name} must be a {dtype} tensor, got {came}")
            if value.dim() != rank:
                raise ValueError(f"{name} must have {rank} dimensions, got shape {tuple(value.shape)}")
        if not len(self.images):
            raise ValueError("images must hold at least one image, got none")
        if self.images.shape[1] not in (1, 3):
            raise ValueError(f"images must have 1 or 3 channels ([N, C, H, W]), got shape {tuple(self.images.shape)}")
        if len(self.labels) != len(self.images):
            raise ValueError(
                f"labels must give one label an image: {len(self.images)} images, {len(self.labels)} labels"
            )
        if len(self.class_split) != self.num_classes:
            raise ValueError(
                f"class_split must give one value a class: {self.num_classes} classes, {len(self.class_split)} values"
            )
        if len(set(self.class_names)) != self.num_classes:
            raise ValueError("class_names must all be different")
        low, high = self.labels.min().item(), self.labels.max().item()
        if low < 0 or high >= self.num_classes:
            raise ValueError(f"labels must lie in [0, {self.num_classes}), got {low} to {high}")
        if self.class_split.max().item() > max(Split):
            raise ValueError(
                f"class_split must be 0 (base), 1 (validation) or 2 (novel), got {self.class_split.max().item()}"
            )

    @classmethod
    def from_arrays(cls, images: np.ndarray, labels: np.ndarray, class_names, class_split) -> "ImageArchive":
        """An archive from numpy arrays as image files give them.

        Args:
            images: uint8, ``[N, H, W]`` (grey) or ``[N, H, W, C]``.
            labels: ``[N]``, any integer dtype.
            class_names: one name a class.
            class_split: ``[classes]`` integers, ``Split`` values.

        Raises:
            TypeError: images that are not uint8, labels or splits that are not integers.
            ValueError: as the constructor.
        """
        images, labels, class_split = np.asarray(images), np.asarray(labels), np.asarray(class_split)
        if images.dtype != np.uint8:
            raise TypeError(f"images must be a uint8 array, got {images.dtype}")
        for name, value in (("labels", labels), ("class_split", class_split)):
            if not np.issubdtype(value.dtype, np.integer):
                raise TypeError(f"{name} must be an integer array, got {value.dtype}")
        if images.ndim not in (3, 4):
            raise ValueError(f"images must be [N, H, W] or [N, H, W, C], got shape {images.shape}")
        if class_split.size and not 0 <= class_split.min() <= class_split.max() <= max(Split):
            raise ValueError(
                "class_split must be 0 (base), 1 (validation) or 2 (novel), "
                f"got {class_split.min()} to {class_split.max()}"
            )
        channels_first = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
        return cls(
            images=torch.from_numpy(np.ascontiguousarray(channels_first)),
            labels=torch.from_numpy(labels.astype(np.int64)),
            class_names=tuple(str(name) for name in class_names),
            class_split=torch.from_numpy(class_split.astype(np.uint8)),
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def subset(self, split: Split) -> "ImageArchive":
        """The classes of one split alone, relabelled 0, 1, ... in their old order.

        Raises:
            ValueError: no class has this split.
        """
        chosen = (self.class_split == split).nonzero().squeeze(1)
        if not len(chosen):
            raise ValueError(f"the archive has no {Split(split).name.lower()} classes")
        new_label = torch.full((self.num_classes,), -1, dtype=torch.int64)
        new_label[chosen] = torch.arange(len(chosen))
        relabelled = new_label[self.labels]
        kept = relabelled >= 0
        return ImageArchive(
            images=self.images[kept],
            labels=relabelled[kept],
            class_names=tuple(self.class_names[label] for label in chosen.tolist()),
            class_split=self.class_split[chosen],
        )

    def hold_out(self, fraction: float, generator: torch.Generator) -> tuple["ImageArchive", "ImageArchive"]:
        """Parts the images of every class at random into ``(kept, held_out)``, the classes staying the same.

        Args:
            fraction: the share of each class's images to hold out, rounded to whole images, in (0, 1).
            generator: a CPU generator; the same state gives the same parts.

        Raises:
            ValueError: a fraction outside (0, 1), or a class so small that one of its parts would be empty.
        """
        if not 0 < fraction < 1:
            raise ValueError(f"fraction must lie in (0, 1), got {fraction}")
        shuffled = torch.randperm(len(self), generator=generator)
        by_class = shuffled[self.labels[shuffled].argsort(stable=True)]
        counts = self.labels.bincount(minlength=self.num_classes)
        held_counts = (counts * fraction).round().long()
        if ((held_counts == 0) | (held_counts == counts)).any():
            smallest = counts.argmin().item()
            raise ValueError(
                f"cannot hold out {fraction:g} of each class: class {self.class_names[smallest]!r} "
                f"has {counts[smallest].item()} images"
            )
        rank = torch.arange(len(self)) - (counts.cumsum(0) - counts)[self.labels[by_class]]
        held = rank < held_counts[self.labels[by_class]]
        return self._select(by_class[~held]), self._select(by_class[held])

    def channel_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel over all pixels, pixels in [0, 1]."""
        channels = self.images.double().div(255).transpose(0, 1).flatten(1)
        return tuple(channels.mean(1).tolist()), tuple(channels.std(1).tolist())

    def _select(self, index: Tensor) -> "ImageArchive":
        return ImageArchive(self.images[index], self.labels[index], self.class_names, self.class_split)
