"""How far classes lie apart and how wide they spread: equations 2 to 4 of the negative-margin paper."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewshot_ext._precision import full_precision, normalize
from fewshot_ext._validation import check_integers


@full_precision()
def class_centers(features: Tensor, labels: Tensor) -> Tensor:
    """Mean of the L2-normalized features of each class.

    Args:
        features: ``[N, D]`` float32 or float64. A zero vector has no direction and counts as zero.
        labels: ``[N]`` int64, classes 0 .. C - 1, each with at least one image.

    Returns:
        ``[C, D]``, dtype and device of ``features``; gradients flow.

    Raises:
        TypeError: an argument that is not a tensor of the dtype above.
        ValueError: shapes that do not fit each other, no images, a negative label, or a class without images.

    Reference:
        Liu et al., Negative Margin Matters, ECCV 2020, eq. 2.

    Example:
        >>> class_centers(torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0]))
        tensor([[0.5000, 0.5000]])
    """
    counts = _class_counts(features, labels)
    sums = features.new_zeros(len(counts), features.shape[1])
    return sums.index_add(0, labels, normalize(features)) / counts.unsqueeze(1)


@full_precision()
def inter_class_variance(features: Tensor, labels: Tensor) -> Tensor:
    """D_inter: mean squared distance between the centers of two different classes.

    Args:
        features, labels: as in ``class_centers``.

    Returns:
        A scalar in [0, 4]; gradients flow.

    Raises:
        TypeError, ValueError: as ``class_centers``, and where there are fewer than two classes.

    Reference:
        Liu et al., Negative Margin Matters, ECCV 2020, eq. 3. The double sum is taken as twice the variance of the
        centers, which is the same and needs no table of all pairs.

    Example:
        >>> inter_class_variance(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))
        tensor(2.)
    """
    centers = class_centers(features, labels)
    _check_classes(centers, 2)
    return 2 * centers.var(0).sum()


@full_precision()
def intra_class_variance(features: Tensor, labels: Tensor) -> Tensor:
    """D_intra: mean squared distance of an image to the center of its class, the mean taken class by class.

    Args:
        features, labels: as in ``class_centers``.

    Returns:
        A scalar in [0, 1]; gradients flow.

    Raises:
        TypeError, ValueError: as ``class_centers``.

    Reference:
        Liu et al., Negative Margin Matters, ECCV 2020, eq. 3.

    Example:
        >>> intra_class_variance(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0]))
        tensor(0.5000)
    """
    return _spread(features, labels, class_centers(features, labels)).mean()


@full_precision()
def discriminative_function(features: Tensor, labels: Tensor) -> Tensor:
    """phi = D_inter / D_intra: how well classes can be told apart.

    Args:
        features, labels: as in ``class_centers``.

    Returns:
        A scalar, at least 0; infinite where no class spreads. Gradients flow.

    Raises:
        TypeError, ValueError: as ``inter_class_variance``.

    Reference:
        Liu et al., Negative Margin Matters, ECCV 2020, eq. 4.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
        >>> discriminative_function(features, torch.tensor([0, 0, 1, 1]))
        tensor(4.)
    """
    return inter_class_variance(features, labels) / intra_class_variance(features, labels)


@dataclass(frozen=True)
class Discriminability:
    """The three quantities, each with the half-width of its 95 % interval over the draw of classes.

    Attributes:
        inter, inter_interval: D_inter.
        intra, intra_interval: D_intra.
        ratio, ratio_interval: phi.
    """

    inter: float
    inter_interval: float
    intra: float
    intra_interval: float
    ratio: float
    ratio_interval: float


@full_precision()
def measure_discriminability(features: Tensor, labels: Tensor) -> Discriminability:
    """D_inter, D_intra and phi with jackknife intervals: each class is left out once.

    The classes at hand are a sample of those that could have been; the images of a class are many and their number
    matters less.

    Args:
        features, labels: as in ``class_centers``; computed in float64.

    Raises:
        TypeError, ValueError: as ``class_centers``, and where there are fewer than three classes.

    Reference:
        Liu et al., Negative Margin Matters, ECCV 2020, eq. 2-4; Efron and Stein, The Jackknife Estimate of Variance,
        Annals of Statistics 1981.

    Example:
        >>> features = torch.eye(3).repeat_interleave(2, 0)
        >>> found = measure_discriminability(features + 0.1, torch.arange(3).repeat_interleave(2))
        >>> found.inter_interval < 1e-6 < found.inter
        True
    """
    centers = class_centers(features.double(), labels)
    _check_classes(centers, 3)
    spread = _spread(features.double(), labels, centers)
    classes = len(centers)
    # About their common mean the sums below stay small, whatever the centers have in common.
    centers = centers - centers.mean(0)
    squares = centers.square().sum(1)
    # Without class j the centers' mean is -c_j / (C - 1), which takes |c_j|^2 / (C - 1) off the sum of squares.
    inter = 2 * (squares.sum() - squares - squares / (classes - 1)) / (classes - 2)
    intra = (spread.sum() - spread) / (classes - 1)
    whole = (2 * squares.sum() / (classes - 1), spread.mean())
    found = []
    for value, without in zip((*whole, whole[0] / whole[1]), (inter, intra, inter / intra), strict=True):
        error = math.sqrt((classes - 1) * without.var(correction=0).item())
        found += [value.item(), 1.96 * error]
    return Discriminability(*found)


def _spread(features: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
    """``[C]`` mean squared distance to the center of the class."""
    distances = (normalize(features) - centers[labels]).square().sum(1)
    return distances.new_zeros(len(centers)).index_add(0, labels, distances) / labels.bincount()


def _class_counts(features: Tensor, labels: Tensor) -> Tensor:
    if not isinstance(features, Tensor) or features.dtype not in (torch.float32, torch.float64):
        came = features.dtype if isinstance(features, Tensor) else type(features).__name__
        raise TypeError(f"features: expected a float32 or float64 tensor, got {came}")
    if features.dim() != 2 or not len(features):
        raise ValueError(f"features: expected shape [N, D] with N at least 1, got {list(features.shape)}")
    return count_labels(labels, len(features))


def count_labels(labels: Tensor, images: int) -> Tensor:
    """``[C]`` images of each class, after a check of the labels.

    Raises:
        TypeError: labels that are no int64 tensor.
        ValueError: another shape than ``[images]``, a negative label, or a class without images.
    """
    check_integers("labels", labels, "[images]", 1)
    if labels.shape != (images,):
        raise ValueError(f"labels: expected shape [{images}], got {list(labels.shape)}")
    if labels.min() < 0:
        raise ValueError(f"labels: expected no negative value, got {labels.min().item()}")
    counts = labels.bincount()
    if (counts == 0).any():
        raise ValueError(f"labels: expected every class from 0 on, but class {counts.argmin().item()} has no images")
    return counts


def _check_classes(centers: Tensor, least: int) -> None:
    if len(centers) < least:
        raise ValueError(f"labels: expected at least {least} classes, got {len(centers)}")
