"""Images of every kind that users have, as batches of uint8 tensors: tensors, arrays, pictures, files, folders."""

import glob
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from fewshot_ext import _extras
from fewshot_ext._threads import in_threads
from fewshot_ext.data import list_images
from fewshot_ext.data.pictures import decode

if TYPE_CHECKING:
    from PIL import Image

TAKEN = (
    "a uint8 tensor [N, C, H, W], a float tensor of that shape in [0, 1], an array [N, H, W] or [N, H, W, C] of "
    "either kind, a file, a folder or a pattern such as photos/*.jpg, a PIL image, or a list of files, PIL images, "
    "arrays [H, W] or [H, W, C] and tensors [C, H, W]"
)
# Weights of red, green and blue in ITU-R 601-2 luma, which Pillow takes too.
_LUMA = (0.299, 0.587, 0.114)


class ImageBatches:
    """Iterates over images in batches of uint8 ``[B, C, H, W]``; files are read when their batch is due.

    Args:
        images: see ``TAKEN``. Floats are rounded to the 256 levels that picture files have. What is in a list, of
            whatever size, is brought to ``image_size`` as a file is.
        channels: 1 or 3; gray images are repeated, and colored ones turned to gray. None leaves tensors as they
            are and reads files in color.
        image_size: side that files are brought to.
        resize_mode: how they are; see ``fewshot_ext.models.NetworkConfig``.
        batch_size: images a batch.
        on_damage: called with a file that cannot be read and what is wrong with it, which is left out then; without
            it that is an error.

    Raises:
        ImportError: files are given and Pillow is missing.
        OSError: a folder or a file that is not there.
        TypeError: images of another kind or dtype.
        ValueError: no images, a wrong shape, floats outside [0, 1], files or a list without an ``image_size``; while
            iterating, a file that is no picture or damaged. The message names it.
    """

    def __init__(
        self,
        images: Any,
        *,
        channels: int | None,
        image_size: int | None,
        batch_size: int,
        resize_mode: Literal["crop", "stretch"] | None,
        on_damage: Callable[[Path, str], None] | None = None,
    ) -> None:
        self.channels, self.image_size, self.batch_size = channels, image_size, batch_size
        self.on_damage, self.resize_mode = on_damage, resize_mode
        self.images: Tensor | Sequence[Path | Image.Image]
        if isinstance(images, str | Path):
            images = _files(Path(images).expanduser())
        if isinstance(images, Tensor | np.ndarray):
            self.images = _as_tensor(images)
        else:
            pictures = images if isinstance(images, Sequence) and not isinstance(images, bytes) else [images]
            self.images = [_picture(image, f"images[{index}]") for index, image in enumerate(pictures)]
            if not all(isinstance(picture, Path) or _is_pillow(picture) for picture in self.images):
                raise TypeError(f"images: expected {TAKEN}, got {_kind(images)}")
        if not len(self.images):
            raise ValueError("images: expected at least one image, got none")
        if not isinstance(self.images, Tensor):
            self._check_pictures()

    def __len__(self) -> int:
        """Images, not batches."""
        return len(self.images)

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, len(self), self.batch_size):
            batch = self.images[start : start + self.batch_size]
            if not isinstance(batch, Tensor):
                read = [image for image in in_threads(self._read, batch) if image is not None]
                if not read:
                    continue
                batch = torch.stack(read)
            yield _with_channels(_as_uint8(batch), self.channels)

    def _read(self, picture: "Path | Image.Image") -> Tensor | None:
        try:
            return read_for(picture, self.image_size, self.channels, self.resize_mode)
        except (OSError, ValueError) as error:
            if self.on_damage is None:
                raise
            self.on_damage(picture, str(error))
            return None

    def _check_pictures(self) -> None:
        if self.image_size is None:
            raise ValueError(
                "image_size: expected a value to read picture files, or what is in a list, for a backbone that does "
                "not say its own, got none"
            )
        for picture in self.images:
            if isinstance(picture, Path) and not picture.is_file():
                raise FileNotFoundError(f"images: {str(picture)!r} is not a file")


