"""The reduction of the coding rate by classes (MCR^2)."""

from typing import NamedTuple

import torch
from torch import Tensor

from fewshot_ext._validation import check_floating, check_integers, check_like, check_positive, check_tensor
from fewshot_ext.ops.coding_rate import coding_rate, coding_rates


class RateReduction(NamedTuple):
    """What :func:`rate_reduction` returns, in nats.

    Example:
        >>> import torch, fewshot_ext
        >>> fewshot_ext.rate_reduction(torch.eye(4), torch.tensor([0, 0, 1, 1])).class_rates
        tensor([2.1972, 2.1972])
    """

    reduction: Tensor  # []: expansion - compression
    expansion: Tensor  # []: the rate of all embeddings
    compression: Tensor  # []: the mean over samples of the rates of their classes
    class_rates: Tensor  # [C]
    classes: Tensor  # [C]: the labels that there are, ascending


torch.serialization.add_safe_globals([RateReduction])  # so that torch.load reads a saved one


def _size_groups(counts: Tensor) -> list[Tensor]:
    """Classes of like sizes: none has half the samples of another of its group, so that padding at most doubles it."""
    exponents = torch.frexp((counts - 1).clamp(min=0).double()).exponent
    return [(exponents == exponent).nonzero().squeeze(1) for exponent in exponents.unique()]


def _padded(rows: Tensor, starts: Tensor, counts: Tensor) -> Tensor:
    """Each class as a matrix of as many rows as the largest has, [classes, rows, D]; the rest are zeros."""
    position = torch.arange(int(counts.max()), device=rows.device)
    inside = position < counts[:, None]
    index = torch.where(inside, starts[:, None] + position, 0)
    return rows[index] * inside.unsqueeze(-1)


def rate_reduction(embeddings: Tensor, labels: Tensor, eps: float = 0.5) -> RateReduction:
    r"""Coding rate reduction: how much volume the embeddings span beyond what their classes span by themselves.

    .. math::
        \Delta R = R(Z) - \sum_j \frac{n_j}{n} R(Z_j), \quad
        R(Z_j) = \tfrac{1}{2} \log \det \left(I + \frac{D}{n_j \epsilon^2} Z_j^T Z_j\right)

    Yu et al., "Learning Diverse and Discriminative Representations via the Principle of Maximal Coding Rate Reduction",
    NeurIPS 2020, section 2: the first term is the expansion, the second the compression. Maximized over embeddings of
    length 1, it spreads every class over a subspace of its own, orthogonal to those of the others.

    Args:
        embeddings: Z, ``[n, D]``, one row a sample; dtypes as in :func:`fewshot_ext.coding_rate`.
        labels: ``[n]`` int64, on the device of ``embeddings``; any integers.
        eps: :math:`\epsilon` > 0, the distortion, in units of the embeddings.

    Returns:
        A named tuple of ``reduction``, ``expansion`` and ``compression``, ``[]``, and the rates and labels of the C
        classes that there are, ``[C]``; rates in nats, in the dtype of :func:`fewshot_ext.coding_rate`. All are 0 where
        there are no samples.

    Every rate has its gradient to ``embeddings``, also a second time. The number of classes and their sizes are read
    from the labels, so that a GPU is waited for and ``torch.compile(fullgraph=True)`` is not possible. Classes are
    computed many at a time, grouped by size.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: shapes or devices that do not fit, ``eps`` not finite or not above 0.

    Example:
        >>> import torch, fewshot_ext
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> apart = fewshot_ext.rate_reduction(torch.eye(4), labels)
        >>> mixed = fewshot_ext.rate_reduction(torch.eye(4)[[0, 1, 0, 1]], labels)
        >>> apart.reduction, mixed.reduction
        (tensor(1.0217), tensor(0.))
    """
    check_tensor("embeddings", embeddings, "[n, D]", 2)
    check_floating("embeddings", embeddings)
    check_integers("labels", labels, "[n]", 1)
    if labels.shape[0] != embeddings.shape[0]:
        raise ValueError(f"labels: expected shape [{embeddings.shape[0]}] to fit embeddings, got {list(labels.shape)}")
    check_like("embeddings", embeddings, "labels", labels, any_dtype=True)
    eps = check_positive("eps", eps)

    samples, dimensions = embeddings.shape
    classes, index, counts = labels.unique(return_inverse=True, return_counts=True)
    rows = embeddings[index.argsort(stable=True)]
    starts = counts.cumsum(0) - counts
    groups = _size_groups(counts)
    rates = [
        coding_rates(_padded(rows, starts[group], counts[group]), dimensions / (counts[group].double() * eps**2))
        for group in groups
    ]
    expansion = coding_rate(embeddings, eps)
    class_rates = expansion.new_zeros(len(classes))
    if groups:
        class_rates = class_rates.index_copy(0, torch.cat(groups), torch.cat(rates))
    compression = (class_rates * counts).sum() / max(samples, 1)
    return RateReduction(expansion - compression, expansion, compression, class_rates, classes)
