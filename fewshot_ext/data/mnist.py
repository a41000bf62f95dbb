"""MNIST from the ``mnist.npz`` that its users pass around."""

from collections.abc import Collection
from pathlib import Path

from fewshot_ext.data.archive import ImageArchive, Split
from fewshot_ext.data.archive_file import ArraySpec, read_arrays

_ARRAYS = {
    "x_train": ArraySpec("u", (3,), uint8=True),
    "y_train": ArraySpec("iu", (1,)),
    "x_test": ArraySpec("u", (3,), uint8=True),
    "y_test": ArraySpec("iu", (1,)),
}


def load_mnist(path: str | Path, part: str = "train", base: Collection[int] = range(7)) -> ImageArchive:
    """MNIST with the digits as classes, seven base and three novel as in Fig. 3 of the negative-margin paper.

    Args:
        path: an ``.npz`` file with ``x_train``, ``y_train``, ``x_test``, ``y_test``.
        part: "train" for the 60,000 training images, "test" for the 10,000 test images.
        base: the digits that are base classes; the others are novel.

    Raises:
        OSError: the file cannot be opened.
        ValueError: another part, a base digit outside 0 to 9, or a file without these arrays.
    """
    if part not in ("train", "test"):
        raise ValueError(f"part: expected train or test, got {part!r}")
    if not set(base) <= set(range(10)):
        raise ValueError(f"base: expected digits from 0 to 9, got {list(base)}")
    arrays = read_arrays(path, _ARRAYS.get)
    missing = [key for key in _ARRAYS if key not in arrays]
    if missing:
        raise ValueError(f"{str(path)!r} is not MNIST: {', '.join(missing)} missing; it holds {', '.join(arrays)}")
    try:
        return ImageArchive.from_arrays(
            images=arrays[f"x_{part}"],
            labels=arrays[f"y_{part}"],
            class_names=[str(digit) for digit in range(10)],
            class_split=[Split.BASE if digit in base else Split.NOVEL for digit in range(10)],
        )
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from error
