"""The coding rate as its formula reads: the logarithm of the D x D determinant, through autograd.

Same arguments and results as :func:`fewshot_ext.coding_rate`, except that nothing is checked and half types are not
promoted: call it in float64 for an oracle.
"""

import torch
from torch import Tensor


def coding_rate(embeddings: Tensor, eps: float = 0.5, *, alpha: float | None = None) -> Tensor:
    samples, dimensions = embeddings.shape[-2:]
    if alpha is None:
        alpha = dimensions / (max(samples, 1) * eps**2)
    identity = torch.eye(dimensions, dtype=embeddings.dtype, device=embeddings.device)
    # Not by torch.linalg.slogdet, which errs on batches of large matrices when it uses several CPU threads.
    eigenvalues = torch.linalg.eigvalsh(identity + alpha * embeddings.mT @ embeddings)
    return eigenvalues.log().sum(-1) / 2
