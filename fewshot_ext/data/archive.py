"""One typed form for every image set, in memory and on disk: uint8 pixels, labels, class names and class split."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewshot_ext._files import is_text
from fewshot_ext.data import archive_file

# The field of the images of base classes that no training sees: 1 for them, 0 for all others.
HELD_OUT = "held_out"
# The field of the queries of a set with a gallery, as In-Shop Clothes is: 1 for a query, 0 for all others.
IS_QUERY = "is_query"


class Split(IntEnum):
    """The role of a class: pre-training (base), choosing settings (validation), or the test (novel)."""

    BASE = 0
    VALIDATION = 1
    NOVEL = 2


@dataclass(frozen=True, eq=False, repr=False)
class ImageArchive:
    """Images of many classes, held in memory as uint8.

    Indexing with an int64 tensor gives ``(images, labels)`` of that batch, so an archive is a ``torch``
    dataset that fetches a whole batch at a time.

    Args:
        images: ``[N, C, H, W]`` uint8, N >= 1; C is 1 (gray) or 3 (RGB).
        labels: ``[N]`` int64, each in ``[0, classes)``.
        class_names: one name a class, all different.
        class_split: ``[classes]`` uint8, a ``Split`` value a class.
        class_words: what a class is called in English where its name is a code, one text a class, or None.
        image_fields: further facts about the images by name, each ``[N]`` int64, such as Omniglot's ``drawer``. Where
            one is ``held_out``, its images of base classes are not for training; see ``subset``. Where one is
            ``is_query``, it marks queries by 1 and the gallery, in which they are searched, by 0; see the property.
        passed_over: where the images come from a folder, a line on each kind of thing in it that was passed over.

    Raises:
        TypeError: a tensor of the wrong dtype, or something that is not a tensor.
        ValueError: a wrong rank or length, a label or split value out of range, a class name given twice or with
            characters that UTF-8 cannot hold.

    Example:
        >>> archive = ImageArchive(
        ...     images=torch.zeros(4, 1, 8, 8, dtype=torch.uint8),
        ...     labels=torch.tensor([0, 0, 1, 1]),
        ...     class_names=("zero", "one"),
        ...     class_split=torch.tensor([Split.BASE, Split.NOVEL], dtype=torch.uint8),
        ... )
        >>> archive.subset(Split.NOVEL).class_names
        ('one',)
        >>> archive.save("two_digits.npz")
        >>> ImageArchive.load("two_digits.npz").class_names
        ('zero', 'one')
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    class_split: Tensor
    class_words: tuple[str, ...] | None = None
    image_fields: Mapping[str, Tensor] = field(default_factory=dict)
    passed_over: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, value, dtype, rank in (
            ("images", self.images, torch.uint8, 4),
            ("labels", self.labels, torch.int64, 1),
            ("class_split", self.class_split, torch.uint8, 1),
            *((f"image_fields[{name!r}]", value, torch.int64, 1) for name, value in self.image_fields.items()),
        ):
            if not isinstance(value, Tensor) or value.dtype != dtype:
                came = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"{name}: expected a {dtype} tensor, got {came}")
            if value.dim() != rank:
                raise ValueError(f"{name}: expected {rank} dimensions, got shape {tuple(value.shape)}")
        if not len(self.images):
            raise ValueError("images: expected at least one image, got none")
        if not self.images.numel():
            raise ValueError(f"images: expected pixels, got shape {tuple(self.images.shape)}")
        if self.images.shape[1] not in (1, 3):
            raise ValueError(f"images: expected 1 or 3 channels ([N, C, H, W]), got shape {tuple(self.images.shape)}")
        if len(self.labels) != len(self.images):
            raise ValueError(
                f"labels: expected one label an image: {len(self.images)} images, {len(self.labels)} labels"
            )
        for name, value in self.image_fields.items():
            if len(value) != len(self.images):
                raise ValueError(
                    f"image_fields[{name!r}]: expected one value an image: "
                    f"{len(self.images)} images, {len(value)} values"
                )
        if len(self.class_split) != self.num_classes:
            raise ValueError(
                f"class_split: expected one value a class: {self.num_classes} classes, {len(self.class_split)} values"
            )
        if self.class_words is not None and len(self.class_words) != self.num_classes:
            raise ValueError(
                f"class_words: expected one text a class: {self.num_classes} classes, {len(self.class_words)} texts"
            )
        if len(set(self.class_names)) != self.num_classes:
            raise ValueError("class_names: expected all to be different")
        for name in (*self.class_names, *(self.class_words or ())):
            if not is_text(name):
                raise ValueError(f"class_names and class_words: expected text that UTF-8 can hold, got {name!r}")
        marks = self.image_fields.get(IS_QUERY)
        if marks is not None and not 0 <= marks.min() <= marks.max() <= 1:
            raise ValueError(
                f"image_fields[{IS_QUERY!r}]: expected 0 or 1, got {marks.min().item()} to {marks.max().item()}"
            )
        low, high = self.labels.min().item(), self.labels.max().item()
        if low < 0 or high >= self.num_classes:
            raise ValueError(f"labels: expected numbers in [0, {self.num_classes}), got {low} to {high}")
        if self.class_split.max().item() > max(Split):
            raise ValueError(
                f"class_split: expected 0 (base), 1 (validation) or 2 (novel), got {self.class_split.max().item()}"
            )

    @classmethod
    def from_arrays(
        cls,
        images: np.ndarray,
        labels: np.ndarray,
        class_names,
        class_split,
        class_words=None,
        image_fields: Mapping[str, np.ndarray] | None = None,
    ) -> "ImageArchive":
        """An archive from numpy arrays as image files give them.

        Args:
            images: uint8, ``[N, H, W]`` (gray) or ``[N, H, W, C]``.
            labels: ``[N]``, any integer dtype.
            class_names: one name a class.
            class_split: ``[classes]`` integers, ``Split`` values.
            class_words: one text a class, or None.
            image_fields: arrays of integers ``[N]`` by name.

        Raises:
            TypeError: images that are not uint8; labels, splits or fields that are not integers.
            ValueError: as the constructor.
        """
        images, labels, class_split = np.asarray(images), np.asarray(labels), np.asarray(class_split)
        if images.dtype != np.uint8:
            raise TypeError(f"images: expected a uint8 array, got {images.dtype}")
        image_fields = {name: np.asarray(value) for name, value in (image_fields or {}).items()}
        for name, value in (("labels", labels), ("class_split", class_split), *image_fields.items()):
            if not np.issubdtype(value.dtype, np.integer):
                raise TypeError(f"{name}: expected an integer array, got {value.dtype}")
            if value.dtype == np.uint64 and value.size and value.max() > np.iinfo(np.int64).max:
                raise ValueError(f"{name}: expected integers that int64 holds, got {value.max()}")
        if images.ndim not in (3, 4):
            raise ValueError(f"images: expected shape [N, H, W] or [N, H, W, C], got shape {images.shape}")
        if class_split.size and not 0 <= class_split.min() <= class_split.max() <= max(Split):
            raise ValueError(
                "class_split: expected 0 (base), 1 (validation) or 2 (novel), "
                f"got {class_split.min()} to {class_split.max()}"
            )
        channels_first = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
        return cls(
            images=torch.from_numpy(np.ascontiguousarray(channels_first)),
            labels=torch.from_numpy(labels.astype(np.int64)),
            class_names=tuple(str(name) for name in class_names),
            class_split=torch.from_numpy(class_split.astype(np.uint8)),
            class_words=None if class_words is None else tuple(str(words) for words in class_words),
            image_fields={name: torch.from_numpy(value.astype(np.int64)) for name, value in image_fields.items()},
        )

    @classmethod
    def load(cls, path: str | Path) -> "ImageArchive":
        """The archive in an ``.npz`` file that ``save`` wrote, or in one of the same arrays without a checksum.

        The arrays: ``images`` uint8 ``[N, H, W]`` or ``[N, H, W, C]``, or in its place ``data`` uint8 ``[bytes]``
        with ``offsets`` ``[N + 1]``, image i being the JPEG or PNG file ``data[offsets[i]:offsets[i + 1]]``;
        ``labels`` ``[N]``, ``class_names`` and ``class_split`` ``[classes]``; optional ``class_words``
        ``[classes]``, further integers ``[N]`` under any name, ``format_version`` and ``sha256``. Nothing is
        unpickled, and every array is checked before it is read.

        Raises:
            ImportError: the images are JPEG or PNG and Pillow is missing.
            OSError: the file cannot be opened.
            ValueError: it is no archive, is damaged or does not match its checksum, an array is missing or of
                the wrong dtype, shape or range, or an image is damaged, has another size than the first or too
                many pixels. The message names the file and the array or image.
        """
        arguments = archive_file.read(path)
        try:
            return cls.from_arrays(**arguments)
        except ValueError as error:
            raise ValueError(f"{str(path)!r}: {error}") from error

    def save(self, path: str | Path, jpeg_quality: int | None = None) -> None:
        """Writes the archive to an ``.npz`` file, whole or not at all; the same archive gives the same bytes.

        Args:
            path: the file, in a folder that exists.
            jpeg_quality: 1 to 100 to store JPEG, which changes pixels a little and takes a fraction of the space;
                None to store the pixels as they are.

        Raises:
            ImportError: JPEG is asked for and Pillow is missing.
            OSError: the file cannot be written.
            ValueError: a quality outside 1 to 100.
        """
        words = {} if self.class_words is None else {"class_words": np.array(self.class_words)}
        arrays = {
            "labels": self.labels.numpy(),
            "class_names": np.array(self.class_names),
            "class_split": self.class_split.numpy(),
            **words,
            **{name: values.numpy() for name, values in self.image_fields.items()},
        }
        archive_file.write(path, self.images.numpy(), arrays, jpeg_quality)

    def checksum(self) -> str:
        """SHA-256 of pixels, labels, class names, split, held-out images and queries: what a result was measured on."""
        digest = hashlib.sha256()
        held_out = (self.image_fields[HELD_OUT],) if self.has_held_out else ()
        for part in (self.images, self.labels, self.class_split, *held_out):
            digest.update(f"{part.dtype} {tuple(part.shape)}\n".encode())
            digest.update(part.contiguous().numpy().data)
        digest.update("\n".join(self.class_names).encode())
        marks = self._query_marks()
        if marks.any():  # without queries it is that of files from before there were any
            digest.update(f"\n{IS_QUERY}\n".encode() + marks.bool().numpy().tobytes())
        return digest.hexdigest()

    def record(self, name: str) -> dict[str, Any]:
        """What a result says of the images that it was measured on."""
        told = {"passed_over": list(self.passed_over)} if self.passed_over else {}
        queries = int(self._query_marks().sum())
        return {"name": name, "sha256": self.checksum(), **({"queries": queries} if queries else {}), **told}

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        counts = self.class_split.bincount(minlength=len(Split)).tolist()
        roles = ", ".join(f"{count} {split.name.lower()}" for split, count in zip(Split, counts, strict=True) if count)
        size = " x ".join(map(str, self.images.shape[1:]))
        return f"ImageArchive({len(self)} images of {size}; classes: {roles})"

    def __getitem__(self, index) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def class_titles(self) -> tuple[str, ...]:
        """What pictures call each class: the first of its words, which WordNet's synonyms follow, or its name."""
        if self.class_words is None:
            return self.class_names
        return tuple(
            words.partition(",")[0] or name for words, name in zip(self.class_words, self.class_names, strict=True)
        )

    @property
    def has_held_out(self) -> bool:
        """Whether some images of base classes are held out from training, as the set itself says."""
        return HELD_OUT in self.image_fields and bool(self._is_held_out.any())

    @property
    def _is_held_out(self) -> Tensor:
        return (self.image_fields[HELD_OUT] != 0) & (self.class_split[self.labels] == Split.BASE)

    @property
    def is_query(self) -> Tensor | None:
        """``[N]`` bool: which images are queries, to be searched among the others alone; None where none is marked.

        Without queries every image is searched among all others. The official list of In-Shop Clothes marks them.

        Raises:
            ValueError: all images are queries.
        """
        marks = self._query_marks().bool()
        if marks.all():
            raise ValueError(f"{IS_QUERY}: expected images to search beside the queries, got {len(self)} queries alone")
        return marks if marks.any() else None

    def _query_marks(self) -> Tensor:
        return self.image_fields.get(IS_QUERY, torch.zeros_like(self.labels))

    def subset(self, split: Split, *, held_out: bool = False) -> "ImageArchive":
        """The classes of one split alone, relabeled 0, 1, ... in their old order.

        Args:
            split: the role of the classes.
            held_out: of base classes, take the images that the set holds out from training and not all others. The
                labels are the same.

        Raises:
            ValueError: no class has this split, or no image of it is left.
        """
        chosen = (self.class_split == split).nonzero().squeeze(1)
        if not len(chosen):
            had = {Split(role).name.lower() for role in self.class_split.tolist()}
            raise ValueError(
                f"the images have no {Split(split).name.lower()} classes, all are {' or '.join(sorted(had))}: "
                "`fewshot-ext data pack --split` gives classes their roles, as folders train, val and test around "
                "them do"
            )
        archive = self
        if split == Split.BASE and (held_out or self.has_held_out):
            wanted = self._is_held_out == held_out if self.has_held_out else torch.zeros(len(self), dtype=torch.bool)
            if not (wanted & (self.class_split[self.labels] == Split.BASE)).any():
                which = "held out from training" if held_out else "to train on: all are held out"
                raise ValueError(f"the base classes have no images {which}")
            archive = self._select(wanted.nonzero().squeeze(1))
        return archive._select_classes(chosen, self.class_split[chosen])

    def with_roles(self, roles: Mapping[str, Split]) -> "ImageArchive":
        """The classes that ``roles`` names, with these roles and in its order; ``load_split(name).roles`` are such.

        Raises:
            ValueError: a class that the archive does not have.

        Example:
            >>> from fewshot_ext.data import load_digits
            >>> load_digits().with_roles({"7": Split.BASE, "1": Split.NOVEL}).class_names
            ('7', '1')
        """
        number = {name: label for label, name in enumerate(self.class_names)}
        unknown = [name for name in roles if name not in number]
        if unknown:
            raise ValueError(
                f"{len(unknown)} of {len(roles)} classes are not in the archive: {', '.join(unknown[:3])}"
                f"{', ...' if len(unknown) > 3 else ''}"
            )
        chosen = torch.tensor([number[name] for name in roles])
        split = torch.tensor(list(roles.values()), dtype=torch.uint8)
        return self._select_classes(chosen, split)

    def with_test_classes(self, other: "ImageArchive") -> "ImageArchive":
        """All classes as base classes, and the validation and novel classes of another set: another domain.

        The setting mini-ImageNet -> CUB of Chen et al. (A Closer Look at Few-shot Classification, ICLR 2019), in which
        all 100 classes of mini-ImageNet are trained on. Facts about images are kept that both sets have; what
        one marks as queries are queries.

        Args:
            other: images of the same shape; its base classes are left out, and ``passed_over`` says how many.

        Raises:
            ValueError: images of another shape, no novel classes in ``other``, or a class that both sets have.

        Example:
            >>> from fewshot_ext.data import load_digits
            >>> odd = load_digits().with_roles({"1": Split.BASE, "3": Split.NOVEL})
            >>> odd.with_test_classes(load_digits().with_roles({"0": Split.BASE, "8": Split.NOVEL}))
            ImageArchive(539 images of 1 x 8 x 8; classes: 2 base, 1 novel)
        """
        shapes = [" x ".join(map(str, archive.images.shape[1:])) for archive in (self, other)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"images of two sets: expected one shape, got {shapes[0]} and {shapes[1]}; "
                "`fewshot-ext data pack` with the same --size and --mode makes them equal"
            )
        other.subset(Split.NOVEL)  # which names what is missing
        chosen = (other.class_split != Split.BASE).nonzero().squeeze(1)
        test = other._select_classes(chosen, other.class_split[chosen])
        shared = [name for name in test.class_names if name in set(self.class_names)]
        if shared:
            raise ValueError(
                f"classes of two sets: expected other ones in the test than in training, got {len(shared)} in both: "
                f"{', '.join(shared[:3])}{', ...' if len(shared) > 3 else ''}"
            )
        words = None
        if self.class_words or other.class_words:
            words = self.class_words or self.class_names, test.class_words or test.class_names
        fields = {
            name: torch.cat([value, test.image_fields.get(name, torch.zeros_like(test.labels))])
            for name, value in self.image_fields.items()
            if name in test.image_fields or name == HELD_OUT
        }
        if IS_QUERY in {*self.image_fields, *test.image_fields}:
            fields[IS_QUERY] = torch.cat([self._query_marks(), test._query_marks()])
        left_out = other.num_classes - test.num_classes
        told = (f"left out {left_out} base classes of the second set: those of the first take their place",)
        return ImageArchive(
            images=torch.cat([self.images, test.images]),
            labels=torch.cat([self.labels, test.labels + self.num_classes]),
            class_names=self.class_names + test.class_names,
            class_split=torch.cat([torch.full_like(self.class_split, Split.BASE), test.class_split]),
            class_words=words and words[0] + words[1],
            image_fields=fields,
            passed_over=(*self.passed_over, *other.passed_over, *(told if left_out else ())),
        )

    def with_rotations(self) -> "ImageArchive":
        """Four times the classes: each turned by 0, 90, 180 and 270 degrees is a class of its own.

        The usual way to enlarge Omniglot (Santoro et al., 2016). Class ``c`` becomes ``c/rot000``, ``c/rot090``,
        ``c/rot180`` and ``c/rot270``, turned counter-clockwise, all in the role of ``c``.

        Raises:
            ValueError: images that are not square.
        """
        height, width = self.images.shape[-2:]
        if height != width:
            raise ValueError(f"only square images can be turned into images of the same shape, got {height} x {width}")
        turns = range(4)
        return ImageArchive(
            images=torch.cat([self.images.rot90(turn, (2, 3)) for turn in turns]),
            labels=torch.cat([self.labels + turn * self.num_classes for turn in turns]),
            class_names=tuple(f"{name}/rot{90 * turn:03d}" for turn in turns for name in self.class_names),
            class_split=self.class_split.repeat(4),
            class_words=self.class_words and self.class_words * 4,
            image_fields={name: value.repeat(4) for name, value in self.image_fields.items()},
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
            raise ValueError(f"fraction: expected a number in (0, 1), got {fraction}")
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
        return replace(
            self,
            images=self.images[index],
            labels=self.labels[index],
            image_fields={name: value[index] for name, value in self.image_fields.items()},
        )

    def _select_classes(self, chosen: Tensor, split: Tensor) -> "ImageArchive":
        new_label = torch.full((self.num_classes,), -1, dtype=torch.int64)
        new_label[chosen] = torch.arange(len(chosen))
        kept = (new_label[self.labels] >= 0).nonzero().squeeze(1)
        names = chosen.tolist()
        return replace(
            self._select(kept),
            labels=new_label[self.labels[kept]],
            class_names=tuple(self.class_names[label] for label in names),
            class_split=split,
            class_words=self.class_words and tuple(self.class_words[label] for label in names),
        )
