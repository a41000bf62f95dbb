"""Typed settings of metric learning: what a YAML file or the command line fills in."""

from dataclasses import dataclass, field, replace
from typing import Literal

from fewshot_ext._validation import (
    check_at_least,
    check_choice,
    check_count,
    check_counts,
    check_positive,
    plain_numbers,
)
from fewshot_ext.losses.anti_collapse import CONVENTIONS, VARIANTS
from fewshot_ext.losses.base_losses import BASE_LOSSES, PROXY_LOSSES
from fewshot_ext.losses.miners import MINERS
from fewshot_ext.models import BackboneConfig
from fewshot_ext.training.config import TrainingConfig

NO_ANTI_COLLAPSE = "none"
# Settings of the backbone that a checkpoint does not bring.
OF_THE_EMBEDDING = ("embedding", "pooling")


@dataclass(frozen=True)
class AntiCollapseConfig:
    """The term of Jiang et al. (2024) that keeps embeddings from collapsing: loss = base_weight base + weight penalty.

    Args:
        variant: what is spread: the embeddings of the batch (pair), the proxies of its classes (batch_proxy), the
            proxies of all classes (all_proxy) or nothing (none), which leaves the base loss as it is.
        convention: formula of the penalty: -gamma2 R (paper) or exp(-gamma2 R) (official, as in the authors' code).
        weight: weight of the penalty (nu), at least 0.
        base_weight: weight of the base loss, at least 0 (the official code: 0.0035 to 0.01, with weight 1).
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
        plain_numbers(self)
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
        epochs: number of epochs between two measurements; the last epoch is always measured.
        ks: numbers K of Recall@K.
        map_ks: numbers K of MAP@K.
        clusters: measure NMI and F1 of a k-means clustering too, which takes the longest.
        seen_images: largest number of training images to measure, drawn evenly from the classes. All images of
            validation and unseen classes are measured.
        eps: distortion of the coding rate that is measured.

    Raises:
        ValueError: a value out of range, no K, or a K given twice.
    """

    epochs: int = 5
    ks: tuple[int, ...] = (1, 2, 4, 8)
    map_ks: tuple[int, ...] = ()
    clusters: bool = False
    seen_images: int = 10_000
    eps: float = 0.5

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_count("epochs", self.epochs, 1)
        check_count("seen_images", self.seen_images, 2)
        check_positive("eps", self.eps)
        check_counts("ks", self.ks, 1)
        check_counts("map_ks", self.map_ks, 1)
        if len(set(self.map_ks)) < len(self.map_ks):
            raise ValueError(f"map_ks: expected no K twice, got {list(self.map_ks)}")
        if not self.ks or len(set(self.ks)) < len(self.ks):
            raise ValueError(f"ks: expected at least one K, and none twice, got {list(self.ks)}")


_CLASSES_PER_BATCH = 45  # of the official code


