"""Metric learning: an embedding of unit length, trained on P x K batches with or without the Anti-Collapse term."""

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fewshot_ext._precision import normalize
from fewshot_ext.data import ImageArchive, PKBatches
from fewshot_ext.losses import AntiCollapseLoss, base_loss
from fewshot_ext.models import Backbone, CheckpointSettings, EmbeddedBackbone, NetworkConfig
from fewshot_ext.models.checkpoint import METRIC_TRAINING
from fewshot_ext.ops import coding_rate
from fewshot_ext.training.metric_callbacks import EmbeddingHistory
from fewshot_ext.training.metric_config import NO_ANTI_COLLAPSE, OF_THE_EMBEDDING, MetricTrainingConfig
from fewshot_ext.training.module import ImageTraining, describe_network, read_start
from fewshot_ext.training.run import BEST, TrainingRun


class MetricTraining(ImageTraining):
    """Backbone and loss over uint8 images, with Adam or AdamW and a rate of its own for the proxies.

    Args:
        config: see ``MetricTrainingConfig``.
        network: what is trained.
        num_classes: seen classes.
        seed: with the epoch's number it decides the augmentation and the mined negatives of that epoch.
        checkpoint_sha256: of the file that the first weights come from, for the record.

    Shape:
        ``[B, C, H, W]`` uint8 -> embeddings ``[B, D]`` of length 1, in float32, or float64 for that precision.

    Reference:
        Jiang et al., Anti-Collapse Loss for Deep Metric Learning Based on Coding Rate Metric, 2024.

    Raises:
        ImportError: pytorch-metric-learning is missing (extra ``metric``).
    """

    stage = METRIC_TRAINING
    config_type = MetricTrainingConfig
    others = ("num_classes", "checkpoint_sha256")
    means = ("base_loss", "coding_rate")
    rates = ("learning_rate_backbone", "learning_rate_proxies")

    def __init__(
        self,
        config: MetricTrainingConfig,
        network: NetworkConfig,
        num_classes: int,
        seed: int = 0,
        checkpoint_sha256: str | None = None,
    ) -> None:
        super().__init__(config, network, seed, num_classes=num_classes, checkpoint_sha256=checkpoint_sha256)
        self.criterion = base_loss(config.loss, num_classes, self.network.out_features, config.miner)
        if config.anti_collapse.variant != NO_ANTI_COLLAPSE:
            self.criterion = AntiCollapseLoss(self.criterion, **asdict(config.anti_collapse))

    def forward(self, images: Tensor) -> Tensor:
        features = super().forward(images)
        return normalize(features)

    def train(self, mode: bool = True) -> "MetricTraining":
        super().train(mode)
        if self.config.freeze_batch_norm:
            for part in self.network.modules():
                if isinstance(part, nn.modules.batchnorm._BatchNorm):
                    part.eval()
        return self

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.train()  # Lightning leaves the mode of every part as it finds it
        if self.config.warmup_epochs:
            # Without a gradient Adam takes no step, not even that of weight decay.
            self.backbone.backbone.requires_grad_(self.current_epoch >= self.config.warmup_epochs)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> dict[str, Tensor]:
        images, target = batch
        embeddings = self(images)
        # A miner fails on them with a message that helps nobody.
        if not embeddings.isfinite().all():
            raise FloatingPointError(
                f"the embeddings are not finite in epoch {self.current_epoch + 1}: take a smaller learning_rate"
            )
        # Cosines are multiplied by 64 before they are exponentiated: rounded to bfloat16 they would be off by a fifth.
        with torch.autocast(self.device.type, enabled=False):
            if isinstance(self.criterion, AntiCollapseLoss):
                loss, base, *_ = self.criterion.terms(embeddings, target)
            else:
                loss = base = self.criterion(embeddings, target)
            rate = coding_rate(embeddings.detach(), self.config.measurement.eps)
        return {"loss": loss, "mean_loss": loss.detach(), "base_loss": base.detach(), "coding_rate": rate}

    def configure_optimizers(self) -> dict:
        config = self.config
        kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
        groups: list[dict[str, Any]] = [{"params": list(self.network.parameters()), "lr": config.learning_rate}]
        if proxies := list(self.criterion.parameters()):
            # Their length is divided away, so that decay would do nothing but change their rate.
            groups.append({"params": proxies, "lr": config.proxy_learning_rate, "weight_decay": 0.0})
        optimizer = kind(groups, weight_decay=config.weight_decay)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(config.milestones), config.decay_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}


