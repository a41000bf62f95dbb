"""Pre-training of a backbone on base classes with a signed-margin softmax, the first of the two stages."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fewshot_ext._validation import check_count
from fewshot_ext.data import ImageArchive, training_batches
from fewshot_ext.evaluation import extract_features
from fewshot_ext.losses import MarginCosineLoss, MarginSoftmaxLoss
from fewshot_ext.models import NetworkConfig
from fewshot_ext.models.checkpoint import PRE_TRAINING
from fewshot_ext.training.callbacks import Validation
from fewshot_ext.training.config import PreTrainingConfig
from fewshot_ext.training.distributed import RankBatches, share_batches
from fewshot_ext.training.module import ImageTraining, describe_network
from fewshot_ext.training.run import BEST, TrainingRun
from fewshot_ext.training.schedule import WarmupCosine, sgd_in_steps

HEADS = {"cosine": MarginCosineLoss, "dot": MarginSoftmaxLoss}


class PreTraining(ImageTraining):
    """Backbone and margin head over uint8 images, with Adam, linear warm-up and cosine decay, or with SGD in steps.

    Args:
        config: see ``PreTrainingConfig``.
        network: what is trained.
        num_classes: classes of the margin head, as many as base classes or more.
        seed: with the epoch's number it decides the augmentation of that epoch.

    Shape:
        ``[B, C, H, W]`` uint8 -> features ``[B, D]``.

    Reference:
        Liu et al., Negative Margin Matters: Understanding Margin in Few-shot Classification, ECCV 2020,
        section 3.5.
    """

    stage = PRE_TRAINING
    config_type = PreTrainingConfig
    others = ("num_classes",)

    def __init__(
        self,
        config: PreTrainingConfig,
        network: NetworkConfig,
        num_classes: int,
        seed: int = 0,
    ) -> None:
        super().__init__(config, network, seed, num_classes=num_classes)
        self.head = HEADS[config.similarity](
            self.network.out_features,
            num_classes,
            margin=config.margin,
            scale=config.scale,
            label_smoothing=config.label_smoothing,
        )

    @property
    def can_go_on(self) -> bool:
        return self.config.optimizer == "sgd"  # whose steps do not depend on the number of epochs

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        for state in checkpoint["lr_schedulers"]:
            WarmupCosine.upgrade(state)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> dict[str, Tensor]:
        images, target = batch
        loss, prediction = self.head(self(images), target, return_prediction=True)
        return {
            "loss": loss * self._weight(len(target), batch_index),
            "mean_loss": loss.detach(),
            "accuracy": (prediction == target).float().mean(),
        }

    @torch.inference_mode()
    def classify(self, images: Tensor) -> Tensor:
        """The base class of ``[N, C, H, W]`` uint8 images by the classifier of the training, ``[N]`` int64 on the CPU.

        Without episodes or augmentation: what the paper's Fig. 1 has as accuracy on base classes.
        """
        features = extract_features(self.network, images, dtype=self.head.weight.dtype)
        return self.head.scores(features).argmax(1).cpu()

    def _weight(self, count: int, batch_index: int) -> float:
        """What turns this process's mean loss into its part of the mean over the whole batch.

        Gradients are averaged over processes as if each had as many images as the next, which a ragged last batch
        denies.
        """
        sampler = self.trainer.train_dataloader.sampler
        if not isinstance(sampler, RankBatches):
            return 1.0
        return count * sampler.world_size / sampler.total(batch_index)

    def configure_optimizers(self) -> dict:
        config = self.config
        if config.optimizer == "sgd":
            return sgd_in_steps(self.parameters(), config)
        # Rates come from the schedule whole, so the optimizer's own rate is 1 and the factor is the rate.
        optimizer = torch.optim.Adam(self.parameters(), lr=1.0, weight_decay=config.weight_decay)
        total_steps = int(self.trainer.estimated_stepping_batches)
        warmup_steps = round(total_steps * config.warmup)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            WarmupCosine(
                total_steps=total_steps,
                warmup_steps=warmup_steps,
                peak=config.learning_rate,
                minimum=config.minimum_learning_rate,
                warmup_multiplier=config.warmup_multiplier,
            ),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class PreTrainingRun(TrainingRun):
    """Everything that a pre-training needs, checked before its first step.

    Args:
        config: see ``PreTrainingConfig``.
        archive: training images of the base classes.
        directory: receives ``last.ckpt``, ``best.ckpt`` and the TensorBoard log.
        validation: images of validation classes, which choose ``best.ckpt``; without any the last epoch is the best.
        held_out: further images of the same classes, which ``results`` has the accuracy on.
        seed: decides initial weights, batch order, augmentation and validation episodes.
        options: ``device``, ``devices``, ``num_nodes``, ``resume``, ``on_epoch`` and ``progress``, as ``TrainingRun``
            has them; its processes share every batch.

    On several GPUs batch normalization takes its statistics over all of them, as one GPU would. On several CPU
    processes, which torch offers no such layer for, each takes them over its own share of the batch.

    Raises:
        ImportError: Lightning, TensorBoard or kornia (where images are augmented) is missing.
        OSError: ``last.ckpt`` cannot be read.
        ValueError: images too small for the backbone, fewer than two of them, too few validation classes or images
            for the episodes, or a ``last.ckpt`` of other settings.
    """

    def __init__(
        self,
        config: PreTrainingConfig,
        archive: ImageArchive,
        directory: str | Path,
        *,
        validation: ImageArchive | None = None,
        held_out: ImageArchive | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self._held_out = held_out
        network, classes = describe_network(config, config.backbone, archive, config.similarity), archive.num_classes
        if config.head_classes is not None:
            classes = check_count("head_classes", config.head_classes, classes)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            module = PreTraining(config, network, classes, seed)
        super().__init__(
            module,
            archive,
            training_batches(archive, config.batch_size, seed),
            directory,
            validation=validation and Validation(module, validation, Path(directory) / BEST, seed),
            **options,
        )

    def train(self) -> PreTraining:
        if self.config.compile:
            self.module.backbone.compile()
        return super().train()

    def results(self) -> dict[str, float]:
        """As ``TrainingRun.results``, with the shares of training and of held-out images that are classified rightly.

        They are of the last epoch, without augmentation; see ``PreTraining.classify``.
        """
        parts = {"training_accuracy": self.archive} | ({"held_out_accuracy": self._held_out} if self._held_out else {})
        plain = {
            name: (self.module.classify(part.images) == part.labels).double().mean().item()
            for name, part in parts.items()
        }
        return super().results() | plain

    def _shared(self, loader: DataLoader, rank: int, processes: int) -> DataLoader:
        return share_batches(loader, rank, processes)

    def _trainer_options(self) -> dict[str, Any]:
        return {"sync_batchnorm": self.device.type == "cuda" and self._processes > 1}


def pretrain(config: PreTrainingConfig, archive: ImageArchive, directory: str | Path, **options: Any) -> PreTraining:
    """Trains a fresh backbone and margin head on all classes of ``archive``.

    The arguments are those of ``PreTrainingRun``; what comes back and what is raised are those of it and its ``train``.
    """
    return PreTrainingRun(config, archive, directory, **options).train()
