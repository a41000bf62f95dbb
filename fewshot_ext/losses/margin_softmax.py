"""Classifier heads with a signed-margin softmax loss."""

import math
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewshot_ext._precision import full_precision, normalize
from fewshot_ext._validation import check_count, check_flag, check_floating
from fewshot_ext.ops import margin_cosine_loss, margin_softmax_loss
from fewshot_ext.ops.margin_softmax import DEFAULTS, check_settings


class _MarginLoss(nn.Module):
    """Owns the class weight ``[num_classes, in_features]``; a subclass chooses the similarity and the defaults."""

    _loss: ClassVar[Callable[..., Tensor | tuple[Tensor, Tensor]]]
    default_margin: ClassVar[float]
    default_scale: ClassVar[float]

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        margin: float | None = None,
        scale: float | None = None,
        *,
        reduction: str = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        check: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        margin = self.default_margin if margin is None else margin
        scale = self.default_scale if scale is None else scale
        self.in_features = check_count("in_features", in_features, 1)
        self.num_classes = check_count("num_classes", num_classes, 2)
        # What the function checks in every call, so that a mistake shows where it is made.
        settings = check_settings(margin, scale, label_smoothing, ignore_index, reduction)
        self.margin, self.scale, self.label_smoothing, self.ignore_index = settings
        self.reduction = reduction
        check_flag("check", check)
        self.check = check
        check_floating("dtype", torch.empty(0, dtype=dtype))
        self.weight = nn.Parameter(torch.empty(self.num_classes, self.in_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """kaiming_uniform with a = sqrt(5), as :class:`torch.nn.Linear` does and the paper's classifiers start."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(
        self, features: Tensor, target: Tensor, *, return_prediction: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Loss of ``features [N, D]`` with labels ``target [N]``; see the function of the same name."""
        return self._loss(features, self.weight, target, return_prediction=return_prediction, **self._options())

    def _options(self) -> dict[str, object]:
        return {
            "margin": self.margin,
            "scale": self.scale,
            "reduction": self.reduction,
            "ignore_index": self.ignore_index,
            "label_smoothing": self.label_smoothing,
            "check": self.check,
        }

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, num_classes={self.num_classes}"
        return ", ".join([sizes, *(f"{name}={value!r}" for name, value in self._options().items())])


class MarginCosineLoss(_MarginLoss):
    """Cosine classifier trained with :func:`fewshot_ext.margin_cosine_loss` (Neg-Cosine, paper equation 8).

    Args:
        in_features: D, the length of a feature vector.
        num_classes: C >= 2.
        margin, scale: as in :func:`fewshot_ext.margin_cosine_loss`; None takes its defaults, -0.3 and 30.
        reduction, ignore_index, label_smoothing, check: likewise.
        device, dtype: of the weight, ``[C, D]``, drawn by kaiming_uniform(a = sqrt 5).

    Example:
        >>> import torch, fewshot_ext
        >>> head = fewshot_ext.MarginCosineLoss(in_features=64, num_classes=5, margin=-0.3)
        >>> features = torch.randn(8, 64)
        >>> loss = head(features, torch.randint(5, (8,)))
        >>> head.scores(features).shape
        torch.Size([8, 5])
    """

    _loss = staticmethod(margin_cosine_loss)
    default_margin, default_scale = DEFAULTS["cosine"]

    def scores(self, features: Tensor) -> Tensor:
        """Plain cosines ``[N, C]``, without margin and scale: what a prediction is made from."""
        with full_precision():
            cosines = F.linear(normalize(features), normalize(self.weight))
        return cosines.to(torch.result_type(features, self.weight))


class MarginSoftmaxLoss(_MarginLoss):
    """Linear classifier without bias, trained with :func:`fewshot_ext.margin_softmax_loss` (Neg-Softmax, equation 7).

    Args:
        in_features: D, the length of a feature vector.
        num_classes: C >= 2.
        margin, scale: as in :func:`fewshot_ext.margin_softmax_loss`; None takes its defaults, -1 and 5.
        reduction, ignore_index, label_smoothing, check: likewise.
        device, dtype: of the weight, ``[C, D]``, drawn by kaiming_uniform(a = sqrt 5).

    Example:
        >>> import torch, fewshot_ext
        >>> head = fewshot_ext.MarginSoftmaxLoss(in_features=64, num_classes=5, margin=-1.0)
        >>> loss, prediction = head(torch.randn(8, 64), torch.randint(5, (8,)), return_prediction=True)
    """

    _loss = staticmethod(margin_softmax_loss)
    default_margin, default_scale = DEFAULTS["dot"]

    def scores(self, features: Tensor) -> Tensor:
        """Plain inner products ``[N, C]``, without margin and scale: what a prediction is made from."""
        return F.linear(features, self.weight)
