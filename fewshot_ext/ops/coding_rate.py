"""The coding rate of a set of embeddings.

Operator contract: problems [B, n, D], each with an alpha of its own, give rates [B] and the Cholesky factors of the
smaller of the two matrices whose determinants agree (Sylvester): I + alpha Z Z^T, n x n, and I + alpha Z^T Z, D x D.
Factorizing is torch's own linear algebra on every device. It is an operator all the same, because a graph must not
depend on which of n and D is the smaller.
"""

import math

import torch
from torch import Tensor

from fewshot_ext._precision import accumulate_dtype, full_precision
from fewshot_ext._validation import (
    check_floating,
    check_positive,
    check_tensor,
)
from fewshot_ext.ops._autograd import differentiable

# Of alpha times the sum of squares. Gradients are off by 2e-16 of that where the set is of low rank: 2e-4 here.
_MOST_SQUARES = 1e12


def _smaller_matrix(embeddings: Tensor, alpha: Tensor) -> Tensor:
    """M = I + alpha Z Z^T or I + alpha Z^T Z, [..., k, k] with k = min(n, D). No eigenvalue lies below 1."""
    samples, dimensions = embeddings.shape[-2:]
    rows = embeddings if samples <= dimensions else embeddings.mT
    # Half precision would move eigenvalues by more than the 1 that keeps them positive.
    with full_precision():
        gram = rows @ rows.mT
    squares = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    alpha = alpha.masked_fill(alpha * squares > _MOST_SQUARES, math.nan)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.addcmul(identity, alpha[..., None, None], gram)


def _solve(factor: Tensor, embeddings: Tensor) -> Tensor:
    """M^-1 Z or Z M^-1, which are the same, from the Cholesky factor M = U^T U. The inverse of a matrix so well
    conditioned loses nothing, and with a product it takes a half to an eighth of the time of triangular solves."""
    inverse = torch.cholesky_inverse(factor, upper=True)
    with full_precision():
        return inverse @ embeddings if embeddings.shape[-2] <= embeddings.shape[-1] else embeddings @ inverse


@torch.library.custom_op("fewshot_ext::coding_rate", mutates_args=())
def _coding_rate_op(embeddings: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    factor, failed = torch.linalg.cholesky_ex(_smaller_matrix(embeddings, alpha))
    factor = factor.mT.contiguous()  # torch gives it in columns
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    # Where it fails the factorization stops half-way, with numbers on the diagonal that look like results.
    diagonal.masked_fill_((failed != 0).unsqueeze(-1), math.nan)
    return diagonal.log().sum(-1), factor


@_coding_rate_op.register_fake
def _(embeddings, alpha):
    batch, samples, dimensions = embeddings.shape
    smaller = torch.sym_min(samples, dimensions)
    return embeddings.new_empty([batch]), embeddings.new_empty([batch, smaller, smaller])


def _save_for_backward(ctx, inputs, output) -> None:
    embeddings, alpha = inputs
    _, factor = output
    ctx.mark_non_differentiable(factor)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(embeddings, alpha, factor)


def _backward(ctx, grad_rate, *unused_grads):
    if grad_rate is None:
        return None, None
    embeddings, alpha, factor = ctx.saved_tensors
    # The factor that was saved is a constant to autograd. Where a graph of this pass is wanted it is made again.
    if torch.is_grad_enabled():
        factor = torch.linalg.cholesky_ex(_smaller_matrix(embeddings, alpha)).L.mT
    return (grad_rate * alpha)[..., None, None] * _solve(factor, embeddings), None


_call_coding_rate = differentiable(
    torch.ops.fewshot_ext.coding_rate.default, _save_for_backward, _backward, dimensions=2
)


def coding_rates(problems: Tensor, alpha: Tensor) -> Tensor:
    """Rates [...] of problems [..., n, D] of a floating dtype, each with its own alpha [...].

    In float64 whatever the dtype: a set of low rank has eigenvalues of 1 beside large ones, whose rounding in float32
    puts the gradient off by 15 % where alpha times the sum of squares is 6e5.
    """
    return _call_coding_rate(problems.double(), alpha.double())[0].to(accumulate_dtype(problems.dtype))


def coding_rate(embeddings: Tensor, eps: float = 0.5, *, alpha: float | None = None) -> Tensor:
    r"""Coding rate: the nats that code a set of embeddings up to a distortion, which measures the volume they span.

    .. math::
        R(Z) = \tfrac{1}{2} \log \det (I + \alpha Z^T Z), \quad \alpha = \frac{D}{n \epsilon^2}

    The R of Yu et al., "Learning Diverse and Discriminative Representations via the Principle of Maximal Coding Rate
    Reduction", NeurIPS 2020, section 2.1, and of Jiang et al., "Anti-Collapse Loss for Deep Metric Learning Based on
    Coding Rate Metric", 2024. It is largest where the embeddings spread evenly over all directions, and falls as they
    collapse onto few. Embeddings are taken as they come: normalize them first, as the papers do, where lengths must not
    count.

    The determinant is that of the smaller of the D x D and the n x n matrix, by a Cholesky factorization. It needs no
    jitter: with rows of length 1 the eigenvalues lie in [1, 1 + alpha n].

    Args:
        embeddings: Z, ``[..., n, D]``, one row a sample; float32, float64, bfloat16 or float16. All are computed in
            float64, also under autocast. No samples (n = 0) and no dimensions (D = 0) have rate 0. Rows of zeros
            count in n and in nothing else.
        eps: :math:`\epsilon` > 0, the distortion, in units of the embeddings.
        alpha: > 0, instead of the one that follows from ``eps``.

    Returns:
        Rates in nats, ``[...]``, at least 0; float64 for float64 embeddings and float32 otherwise. A set with entries
        that are not finite has the rate and the gradient NaN, and leaves the other sets of the batch alone. So has a
        set so long that the 1 of the identity is lost beside it in rounding: one with alpha times the sum of its
        squares above 1e12. The rounding of gradients is 2e-16 times that, relatively.

    The gradient is :math:`\alpha (I + \alpha Z Z^T)^{-1} Z` in closed form, from the factor that the value came from,
    and may be differentiated again; forward-mode derivatives raise a RuntimeError.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: fewer than two dimensions of ``embeddings``, ``eps`` or ``alpha`` not finite or not above 0.

    Example:
        >>> import torch, fewshot_ext
        >>> spread, collapsed = torch.eye(4), torch.eye(4)[[0, 0, 0, 0]]
        >>> fewshot_ext.coding_rate(torch.stack([spread, collapsed]))
        tensor([3.2189, 1.4166])
    """
    check_tensor("embeddings", embeddings, "[..., n, D]", 2, batched=True)
    check_floating("embeddings", embeddings)
    eps = check_positive("eps", eps)
    *batch, samples, dimensions = embeddings.shape
    if alpha is None:
        alpha = dimensions / (max(samples, 1) * eps**2)
    else:
        alpha = check_positive("alpha", alpha)
    return coding_rates(embeddings, embeddings.new_full(batch, alpha, dtype=accumulate_dtype(embeddings.dtype)))