def read_for(picture: "Path | Image.Image", image_size: int, channels: int | None, resize_mode: str | None) -> Tensor:
    """A picture as a network takes it; see ``fewshot_ext.models.NetworkConfig`` for ``resize_mode``."""
    how = {} if resize_mode is None else {"resize": resize_mode, "filter": "bilinear"}
    return torch.from_numpy(decode(picture, size=image_size, mode="L" if channels == 1 else "RGB", **how))


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return list_images(path)
    if path.exists() or not glob.has_magic(str(path)):
        return [path]
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    files = [file for file in found if file.is_file()]
    if not files:
        raise FileNotFoundError(f"images: no file fits {str(path)!r}")
    return files


def _is_pillow(picture: Any) -> bool:
    # Without Pillow nothing is a picture of it.
    return _extras.is_installed("PIL") and isinstance(picture, _pillow().Image)


def _pillow():
    _extras.require("train", "PIL")
    from PIL import Image

    return Image


def _picture(image: Any, name: str) -> Any:
    """A path or a picture of Pillow, where ``image`` can be made one."""
    if isinstance(image, str | Path):
        return Path(image).expanduser()
    if not isinstance(image, Tensor | np.ndarray):
        return image
    if image.ndim not in (2, 3):
        raise ValueError(
            f"{name}: expected an array [H, W] or [H, W, C] or a tensor [C, H, W], got {list(image.shape)}"
        )
    channels_last = isinstance(image, np.ndarray)
    if image.ndim == 2:
        image = image[..., None] if channels_last else image[None]
    try:
        pixels = _as_uint8(_as_tensor(image[None]))[0].permute(1, 2, 0).cpu().numpy()
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("images", name, 1)) from error
    return _pillow().fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels))


def _as_tensor(images: Tensor | np.ndarray) -> Tensor:
    """``[N, C, H, W]``, uint8 or floats in [0, 1], sharing the memory of ``images``."""
    if isinstance(images, np.ndarray):
        if images.dtype != np.uint8 and images.dtype.kind != "f":
            raise TypeError(f"images: expected uint8 or floats in [0, 1], got an array of {images.dtype}")
        if images.ndim == 2 or (images.ndim == 3 and images.shape[2] in (1, 3, 4)):
            raise ValueError(
                f"images: expected an array [N, H, W] or [N, H, W, C], got shape {images.shape}, which looks like one "
                "picture: write images[None] for a set of one (and images[..., None] for gray ones so narrow)"
            )
        if images.ndim not in (3, 4):
            raise ValueError(f"images: expected an array [N, H, W] or [N, H, W, C], got shape {images.shape}")
        # torch warns about arrays that nobody may write to, such as those that Pillow gives.
        images = torch.from_numpy(np.require(images, requirements=["C", "W"]))
        images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2)
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"images: expected uint8 or floats in [0, 1], got a tensor of {images.dtype}")
    if images.dim() != 4:
        one = ": write images[None] for a set of one" if images.dim() == 3 else ""
        raise ValueError(f"images: expected a tensor [N, C, H, W], got shape {tuple(images.shape)}{one}")
    if images.shape[1] not in (1, 3):
        order = "[N, H, W, C] arrays" if images.shape[3] in (1, 3) else "1 or 3 channels"
        raise ValueError(f"images: expected [N, C, H, W] tensors or {order}, got {tuple(images.shape)} as [N, C, H, W]")
    if images.is_floating_point() and images.numel():
        low, high = images.min().item(), images.max().item()
        # Written so that NaN, which compares false with everything, is refused too.
        if not (low >= 0 and high <= 1):
            raise ValueError(f"images: expected floats in [0, 1], not yet normalized, got {low:g} to {high:g}")
    return images


def _as_uint8(images: Tensor) -> Tensor:
    return images if images.dtype == torch.uint8 else (images.float() * 255).round().to(torch.uint8)


def _with_channels(images: Tensor, channels: int | None) -> Tensor:
    if channels in (None, images.shape[1]):
        return images
    if channels == 3:
        return images.expand(-1, 3, -1, -1)
    luma = torch.tensor(_LUMA, device=images.device).view(3, 1, 1)
    return (images * luma).sum(1, keepdim=True).round().to(torch.uint8)


def _kind(images: Any) -> str:
    if isinstance(images, Sequence) and not isinstance(images, str | bytes):
        others = {
            type(image).__name__
            for image in images
            if not isinstance(image, str | Path | Tensor | np.ndarray) and not _is_pillow(image)
        }
        return f"a {type(images).__name__} of {', '.join(sorted(others))}"
    return type(images).__name__
