"""From uint8 pixels to network input, in batches on the device that trains."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewshot_ext import _extras
from fewshot_ext._checks import check_at_least, check_fraction


@dataclass(frozen=True)
class AugmentationConfig:
    """What happens to training images; zero everywhere (the default) means nothing at all.

    Args:
        crop_scale: smallest share of the image's area that a random resized crop keeps, in (0, 1); 0 for no
            crop.
        rotation: largest rotation in degrees, to either side.
        translation: largest shift, as a share of the image's side.
        zoom: largest change of size, as a share: 0.1 draws the factor from [0.9, 1.1].
        color_jitter: largest change of brightness, contrast and saturation, as a share (the paper: 0.4).
        horizontal_flip: mirror half of the images. Never for digits or letters, where the mirror image is
            another sign or none.

    Raises:
        ValueError: a value out of range.
    """

    crop_scale: float = 0.0
    rotation: float = 0.0
    translation: float = 0.0
    zoom: float = 0.0
    color_jitter: float = 0.0
    horizontal_flip: bool = False

    def __post_init__(self) -> None:
        check_at_least("rotation", self.rotation, 0)
        for name in ("crop_scale", "translation", "zoom", "color_jitter"):
            check_fraction(name, getattr(self, name))


class ImageInput(nn.Module):
    """Scales uint8 images to [0, 1], augments them in training mode, and normalises them channel by channel.

    It holds mean and deviation as buffers, so a checkpoint carries the preprocessing that its weights expect.

    Args:
        mean, std: one number a channel, for pixels in [0, 1].
        augmentation: applied in training mode only; see ``AugmentationConfig``.

    Raises:
        ImportError: an augmentation is asked for and kornia is missing.

    Shape:
        ``[B, C, H, W]`` uint8 -> ``[B, C, H, W]`` float32.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: AugmentationConfig = AugmentationConfig(),
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))
        self.augmentation = _build_augmentation(augmentation)

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.to(self.mean.dtype) / 255
        if self.training:
            pixels = self.augmentation(pixels)
        return (pixels - self.mean) / self.std


class _RandomResizedCrop(nn.Module):
    """Kornia's crop needs the output size beforehand; here it is the size that comes in."""

    def __init__(self, smallest_scale: float) -> None:
        super().__init__()
        self.smallest_scale = smallest_scale
        self.crops: dict[tuple[int, int], nn.Module] = {}

    def forward(self, images: Tensor) -> Tensor:
        import kornia.augmentation as K

        size = tuple(images.shape[-2:])
        if size not in self.crops:
            self.crops[size] = K.RandomResizedCrop(size, scale=(self.smallest_scale, 1.0), cropping_mode="resample")
        return self.crops[size](images)


def _build_augmentation(config: AugmentationConfig) -> nn.Module:
    if config == AugmentationConfig():
        return nn.Identity()
    _extras.require("train", "kornia")
    import kornia.augmentation as K

    steps: list[nn.Module] = []
    if config.crop_scale:
        steps.append(_RandomResizedCrop(config.crop_scale))
    if config.rotation or config.translation or config.zoom:
        steps.append(
            K.RandomAffine(
                degrees=config.rotation,
                translate=(config.translation, config.translation),
                scale=(1 - config.zoom, 1 + config.zoom),
                p=1.0,
            )
        )
    if config.color_jitter:
        steps.append(K.ColorJitter(config.color_jitter, config.color_jitter, config.color_jitter, p=1.0))
    if config.horizontal_flip:
        steps.append(K.RandomHorizontalFlip())
    return nn.Sequential(*steps)
