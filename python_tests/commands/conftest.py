import pytest
import torch
from PIL import Image

from fewshot_ext.data import ImageArchive, Split, load_digits


@pytest.fixture(scope="session")
def three_splits(tmp_path_factory):
    """Digits with three base, two validation and five novel classes."""
    digits = load_digits()
    split = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 2], dtype=torch.uint8)
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    ImageArchive(digits.images, digits.labels, digits.class_names, split).save(path)
    return str(path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Six pictures of each of three digits to search, and two others of each to ask with."""
    root, digits = tmp_path_factory.mktemp("pictures"), load_digits()
    for label in (5, 6, 7):
        images = digits.images[digits.labels == label][:8]
        for index, image in enumerate(images):
            folder = root / ("query" if index < 2 else "gallery") / f"digit {label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def with_regions(tmp_path_factory):
    """A checkpoint whose feature map of the digits has 2 x 2 positions; that of ``checkpoints`` has one."""
    from fewshot_ext.training import BackboneConfig, PreTrainingConfig, pretrain

    folder = tmp_path_factory.mktemp("regions")
    config = PreTrainingConfig(epochs=1, batch_size=64, backbone=BackboneConfig(width=8, pooled_blocks=2))
    pretrain(config, load_digits().subset(Split.BASE), folder)
    return folder / "last.ckpt"
