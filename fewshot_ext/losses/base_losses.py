"""The metric learning losses that the Anti-Collapse paper builds on, from pytorch-metric-learning."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fewshot_ext._extras import require
from fewshot_ext.ops._validation import check_choice, check_floating, check_integer, check_tensor

PROXY_LOSSES = ("proxy_anchor", "proxy_nca")
BASE_LOSSES = (*PROXY_LOSSES, "contrastive", "triplet")
# Of the official code: one scale for similarities, and the distances between which negatives are drawn.
_COSINE_SCALE = 64
_NEAREST_NEGATIVE, _FARTHEST_NEGATIVE = 0.5, 1.4


class MinedLoss(nn.Module):
    """A loss over the tuples that a miner finds in the batch: both of pytorch-metric-learning."""

    def __init__(self, loss: nn.Module, miner: nn.Module) -> None:
        super().__init__()
        self.loss = loss
        self.miner = miner

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return self.loss(embeddings, labels, self.miner(embeddings, labels))


def base_loss(name: str, num_classes: int, embedding_size: int) -> nn.Module:
    """A loss ``loss(embeddings [n, D], labels [n]) -> []`` with the settings of the official Anti-Collapse code.

    ============== =========================================================== ==========================
    name           loss                                                        tuples
    ============== =========================================================== ==========================
    "proxy_anchor" ProxyAnchor (Kim et al., CVPR 2020), alpha 64, delta 0.1     all
    "proxy_nca"    ProxyNCA (Movshovitz-Attias et al., ICCV 2017), scale 64     all
    "contrastive"  margins 0 and 1, mean over pairs                             distance-weighted
    "triplet"      margin 0.2                                                   distance-weighted
    ============== =========================================================== ==========================

    The first two own ``proxies`` ``[num_classes, embedding_size]``, which want a learning rate far above that of the
    backbone (2000 times as high in the official code). ``scale`` is that of cosines. Distance-weighted negatives (Wu et
    al., ICCV 2017) are drawn from torch's global generator. Every loss normalises the embeddings.

    Args:
        name: see above.
        num_classes: at least 2; labels are in [0, num_classes).
        embedding_size: D, at least 1.

    Raises:
        ImportError: pytorch-metric-learning is missing (extra ``metric``).
        TypeError, ValueError: an unknown name, a size that is no integer or too small. In a call a wrong type or dtype,
            shapes that do not fit and no samples; of the first two labels without a proxy; of the last two embeddings
            that are not finite, and batches of one class or without two images of a class.

    Example:
        >>> import torch
        >>> loss = base_loss("proxy_anchor", num_classes=5, embedding_size=16)
        >>> loss(torch.randn(8, 16), torch.randint(5, (8,))).shape
        torch.Size([])
    """
    check_choice("name", name, BASE_LOSSES)
    for argument, size, least in (("num_classes", num_classes, 2), ("embedding_size", embedding_size, 1)):
        if check_integer(argument, size) < least:
            raise ValueError(f"{argument}: expected at least {least}, got {size}")
    require("metric", "pytorch_metric_learning")
    from pytorch_metric_learning import losses, miners, reducers

    if name in PROXY_LOSSES:
        if name == "proxy_anchor":
            loss = losses.ProxyAnchorLoss(num_classes, embedding_size, margin=0.1, alpha=_COSINE_SCALE)
        else:
            # On squared distances of vectors of length 1, which are 2 - 2 cos.
            loss = losses.ProxyNCALoss(num_classes, embedding_size, softmax_scale=_COSINE_SCALE / 2)
        check = partial(_check_proxy_batch, num_classes=num_classes, embedding_size=embedding_size)
    else:
        if name == "contrastive":
            loss = losses.ContrastiveLoss(pos_margin=0, neg_margin=1, reducer=reducers.MeanReducer())
        else:
            loss = losses.TripletMarginLoss(margin=0.2)
        miner = miners.DistanceWeightedMiner(cutoff=_NEAREST_NEGATIVE, nonzero_loss_cutoff=_FARTHEST_NEGATIVE)
        loss, check = MinedLoss(loss, miner), _check_pairs
    # A hook, and not a module around the loss, which would rename its parameters.
    loss.register_forward_pre_hook(partial(_check_before, check), with_kwargs=True)
    return loss


def _check_before(
    check: Callable[..., None], loss: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> None:
    _check_batch(*arguments, **keywords)
    check(*arguments, **keywords)


def _check_batch(embeddings: object, labels: object, *_: Any, **__: Any) -> None:
    check_tensor("embeddings", embeddings, "[n, D]", 2)
    check_floating("embeddings", embeddings)
    check_tensor("labels", labels, "[n]", 1)
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: expected dtype torch.int64, got {labels.dtype}")
    if len(embeddings) == 0:
        raise ValueError("embeddings: expected at least one sample, got none")
    if len(labels) != len(embeddings):
        raise ValueError(f"labels: expected shape [{len(embeddings)}] to fit embeddings, got {list(labels.shape)}")


def _check_proxy_batch(
    embeddings: Tensor, labels: Tensor, *_: Any, num_classes: int, embedding_size: int, **__: Any
) -> None:
    if embeddings.shape[1] != embedding_size:
        raise ValueError(
            f"embeddings: expected shape [n, {embedding_size}] to fit the proxies, got {list(embeddings.shape)}"
        )
    low, high = torch.stack(labels.aminmax()).tolist()
    if low < 0 or high >= num_classes:
        raise ValueError(f"labels: expected labels in [0, {num_classes}), the number of proxies, got {low} to {high}")


def _check_pairs(embeddings: Tensor, labels: Tensor, *_: Any, **__: Any) -> None:
    """Without a pair of each kind there is no loss, only a zero that looks like one; of NaN the miner makes nothing."""
    counts = labels.unique(return_counts=True)[1]
    if len(counts) < 2:
        raise ValueError(f"labels: expected at least two classes, got one for all {len(labels)} samples: no negatives")
    if counts.max() < 2:
        raise ValueError(
            f"labels: expected a class with at least two samples, got {len(counts)} classes with one each: no positives"
        )
    finite = embeddings.isfinite().all(1)
    if not finite.all():
        raise ValueError(f"embeddings: expected finite entries, got others in row {int((~finite).nonzero()[0, 0])}")
