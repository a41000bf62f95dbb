"""Typed settings of metric learning: what a YAML file or the command line fills in."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fewshot_ext._checks import check_at_least, check_choice, check_count, check_positive
from fewshot_ext._formats import typed
from fewshot_ext.data.augmentation import AugmentationConfig
from fewshot_ext.losses.anti_collapse import CONVENTIONS, VARIANTS
from fewshot_ext.losses.base_losses import BASE_LOSSES, PROXY_LOSSES
from fewshot_ext.models import BackboneConfig
from fewshot_ext.training.config import PRECISIONS, build_parts, check_normalisation

NO_ANTI_COLLAPSE = "none"


@dataclass(frozen=True)
class AntiCollapseConfig:
    """The term of Jiang et al. (2024) that keeps embeddings from collapsing: loss = base_weight base + weight penalty.

    Args:
        variant: what is spread: "pair" the embeddings of the batch, "batch_proxy" the proxies of its classes,
            "all_proxy" those of all classes; "none" leaves the base loss alone.
        convention: formula of the penalty: "paper" is -gamma2 R, "official" is exp(-gamma2 R), as the authors' code.
        weight: of the penalty (nu), at least 0.
        base_weight: of the base loss, at least 0 (the official code: 0.0035 to 0.01, with weight 1).
        eps: distortion of the coding rate.
        gamma1: factor of the coding rate's alpha.
        gamma2: factor of the coding rate.

    Raises:
        ValueError: a value out of range; the message names it.
    """

    variant: Literal["none", "pair", "batch_proxy", "all_proxy"] = NO_ANTI_COLLAPSE
    convention: Literal["paper", "official"] = "paper"
    weight: float = 0.1
    base_weight: float = 1.0
    eps: float = 0.5
    gamma1: float = 1.0
    gamma2: float = 1.0

    def __post_init__(self) -> None:
        check_choice("variant", self.variant, NO_ANTI_COLLAPSE, *VARIANTS)
        check_choice("convention", self.convention, *CONVENTIONS)
        for name in ("weight", "base_weight", "gamma2"):
            check_at_least(name, getattr(self, name), 0)
        for name in ("eps", "gamma1"):
            check_positive(name, getattr(self, name))


@dataclass(frozen=True)
class MeasurementConfig:
    """What is measured while the training runs: retrieval, coding rate and spectrum of the embeddings.

    Args:
        epochs: epochs between two measurements; the last epoch is always measured.
        ks: the K of Recall@K.
        seen_images: most training images that are measured, drawn evenly from the classes; all images of validation
            and unseen classes are.
        eps: distortion of the coding rate that is measured.

    Raises:
        ValueError: a value out of range, no K, or a K given twice.
    """

    epochs: int = 5
    ks: tuple[int, ...] = (1, 2, 4, 8)
    seen_images: int = 10_000
    eps: float = 0.5

    def __post_init__(self) -> None:
        check_count("epochs", self.epochs, 1)
        check_count("seen_images", self.seen_images, 2)
        check_positive("eps", self.eps)
        if not self.ks or len(set(self.ks)) < len(self.ks):
            raise ValueError(f"ks must name at least one K, and none twice, got {list(self.ks)}")
        for k in self.ks:
            check_count("ks", k, 1)


_CLASSES_PER_BATCH = 45  # of the official code


@dataclass(frozen=True)
class MetricTrainingConfig:
    """An embedding of unit length trained by a metric learning loss on batches of P classes with K images each.

    Batches, losses and weight decay are those of the official Anti-Collapse code; its rates are for a ResNet-50 that
    knows ImageNet (learning_rate 1e-5, proxy_learning_rate 0.02), the default here for a network that starts afresh.

    Args:
        loss: the first two have proxies, the others compare images; settings as in the official Anti-Collapse code.
        epochs: an epoch has as many batches as hold all training images.
        classes_per_batch: P, classes a batch; null for 45, or all where there are fewer.
        samples_per_class: K, images a class in a batch; at least 2 for contrastive and triplet.
        learning_rate: AdamW's rate for the backbone.
        proxy_learning_rate: the rate for the proxies, where the loss has some; they start anywhere, and must move
            faster than the backbone. They have no weight decay.
        milestones: epochs after which both rates fall.
        decay_factor: of both rates at each of the milestones.
        weight_decay: of AdamW, for the backbone.
        precision: Lightning's name of the arithmetic, as "32-true" or "bf16-mixed"; the loss is always in full.
        channels_last: keep feature maps in the channels-last layout, which most convolutions are faster in.
        compile: compile the backbone by torch.compile; the first steps then take minutes.
        checkpoint_epochs: epochs between two checkpoints; a broken run resumes at the last of them.
        image_size: side of the square images that the backbone sees; null for the size of the archive's.
        mean: of each channel, for pixels in [0, 1]; null for that of the training images.
        std: likewise the standard deviation.
        anti_collapse: see ``AntiCollapseConfig``.
        backbone: see ``BackboneConfig``; ``embedding`` is D, and null leaves the features as they are.
        augmentation: see ``AugmentationConfig``.
        measurement: see ``MeasurementConfig``.

    Raises:
        ValueError: a value out of range; the message names it.

    Example:
        >>> MetricTrainingConfig("triplet", anti_collapse=AntiCollapseConfig("pair")).anti_collapse.weight
        0.1
    """

    loss: Literal["proxy_anchor", "proxy_nca", "contrastive", "triplet"] = "proxy_anchor"
    epochs: int = 100
    classes_per_batch: int | None = None
    samples_per_class: int = 2
    learning_rate: float = 1e-3
    proxy_learning_rate: float = 0.02
    milestones: tuple[int, ...] = ()
    decay_factor: float = 0.5
    weight_decay: float = 4e-4
    precision: Literal["32-true", "16-mixed", "bf16-mixed", "64-true"] = "32-true"
    channels_last: bool = False
    compile: bool = False
    checkpoint_epochs: int = 1
    image_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    anti_collapse: AntiCollapseConfig = field(default_factory=AntiCollapseConfig)
    backbone: BackboneConfig = field(default_factory=lambda: BackboneConfig(embedding=64))
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    measurement: MeasurementConfig = field(default_factory=MeasurementConfig)

    def __post_init__(self) -> None:
        check_choice("loss", self.loss, *BASE_LOSSES)
        if self.classes_per_batch is not None:
            check_count("classes_per_batch", self.classes_per_batch, 0)
        if self.classes_per_batch in (0, 1):
            raise ValueError(
                f"classes_per_batch must be at least 2, got {self.classes_per_batch}: a batch of one class has no "
                "negatives"
            )
        has_proxies = self.loss in PROXY_LOSSES
        check_count("samples_per_class", self.samples_per_class, 1)
        if self.samples_per_class < 2 and not has_proxies:
            raise ValueError(
                f"samples_per_class must be at least 2 for {self.loss}, which compares images of a class, got 1"
            )
        if not has_proxies and self.anti_collapse.variant in ("batch_proxy", "all_proxy"):
            raise ValueError(
                f"anti_collapse.variant must be 'pair' or 'none' for {self.loss}, which has no proxies, "
                f"got {self.anti_collapse.variant!r}"
            )
        check_positive("proxy_learning_rate", self.proxy_learning_rate)
        check_positive("decay_factor", self.decay_factor)
        for epoch in self.milestones:
            check_count("milestones", epoch, 1)
        check_choice("precision", self.precision, *PRECISIONS)
        check_count("epochs", self.epochs, 1)
        check_positive("learning_rate", self.learning_rate)
        check_at_least("weight_decay", self.weight_decay, 0)
        check_count("checkpoint_epochs", self.checkpoint_epochs, 1)
        check_normalisation(self.image_size, self.mean, self.std)

    def batches_of(self, num_classes: int) -> "MetricTrainingConfig":
        """The same settings with P, where it was left open, for so many classes.

        Example:
            >>> MetricTrainingConfig().batches_of(5).classes_per_batch
            5
        """
        if self.classes_per_batch is not None:
            return self
        return replace(self, classes_per_batch=max(2, min(_CLASSES_PER_BATCH, num_classes)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "MetricTrainingConfig":
        """Rebuilds a config from ``dataclasses.asdict``, as a checkpoint keeps it."""
        return typed(cls, build_parts(values, _PARTS))


_PARTS = {
    "anti_collapse": AntiCollapseConfig,
    "backbone": BackboneConfig,
    "augmentation": AugmentationConfig,
    "measurement": MeasurementConfig,
}