class MetricTrainingRun(TrainingRun):
    """Everything that a metric training needs, checked before its first step.

    A loss on pairs is a function of the whole batch, so a run has one process.

    Args:
        config: see ``MetricTrainingConfig``.
        seen: training images of the seen classes.
        directory: receives ``last.ckpt``, ``best.ckpt``, ``history.json``, ``history.csv`` and the TensorBoard log.
        checkpoint: whose backbone is trained on, behind a fresh layer for the embedding: a file of any training or of
            other code, or "timm:NAME" for a backbone of this package with timm's weights; None starts from random ones.
        validation: images of validation classes, which choose ``best.ckpt``; without any the last epoch is the best.
        unseen: images of the classes that are tested; they choose nothing.
        seed: decides initial weights, batches, augmentation and mined negatives.
        options: ``device``, ``resume``, ``on_epoch`` and ``progress``, as ``TrainingRun`` has them.

    Raises:
        ImportError: Lightning, TensorBoard, pytorch-metric-learning or kornia (where images are augmented) is missing.
        OSError: ``checkpoint`` or ``last.ckpt`` cannot be read.
        ValueError: images too small for the backbone, fewer seen classes than P, a class with a single image, a K of
            Recall@K larger than a gallery, a checkpoint that does not fit the images or the settings of the backbone,
            or a ``last.ckpt`` of other settings.

    Example:
        >>> from fewshot_ext.data import Split, load_digits
        >>> from fewshot_ext.models import BackboneConfig
        >>> config = MetricTrainingConfig(
        ...     epochs=1, classes_per_batch=4, backbone=BackboneConfig(pooled_blocks=3, embedding=8)
        ... )
        >>> digits = load_digits()
        >>> run = MetricTrainingRun(config, digits.subset(Split.BASE), "out", unseen=digits.subset(Split.NOVEL))
        >>> run.train()(digits.images).shape
        torch.Size([1797, 8])
    """

    def __init__(
        self,
        config: MetricTrainingConfig,
        seen: ImageArchive,
        directory: str | Path,
        *,
        checkpoint: str | Path | None = None,
        validation: ImageArchive | None = None,
        unseen: ImageArchive | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        config = config.batches_of(seen.num_classes)
        check_batches(config, seen)
        sets = {"seen": seen, "validation": validation, "unseen": unseen}
        self.history = EmbeddingHistory(
            config.measurement,
            {name: archive for name, archive in sets.items() if archive is not None},
            Path(directory),
            Path(directory) / BEST,
            seed,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            if checkpoint is None:
                if config.freeze_batch_norm:
                    raise ValueError(
                        "freeze_batch_norm: expected false without a checkpoint, whose statistics it keeps"
                    )
                network = describe_network(config, config.backbone, seen)
                module = MetricTraining(config, network, seen.num_classes, seed)
            else:
                module = _from_checkpoint(config, seen, checkpoint, seed)
        batches = PKBatches(seen.labels, config.classes_per_batch, config.samples_per_class, seed)
        super().__init__(
            module,
            seen,
            # Without a generator of its own a DataLoader draws from the global one whenever it is iterated.
            DataLoader(seen, batch_size=None, sampler=batches, generator=torch.Generator()),
            directory,
            validation=None if validation is None else self.history,
            measurements=[self.history] if validation is None else [],
            **options,
        )

    def train(self) -> MetricTraining:
        if self.config.compile:
            self.module.backbone.compile()
        return super().train()

    def _shared(self, loader: DataLoader, rank: int, processes: int) -> DataLoader:
        raise ValueError(f"metric training has one process, got {processes}: its losses compare all images of a batch")

    def results(self) -> dict[str, Any]:
        """Means over the last epoch, the last measurement of every set, and the best validation Recall@1."""
        found: dict[str, Any] = {**super().results()}
        last = {row["classes"]: row for row in self.history.rows}
        for name, row in last.items():
            found[name] = {key: value for key, value in row.items() if key not in ("classes", "spectrum")}
        return found


def _from_checkpoint(config: MetricTrainingConfig, seen: ImageArchive, source: str | Path, seed: int) -> MetricTraining:
    start = read_start(source, seen, CheckpointSettings())
    own, asked = start.config.backbone, config.backbone
    for field in fields(asked):
        value, kept = getattr(asked, field.name), getattr(own, field.name)
        if field.name not in OF_THE_EMBEDDING and value not in (field.default, kept):
            raise ValueError(f"backbone.{field.name}: expected {kept}, as checkpoint {source} has it, got {value}")
    # The side to resize to goes with that of the middle, which is cut out.
    sizes = config if config.image_size else start.config
    network = replace(
        start.config,
        backbone=replace(own, **{name: getattr(asked, name) for name in OF_THE_EMBEDDING}),
        image_size=sizes.image_size,
        resize=sizes.resize,
        resize_mode=config.resize_mode or start.config.resize_mode,
        mean=config.mean or start.config.mean,
        std=config.std or start.config.std,
        channels_last=config.channels_last,
        similarity="cosine",
    )
    module = MetricTraining(config, network, seen.num_classes, seed, start.sha256)
    _without_projection(module.backbone).load_state_dict(_without_projection(start.network.backbone).state_dict())
    return module


def _without_projection(backbone: Backbone) -> Backbone:
    return backbone.backbone if isinstance(backbone, EmbeddedBackbone) else backbone


def check_batches(config: MetricTrainingConfig, seen: ImageArchive) -> None:
    """Finds why the seen classes do not make P x K batches.

    Raises:
        ValueError: fewer classes than P, or a class with one image, which has no other to be near to.
    """
    sizes = seen.labels.bincount(minlength=seen.num_classes)
    classes = int((sizes > 0).sum())
    wanted = config.batches_of(seen.num_classes).classes_per_batch
    if classes < wanted:
        raise ValueError(f"classes_per_batch: expected at most {classes}, the classes to train on, got {wanted}")
    lone = (sizes == 1).nonzero().flatten().tolist()
    if lone:
        raise ValueError(
            f"seen classes need at least 2 images each, got 1 for {len(lone)} of them, "
            f"the first of them {seen.class_names[lone[0]]!r}"
        )
