"""Signed-margin softmax losses as equations 1, 7 and 8 of Negative Margin Matters read.

They hold the N x C logits and let autograd work. Same arguments and results as :func:`fewshot_ext.margin_cosine_loss`
and :func:`fewshot_ext.margin_softmax_loss`, except that half types are neither promoted nor accumulated in float32:
call them in float64 for an oracle.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def _margin_cross_entropy(
    similarity: Tensor,
    target: Tensor,
    margin: float,
    scale: float,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    return_prediction: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    is_target = target.unsqueeze(1) == torch.arange(similarity.shape[1], device=target.device)
    logits = scale * (similarity - margin * is_target.to(similarity.dtype))
    loss = F.cross_entropy(
        logits, target, reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing
    )
    return (loss, similarity.argmax(dim=1)) if return_prediction else loss


def margin_cosine_loss(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    margin: float = -0.3,
    scale: float = 30.0,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    return_prediction: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    similarity = F.linear(F.normalize(features, dim=1), F.normalize(weight, dim=1))
    return _margin_cross_entropy(
        similarity, target, margin, scale, reduction, ignore_index, label_smoothing, return_prediction
    )


def margin_softmax_loss(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    margin: float = -1.0,
    scale: float = 5.0,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    return_prediction: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    similarity = F.linear(features, weight)
    return _margin_cross_entropy(
        similarity, target, margin, scale, reduction, ignore_index, label_smoothing, return_prediction
    )
