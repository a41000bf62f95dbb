"""Measures of open-set episodes, in which some queries are of none of the classes of the support set."""

import torch
from torch import Tensor

from fewshot_ext.evaluation.protocol import mean_and_interval

REJECTED = tuple(range(0, 100, 10))
"""Percentages of the queries, after whose rejection ``open_set_measures`` has the accuracy."""


def auroc(known: Tensor, unknown: Tensor) -> Tensor:
    """The area under the ROC curve of each episode: how often a known query scores above an unknown one.

    Args:
        known: ``[E, K]`` floats, scores of queries of the support classes; larger means more surely known.
        unknown: ``[E, U]``, of the others.

    Returns:
        ``[E]`` float64 in [0, 1]; pairs of equal scores count one half.

    Example:
        >>> auroc(torch.tensor([[3.0, 2.0]]), torch.tensor([[1.0, 2.0]]))
        tensor([0.8750], dtype=torch.float64)
    """
    known, unknown = known.sort(-1).values, unknown.contiguous()
    below, up_to = (torch.searchsorted(known, unknown, right=right).double() for right in (False, True))
    return 1 - (below + up_to).mean(-1) / (2 * known.shape[-1])


def accuracy_over_rejection(scores: Tensor, right: Tensor) -> Tensor:
    """The accuracy among the queries that are left, after those with the lowest scores are rejected.

    Args:
        scores: ``[E, Q]`` floats, larger means more surely known.
        right: ``[E, Q]`` bool, whether the prediction is the true class; False for a query of none of the classes.

    Returns:
        ``[E, Q]`` float64 in [0, 1]: column r is of the Q - r queries that are left after r are rejected. Their mean is
        the area under the accuracy-rejection curve.

    Reference:
        Nadeem et al., Accuracy-Rejection Curves for Comparing Classifiers with a Reject Option, MLSB 2009.

    Example:
        >>> accuracy_over_rejection(torch.tensor([[0.9, 0.1, 0.5]]), torch.tensor([[True, False, True]]))
        tensor([[0.6667, 1.0000, 1.0000]], dtype=torch.float64)
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    hits = right.double().gather(-1, order).cumsum(-1)
    return (hits / torch.arange(1, scores.shape[-1] + 1)).flip(-1)


def open_set_measures(scores: Tensor, target: Tensor) -> dict[str, tuple[float, float]]:
    """AUROC and accuracies over rejection in percent, by the largest score of each query, each with its interval.

    Args:
        scores: ``[E, Q, way]`` of a head.
        target: ``[Q]`` int64, the true classes, ``way`` and more for queries of none of them.

    Example:
        >>> scores = torch.tensor([[[5.0, 0.0], [0.0, 4.0], [1.0, 1.0]]])
        >>> open_set_measures(scores, torch.tensor([0, 1, 2]))["auroc"]
        (100.0, 0.0)
    """
    surest, predicted = scores.max(-1)
    known = target < scores.shape[-1]
    curve = 100 * accuracy_over_rejection(surest, predicted == target)
    return {
        "auroc": mean_and_interval(100 * auroc(surest[:, known], surest[:, ~known])),
        "accuracy_over_rejection": mean_and_interval(curve.mean(1)),
        **{
            f"accuracy_at_{percent}_rejected": mean_and_interval(curve[:, len(target) * percent // 100])
            for percent in REJECTED
        },
    }
