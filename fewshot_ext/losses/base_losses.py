"""The metric learning losses that the Anti-Collapse paper builds on, with the settings of its official code."""

import torch
from torch import Tensor, nn

from fewshot_ext._extras import require
from fewshot_ext._precision import full_precision, normalize
from fewshot_ext._validation import (
    check_choice,
    check_count,
    check_floating,
    check_integers,
    check_like,
    check_tensor,
)
from fewshot_ext.losses.miners import MINERS, TripletMiner

PROXY_LOSSES = ("proxy_anchor", "proxy_nca")
BASE_LOSSES = (*PROXY_LOSSES, "contrastive", "triplet")
# Of the official code: scale and threshold of cosines, and the deviation of the first proxies.
_SCALE, _THRESHOLD = 64.0, 0.1
_PROXY_DEVIATION = 1 / 8


class ProxyLoss(nn.Module):
    r"""ProxyAnchor or ProxyNCA: the cosine with the own class's proxy is pulled up, those with the others pushed down.

    With s the cosines of embeddings with proxies, a = 64 and d = 0.1, both are the mean of terms
    :math:`\log (1 + \sum e^{-a (s - d)})` over cosines of images with their own class's proxy, plus the mean of terms
    :math:`\log (1 + \sum e^{a (s + d)})` over those with other proxies. They differ in what a term sums over:

    - "proxy_anchor" (Kim et al., CVPR 2020, eq. 4) has a term for each proxy, over the images of the batch; in the
      first mean there are only proxies of classes in the batch.
    - "proxy_nca" has a term for each image, over the proxies; in the first sum the proxy counts once for each image
      that its class has in the batch. This is what the official Anti-Collapse code computes; the loss of
      Movshovitz-Attias et al., ICCV 2017, is the logarithm of one ratio.

    Attributes:
        proxies: ``[num_classes, embedding_size]``; only their directions count.
    """

    def __init__(self, name: str, num_classes: int, embedding_size: int) -> None:
        super().__init__()
        self.name = name
        self.proxies = nn.Parameter(torch.randn(num_classes, embedding_size) * _PROXY_DEVIATION)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss, ``[]``, of embeddings ``[n, D]`` and labels ``[n]``."""
        _check_batch(embeddings, labels)
        _check_proxies(embeddings, labels, self.proxies)
        with full_precision():
            embeddings = normalize(embeddings)
            cosines = embeddings @ normalize(self.proxies).to(embeddings.dtype).mT
            own = labels.unsqueeze(1) == torch.arange(len(self.proxies), device=labels.device)  # [n, C]
            pull, push = _SCALE * (_THRESHOLD - cosines), _SCALE * (_THRESHOLD + cosines)
            if self.name == "proxy_anchor":
                in_batch = own.any(0)
                return _log_one_plus_sum(pull, own, 0)[in_batch].mean() + _log_one_plus_sum(push, ~own, 0).mean()
            pull = pull + own.sum(0).to(pull.dtype).log()
            return _log_one_plus_sum(pull, own, 1).mean() + _log_one_plus_sum(push, ~own, 1).mean()

    def extra_repr(self) -> str:
        return f"{self.name!r}, num_classes={self.proxies.shape[0]}, embedding_size={self.proxies.shape[1]}"


class MinedLoss(nn.Module):
    """A loss of pytorch-metric-learning over the triplets that a miner draws from the batch."""

    def __init__(self, loss: nn.Module, miner: TripletMiner) -> None:
        super().__init__()
        self.loss = loss
        self.miner = miner

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss, ``[]``, of embeddings ``[n, D]`` and labels ``[n]``."""
        _check_batch(embeddings, labels)
        _check_pairs(embeddings, labels)
        with full_precision():
            embeddings = normalize(embeddings)
            return self.loss(embeddings, labels, self.miner(embeddings, labels))


def require_packages(name: str) -> None:
    """Raises :class:`ImportError` where the base loss ``name`` needs a package that is missing."""
    if name not in PROXY_LOSSES:
        require("metric", "pytorch_metric_learning")


