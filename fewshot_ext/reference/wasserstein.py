"""The Wasserstein distance as its formula reads: the root of the linear program over powers of distances.

Same arguments and results as :func:`fewshot_ext.wasserstein_distance`, except that weights have the batch shape of the
points, that nothing is checked, and that points which coincide have no gradient: call it in float64 for an oracle.
"""

import torch
from torch import Tensor

from fewshot_ext.reference.emd import emd


def wasserstein_distance(
    x: Tensor, y: Tensor, x_weight: Tensor | None = None, y_weight: Tensor | None = None, p: float = 1
) -> Tensor:
    distance = torch.linalg.vector_norm(x.unsqueeze(-2) - y.unsqueeze(-3), dim=-1)
    value, *_ = emd(distance**p, x_weight, y_weight, normalize=True)
    return value ** (1 / p)
