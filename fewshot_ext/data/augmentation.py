"""From uint8 pixels to network input, in batches on the device that trains."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewshot_ext import _extras
from fewshot_ext._validation import (
    check_at_least,
    check_choice,
    check_count,
    check_fraction,
    check_number,
    check_positive,
    plain_numbers,
)
from fewshot_ext.data.pictures import RESIZES, short_side_resized
from fewshot_ext.data.resampling import resized_parts

_TRIES = 10


@dataclass(frozen=True)
class AugmentationConfig:
    """What happens to training images; zero everywhere (the default) means nothing at all.

    Args:
        crop_scale: smallest share of the image's area that a random resized crop keeps, in (0, 1); 0 does not crop.
        rotation: largest rotation in degrees, to either side.
        translation: largest shift, as a share of the image's side.
        zoom: largest change of size, as a share: 0.1 draws the factor from [0.9, 1.1].
        color_jitter: largest change of brightness, contrast and saturation, as a share (the paper: 0.4).
        horizontal_flip: mirror half of the images. Never do so with digits or letters, whose mirror images are other
            signs or none.

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
        plain_numbers(self)
        check_at_least("rotation", self.rotation, 0)
        for name in ("crop_scale", "translation", "zoom", "color_jitter"):
            check_fraction(name, getattr(self, name))


