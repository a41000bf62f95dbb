"""Exact nearest-neighbor search: by distance, and by place in the gallery where distances are equal."""

import math

import torch
from torch import Tensor

from fewshot_ext._precision import normalize

# Entries of a matrix product and elements of differences at a time: 256 MB and 32 MB in float64.
SCORES_AT_ONCE = 2**25
_DIFFERENCES_AT_ONCE = 2**22


class ExactSearch:
    """Finds the gallery's nearest of each query, in an order that depends on nothing but the two.

    Matrix products in float64 give distances with a bound on their rounding. Neighbors whose order the bound leaves
    open are compared again by the sums of their squared differences, which are the same whatever else is in the
    product: the number of queries at a time changes nothing, equal vectors are at equal distances, and distances
    between vectors of small integers are exact.

    Args:
        embeddings: ``[Q, D]``, of which some are asked for.
        gallery: ``[N, D]``; ``embeddings`` themselves where these are searched among each other.
        distance: "cosine" or "euclidean".
    """

    def __init__(self, embeddings: Tensor, gallery: Tensor, distance: str) -> None:
        points = [x.detach().double() for x in ((gallery,) if gallery is embeddings else (gallery, embeddings))]
        if distance == "cosine":
            # By the largest entry first: parallel vectors of integers become equal, and short vectors reach length 1.
            longest = [x.abs().amax(1, keepdim=True) for x in points]
            points = [normalize(x / by.where(by > 0, 1)) for x, by in zip(points, longest, strict=True)]
        else:
            # Squares must neither overflow nor vanish; a power of two changes no digit.
            _, exponent = math.frexp(max(x.abs().max().item() for x in points))
            if abs(exponent) > 400:
                points = [x * 2.0 ** -max(-1000, min(1000, exponent)) for x in points]
        # Without what the vectors have in common their products keep more digits. The median is made of entries of the
        # gallery, so that integers stay integers, and a vector far from the rest does not move it.
        origin = points[0][:: max(1, len(gallery) // 1000)].median(0).values
        points = [x - origin for x in points]
        self.gallery, self.queries = points[0], points[-1]
        self.squares = self.gallery.square().sum(1)
        # A product of D terms and the squares, each rounded to 53 bits, twice over to be safe.
        self.error = (self.gallery.shape[1] + 8) * torch.finfo(torch.float64).eps

    def nearest(self, rows: Tensor, own: Tensor | None, depth: int) -> Tensor:
        """Places in the gallery of the nearest, the nearest first, ``[rows, depth]``.

        Args:
            rows: ``[rows]`` of the embeddings, the queries.
            own: ``[rows]`` the place of each query in the gallery, which it must not find; None where it has none.
            depth: at most N, and at most N - 1 with ``own``.
        """
        queries = self.queries[rows]
        # |q - g|^2 / 2 without the |q|^2 / 2 that a query's distances share, less the bound on the error.
        lowest = torch.addmm((0.5 - self.error) * self.squares, queries, self.gallery.mT, alpha=-1)
        if own is not None:
            lowest.scatter_(1, own.unsqueeze(1), torch.inf)
        values, index = lowest.topk(min(depth + 1, len(self.gallery)), largest=False)
        highest = values + self._width(queries, self.squares[index])
        index = index[:, :depth].contiguous()
        unsure = (highest[:, :-1] >= values[:, 1:]).any(1).nonzero().squeeze(1)
        for part in unsure.split(max(1, len(rows) // 4)):
            index[part] = self._settle(queries[part], lowest[part], depth)
        return index

    def _width(self, queries: Tensor, squares: Tensor) -> Tensor:
        """What lies between the bounds on a distance."""
        return self.error * (queries.square().sum(1, keepdim=True) + 2 * squares)

    def _settle(self, queries: Tensor, lowest: Tensor, depth: int) -> Tensor:
        width = self._width(queries, self.squares)
        possible = lowest <= (lowest + width).kthvalue(depth, keepdim=True).values
        # Of two vectors without length nothing was rounded.
        distances = torch.full_like(lowest, torch.inf).masked_fill_(possible, 0)
        pairs = (possible & (width > 0)).nonzero()
        for row, place in (part.unbind(1) for part in pairs.split(max(1, _DIFFERENCES_AT_ONCE // queries.shape[1]))):
            distances[row, place] = (queries[row] - self.gallery[place]).square().sum(1)
        return distances.sort(dim=1, stable=True).indices[:, :depth]
