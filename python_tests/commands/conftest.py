import pytest
import torch

from fewshot_ext.data import ImageArchive, load_digits


@pytest.fixture(scope="session")
def three_splits(tmp_path_factory):
    """Digits with three base, two validation and five novel classes."""
    digits = load_digits()
    split = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 2], dtype=torch.uint8)
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    ImageArchive(digits.images, digits.labels, digits.class_names, split).save(path)
    return str(path)