@dataclass(frozen=True)
class MetricTrainingConfig(TrainingConfig):
    """An embedding of unit length trained by a metric learning loss on batches of P classes with K images each.

    Batches, losses and the factor of weight decay are those of the official Anti-Collapse code, whose recipes have
    the rest: it fine-tunes networks that know ImageNet, and the defaults here are for one that starts afresh.

    Args:
        loss: loss with the settings of the official Anti-Collapse code. proxy_anchor and proxy_nca compare images with
            proxies of the classes, contrastive and triplet compare images with each other.
        miner: how triplets are drawn for contrastive and triplet: negatives by the inverse density of their distance
            (distance), all at random (random), negatives a little farther than the positive (semihard), or positives
            and negatives that are in the wrong order (softhard). See ``TripletMiner``.
        epochs: number of epochs; an epoch has as many batches as hold all training images.
        classes_per_batch: number of classes in a batch (P); null takes 45, or all where there are fewer.
        samples_per_class: number of images of each class in a batch (K); at least 2 for contrastive and triplet.
        optimizer: adam, whose weight decay is an L2 penalty, as in the official code, or adamw, whose is decoupled.
        learning_rate: learning rate of the network.
        proxy_learning_rate: learning rate of the proxies, if the loss has any. They start anywhere and must move faster
            than the backbone. They have no weight decay.
        milestones: epochs after which both learning rates fall.
        decay_factor: factor that both learning rates are multiplied by at each milestone.
        weight_decay: weight decay of the network.
        warmup_epochs: number of first epochs that train the embedding's layer and the proxies alone.
        freeze_batch_norm: keep means and variances of batch normalization as the checkpoint has them; its scales and
            shifts are trained.
        compile: compile the backbone by torch.compile; the first steps then take minutes.
        anti_collapse: see ``AntiCollapseConfig``.
        backbone: see ``BackboneConfig``; its ``embedding`` is the number of dimensions that are compared, and null
            leaves the features as they are. A checkpoint brings the rest of it, and image_size with resize,
            resize_mode, mean and std where they are null.
        measurement: see ``MeasurementConfig``.

    Raises:
        ValueError: a value out of range; the message names it.

    Example:
        >>> MetricTrainingConfig("triplet", anti_collapse=AntiCollapseConfig("pair")).anti_collapse.weight
        0.1
    """

    loss: Literal["proxy_anchor", "proxy_nca", "contrastive", "triplet"] = "proxy_anchor"
    miner: Literal["distance", "random", "semihard", "softhard"] = "distance"
    epochs: int = 100
    classes_per_batch: int | None = None
    samples_per_class: int = 2
    optimizer: Literal["adam", "adamw"] = "adamw"
    learning_rate: float = 1e-3
    proxy_learning_rate: float = 0.02
    milestones: tuple[int, ...] = ()
    decay_factor: float = 0.5
    weight_decay: float = 4e-4
    warmup_epochs: int = 0
    freeze_batch_norm: bool = False
    compile: bool = False
    anti_collapse: AntiCollapseConfig = field(default_factory=AntiCollapseConfig)
    backbone: BackboneConfig = field(default_factory=lambda: BackboneConfig(embedding=64))
    measurement: MeasurementConfig = field(default_factory=MeasurementConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("loss", self.loss, *BASE_LOSSES)
        if self.classes_per_batch is not None:
            check_count("classes_per_batch", self.classes_per_batch, 0)
        if self.classes_per_batch in (0, 1):
            raise ValueError(
                f"classes_per_batch: expected at least 2, got {self.classes_per_batch}: a batch of one class has no "
                "negatives"
            )
        has_proxies = self.loss in PROXY_LOSSES
        check_choice("miner", self.miner, *MINERS)
        if has_proxies and self.miner != MINERS[0]:
            raise ValueError(f"miner is an option of contrastive and triplet, got {self.miner!r} for {self.loss}")
        check_count("samples_per_class", self.samples_per_class, 1)
        if self.samples_per_class < 2 and not has_proxies:
            raise ValueError(
                f"samples_per_class: expected at least 2 for {self.loss}, which compares images of a class, got 1"
            )
        if not has_proxies and self.anti_collapse.variant in ("batch_proxy", "all_proxy"):
            raise ValueError(
                f"anti_collapse.variant: expected 'pair' or 'none' for {self.loss}, which has no proxies, "
                f"got {self.anti_collapse.variant!r}"
            )
        check_choice("optimizer", self.optimizer, "adam", "adamw")
        check_count("warmup_epochs", self.warmup_epochs, 0)
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs: expected at most epochs, {self.epochs}, got {self.warmup_epochs}")
        if self.warmup_epochs and self.backbone.embedding is None:
            raise ValueError(
                f"warmup_epochs: expected 0 without backbone.embedding, whose layer it trains, got {self.warmup_epochs}"
            )
        check_positive("proxy_learning_rate", self.proxy_learning_rate)
        check_positive("decay_factor", self.decay_factor)
        check_counts("milestones", self.milestones, 1)
        check_count("epochs", self.epochs, 1)
        check_positive("learning_rate", self.learning_rate)
        check_at_least("weight_decay", self.weight_decay, 0)

    def batches_of(self, num_classes: int) -> "MetricTrainingConfig":
        """The same settings with P, where it was left open, for so many classes.

        Example:
            >>> MetricTrainingConfig().batches_of(5).classes_per_batch
            5
        """
        if self.classes_per_batch is not None:
            return self
        return replace(self, classes_per_batch=max(2, min(_CLASSES_PER_BATCH, num_classes)))
