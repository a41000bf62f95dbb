"""Pre-training of a backbone on base classes with a signed-margin softmax, the first of the two stages."""

import logging
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewshot_ext import _extras

_extras.require("train", "lightning", "tensorboard")

import lightning.pytorch as pl  # noqa: E402  (the check above words a missing Lightning better than Python does)
from lightning.pytorch.callbacks import Callback, ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import TensorBoardLogger  # noqa: E402

from fewshot_ext._checks import check_at_least  # noqa: E402
from fewshot_ext._random import derive_seed  # noqa: E402
from fewshot_ext._record import check_same_settings  # noqa: E402
from fewshot_ext.data import ImageArchive, training_batches  # noqa: E402
from fewshot_ext.losses import MarginCosineLoss, MarginSoftmaxLoss  # noqa: E402
from fewshot_ext.models import Backbone  # noqa: E402
from fewshot_ext.training.callbacks import EpochMeans, ProgressBar, Validation  # noqa: E402
from fewshot_ext.training.checkpoints import AtomicCheckpointIO  # noqa: E402
from fewshot_ext.training.config import PreTrainingConfig  # noqa: E402
from fewshot_ext.training.distributed import RankBatches, share_batches  # noqa: E402
from fewshot_ext.training.features import FeatureExtractor, read_checkpoint  # noqa: E402
from fewshot_ext.training.schedule import warmup_cosine  # noqa: E402

LAST, BEST = "last.ckpt", "best.ckpt"
HEADS = {"cosine": MarginCosineLoss, "softmax": MarginSoftmaxLoss}

# Facts about this kind of run that a user can do nothing about; every other warning still comes through.
_EXPECTED_WARNINGS = (
    ".*does not have many workers.*",  # batches are cut from a tensor in memory: workers would only copy
    ".*exists and is not empty.*",  # resuming writes where the broken run wrote
    ".*treespec, LeafSpec.*",  # between Lightning and torch
    ".*callbacks used to create the checkpoint.*",  # a resumed run may write checkpoints further apart
    ".*sync_dist=True.*",  # the validation accuracy is the same in every process
)


