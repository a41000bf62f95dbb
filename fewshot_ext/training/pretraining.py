"""Pre-training of a backbone on base classes with a signed-margin softmax, the first of the two stages."""

import logging
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from fewshot_ext import _extras

_extras.require("train", "lightning", "tensorboard")

import lightning.pytorch as pl  # noqa: E402  (the check above words a missing Lightning better than Python does)
from lightning.pytorch.callbacks import Callback, ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import TensorBoardLogger  # noqa: E402

from fewshot_ext._random import derive_seed  # noqa: E402
from fewshot_ext.data import ImageArchive, ImageInput, training_batches  # noqa: E402
from fewshot_ext.losses import MarginCosineLoss, MarginSoftmaxLoss  # noqa: E402
from fewshot_ext.models import conv4  # noqa: E402
from fewshot_ext.training.config import PreTrainingConfig  # noqa: E402
from fewshot_ext.training.schedule import warmup_cosine  # noqa: E402

HEADS = {"cosine": MarginCosineLoss, "softmax": MarginSoftmaxLoss}

# Facts about this kind of run that a user can do nothing about; every other warning still comes through.
_EXPECTED_WARNINGS = (
    ".*does not have many workers.*",  # batches are cut from a tensor in memory: workers would only copy
    ".*exists and is not empty.*",  # resuming writes where the broken run wrote
    ".*treespec, LeafSpec.*",  # between Lightning and torch
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
        channels, height, width = image_size
        self.input = ImageInput(mean, std, config.augmentation)
        self.backbone = conv4(channels, width=config.backbone.width, pooled_blocks=config.backbone.pooled_blocks)
        self.head = HEADS[config.similarity](
            self.backbone.feature_size(height, width),
            num_classes,
            margin=config.margin,
            scale=config.scale,
            label_smoothing=config.label_smoothing,
        )

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> "PreTraining":
        """The trained module behind a checkpoint, on the CPU; the file is read without running code in it."""
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        arguments = dict(checkpoint["hyper_parameters"])
        module = cls(PreTrainingConfig.from_dict(arguments.pop("config")), **arguments)
        module.load_state_dict(checkpoint["state_dict"])
        return module.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone(self.input(images))

    def on_train_epoch_start(self) -> None:
        # Augmentation draws from the global generator. Setting it by the epoch's number makes a resumed run
        # draw what the unbroken run would have drawn.
        torch.manual_seed(derive_seed(self.seed, self.current_epoch))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        images, target = batch
        loss, prediction = self.head(self(images), target, return_prediction=True)
        accuracy = (prediction == target).float().mean()
        self.log_dict(
            {"train/loss": loss, "train/accuracy": accuracy},
            on_step=False,
            on_epoch=True,
            batch_size=len(target),
        )
        return loss

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


class _EpochReport(Callback):
    """Hands the epoch's number and mean loss to whoever draws the progress bar."""

    def __init__(self, on_epoch: Callable[[int, float], None]) -> None:
        self.on_epoch = on_epoch

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.current_epoch:
            self.on_epoch(trainer.current_epoch, float("nan"))

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.on_epoch(trainer.current_epoch + 1, trainer.callback_metrics["train/loss"].item())


def pretrain(
    config: PreTrainingConfig,
    archive: ImageArchive,
    directory: str | Path,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    resume: bool = False,
    on_epoch: Callable[[int, float], None] | None = None,
) -> PreTraining:
    """Trains a fresh backbone and margin head on all classes of ``archive``.

    Args:
        config: see ``PreTrainingConfig``.
        archive: training images of the base classes.
        directory: receives ``last.ckpt`` and the TensorBoard log.
        seed: decides initial weights, batch order and augmentation.
        device: "cpu" or "cuda".
        resume: continue from ``last.ckpt`` where there is one. At an epoch's end the resumed run is in the
            state that the unbroken run would have had.
        on_epoch: called with (epochs done, mean loss of the last epoch).

    Returns:
        The trained module, in evaluation mode, on the device that trained it.

    Raises:
        ImportError: Lightning, TensorBoard or kornia (where images are augmented) is missing.
        ValueError: images too small for the backbone, or fewer than two of them.
        KeyboardInterrupt: Ctrl-C; ``last.ckpt`` then holds the last checkpointed epoch.
    """
    directory, device = Path(directory), torch.device(device)
    with torch.random.fork_rng(), _quiet_lightning():
        torch.manual_seed(seed)
        module = PreTraining(
            config,
            archive.num_classes,
            tuple(archive.images.shape[1:]),
            *archive.channel_statistics(),
            seed=seed,
        )
        checkpoint = ModelCheckpoint(
            directory,
            filename="last",
            every_n_epochs=min(config.checkpoint_epochs, config.epochs),
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )
        trainer = pl.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=[device.index or 0] if device.type == "cuda" else 1,
            precision=config.precision,
            max_epochs=config.epochs,
            logger=TensorBoardLogger(directory.parent, name="", version=directory.name),
            callbacks=[checkpoint, *([_EpochReport(on_epoch)] if on_epoch else [])],
            log_every_n_steps=1,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        last = directory / "last.ckpt"
        broken_off = last if resume and last.exists() else None
        # Lightning fetches the first batch of a resumed run before it tells the sampler the epoch.
        epoch = _epochs_done(broken_off) if broken_off else 0
        batches = training_batches(archive, config.batch_size, seed, epoch)
        with _keyboard_interrupt(trainer):
            trainer.fit(module, batches, ckpt_path=broken_off, weights_only=True)
        trainer.save_checkpoint(last)
    return module.to(device).eval()


def _epochs_done(checkpoint: Path) -> int:
    progress = torch.load(checkpoint, map_location="cpu", weights_only=True)["loops"]["fit_loop"]["epoch_progress"]
    return progress["current"]["processed"]


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
    notices = logging.getLogger("lightning.pytorch")
    level = notices.level
    notices.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in _EXPECTED_WARNINGS:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        notices.setLevel(level)
