"""How far embeddings have collapsed: their singular values and their coding rate."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewshot_ext._precision import full_precision, normalize
from fewshot_ext.ops import coding_rate


@full_precision()
def singular_spectrum(embeddings: Tensor) -> Tensor:
    r"""Singular values of the embeddings, normalized to length 1 each, over the square root of their number.

    The coding rate of the same embeddings follows from them:
    :math:`R = \tfrac{1}{2} \sum_i \log (1 + D \sigma_i^2 / \epsilon^2)`, with
    :math:`\sum_i \sigma_i^2 = 1`. It is largest where all are equal, and low where few are left. The mean is not
    taken off, because the coding rate does not either.

    Args:
        embeddings: ``[n, D]``, floating.

    Returns:
        ``[D]`` float64 on the CPU, falling.

    Raises:
        ValueError: a wrong shape, no embeddings, or entries that are not finite.

    Example:
        >>> singular_spectrum(torch.eye(2))
        tensor([0.7071, 0.7071], dtype=torch.float64)
    """
    if embeddings.dim() != 2 or not embeddings.numel():
        raise ValueError(f"embeddings: expected shape [n, D] with samples, got {list(embeddings.shape)}")
    if not embeddings.isfinite().all():
        raise ValueError("embeddings: expected finite entries, got NaN or infinity")
    unit = normalize(embeddings.detach().double()).cpu()
    # The D x D matrix is small whatever n is; its rounding is 1e-8 of the largest singular value.
    eigenvalues = torch.linalg.eigvalsh(unit.mT @ unit / len(unit))
    return eigenvalues.clamp(min=0).sqrt().flip(0)


def effective_rank(spectrum: Tensor) -> float:
    """exp of the entropy of the singular values divided by their sum: D where all are equal, 1 where one is left.

    Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.

    Args:
        spectrum: ``[D]`` singular values.

    Example:
        >>> round(effective_rank(torch.tensor([1.0, 1.0, 0.0])), 6)
        2.0
    """
    share = spectrum / spectrum.sum()
    return torch.special.entr(share).sum().exp().item()


def spectral_decay(spectrum: Tensor) -> float:
    """Divergence of the singular values, divided by their sum, from all being equal: 0 there, infinite where one is 0.

    The rho of Roth et al., "Revisiting Training Strategies and Generalization Performance in Deep Metric Learning",
    ICML 2020, section 5, over all singular values.

    Args:
        spectrum: ``[D]`` singular values.

    Example:
        >>> round(spectral_decay(torch.tensor([3.0, 1.0])), 6)
        0.143841
    """
    share = spectrum / spectrum.sum()
    return -(share * len(share)).log().mean().item()


@dataclass(frozen=True)
class EmbeddingSpread:
    """What :func:`measure_spread` returns.

    Attributes:
        coding_rate: in nats.
        effective_rank, spectral_decay: see the functions of these names.
        spectrum: ``[D]`` float64, see :func:`singular_spectrum`.
    """

    coding_rate: float
    effective_rank: float
    spectral_decay: float
    spectrum: Tensor

    def row(self) -> dict[str, Any]:
        """All of it in plain types, as columns of a table; an infinite decay is None, because JSON has no infinity."""
        decay = self.spectral_decay if math.isfinite(self.spectral_decay) else None
        return {**vars(self), "spectral_decay": decay, "spectrum": self.spectrum.tolist()}


@full_precision()
def measure_spread(embeddings: Tensor, eps: float = 0.5) -> EmbeddingSpread:
    """How much of their space embeddings span, each normalized to length 1.

    Args:
        embeddings: ``[n, D]``, floating.
        eps: distortion of the coding rate.

    Raises:
        ValueError: as :func:`singular_spectrum`, and for ``eps`` not above 0.

    Example:
        >>> spread = measure_spread(torch.eye(2))
        >>> round(spread.coding_rate, 4), round(spread.effective_rank, 4)
        (1.6094, 2.0)
    """
    spectrum = singular_spectrum(embeddings)
    rate = coding_rate(normalize(embeddings.detach().double()), eps).item()
    return EmbeddingSpread(rate, effective_rank(spectrum), spectral_decay(spectrum), spectrum)
