"""Summary of an archive, as `data pack` and `data info` print it."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fewshot_ext._files import replace_file
from fewshot_ext.data import ImageArchive, Split, contact_sheet

_SIZES_NAMED = 8
_COLORS = {Split.BASE: "#0072B2", Split.VALIDATION: "#E69F00", Split.NOVEL: "#D55E00"}


def table(archive: ImageArchive) -> str:
    """Images, size, for each role the number of classes and of images a class, and the queries where there are some."""
    count, channels, height, width = archive.images.shape
    size = f"{count:,} images of {height} x {width} pixels, {'gray' if channels == 1 else 'RGB'}"
    lines = [size, *_roles(archive.labels, archive.class_split), *_queries(archive)]
    if archive.has_held_out:
        count = len(archive.subset(Split.BASE, held_out=True))
        lines.append(f"held out from training: {count:,} images of base classes")
    return "\n".join(lines)


def table_of_sizes(sizes: Sequence[tuple[int, int]], labels: Sequence[int], class_split: Sequence[Split]) -> str:
    """The same for pictures of several sizes, each with its number."""
    counts = Counter(sizes).most_common()
    lines = [f"{len(sizes):,} images of {len(counts):,} sizes, which data pack --size brings to one"]
    lines += [f"{count:>10,} of {height} x {width} pixels" for (height, width), count in counts[:_SIZES_NAMED]]
    if rest := sum(count for _, count in counts[_SIZES_NAMED:]):
        lines.append(f"{rest:>10,} of {len(counts) - _SIZES_NAMED:,} other sizes")
    return "\n".join([*lines, *_roles(torch.tensor(labels), torch.tensor(class_split))])


def _roles(labels: Tensor, class_split: Tensor) -> list[str]:
    per_class = labels.bincount(minlength=len(class_split))
    lines = [f"{'':<12}{'classes':>9}{'images':>10}{'images a class':>18}"]
    for role in Split:
        own = per_class[class_split == role]
        if len(own):
            low, high = own.min().item(), own.max().item()
            spread = f"{low}" if low == high else f"{low} to {high}"
            lines.append(f"{role.name.lower():<12}{len(own):>9,}{own.sum().item():>10,}{spread:>18}")
    return lines


def _queries(archive: ImageArchive) -> list[str]:
    if archive.is_query is None:
        return []
    role = archive.class_split[archive.labels]
    lines = []
    for each in Split:
        own = archive.is_query[role == each]
        if own.any():
            count, name = int(own.sum()), each.name.lower()
            lines.append(
                f"{count:,} of the {name} images are queries, searched among the other {len(own) - count:,} alone"
            )
    return lines


def write_preview(
    image: Callable[[int], Tensor], labels: Sequence[int], names: Sequence[str], roles: Sequence[int], path: Path
) -> None:
    """A contact sheet of up to 64 classes, spread evenly, one image each; the border tells the role.

    Args:
        image: gives the image of an index, ``[C, H, W]`` uint8.
        labels: the class of each image.
        names, roles: of each class.
        path: the file to write.
    """
    first = {label: index for index, label in reversed(list(enumerate(labels)))}
    chosen = sorted(first)
    chosen = [chosen[number * len(chosen) // min(64, len(chosen))] for number in range(min(64, len(chosen)))]
    sheet = contact_sheet(
        [image(first[label]) for label in chosen],
        [names[label] for label in chosen],
        borders=[_COLORS[Split(roles[label])] for label in chosen],
    )
    replace_file(path, lambda temporary: sheet.save(temporary))


LEGEND = "borders: blue for base, orange for validation, vermilion for novel classes"