class ImageInput(nn.Module):
    """Scales uint8 images to [0, 1], resizes and augments them, and normalizes them channel by channel.

    It holds mean and deviation as buffers, so a checkpoint carries the preprocessing that its weights expect. All of
    it runs on whole batches, on the device that the images are on, and draws from that device's default generator:
    the same ``torch.manual_seed`` gives the same images there.

    Args:
        mean, std: one number a channel, for pixels in [0, 1].
        augmentation: applied in training mode only; see ``AugmentationConfig``.
        image_size: side of the square that comes out. In evaluation, and in training without random crops, images
            are brought to ``resize`` and the middle is cut out; random crops are resized to it. None leaves the size
            as it is, and cuts nothing in evaluation. What shrinks is antialiased, as Pillow does it, and not rounded
            to the 256 levels of pixels again.
        resize: side that images are brought to before the middle is cut out; None takes 1.15 times ``image_size``, as
            in Chen et al. (2019).
        resize_mode: "stretch" makes both sides ``resize``; "crop" makes the short side so and keeps the shape, as
            ``torchvision.transforms.Resize`` does with one number.

    Raises:
        ImportError: rotation, translation or zoom is asked for and kornia is missing.
        TypeError: images that are not uint8, a mean or a deviation that is no number.
        ValueError: an image size below 1, a ``resize`` below it or without it, another mode, another number of
            deviations than of means, a mean that is not finite, or a deviation that is not above 0.

    Shape:
        ``[B, C, H, W]`` uint8 -> ``[B, C, image_size, image_size]`` (or H, W) float32, channels-last if the input is.

    Example:
        >>> module = ImageInput((0.5,), (0.25,), AugmentationConfig(horizontal_flip=True), image_size=84)
        >>> module(torch.zeros(2, 1, 105, 105, dtype=torch.uint8)).shape
        torch.Size([2, 1, 84, 84])
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: AugmentationConfig = AugmentationConfig(),
        image_size: int | None = None,
        resize: int | None = None,
        resize_mode: Literal["crop", "stretch"] = "stretch",
    ) -> None:
        super().__init__()
        check_sizes(image_size, resize)
        check_choice("resize_mode", resize_mode, *RESIZES)
        if len(mean) != len(std):
            raise ValueError(f"std: expected a number a channel as mean has, {len(mean)}, got {len(std)}")
        for name, values, check in (("mean", mean, check_number), ("std", std, check_positive)):
            numbers = torch.tensor([check(name, value) for value in values], dtype=torch.float32)
            self.register_buffer(name, numbers.view(-1, 1, 1))
        self.image_size, self.resize_mode = image_size, resize_mode
        self.resize = resize if resize or image_size is None else int(1.15 * image_size)
        self.crop = None
        if augmentation.crop_scale:
            self.crop = _CropAndFlip(augmentation.crop_scale, augmentation.horizontal_flip, image_size)
        self.augmentation = _build_augmentation(augmentation)

    def forward(self, images: Tensor) -> Tensor:
        return self._prepared(images, self.image_size)

    def whole(self, images: Tensor) -> Tensor:
        """As ``forward``, but neither resized nor cut, except by random crops in training: ``[B, C, H, W]``."""
        return self._prepared(images, None)

    def _prepared(self, images: Tensor, image_size: int | None) -> Tensor:
        if images.dtype != torch.uint8:
            raise TypeError(f"images: expected a torch.uint8 tensor, got {images.dtype}")
        channels_last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
        dtype = self.mean.dtype
        if self.training and self.crop is not None:
            pixels = self.crop(images, dtype)
        else:
            pixels = images.to(dtype).div_(255)
            if image_size is not None:
                pixels = self._middle(pixels, image_size)
        if self.training:
            pixels = self.augmentation(pixels)
        pixels = pixels.sub_(self.mean).div_(self.std)
        return pixels.contiguous(memory_format=torch.channels_last) if channels_last else pixels

    def _middle(self, pixels: Tensor, size: int) -> Tensor:
        sides = (self.resize, self.resize)
        if self.resize_mode == "crop":
            sides = short_side_resized(*pixels.shape[2:], self.resize)
        resized = functional.interpolate(pixels, sides, mode="bilinear", antialias=True)
        top, left = (round((side - size) / 2) for side in sides)
        # The clone frees what was cut off, and keeps the in-place steps off a view.
        return resized[..., top : top + size, left : left + size].clone(memory_format=torch.contiguous_format)


def check_sizes(image_size: int | None, resize: int | None) -> None:
    """Raises unless images can be brought to ``resize`` and have a middle of ``image_size``."""
    if image_size is not None:
        check_count("image_size", image_size, 1)
    if resize is None:
        return
    check_count("resize", resize, 1)
    if image_size is None:
        raise ValueError(f"resize: expected null without an image_size, got {resize}")
    if resize < image_size:
        raise ValueError(f"resize: expected at least image_size, {image_size}, got {resize}")


class _CropAndFlip(nn.Module):
    """A random crop of random shape, resized, and half of the images mirrored, from uint8 to [0, 1] in one step.

    The crops are drawn as torchvision's RandomResizedCrop draws them: an area, an aspect ratio from 3/4 to 4/3, and
    the first of ten tries that lies inside of the image; but their edges need not be those of pixels.
    """

    def __init__(self, smallest_scale: float, flip: bool, size: int | None) -> None:
        super().__init__()
        self.smallest_scale, self.flip, self.size = smallest_scale, flip, size

    def forward(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        height, width = images.shape[-2:]
        out_height, out_width = (height, width) if self.size is None else (self.size, self.size)
        half_width, half_height, center_x, center_y = self._draw_boxes(images, dtype)
        mirrored = torch.rand_like(half_width) < 0.5 if self.flip else torch.zeros_like(half_width, dtype=torch.bool)
        if height > out_height or width > out_width:
            x, y = (center_x + 1) * (width / 2), (center_y + 1) * (height / 2)
            half_width, half_height = half_width * (width / 2), half_height * (height / 2)
            boxes = torch.stack((x - half_width, y - half_height, x + half_width, y + half_height), -1)
            return resized_parts(images, boxes, (out_height, out_width), mirrored).squeeze(1).to(dtype).div_(255)
        # Nothing shrinks: one sampling is faster for small images.
        half_width = torch.where(mirrored, -half_width, half_width)
        x = center_x + half_width * _pixel_centers(out_width, half_width)
        y = center_y + half_height * _pixel_centers(out_height, half_width)
        grid = torch.stack(
            (x.unsqueeze(1).expand(-1, out_height, -1), y.unsqueeze(2).expand(-1, -1, out_width)), dim=-1
        )
        return functional.grid_sample(images.to(dtype).div_(255), grid, padding_mode="border", align_corners=False)

    def _draw_boxes(self, images: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Half width, half height and center of each box, ``[B, 1]``, the image reaching from -1 to 1."""
        count, _, height, width = images.shape
        draw = partial(torch.rand, device=images.device, dtype=dtype)
        area = draw(count, _TRIES) * (1 - self.smallest_scale) + self.smallest_scale
        stretch = ((draw(count, _TRIES) * 2 - 1) * (math.log(4 / 3) / 2)).exp()
        # An image that is not square has as many pixels; only its sides weigh differently.
        side = math.sqrt(height / width)
        box_width, box_height = area.sqrt() * stretch * side, area.sqrt() / stretch / side
        fits = (box_width <= 1) & (box_height <= 1)
        # The largest box of a bearable shape, where no try fitted; argmax gives the first that did.
        first = fits.byte().argmax(1, keepdim=True)
        fitted = fits.any(1, keepdim=True)
        box_width = torch.where(fitted, box_width.gather(1, first), min(1.0, 4 / 3 * side * side))
        box_height = torch.where(fitted, box_height.gather(1, first), min(1.0, 4 / 3 / (side * side)))
        # That one is in the middle.
        center_x = (draw(count, 1) * 2 - 1) * (1 - box_width) * fitted
        center_y = (draw(count, 1) * 2 - 1) * (1 - box_height) * fitted
        return box_width, box_height, center_x, center_y


