"""Full precision: the dtype to accumulate in, vectors of length 1, and arithmetic that autocast leaves alone."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that kernels accumulate and return losses in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def normalize(vectors: Tensor) -> Tensor:
    """Vectors divided by their lengths, but by no less than 1e-12: :func:`torch.nn.functional.normalize` without its
    failures in half types and at great lengths.

    Args:
        vectors: ``[..., D]``; float32, float64, bfloat16 or float16.

    Returns:
        The same shape; float64 for float64 vectors and float32 otherwise, because 1e-12 is 0 in float16. Vectors of
        zeros stay zeros. Gradients reach ``vectors``.

    Example:
        >>> normalize(torch.tensor([[3e30, 4e30], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    vectors = vectors.to(accumulate_dtype(vectors.dtype))
    # The squares of long vectors would overflow. Shorter ones are left as they are, to the last bit.
    longest = vectors.detach().abs().amax(-1, keepdim=True) if vectors.numel() else vectors.detach()
    shrink = torch.where(longest > torch.finfo(vectors.dtype).max ** 0.25, longest, 1)
    return F.normalize(vectors / shrink, dim=-1)


@contextmanager
def full_precision() -> Iterator[None]:
    """A context, and by ``@full_precision()`` a decorator, in which no autocast rounds to half types."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield
