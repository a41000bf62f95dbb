"""Parts of images resized as Pillow's bilinear filter does it, in batches: every image has parts of its own."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fewshot_ext._precision import full_precision

# Counts the changes of what a network sees of an image: features that are kept are of one number.
PICTURES = "2"

# Pixels of an image that need not be read in parts.
_SMALL = 128 * 128


def resized_parts(
    images: Tensor, boxes: Tensor, size: tuple[int, int], mirrored: Tensor | None = None, *, alone: bool = False
) -> Tensor:
    """Parts of images, resized bilinearly, and antialiased where they shrink.

    Args:
        images: ``[B, C, H, W]``, uint8 or floating.
        boxes: ``[B, P, 4]`` (left, top, right, bottom) in pixels, inside of the images; fractions of a pixel count.
        size: height and width of what comes out.
        mirrored: ``[B, P]`` bool, whether a part is flipped from left to right; none is where None.
        alone: whether a part is resized as if it had been cut out before, so that no pixel beside it shines in. Its
            box must then have whole numbers, as ``Image.crop`` takes them; else it is that of ``Image.resize``.

    Returns:
        ``[B, P, C, *size]``, in the dtype of the images or in float32 for uint8, and in their unit; differentiable to
        the images.

    Example:
        >>> image = torch.arange(16.0).view(1, 1, 4, 4)
        >>> resized_parts(image, torch.tensor([[[2, 0, 4, 1]]]), (4, 4), alone=True)[0, 0, 0, 0]
        tensor([2.0000, 2.2500, 2.7500, 3.0000])
    """
    height, width = images.shape[2:]
    dtype = images.dtype if images.is_floating_point() else torch.float32
    boxes = boxes.to(images.device, torch.promote_types(dtype, torch.float32))
    across = _weights(boxes[..., 0], boxes[..., 2], size[1], width, alone, mirrored).to(dtype)
    down = _weights(boxes[..., 1], boxes[..., 3], size[0], height, alone).to(dtype)
    if images.device.type != "cpu" or height * width <= _SMALL:
        return _combined(images.to(dtype), across, down)
    # A processor gains more by leaving out what is beside the parts than it loses by taking the images one by one.
    parts = []
    for image, (left, top, right, bottom) in enumerate(_spans(boxes, size, height, width)):
        one = slice(image, image + 1)
        inside = images[one, :, top:bottom, left:right].to(dtype)
        parts.append(_combined(inside, across[one, ..., left:right], down[one, ..., top:bottom]))
    return torch.cat(parts) if parts else _combined(images.to(dtype), across, down)


def _weights(
    start: Tensor, stop: Tensor, size: int, pixels: int, alone: bool, mirrored: Tensor | None = None
) -> Tensor:
    """How much each of the pixels of a line counts in each pixel that comes out of ``[B, P]`` parts of it,
    ``[B, P, size, pixels]``."""
    start, stop = start[..., None, None], stop[..., None, None]
    scale = (stop - start) / size
    steps = torch.arange(size, device=start.device, dtype=start.dtype).unsqueeze(1) + 0.5
    if mirrored is not None:
        steps = torch.where(mirrored.to(start.device)[..., None, None], steps.flip(0), steps)
    pixel = torch.arange(pixels, device=start.device, dtype=start.dtype)
    weights = pixel - (start + scale * steps - 0.5)
    weights = weights.abs_().div_(-scale.clamp_min(1)).add_(1).clamp_min_(0)
    if alone:
        weights.mul_((pixel >= start) & (pixel < stop))
    return weights.div_(weights.sum(-1, keepdim=True))


@contextmanager
def _no_tf32() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    if before != "tf32":
        yield
        return
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


# Autocast would round the pixels to half types, and TF32 to a part of a level.
@full_precision()
@_no_tf32()
def _combined(images: Tensor, across: Tensor, down: Tensor) -> Tensor:
    rows = torch.einsum("bchw,bpow->bpcho", images, across)
    return down.unsqueeze(2) @ rows


def _spans(boxes: Tensor, size: tuple[int, int], height: int, width: int) -> list[list[int]]:
    """The pixels of each image that take part: those in its boxes, and as many beside them as the filter reaches."""
    reach = ((boxes[..., 2:] - boxes[..., :2]) / boxes.new_tensor([size[1], size[0]])).clamp_min(1)
    first = (boxes[..., :2] - reach).amin(1).floor().clamp_min(0)
    last = torch.minimum((boxes[..., 2:] + reach).amax(1).ceil(), boxes.new_tensor([width, height]))
    return torch.cat([first, last], -1).long().tolist()