class PreTraining(pl.LightningModule):
    """Backbone and margin head over uint8 images, with Adam, linear warm-up and cosine decay.

    Args:
        config: see ``PreTrainingConfig``.
        num_classes: base classes.
        image_size: (channels, height, width).
        mean, std: one number a channel, for pixels in [0, 1].
        seed: with the epoch's number it decides the augmentation of that epoch.

    Shape:
        ``[B, C, H, W]`` uint8 -> features ``[B, D]``.

    Reference:
        Liu et al., Negative Margin Matters: Understanding Margin in Few-shot Classification, ECCV 2020,
        section 3.5.
    """

    def __init__(
        self,
        config: PreTrainingConfig,
        num_classes: int,
        image_size: tuple[int, int, int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config, self.seed = config, seed
        # Plain containers, so that a checkpoint loads with weights_only and survives a renamed class.
        self.save_hyperparameters(
            {
                "config": asdict(config),
                "num_classes": num_classes,
                "image_size": tuple(image_size),
                "mean": tuple(mean),
                "std": tuple(std),
                "seed": seed,
            }
        )
        self.extractor = FeatureExtractor(config, image_size, mean, std)
        self.head = HEADS[config.similarity](
            self.extractor.out_features,
            num_classes,
            margin=config.margin,
            scale=config.scale,
            label_smoothing=config.label_smoothing,
        )

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> "PreTraining":
        """The trained module behind a checkpoint, on the CPU; the file is read without running code in it.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not the checkpoint of a pre-training.
        """
        checkpoint = read_checkpoint(path)
        arguments = dict(checkpoint["hyper_parameters"])
        module = cls(PreTrainingConfig.from_dict(arguments.pop("config")), **arguments)
        module.load_state_dict(checkpoint["state_dict"])
        return module.eval()

    @property
    def backbone(self) -> Backbone:
        return self.extractor.backbone

    def forward(self, images: Tensor) -> Tensor:
        return self.extractor(images)

    def on_train_epoch_start(self) -> None:
        # Augmentation and dropout draw from the global generator. Setting it by the epoch's number makes a resumed
        # run draw what the unbroken run would have drawn; other processes draw other numbers for their images.
        rank = (self.global_rank,) if self.global_rank else ()
        torch.manual_seed(derive_seed(self.seed, self.current_epoch, *rank))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> dict[str, Tensor]:
        images, target = batch
        loss, prediction = self.head(self(images), target, return_prediction=True)
        return {
            "loss": loss * self._weight(len(target), batch_index),
            "mean_loss": loss.detach(),
            "accuracy": (prediction == target).float().mean(),
        }

    def _weight(self, count: int, batch_index: int) -> float:
        """What turns this process's mean loss into its part of the mean over the whole batch.

        Gradients are averaged over processes as if each had as many images as the next, which a ragged last batch
        denies.
        """
        sampler = self.trainer.train_dataloader.sampler
        if not isinstance(sampler, RankBatches):
            return 1.0
        return count * sampler.world_size / sampler.total(batch_index)

    def on_train_epoch_end(self) -> None:
        self.log("train/learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"])

    def configure_optimizers(self) -> dict:
        config = self.config
        # Rates come from the schedule whole, so the optimiser's own rate is 1 and the factor is the rate.
        optimizer = torch.optim.Adam(self.parameters(), lr=1.0, weight_decay=config.weight_decay)
        total_steps = int(self.trainer.estimated_stepping_batches)
        warmup_steps = round(total_steps * config.warmup)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: warmup_cosine(
                step,
                total_steps=total_steps,
                warmup_steps=warmup_steps,
                peak=config.learning_rate,
                minimum=config.minimum_learning_rate,
                warmup_multiplier=config.warmup_multiplier,
            ),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class PreTrainingRun:
    """Everything that a pre-training needs, checked before its first step.

    Args:
        config: see ``PreTrainingConfig``.
        archive: training images of the base classes.
        directory: receives ``last.ckpt``, ``best.ckpt`` and the TensorBoard log.
        validation: images of validation classes, which choose ``best.ckpt``; without any the last epoch is the best.
        seed: decides initial weights, batch order, augmentation and validation episodes.
        device: "cpu" or "cuda".
        devices: processes on this machine, a GPU each where ``device`` is "cuda". They share every batch; torchrun
            or Lightning starts them.
        num_nodes: machines, which share the file system that ``directory`` is on.
        resume: continue from ``last.ckpt`` where there is one. At an epoch's end the resumed run is in the
            state that the unbroken run would have had.
        on_epoch: called with (epochs done, mean loss of the last epoch).
        progress: draw a progress bar.

    On several GPUs batch normalisation takes its statistics over all of them, as one GPU would. On several CPU
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
        seed: int = 0,
        device: torch.device | str = "cpu",
        devices: int = 1,
        num_nodes: int = 1,
        resume: bool = False,
        on_epoch: Callable[[int, float], None] | None = None,
        progress: bool = False,
    ) -> None:
        for name, value in (("devices", devices), ("num_nodes", num_nodes)):
            check_at_least(name, value, 1)
        self.config, self.archive, self.directory = config, archive, Path(directory)
        self.device, self.seed = torch.device(device), seed
        statistics = archive.channel_statistics() if config.mean is None else (config.mean, config.std)
        image_size = tuple(archive.images.shape[1:])
        if len(statistics[0]) != image_size[0] or len(statistics[1]) != image_size[0]:
            raise ValueError(f"mean and std must give one number a channel: the images have {image_size[0]} channels")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.module = PreTraining(config, archive.num_classes, image_size, *statistics, seed=seed)
        self.start = self._start(self.directory / LAST) if resume else None
        # Lightning fetches the first batch of a resumed run before it tells the sampler the epoch.
        self.epochs_done = _epochs_done(self.start) if self.start else 0
        self._loader = training_batches(archive, config.batch_size, seed, self.epochs_done)
        self.validation = validation and Validation(config.validation, validation, self.directory / BEST, seed)
        self._distributed = devices * num_nodes > 1
        if self._distributed:
            # Raises where batches are too small to share; the ranks are known only once processes run.
            RankBatches(self._loader.sampler, 0, devices * num_nodes)
        self._devices, self._num_nodes = devices, num_nodes
        self._means = EpochMeans(on_epoch)
        self._callbacks: list[Callback] = [self._means]
        if self.validation:
            self._callbacks.append(self.validation)
        if progress:
            _extras.require("train", "tqdm")
            self._callbacks.append(ProgressBar(self._means, self.validation))

    def train(self) -> PreTraining:
        """Trains to the last epoch.

        Returns:
            The module of ``best.ckpt``, in evaluation mode, on the device that trained it.

        Raises:
            FloatingPointError: the loss is not a number any more.
            KeyboardInterrupt: Ctrl-C; ``last.ckpt`` then holds the last checkpointed epoch.
            OSError: a checkpoint cannot be written; the one before it is whole.
        """
        with torch.random.fork_rng(), _quiet_lightning():
            trainer = self._trainer()
            loader = self._loader
            if trainer.world_size > 1:
                loader = share_batches(loader, trainer.global_rank, trainer.world_size)
            if self.config.compile:
                self.module.backbone.compile()
            with _keyboard_interrupt(trainer):
                trainer.fit(self.module, loader, ckpt_path=self.start, weights_only=True)
            trainer.save_checkpoint(self.directory / LAST)
            if self.validation:
                self.module.load_state_dict(read_checkpoint(self.directory / BEST)["state_dict"])
            else:
                trainer.save_checkpoint(self.directory / BEST)
        return self.module.to(trainer.strategy.root_device).eval()

    @property
    def has_checkpoint(self) -> bool:
        """Whether a broken run could go on from ``last.ckpt``."""
        return (self.directory / LAST).exists()

    def results(self) -> dict[str, float]:
        """Loss and accuracy over the last epoch, and the best validation accuracy with its epoch."""
        found = dict(self._means.means)
        if self.validation:
            found["best_validation_accuracy"] = self.validation.best_accuracy
            found["best_epoch"] = self.validation.best_epoch
        return found

    def _start(self, last: Path) -> Path | None:
        if not last.exists():
            return None
        before, after = dict(read_checkpoint(last)["hyper_parameters"]), dict(self.module.hparams)
        # A run may go on with its checkpoints further apart: the result is the same.
        for settings in (before, after):
            settings["config"] = {**settings["config"], "checkpoint_epochs": None}
        check_same_settings(before, after, self.directory)
        return last

    def _trainer(self) -> pl.Trainer:
        on_gpu = self.device.type == "cuda"
        checkpoint = ModelCheckpoint(
            self.directory,
            filename=Path(LAST).stem,
            every_n_epochs=min(self.config.checkpoint_epochs, self.config.epochs),
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )
        return pl.Trainer(
            accelerator="gpu" if on_gpu else "cpu",
            devices=[self.device.index or 0] if on_gpu and self._devices == 1 else self._devices,
            num_nodes=self._num_nodes,
            strategy="ddp" if self._distributed else "auto",
            sync_batchnorm=on_gpu and self._distributed,
            use_distributed_sampler=False,
            precision=self.config.precision,
            max_epochs=self.config.epochs,
            logger=TensorBoardLogger(self.directory.parent, name="", version=self.directory.name),
            callbacks=[*self._callbacks, checkpoint],
            plugins=[AtomicCheckpointIO()],
            log_every_n_steps=1,
            enable_progress_bar=False,
            enable_model_summary=False,
        )


def pretrain(config: PreTrainingConfig, archive: ImageArchive, directory: str | Path, **options: Any) -> PreTraining:
    """Trains a fresh backbone and margin head on all classes of ``archive``.

    The arguments are those of ``PreTrainingRun``; what comes back and what is raised are those of it and its ``train``.
    """
    return PreTrainingRun(config, archive, directory, **options).train()


def _epochs_done(checkpoint: Path) -> int:
    return read_checkpoint(checkpoint)["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]


@contextmanager
def _keyboard_interrupt(trainer: pl.Trainer) -> Iterator[None]:
    """Lightning answers Ctrl-C with ``sys.exit(1)`` and leaves SIGINT ignored; callers want the interrupt."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stopped:
        if in_main_thread:
            signal.signal(signal.SIGINT, handler)
        if trainer.interrupted:
            raise KeyboardInterrupt from stopped
        raise


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Keeps Lightning's start-up notices (accelerators, tips) and ``_EXPECTED_WARNINGS`` off the terminal."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in _EXPECTED_WARNINGS:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
