"""Typed settings of meta-training: what a YAML file or the command line fills in."""

from dataclasses import dataclass, field, replace
from typing import Any

from fewshot_ext._validation import check_at_least, check_count, check_fraction, check_positive
from fewshot_ext.heads import HEADS, MAP_HEADS, DeepEMDHead, Head, HeadChoice, HeadSettings, choose_head
from fewshot_ext.models import BackboneConfig, CheckpointSettings, LocalFeaturesConfig, StructuredClassifierConfig
from fewshot_ext.models.matching import TEMPERATURE
from fewshot_ext.training.config import TrainingConfig, ValidationConfig


@dataclass(frozen=True)
class MetaTrainingConfig(TrainingConfig):
    """Meta-training on episodes of base classes, of DeepEMD or of any other head that gradients pass through.

    The defaults are those of the official implementation of DeepEMD for 5-way 1-shot.

    Args:
        head: classifier of the episodes, by its name in evaluate: deepemd, deepemd_uniform, deepemd_mean, knn,
            prediction_fusion, protonet, protonet_cosine, matchingnet, nearest_neighbor, nearest_neighbor_euclidean or
            simpleshot_l2n. Regions may follow, as in deepemd@grid or protonet@fcn; without them they are those of
            local_features. Validation takes the same head, unless validation.head names another.
        temperature: factor of the similarities before the softmax; null takes that of the head: 12.5 for deepemd, 1 for
            protonet, matchingnet and knn, as their papers have it, and 10 for protonet_cosine, nearest_neighbor and
            prediction_fusion.
        way: number of classes in an episode.
        shot: number of support images of each class. With more than one the prototypes of deepemd are those of the
            structured layer, fitted to the support and then held fixed: the gradient reaches the queries only, as in
            the official implementation.
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
        detach_weights: stop the gradient through the weights of the regions (deepemd only), as the official
            implementation does where OpenCV solves.
        backbone: see ``BackboneConfig``; null takes its defaults. It goes with --checkpoint scratch only: a checkpoint
            brings its own. So it is with resize_mode, and with image_size, resize, mean and std, but for checkpoints of
            other code, which lack them.
        local_features: see ``LocalFeaturesConfig``. Grid and sampling cut and mirror regions themselves.
        classifier: see ``StructuredClassifierConfig``; used by deepemd with more than one shot only.
        validation: see ``ValidationConfig``.

    Raises:
        ValueError: a value out of range, or a head that there is not or that no gradient passes through; the message
            names it.

    Reference:
        Zhang et al., "DeepEMD: Few-Shot Image Classification with Differentiable Earth Mover's Distance and Structured
        Classifiers", CVPR 2020 (https://arxiv.org/abs/2003.06777).

    Example:
        >>> MetaTrainingConfig.from_dict({"shot": 5, "local_features": {"pyramid": [2, 3]}}).local_features.pyramid
        (2, 3)
        >>> MetaTrainingConfig(head="protonet@grid").choice.local_features.name
        'grid'
    """

    head: str = "deepemd"
    temperature: float | None = None
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
        for name in ("learning_rate", "decay"):
            check_positive(name, getattr(self, name))
        check_fraction("momentum", self.momentum)
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov: expected false without momentum, got momentum 0")
        head = self._choose(self.head).head
        if reason := _no_gradient(head):
            names = [name for name, known in (HEADS | MAP_HEADS).items() if not _no_gradient(known)]
            raise ValueError(f"head: expected one of {', '.join(names)}, got {self.head!r}, which {reason}")
        if self.detach_weights and not isinstance(head, DeepEMDHead):
            raise ValueError(f"detach_weights is an option of deepemd, got true for {self.head}")
        if self.temperature is not None:
            check_positive("temperature", self.temperature)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "MetaTrainingConfig":
        """Rebuilds a config from ``dataclasses.asdict``, as a checkpoint keeps it, of version 0.1 too."""
        if "weighting" in values:  # that version had no other head, and always gave its temperature
            values = dict(values)
            if values.pop("weighting") == "uniform":
                values["head"] = "deepemd_uniform"
            if values.get("temperature") == TEMPERATURE:
                del values["temperature"]
        return super().from_dict(values)

    @property
    def choice(self) -> HeadChoice:
        """The head that is trained, with these settings, and the features that it takes."""
        choice = self._choose(self.head)
        if self.temperature is None:
            return choice
        return replace(choice, head=choice.head.with_logit_scale(self.temperature))

    @property
    def validation_head(self) -> tuple[str, HeadChoice]:
        """What classifies validation episodes, and its name."""
        name = self.validation.head
        return (self.head, self.choice) if name is None else (name, self._choose(name))

    def _choose(self, name: str) -> HeadChoice:
        deepemd = DeepEMDHead(classifier=self.classifier, detach_weights=self.detach_weights)
        return choose_head(name, HeadSettings(deepemd=deepemd, local_features=self.local_features))

    @property
    def checkpoint_settings(self) -> CheckpointSettings:
        """What is given for a checkpoint of other code."""
        return CheckpointSettings(image_size=self.image_size, mean=self.mean, std=self.std, resize=self.resize)

    @property
    def epoch_episodes(self) -> int:
        """Episodes of an epoch."""
        return self.steps * self.episodes_per_step


def _no_gradient(head: Head) -> str | None:
    """Why a network cannot be trained through a head."""
    if head.fits:
        return "trains a classifier of its own in each episode: evaluate it on a pre-trained checkpoint"
    return "needs the mean feature of the base classes, which moves with the network" if head.needs_base_mean else None
