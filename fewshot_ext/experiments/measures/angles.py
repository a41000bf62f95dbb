"""Directions of two-dimensional features: their histograms and how many peaks they have (the paper's Fig. 3)."""

import math

import torch
from torch import Tensor

from fewshot_ext._validation import check_count, check_fraction, check_positive


def angle_histogram(features: Tensor, bins: int = 360) -> Tensor:
    """Share of the features in each direction.

    Args:
        features: ``[N, 2]`` float32 or float64, N >= 1. A zero vector counts as direction 0.
        bins: equal parts of the circle; bin i holds the angles from ``-pi + 2 pi i / bins`` on.

    Returns:
        ``[bins]`` float64, sums to 1, on the CPU.

    Raises:
        TypeError: features that are no tensor of floating dtype.
        ValueError: another shape, or fewer than one bin.

    Reference:
        Liu et al., Negative Margin Matters, ECCV 2020, section 3.3, Fig. 3.

    Example:
        >>> angle_histogram(torch.tensor([[1.0, 0.1], [2.0, 0.1], [-1.0, -0.1], [-0.1, 1.0]]), bins=4)
        tensor([0.2500, 0.0000, 0.5000, 0.2500], dtype=torch.float64)
    """
    if not isinstance(features, Tensor) or not features.is_floating_point():
        came = features.dtype if isinstance(features, Tensor) else type(features).__name__
        raise TypeError(f"features: expected a tensor of floating dtype, got {came}")
    if features.dim() != 2 or features.shape[1] != 2 or not len(features):
        raise ValueError(f"features: expected shape [N, 2] with N at least 1, got {list(features.shape)}")
    check_count("bins", bins, 1)
    angles = torch.atan2(features[:, 1].double(), features[:, 0].double()).cpu()
    # An angle of pi is the one of -pi.
    index = ((angles + math.pi) * (bins / (2 * math.pi))).floor().long() % bins
    return torch.bincount(index, minlength=bins).double() / len(features)


def count_peaks(histogram: Tensor, *, width: float = 10.0, least: float = 0.1) -> int:
    """Peaks of a histogram over the circle: one for a class whose features keep together, more for one torn apart.

    The histogram is smoothed by a Gaussian; a local maximum counts as a peak where it reaches ``least`` of the highest.

    Args:
        histogram: ``[bins]``, as ``angle_histogram`` gives it.
        width: standard deviation of the Gaussian in degrees.
        least: share of the highest peak, in [0, 1).

    Returns:
        At least 1; a flat histogram has one peak.

    Raises:
        ValueError: another shape, a width that is not positive, or a share out of range.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.1], [-1.0, 0.2], [-1.0, 0.3]])
        >>> count_peaks(angle_histogram(features))
        2
    """
    if histogram.dim() != 1 or not len(histogram):
        raise ValueError(f"histogram: expected shape [bins], got {list(histogram.shape)}")
    check_positive("width", width)
    check_fraction("least", least)
    bins = len(histogram)
    offsets = torch.arange(bins, dtype=torch.float64)
    degrees = torch.minimum(offsets, bins - offsets) * (360 / bins)
    kernel = torch.exp(-0.5 * (degrees / width).square())
    smooth = torch.fft.irfft(torch.fft.rfft(histogram.double()) * torch.fft.rfft(kernel), n=bins)
    # Rounding leaves ripples on a plain that must not count.
    smooth = (smooth / smooth.max()).mul(1e9).round()
    rising = smooth > smooth.roll(1)
    falling = smooth >= smooth.roll(-1)
    return max(1, int((rising & falling & (smooth >= 1e9 * least)).sum()))
