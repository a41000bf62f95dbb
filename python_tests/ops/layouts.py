"""Tensors with the same values and every kind of stride that callers bring along."""

import torch
from torch import Tensor

LAYOUTS = (
    "contiguous",
    "transposed",
    "columns of a wider matrix",
    "every second row",
    "every second column",
    "offset",
)


def with_layout(tensor: Tensor, layout: str) -> Tensor:
    """A copy of ``tensor``, [rows] or [rows, columns]; what lies between its values in memory is poison."""
    matrix = tensor if tensor.dim() == 2 else tensor.unsqueeze(1)
    rows, columns = matrix.shape
    poison = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max

    def poisoned(*shape: int) -> Tensor:
        return torch.full(shape, poison, dtype=tensor.dtype, device=tensor.device)

    if layout == "transposed":
        view = poisoned(columns, rows).t()
    elif layout == "columns of a wider matrix":
        view = poisoned(rows, columns + 3)[:, 1 : 1 + columns]
    elif layout == "every second row":
        view = poisoned(2 * rows, columns)[::2]
    elif layout == "every second column":
        view = poisoned(rows, 2 * columns)[:, ::2]
    elif layout == "offset":
        view = poisoned(rows * columns + 1)[1:].view(rows, columns)
    else:
        view = poisoned(rows, columns)
    view.copy_(matrix)
    return view if tensor.dim() == 2 else view[:, 0]
