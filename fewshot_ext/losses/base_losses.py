"""The metric learning losses that the Anti-Collapse paper builds on, from pytorch-metric-learning."""

from torch import Tensor, nn

from fewshot_ext._extras import require
from fewshot_ext.ops._validation import check_choice, check_integer

BASE_LOSSES = ("proxy_anchor", "proxy_nca", "contrastive", "triplet")
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
        TypeError, ValueError: an unknown name, a size that is no integer or too small.

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

    if name == "proxy_anchor":
        return losses.ProxyAnchorLoss(num_classes, embedding_size, margin=0.1, alpha=_COSINE_SCALE)
    if name == "proxy_nca":
        # On squared distances of vectors of length 1, which are 2 - 2 cos.
        return losses.ProxyNCALoss(num_classes, embedding_size, softmax_scale=_COSINE_SCALE / 2)
    if name == "contrastive":
        loss = losses.ContrastiveLoss(pos_margin=0, neg_margin=1, reducer=reducers.MeanReducer())
    else:
        loss = losses.TripletMarginLoss(margin=0.2)
    return MinedLoss(
        loss, miners.DistanceWeightedMiner(cutoff=_NEAREST_NEGATIVE, nonzero_loss_cutoff=_FARTHEST_NEGATIVE)
    )
