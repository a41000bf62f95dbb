"""Parts of images resized as Pillow's bilinear filter does it, in batches: every image has parts of its own."""

import torch
from torch import Tensor


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
    (height, width), (out_height, out_width) = images.shape[2:], size
    dtype = images.dtype if images.is_floating_point() else torch.float32
    boxes = boxes.to(images.device, torch.promote_types(dtype, torch.float32))
    # Positions in what comes out, [B, P, size], in its pixels.
    columns, rows = (
        torch.arange(count, device=boxes.device, dtype=boxes.dtype) + 0.5 for count in (out_width, out_height)
    )
    columns, rows = columns.expand(*boxes.shape[:2], -1), rows.expand(*boxes.shape[:2], -1)
    if mirrored is not None:
        columns = torch.where(mirrored.to(boxes.device).unsqueeze(2), columns.flip(2), columns)
    if images.is_cuda:
        across = _weights(boxes[..., 0::2], columns, 0, width, alone).to(dtype)
        down = _weights(boxes[..., 1::2], rows, 0, height, alone).to(dtype)
        # Autocast would round the pixels to half types.
        with torch.autocast("cuda", enabled=False):
            found = torch.einsum("bchw,bpow->bpcho", images.to(dtype), across)
            return torch.einsum("bpqh,bpcho->bpcqo", down, found)
    # A processor gains more by leaving out what is beside a part than it loses by taking the parts one by one.
    parts = []
    with torch.autocast("cpu", enabled=False):
        for b, spans in enumerate(_spans(boxes, size, height, width)):
            for p, (left, top, right, bottom) in enumerate(spans):
                across = _weights(boxes[b, p, 0::2], columns[b, p], left, right, alone).to(dtype)
                down = _weights(boxes[b, p, 1::2], rows[b, p], top, bottom, alone).to(dtype)
                part = images[b, :, top:bottom, left:right].to(dtype)
                parts.append(down @ (part.flatten(0, 1) @ across.mT).unflatten(0, part.shape[:2]))
    if not parts:
        return torch.zeros(*boxes.shape[:2], images.shape[1], *size, dtype=dtype)
    return torch.stack(parts).unflatten(0, boxes.shape[:2])


def _weights(edges: Tensor, positions: Tensor, first: int, last: int, alone: bool) -> Tensor:
    """How much the pixels from ``first`` to ``last`` of a line count at each position of its resized parts.

    Args:
        edges: ``[..., 2]``, where each part begins and ends.
        positions: ``[..., size]``.

    Returns:
        ``[..., size, last - first]``.
    """
    start, stop = edges.unsqueeze(-1).unbind(-2)  # [..., 1]
    scale = (stop - start) / positions.shape[-1]
    pixel = torch.arange(first, last, device=edges.device, dtype=edges.dtype)
    weights = pixel - (start + scale * positions - 0.5).unsqueeze(-1)
    weights = weights.abs_().div_(-scale.clamp_min(1).unsqueeze(-1)).add_(1).clamp_min_(0)
    if alone:
        weights.mul_(((pixel >= start) & (pixel < stop)).unsqueeze(-2))
    return weights.div_(weights.sum(-1, keepdim=True))


def _spans(boxes: Tensor, size: tuple[int, int], height: int, width: int) -> list[list[list[int]]]:
    """The pixels that take part in ``[B, P]`` parts: those of the boxes, and as many beside them as the filter
    reaches."""
    sides = boxes[..., 2:] - boxes[..., :2]
    reach = (sides / boxes.new_tensor([size[1], size[0]])).clamp_min(1)
    first = (boxes[..., :2] - reach).floor().clamp_min(0)
    last = torch.minimum((boxes[..., 2:] + reach).ceil(), boxes.new_tensor([width, height]))
    return torch.cat([first, last], -1).long().tolist()
