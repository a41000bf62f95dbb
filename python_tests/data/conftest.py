"""What the tests of the data layer share."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewshot_ext.data import ImageArchive, load_split


@pytest.fixture
def archive():
    """Twelve RGB 6 x 5 images of three classes, with every optional part."""
    generator = np.random.default_rng(0)
    return ImageArchive.from_arrays(
        images=generator.integers(0, 256, (12, 6, 5, 3), dtype=np.uint8),
        labels=np.arange(12) % 3,
        class_names=["n01", "n02", "Größe"],
        class_split=np.array([0, 1, 2]),
        class_words=["cat", "dog", "size"],
        image_fields={"drawer": np.arange(12) * 1000 - 5},
    )


@pytest.fixture
def picture_tree(tmp_path):
    """Writes pictures ``{path: (height, width)}``, each of its own flat color, and returns the root."""
    root = tmp_path / "pictures"

    def write(sizes: dict[str, tuple[int, int]], mode: str = "RGB") -> Path:
        for number, (name, (height, width)) in enumerate(sizes.items()):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            color = (10 * number) % 256
            Image.new(mode, (width, height), color if mode == "L" else (color, 0, 255 - color)).save(path)
        return root

    return write


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A CIFAR-100 of 600 images: image i of a file has class i % 100, and the pixels of a plane are all alike."""
    counts = {"train.bin": 500, "test.bin": 100}
    monkeypatch.setattr("fewshot_ext.data.cifar._FILES", counts)
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    names = sorted(load_split("cifar_fs").roles)
    (folder / "fine_label_names.txt").write_text("\n".join(names) + "\n\n")
    for file, count in counts.items():
        records = np.zeros((count, 2 + 3072), np.uint8)
        records[:, 1] = np.arange(count) % 100
        for plane in range(3):
            records[:, 2 + plane * 1024 : 2 + (plane + 1) * 1024] = 50 * plane + records[:, 1:2]
        records.tofile(folder / file)
    return folder
