"""Typed settings of meta-training: what a YAML file or the command line fills in."""

from dataclasses import dataclass, field

from fewshot_ext._validation import check_at_least, check_choice, check_count, check_fraction, check_positive
from fewshot_ext.models import BackboneConfig, CheckpointSettings, LocalFeaturesConfig, StructuredClassifierConfig
from fewshot_ext.models.matching import TEMPERATURE, Weighting
from fewshot_ext.training.config import TrainingConfig, ValidationConfig


@dataclass(frozen=True)
class MetaTrainingConfig(TrainingConfig):
    """Meta-training of DeepEMD on episodes of base classes.

    The defaults are those of the official implementation for 5-way 1-shot.

    Args:
        way: number of classes in an episode.
        shot: number of support images of each class. With more than one the prototypes are those of the structured
            layer, fitted to the support and then held fixed: the gradient reaches the queries only, as in the official
            implementation.
        queries: number of query images of each class.
        episodes_per_step: number of episodes whose gradients are averaged in one step, over all devices. They pass
            through the network one by one, so that each has batch statistics of its own and memory stays that of one
            episode.
        steps: number of optimizer steps in an epoch.
        epochs: number of epochs.
        learning_rate: learning rate of SGD in the first epochs.
        decay: factor that the learning rate is multiplied by at each decay.
        decay_epochs: number of epochs between two decays.
        momentum: momentum of SGD.
        nesterov: use Nesterov's momentum, as the official implementation does.
        weight_decay: factor of the L2 penalty that SGD adds to the gradient.
        temperature: temperature of the logits.
        weighting: weights of the regions: cross_reference (the paper's) or uniform.
        detach_weights: stop the gradient through the weights, as the official implementation does where OpenCV solves.
        backbone: see ``BackboneConfig``; null takes its defaults. It goes with --checkpoint scratch only: a checkpoint
            brings its own. So it is with resize_mode, and with image_size, resize, mean and std, but for checkpoints of
            other code, which lack them.
        local_features: see ``LocalFeaturesConfig``. Grid and sampling cut and mirror regions themselves.
        classifier: see ``StructuredClassifierConfig``; used with more than one shot only.
        validation: see ``ValidationConfig``.

    Raises:
        ValueError: a value out of range; the message names it.

    Reference:
        Zhang et al., "DeepEMD: Few-Shot Image Classification with Differentiable Earth Mover's Distance and Structured
        Classifiers", CVPR 2020 (https://arxiv.org/abs/2003.06777).

    Example:
        >>> MetaTrainingConfig.from_dict({"shot": 5, "local_features": {"pyramid": [2, 3]}}).local_features.pyramid
        (2, 3)
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
    backbone: BackboneConfig | None = None
    local_features: LocalFeaturesConfig = field(default_factory=LocalFeaturesConfig)
    classifier: StructuredClassifierConfig = field(default_factory=StructuredClassifierConfig)
    validation: ValidationConfig = field(
        default_factory=lambda: ValidationConfig(epochs=1, episodes=1000, shot=1, queries=15)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("way", self.way, 2)
        for name in ("shot", "queries", "episodes_per_step", "steps", "epochs", "decay_epochs"):
            check_count(name, getattr(self, name), 1)
        check_at_least("weight_decay", self.weight_decay, 0)
        for name in ("learning_rate", "decay", "temperature"):
            check_positive(name, getattr(self, name))
        check_fraction("momentum", self.momentum)
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov: expected false without momentum, got momentum 0")
        check_choice("weighting", self.weighting, "cross_reference", "uniform")

    @property
    def checkpoint_settings(self) -> CheckpointSettings:
        """What is given for a checkpoint of other code."""
        return CheckpointSettings(image_size=self.image_size, mean=self.mean, std=self.std, resize=self.resize)

    @property
    def epoch_episodes(self) -> int:
        """Episodes of an epoch."""
        return self.steps * self.episodes_per_step
