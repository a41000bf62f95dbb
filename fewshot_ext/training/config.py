"""Typed settings of pre-training: what a YAML file or the command line fills in."""

from dataclasses import dataclass, field
from typing import Any, Literal

from fewshot_ext._checks import check_at_least, check_finite, check_fraction, check_positive
from fewshot_ext.data.augmentation import AugmentationConfig


@dataclass(frozen=True)
class BackboneConfig:
    """Shape of the Conv-4 backbone.

    Args:
        width: channels of each of the four blocks.
        pooled_blocks: how many of them, from the first on, halve the image: 4 for 84 x 84 images, at most 3 for 8 x 8.
    """

    width: int = 64
    pooled_blocks: int = 4

    def __post_init__(self) -> None:
        check_at_least("width", self.width, 1)
        if not 0 <= self.pooled_blocks <= 4:
            raise ValueError(f"pooled_blocks must lie in [0, 4], got {self.pooled_blocks}")


@dataclass(frozen=True)
class PreTrainingConfig:
    """Pre-training on base classes with a signed-margin softmax (paper eq. 1, 7, 8).

    The defaults are the paper's recipe for Neg-Cosine on CUB.

    Args:
        similarity: "cosine" (Neg-Cosine) or "softmax" (inner product, Neg-Softmax).
        margin: subtracted from the similarity with the true class; negative loosens, positive tightens.
        scale: multiplies the similarities before the softmax (the paper: 30 for cosine, 5 for the inner
            product).
        label_smoothing: share of the target spread over all classes.
        epochs: passes over the base images.
        batch_size: images a step.
        learning_rate: Adam's rate at the end of the warm-up.
        minimum_learning_rate: the rate that the cosine decay ends at.
        warmup: share of the steps spent in the linear warm-up (the paper: 50 of 200 epochs, 100 of 400).
        warmup_multiplier: how many times smaller than ``learning_rate`` the first rate is.
        weight_decay: L2 penalty that Adam adds to the gradient.
        precision: Lightning's name of the arithmetic, as "32-true" or "bf16-mixed".
        checkpoint_epochs: epochs between two checkpoints; a broken run resumes at the last of them.
        backbone: see ``BackboneConfig``.
        augmentation: see ``AugmentationConfig``.

    Raises:
        ValueError: a value out of range; the message names it.
    """

    similarity: Literal["cosine", "softmax"] = "cosine"
    margin: float = -0.3
    scale: float = 30.0
    label_smoothing: float = 0.0
    epochs: int = 200
    batch_size: int = 256
    learning_rate: float = 3e-3
    minimum_learning_rate: float = 1e-6
    warmup: float = 0.25
    warmup_multiplier: float = 16.0
    weight_decay: float = 0.0
    precision: Literal["32-true", "16-mixed", "bf16-mixed", "64-true"] = "32-true"
    checkpoint_epochs: int = 5
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)

    def __post_init__(self) -> None:
        if self.similarity not in ("cosine", "softmax"):
            raise ValueError(f"similarity must be 'cosine' or 'softmax', got {self.similarity!r}")
        check_finite("margin", self.margin)
        check_positive("scale", self.scale)
        check_fraction("label_smoothing", self.label_smoothing)
        check_at_least("epochs", self.epochs, 1)
        check_at_least("batch_size", self.batch_size, 2)
        check_positive("learning_rate", self.learning_rate)
        check_at_least("minimum_learning_rate", self.minimum_learning_rate, 0)
        check_fraction("warmup", self.warmup)
        check_at_least("warmup_multiplier", self.warmup_multiplier, 1)
        check_at_least("weight_decay", self.weight_decay, 0)
        check_at_least("checkpoint_epochs", self.checkpoint_epochs, 1)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "PreTrainingConfig":
        """Rebuilds a config from ``dataclasses.asdict``, as a checkpoint keeps it."""
        backbone, augmentation = (
            BackboneConfig(**values["backbone"]),
            AugmentationConfig(**values["augmentation"]),
        )
        return cls(**{**values, "backbone": backbone, "augmentation": augmentation})
