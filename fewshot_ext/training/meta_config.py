"""Typed settings of meta-training: what a YAML file or the command line fills in."""

from dataclasses import dataclass, field
from typing import Any, Literal

from fewshot_ext._checks import check_at_least, check_choice, check_count, check_fraction, check_positive
from fewshot_ext._formats import typed
from fewshot_ext.data.augmentation import AugmentationConfig
from fewshot_ext.models import BackboneConfig, LocalFeaturesConfig, StructuredClassifierConfig
from fewshot_ext.models.matching import TEMPERATURE, Weighting
from fewshot_ext.training.config import ValidationConfig, build_parts, check_normalisation

_PARTS = {
    "backbone": BackboneConfig,
    "local_features": LocalFeaturesConfig,
    "classifier": StructuredClassifierConfig,
    "augmentation": AugmentationConfig,
    "validation": ValidationConfig,
}
FROM_SCRATCH = ("backbone", "image_size", "mean", "std")  # a checkpoint brings its own


@dataclass(frozen=True)
class MetaTrainingConfig:
    """Meta-training of DeepEMD on episodes of base classes.

    The defaults are those of the official implementation for 5-way 1-shot.

    Args:
        way: classes an episode.
        shot: support images a class. With more than one the prototypes are those of the structured layer, fitted to
            the support and then held fixed: the gradient reaches the queries alone, as in the official implementation.
        queries: query images a class.
        episodes_per_step: episodes whose gradients are averaged in one step, over all devices. They pass through the
            network one by one, so that each has batch statistics of its own and memory stays that of one episode.
        steps: optimiser steps an epoch.
        epochs: how many epochs.
        learning_rate: SGD's rate in the first epochs.
        decay: what the rate is multiplied by every ``decay_epochs`` epochs.
        decay_epochs: epochs between two decays.
        momentum: of SGD.
        nesterov: Nesterov's momentum, as in the official implementation.
        weight_decay: L2 penalty that SGD adds to the gradient.
        temperature: of the logits.
        weighting: weights of the regions: "cross_reference" (the paper's) or "uniform".
        detach_weights: stop the gradient through the weights, as the official implementation does where OpenCV solves.
        precision: Lightning's name of the arithmetic, as "32-true" or "bf16-mixed"; matching is in float32 or better.
        channels_last: keep feature maps in the channels-last layout, which most convolutions are faster in.
        checkpoint_epochs: epochs between two checkpoints; a broken run resumes at the last of them.
        backbone: from scratch alone: see ``BackboneConfig``; null for its defaults. A checkpoint brings its own.
        image_size: from scratch alone: side of the square images that the backbone sees; null for the archive's.
        mean: from scratch alone: of each channel, for pixels in [0, 1]; null for that of the training images.
        std: likewise the standard deviation.
        local_features: see ``LocalFeaturesConfig``.
        classifier: see ``StructuredClassifierConfig``; of more than one shot alone.
        augmentation: see ``AugmentationConfig``. Grid and sampling cut and mirror regions themselves.
        validation: see ``ValidationConfig``.

    Raises:
        ValueError: a value out of range; the message names it.

    Reference:
        Zhang et al., "DeepEMD: Few-Shot Image Classification with Differentiable Earth Mover's Distance and Structured
        Classifiers", CVPR 2020 (https://arxiv.org/abs/2003.06777).
    """

    way: int = 5
    shot: int = 1
    queries: int = 15
    episodes_per_step: int = 1
    steps: int = 50
    epochs: int = 100
    learning_rate: float = 5e-4
    decay: float = 0.5
    decay_epochs: int = 10
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    temperature: float = TEMPERATURE
    weighting: Weighting = "cross_reference"
    detach_weights: bool = False
    precision: Literal["32-true", "16-mixed", "bf16-mixed", "64-true"] = "32-true"
    channels_last: bool = False
    checkpoint_epochs: int = 1
    backbone: BackboneConfig | None = None
    image_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    local_features: LocalFeaturesConfig = field(default_factory=LocalFeaturesConfig)
    classifier: StructuredClassifierConfig = field(default_factory=StructuredClassifierConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    validation: ValidationConfig = field(
        default_factory=lambda: ValidationConfig(epochs=1, episodes=1000, shot=1, queries=15)
    )

    def __post_init__(self) -> None:
        check_count("way", self.way, 2)
        for name in ("shot", "queries", "episodes_per_step", "steps", "epochs", "decay_epochs", "checkpoint_epochs"):
            check_count(name, getattr(self, name), 1)
        check_at_least("weight_decay", self.weight_decay, 0)
        for name in ("learning_rate", "decay", "temperature"):
            check_positive(name, getattr(self, name))
        check_fraction("momentum", self.momentum)
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov must be false without momentum, got momentum 0")
        check_choice("weighting", self.weighting, "cross_reference", "uniform")
        check_choice("precision", self.precision, "32-true", "16-mixed", "bf16-mixed", "64-true")
        check_normalisation(self.image_size, self.mean, self.std)

    @property
    def epoch_episodes(self) -> int:
        """Episodes of an epoch."""
        return self.steps * self.episodes_per_step

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "MetaTrainingConfig":
        """Rebuilds a config from ``dataclasses.asdict``, as a checkpoint keeps it, or from a YAML file.

        Example:
            >>> MetaTrainingConfig.from_dict({"shot": 5, "local_features": {"pyramid": [2, 3]}}).local_features.pyramid
            (2, 3)
        """
        return typed(cls, build_parts(values, _PARTS))
