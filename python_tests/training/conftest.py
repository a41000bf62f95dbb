import pytest
import torch

from fewshot_ext.data import AugmentationConfig, ImageArchive, Split, load_digits
from fewshot_ext.training import BackboneConfig, PreTrainingConfig, ValidationConfig


@pytest.fixture(scope="session")
def tiny():
    """Settings that train an epoch of a few digits in a blink."""
    return PreTrainingConfig(
        epochs=4,
        batch_size=32,
        backbone=BackboneConfig(width=8, pooled_blocks=2),
        augmentation=AugmentationConfig(rotation=10, translation=0.1),
        validation=ValidationConfig(epochs=1, episodes=20, way=3, shot=1, queries=3),
    )


@pytest.fixture(scope="session")
def archive():
    base = load_digits().subset(Split.BASE)
    return base.hold_out(0.2, torch.Generator().manual_seed(0))[1]


@pytest.fixture(scope="session")
def validation_archive():
    novel = load_digits().subset(Split.NOVEL)
    return novel.hold_out(0.2, torch.Generator().manual_seed(0))[1]


@pytest.fixture(scope="session")
def weights():
    """All numbers of a module's state in one vector."""

    def flatten(module):
        return torch.cat([value.flatten().double() for value in module.state_dict().values()])

    return flatten


@pytest.fixture(scope="session")
def images32():
    """Images of noise, six a class, large enough for every backbone."""
    generator = torch.Generator().manual_seed(0)
    return ImageArchive(
        images=torch.randint(256, (24, 3, 32, 32), dtype=torch.uint8, generator=generator),
        labels=torch.arange(4).repeat_interleave(6),
        class_names=("a", "b", "c", "d"),
        class_split=torch.zeros(4, dtype=torch.uint8),
    )
