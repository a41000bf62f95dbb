"""One problem, drawn alike in every process, and what one process makes of it."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

import fewshot_ext
from fewshot_ext.parallel import ClassParallelMarginLoss

LOSSES = {"cosine": fewshot_ext.margin_cosine_loss, "dot": fewshot_ext.margin_softmax_loss}
BATCHES = {1: ((8,),), 2: ((4, 4), (3, 5), (0, 7)), 4: ((2, 2, 2, 2), (3, 0, 5, 1))}  # even ones first


@dataclass(frozen=True)
class Problem:
    """A rank's part of ``sizes`` samples; ``options`` are those of the loss."""

    sizes: tuple[int, ...]
    classes: int = 11
    dimensions: int = 6
    dtype: torch.dtype = torch.float64
    similarity: str = "cosine"
    options: dict[str, object] = field(default_factory=dict)

    def tensors(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(sum(self.sizes), self.dimensions, generator=generator, dtype=torch.float64)
        target = torch.randint(self.classes, (sum(self.sizes),), generator=generator)
        target[1::4] = self.options.get("ignore_index", -100)
        return features.to(self.dtype), target

    def upstream(self) -> Tensor:
        """Of the loss's rows without a reduction; 1.5 for a number."""
        if self.options.get("reduction") != "none":
            return torch.tensor(1.5)
        return torch.linspace(-1, 1, sum(self.sizes), dtype=torch.float64)

    def own(self, rank: int) -> slice:
        begin = sum(self.sizes[:rank])
        return slice(begin, begin + self.sizes[rank])

    def module(self, **options) -> ClassParallelMarginLoss:
        return ClassParallelMarginLoss(
            self.dimensions,
            self.classes,
            similarity=self.similarity,
            dtype=self.dtype,
            **self.options,
            **options,
        )

    def in_one_process(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss, predictions, and gradients of features and weight."""
        features, target = self.tensors()
        features, weight = features.requires_grad_(), weight.detach().clone().requires_grad_()
        loss, prediction = LOSSES[self.similarity](features, weight, target, return_prediction=True, **self.options)
        loss.backward(self.upstream().to(loss.dtype))
        return loss.detach(), prediction, features.grad, weight.grad
