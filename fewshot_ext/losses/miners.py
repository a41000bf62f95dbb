"""Triplet miners: which images of a batch are compared, as the official Anti-Collapse code draws them."""

import torch
from torch import Tensor, nn

MINERS = ("distance", "random", "semihard", "softhard")
# Of the official code: the distance below which negatives are drawn as if they had it, and the semi-hard margin.
_LEAST_DISTANCE, _MARGIN = 0.5, 0.2
_LARGEST_SQUARE = 4 * (1 - 1e-6)  # at opposite points, distance 2, the weights would be infinite


class TripletMiner(nn.Module):
    """Draws triplets of an anchor, a positive of its class and a negative of another, from torch's global generator.

    Each image that has another of its class is an anchor once, its positive any other image of the class and its
    negative any image of another class, all with the same chance but for this:

    - "distance": the chance of a negative is the inverse of the density of its distance on the sphere (Wu et al.,
      "Sampling Matters in Deep Embedding Learning", ICCV 2017, section 4), which distances below 0.5 count as. Wu et
      al. leave out negatives beyond 1.4; the official Anti-Collapse code does not.
    - "random": all triplets of the batch have the same chance, and as many of them are drawn as there are images.
    - "semihard": a negative farther than the positive, by at most 0.2, where there is one.
    - "softhard": a positive farther than the nearest negative, and a negative nearer than the farthest positive, where
      there are such.

    Shape:
        Embeddings ``[n, D]`` of length 1 and labels ``[n]`` -> three index tensors ``[T]``: anchors, positives and
        negatives, as losses of pytorch-metric-learning take them.

    Example:
        >>> embeddings = nn.functional.normalize(torch.randn(4, 8))
        >>> anchors, positives, negatives = TripletMiner("distance")(embeddings, torch.tensor([0, 0, 1, 1]))
        >>> positives
        tensor([1, 0, 3, 2])
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    @torch.no_grad()
    def forward(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        same = labels.unsqueeze(1) == labels
        positive = same.clone().fill_diagonal_(False)
        if self.name == "random":
            return _any_triplets(same, positive)
        anchors = positive.any(1).nonzero().squeeze(1)
        positive, negative = positive[anchors], ~same[anchors]
        distances = torch.cdist(embeddings[anchors], embeddings, compute_mode="donot_use_mm_for_euclid_dist")
        if self.name == "softhard":
            farthest = distances.where(positive, -torch.inf).amax(1, keepdim=True)
            nearest = distances.where(negative, torch.inf).amin(1, keepdim=True)
            positive = _where_any(positive & (distances > nearest), positive)
            negative = _where_any(negative & (distances < farthest), negative)
        chosen = positive.float().multinomial(1)
        if self.name == "semihard":
            reach = distances.gather(1, chosen)
            negative = _where_any(negative & (distances > reach) & (distances < reach + _MARGIN), negative)
        weights = negative.float()
        if self.name == "distance":
            # By logarithms of each anchor for itself: in 512 dimensions they differ by hundreds.
            log_weights = _log_inverse_density(distances, embeddings.shape[1])
            weights = log_weights.where(negative, -torch.inf).softmax(1)
        return anchors, chosen.squeeze(1), weights.multinomial(1).squeeze(1)

    def extra_repr(self) -> str:
        return repr(self.name)


def _where_any(wanted: Tensor, otherwise: Tensor) -> Tensor:
    return torch.where(wanted.any(1, keepdim=True), wanted, otherwise)


def _log_inverse_density(distances: Tensor, dimensions: int) -> Tensor:
    square = distances.clamp(min=_LEAST_DISTANCE).square().clamp(max=_LARGEST_SQUARE)
    return (2 - dimensions) / 2 * square.log() - (dimensions - 3) / 2 * (1 - square / 4).log()


def _any_triplets(same: Tensor, positive: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As many distinct triplets as there are images, or all where there are fewer."""
    anchors, positives = positive.nonzero(as_tuple=True)
    others = len(same) - same.sum(1)
    ends = others[anchors].cumsum(0)
    drawn = torch.randperm(int(ends[-1]), device=same.device)[: len(same)]
    pair = torch.searchsorted(ends, drawn, right=True)
    # Of each row first the images of other classes.
    rank = drawn - (ends - others[anchors])[pair]
    negatives = same.long().argsort(dim=1, stable=True)[anchors[pair], rank]
    return anchors[pair], positives[pair], negatives
