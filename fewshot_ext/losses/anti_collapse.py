"""Anti-Collapse loss: a metric learning loss, and the coding rate that keeps its embeddings from collapsing."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fewshot_ext._precision import accumulate_dtype, normalize
from fewshot_ext._validation import (
    check_at_least,
    check_choice,
    check_floating,
    check_integers,
    check_positive,
    check_tensor,
)
from fewshot_ext.ops import coding_rate

VARIANTS = ("pair", "batch_proxy", "all_proxy")
CONVENTIONS = ("paper", "official")


class AntiCollapseTerms(NamedTuple):
    """The parts of an Anti-Collapse loss, all ``[]``: loss = base_weight * base + weight * penalty."""

    loss: Tensor
    base: Tensor
    penalty: Tensor
    rate: Tensor  # the coding rate in nats: what a run should log


torch.serialization.add_safe_globals([AntiCollapseTerms])  # so that torch.load reads a saved one


class AntiCollapseLoss(nn.Module):
    r"""Adds to a metric learning loss a penalty on low coding rates, of the batch or of the class proxies.

    .. math::
        L = w_b L_{base} - w \gamma_2 R \quad \text{("paper")}, \qquad
        L = w_b L_{base} + w e^{-\gamma_2 R} \quad \text{("official")}

    Jiang et al., "Anti-Collapse Loss for Deep Metric Learning Based on Coding Rate Metric", 2024, with the rate R of
    :func:`fewshot_ext.coding_rate` over vectors normalized to length 1, and its factor :math:`\alpha` times
    :math:`\gamma_1`:

    ============= ================================== ===================== ====================
    variant       vectors                            alpha, "paper"        alpha, "official"
    ============= ================================== ===================== ====================
    "pair"        the n embeddings of the batch      D / (n eps^2)         D / (n eps)
    "batch_proxy" proxies of the k classes in it     D / (k eps^2)         k / (D eps)
    "all_proxy"   proxies of all C classes           D / (C eps^2)         C / (D eps)
    ============= ================================== ===================== ====================

    "official" is what the authors' code computes. There the exponential ends the penalty early: its gradient is e^-R of
    that of the rate, and R grows with the number of vectors (113 nats for 90 orthogonal embeddings of 512 dimensions).
    "paper" has no exponential and goes on.

    Args:
        base: called as ``base(embeddings, labels)``; any module, such as one of :func:`base_loss` or of
            pytorch-metric-learning, or a head of this package.
        variant: which vectors are to spread.
        convention: which formula, see above.
        eps: > 0, the distortion of the rate.
        base_weight: :math:`w_b` >= 0. The default goes with that of ``weight``: rates count in tens of nats.
        weight: w >= 0.
        gamma1: :math:`\gamma_1` > 0.
        gamma2: :math:`\gamma_2` >= 0.
        proxies: name of the parameter of ``base`` that holds the class proxies, ``[C, D]``, dots allowed: "proxies" in
            pytorch-metric-learning, "weight" in the heads of this package. "pair" does not look for it.

    Call it with ``embeddings`` ``[n, D]``, float32, float64, bfloat16 or float16, and ``labels`` ``[n]`` int64. The
    result is the loss, ``[]``, float64 for float64 embeddings and float32 otherwise. Half types reach ``base`` as
    float32, because pytorch-metric-learning would round its proxies to them. Gradients reach the embeddings and the
    parameters of ``base``. In a distributed run the rate is that of the rank's own batch.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a number out of range, an unknown variant or convention, no proxies ``[C, D]`` in ``base``; in a
            call shapes that do not fit, a single sample under "pair", a single class or labels without a proxy under
            "batch_proxy", and no samples.

    Example:
        >>> import torch, fewshot_ext
        >>> head = fewshot_ext.MarginCosineLoss(in_features=16, num_classes=5)
        >>> loss = fewshot_ext.AntiCollapseLoss(head, "all_proxy", proxies="weight")
        >>> embeddings, labels = torch.randn(8, 16), torch.randint(5, (8,))
        >>> loss(embeddings, labels).backward()
        >>> bool(loss.terms(embeddings, labels).rate > 0)
        True
    """

    def __init__(
        self,
        base: nn.Module,
        variant: str = "batch_proxy",
        *,
        convention: str = "paper",
        eps: float = 0.5,
        base_weight: float = 0.01,
        weight: float = 1.0,
        gamma1: float = 1.0,
        gamma2: float = 1.0,
        proxies: str = "proxies",
    ) -> None:
        super().__init__()
        if not isinstance(base, nn.Module):
            raise TypeError(f"base: expected a torch.nn.Module, got {type(base).__name__}")
        check_choice("variant", variant, *VARIANTS)
        check_choice("convention", convention, *CONVENTIONS)
        self.base = base
        self.variant = variant
        self.convention = convention
        self.eps = check_positive("eps", eps)
        self.gamma1 = check_positive("gamma1", gamma1)
        self.base_weight = check_at_least("base_weight", base_weight, 0)
        self.weight = check_at_least("weight", weight, 0)
        self.gamma2 = check_at_least("gamma2", gamma2, 0)
        if not isinstance(proxies, str):
            raise TypeError(f"proxies: expected the name of a parameter of base, got {type(proxies).__name__}")
        self.proxies = proxies
        if variant != "pair":
            self._proxies()

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss, ``[]``."""
        return self.terms(embeddings, labels).loss

    def terms(self, embeddings: Tensor, labels: Tensor) -> AntiCollapseTerms:
        """The loss and its parts. The loss carries the gradients; detach the others before logging them."""
        check_tensor("embeddings", embeddings, "[n, D]", 2)
        check_floating("embeddings", embeddings)
        check_integers("labels", labels, "[n]", 1)
        samples = embeddings.shape[0]
        if samples == 0:
            raise ValueError("embeddings: expected at least one sample, got none")
        if labels.shape[0] != samples:
            raise ValueError(f"labels: expected shape [{samples}] to fit embeddings, got {list(labels.shape)}")
        vectors = normalize(self._vectors(embeddings, labels))
        base = self.base(embeddings.to(accumulate_dtype(embeddings.dtype)), labels)
        rate = coding_rate(vectors, alpha=self._alpha(*vectors.shape))
        penalty = torch.exp(-self.gamma2 * rate) if self.convention == "official" else -self.gamma2 * rate
        return AntiCollapseTerms(self.base_weight * base + self.weight * penalty, base, penalty, rate)

    def _proxies(self) -> Tensor:
        try:
            proxies = self.base.get_parameter(self.proxies)
        except AttributeError:
            raise ValueError(
                f"base: expected a parameter {self.proxies!r} with the class proxies, which the variant "
                f"{self.variant} spreads, got a {type(self.base).__name__} without; name it by proxies=, or use the "
                "variant pair"
            ) from None
        if proxies.dim() != 2:
            raise ValueError(f"base: expected proxies [C, D] in {self.proxies!r}, got shape {list(proxies.shape)}")
        return proxies

    def _vectors(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        if self.variant == "pair":
            if len(embeddings) < 2:
                raise ValueError("embeddings: expected at least two samples, got one, whose rate is the same anywhere")
            return embeddings
        proxies = self._proxies()
        if self.variant == "all_proxy":
            return proxies
        classes = labels.unique()
        if len(classes) < 2:
            raise ValueError("labels: expected at least two classes, got one, whose proxy has the same rate anywhere")
        if classes[0] < 0 or classes[-1] >= len(proxies):
            raise ValueError(
                f"labels: expected labels in [0, {len(proxies)}), the number of proxies, "
                f"got {int(classes[0])} to {int(classes[-1])}"
            )
        return proxies[classes]

    def _alpha(self, count: int, dimensions: int) -> float:
        if self.convention == "paper":
            return self.gamma1 * dimensions / (count * self.eps**2)
        if self.variant == "pair":
            return self.gamma1 * dimensions / (count * self.eps)
        return self.gamma1 * count / (dimensions * self.eps)

    def extra_repr(self) -> str:
        names = ("variant", "convention", "eps", "base_weight", "weight", "gamma1", "gamma2", "proxies")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
