"""CIFAR-100 from its binary distribution; the Python one is a pickle, which can run code, and is not read."""

from pathlib import Path

import numpy as np

from fewshot_ext.data.archive import ImageArchive, Split

_RECORD = 2 + 3 * 32 * 32
_FILES = {"train.bin": 50_000, "test.bin": 10_000}


def is_cifar100(folder: str | Path) -> bool:
    """Whether the folder is an unpacked ``cifar-100-binary.tar.gz``."""
    return all((Path(folder).expanduser() / name).is_file() for name in (*_FILES, "fine_label_names.txt"))


def load_cifar100(folder: str | Path) -> ImageArchive:
    """All 60,000 images of CIFAR-100, 32 x 32 RGB, 600 of each of 100 classes, every class novel.

    Give it roles with ``archive.with_roles(load_split("cifar_fs").roles)`` or ``"fc100"``.

    Args:
        folder: the unpacked ``cifar-100-binary.tar.gz``.

    Raises:
        OSError: a file is missing.
        ValueError: a file of the wrong length, or another number of class names than 100.
    """
    folder = Path(folder).expanduser()
    names = (folder / "fine_label_names.txt").read_text(encoding="utf-8").split()
    if len(names) != 100:
        raise ValueError(f"{str(folder / 'fine_label_names.txt')!r}: expected 100 classes, got {len(names)}")
    records = []
    for file, count in _FILES.items():
        size = (folder / file).stat().st_size
        if size != count * _RECORD:
            raise ValueError(f"{str(folder / file)!r}: expected {count * _RECORD} bytes ({count} images), got {size}")
        records.append(np.fromfile(folder / file, np.uint8).reshape(count, _RECORD))
    table = np.concatenate(records)
    # A record is the superclass, the class, then a plane each of red, green and blue.
    return ImageArchive.from_arrays(
        images=table[:, 2:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1),
        labels=table[:, 1],
        class_names=names,
        class_split=np.full(100, Split.NOVEL),
    )