class _Flip(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
        return torch.where(mirrored, images.flip(-1), images)


class _ColorJitter(nn.Module):
    """Random brightness, contrast and saturation, image by image, in this order and clipped after each.

    That is what the closer-look code does with Pillow; torchvision draws the order, which changes what is clipped and
    nothing else. Gray images have no saturation to change. The images are
    changed in place: they are the batch's own copy, and fresh memory takes longer than the sums.
    """

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.strength = strength
        # A buffer, which moves with the module: a tensor made in forward would wait for the GPU every time.
        self.register_buffer("luminance", torch.tensor((0.299, 0.587, 0.114)), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        factors = torch.rand(3, len(images), 1, 1, 1, device=images.device, dtype=images.dtype)
        brightness, contrast, saturation = 1 + self.strength * (2 * factors - 1)
        images = images.mul_(brightness).clamp_(0, 1)
        mean = self._gray(images).mean((1, 2, 3), keepdim=True)
        images = images.mul_(contrast).add_(mean * (1 - contrast)).clamp_(0, 1)
        if images.shape[1] == 1:
            return images
        gray = self._gray(images).mul_(1 - saturation)
        return images.mul_(saturation).add_(gray).clamp_(0, 1)

    def _gray(self, images: Tensor) -> Tensor:
        if images.shape[1] == 1:
            return images
        return torch.matmul(self.luminance.to(images.dtype), images.flatten(2)).view(-1, 1, *images.shape[2:])


def _pixel_centers(count: int, like: Tensor) -> Tensor:
    return torch.linspace(-1 + 1 / count, 1 - 1 / count, count, device=like.device, dtype=like.dtype)


def _build_augmentation(config: AugmentationConfig) -> nn.Module:
    steps: list[nn.Module] = []
    if config.horizontal_flip and not config.crop_scale:
        steps.append(_Flip())
    if config.rotation or config.translation or config.zoom:
        _extras.require("train", "kornia")
        import kornia.augmentation as K

        steps.append(
            K.RandomAffine(
                degrees=config.rotation,
                translate=(config.translation, config.translation),
                scale=(1 - config.zoom, 1 + config.zoom),
                p=1.0,
            )
        )
    if config.color_jitter:
        steps.append(_ColorJitter(config.color_jitter))
    return nn.Sequential(*steps)
