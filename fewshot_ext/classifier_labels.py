"""Labels of a classifier's images, as users give them: read, checked and put in order."""

from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fewshot_ext.data import Split
from fewshot_ext.data.folders import list_folder
from fewshot_ext.data.walk import warn_passed_over


def labeled(images: Any, labels: Iterable[Hashable] | None) -> tuple[Any, list[Hashable]]:
    """Images and one hashable label each, numpy's and torch's numbers turned into Python's."""
    if labels is None:
        if not isinstance(images, str | Path):
            raise ValueError(
                "labels: expected a value, unless images is a folder with one folder for each class, got none"
            )
        listing = list_folder(images, Split.NOVEL)
        warn_passed_over(images, listing.passed_over)
        return listing.files, listing.classes
    labels = labels.tolist() if isinstance(labels, Tensor | np.ndarray) else list(labels)
    labels = [label.item() if isinstance(label, np.generic) else label for label in labels]
    for label in labels:
        try:
            hash(label)
        except TypeError:
            raise TypeError(f"labels: expected hashable values, got {label!r}") from None
        if _is_nan(label):  # each would be a class of its own
            raise ValueError("labels: expected values that equal themselves, got NaN")
    return images, labels


def _is_nan(label: Hashable) -> bool:
    # Tuples take an object for equal to itself without asking it.
    return any(map(_is_nan, label)) if isinstance(label, tuple) else label != label


def check_one_each(images: int, labels: Sequence[Hashable]) -> None:
    """Raises ValueError unless there is one label an image."""
    if len(labels) != images:
        raise ValueError(f"labels: expected one an image: {images} images, {len(labels)} labels")


def sorted_if_possible(labels: Iterable[Hashable]) -> list[Hashable]:
    """Without repetitions; where some cannot be compared, in the order in which they come first."""
    distinct = list(dict.fromkeys(labels))
    try:
        return sorted(distinct)
    except TypeError:
        return distinct