def base_loss(name: str, num_classes: int, embedding_size: int, miner: str = "distance") -> nn.Module:
    """A loss ``loss(embeddings [n, D], labels [n]) -> []`` with the settings of the official Anti-Collapse code.

    ============== =========================================================== ==========================
    name           loss                                                        tuples
    ============== =========================================================== ==========================
    "proxy_anchor" ProxyAnchor (Kim et al., CVPR 2020), alpha 64, delta 0.1     all
    "proxy_nca"    ProxyNCA in the official form, see :class:`ProxyLoss`        all
    "contrastive"  margins 0 and 1, mean over pairs                             of ``miner``
    "triplet"      margin 0.2                                                   of ``miner``
    ============== =========================================================== ==========================

    The first two own ``proxies`` ``[num_classes, embedding_size]``, which want a learning rate far above that of the
    backbone (2000 times as high in the official code). Miners draw from torch's global generator. Every loss normalizes
    the embeddings.

    Embeddings are float32, float64, bfloat16 or float16. Half types are computed in float32, also under autocast; the
    loss is float64 for float64 embeddings and float32 otherwise. Gradients reach the embeddings and the proxies.

    Args:
        name: see above.
        num_classes: at least 2; labels are in [0, num_classes).
        embedding_size: D, at least 1.
        miner: "distance", "random", "semihard" or "softhard"; see :class:`TripletMiner`. The first two losses take all
            images of the batch.

    Raises:
        ImportError: for the last two, where pytorch-metric-learning is missing (extra ``metric``).
        TypeError, ValueError: an unknown name or miner, a size that is no integer or too small. In a call a wrong type
            or dtype, shapes or devices that do not fit and no samples; of the first two labels without a proxy; of the
            last two embeddings that are not finite, and batches of one class or without two images of a class.

    Example:
        >>> import torch
        >>> loss = base_loss("proxy_anchor", num_classes=5, embedding_size=16)
        >>> loss(torch.randn(8, 16), torch.randint(5, (8,))).shape
        torch.Size([])
    """
    check_choice("name", name, *BASE_LOSSES)
    num_classes = check_count("num_classes", num_classes, 2)
    embedding_size = check_count("embedding_size", embedding_size, 1)
    check_choice("miner", miner, *MINERS)
    if name in PROXY_LOSSES:
        return ProxyLoss(name, num_classes, embedding_size)
    require_packages(name)
    from pytorch_metric_learning import losses, reducers

    if name == "contrastive":
        loss = losses.ContrastiveLoss(pos_margin=0, neg_margin=1, reducer=reducers.MeanReducer())
    else:
        loss = losses.TripletMarginLoss(margin=0.2)
    return MinedLoss(loss, TripletMiner(miner))


def _log_one_plus_sum(exponents: Tensor, mask: Tensor, dim: int) -> Tensor:
    """log(1 + sum of e^x over the entries of ``mask``), which may be none."""
    total = exponents.where(mask, torch.finfo(exponents.dtype).min).logsumexp(dim)
    return torch.logaddexp(total, total.new_zeros(()))


def _check_batch(embeddings: object, labels: object) -> None:
    check_tensor("embeddings", embeddings, "[n, D]", 2)
    check_floating("embeddings", embeddings)
    check_integers("labels", labels, "[n]", 1)
    check_like("embeddings", embeddings, "labels", labels, any_dtype=True)
    if len(embeddings) == 0:
        raise ValueError("embeddings: expected at least one sample, got none")
    if len(labels) != len(embeddings):
        raise ValueError(f"labels: expected shape [{len(embeddings)}] to fit embeddings, got {list(labels.shape)}")


def _check_proxies(embeddings: Tensor, labels: Tensor, proxies: Tensor) -> None:
    classes, size = proxies.shape
    if embeddings.shape[1] != size:
        raise ValueError(f"embeddings: expected shape [n, {size}] to fit the proxies, got {list(embeddings.shape)}")
    if embeddings.device != proxies.device:
        raise ValueError(f"embeddings: expected device {proxies.device} as the proxies are on, got {embeddings.device}")
    low, high = torch.stack(labels.aminmax()).tolist()
    if low < 0 or high >= classes:
        raise ValueError(f"labels: expected labels in [0, {classes}), the number of proxies, got {low} to {high}")


def _check_pairs(embeddings: Tensor, labels: Tensor) -> None:
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
