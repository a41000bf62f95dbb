"""The base of every training run: repeatable epochs, checkpoints, resuming, several processes."""

import logging
import signal
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from fewshot_ext import _extras
from fewshot_ext._files import remove_leftovers
from fewshot_ext._formats import check_schema, misfits_named, read_weights
from fewshot_ext._record import check_same_settings
from fewshot_ext._validation import check_at_least
from fewshot_ext.data import ImageArchive
from fewshot_ext.models import NetworkConfig
from fewshot_ext.models.network import read_checkpoint
from fewshot_ext.training.callbacks import BestCheckpoint, EpochMeans, ProgressBar
from fewshot_ext.training.checkpoints import AtomicCheckpointIO
from fewshot_ext.training.distributed import let_gloo_finish
from fewshot_ext.training.module import ImageTraining

# Where Lightning keeps how far a run has come.
_LOOPS = {"loops": {"fit_loop": {"epoch_progress": {"current": {"processed": int}}}}}
LAST, BEST = "last.ckpt", "best.ckpt"

# Facts about this kind of run that a user can do nothing about; every other warning still comes through.
_EXPECTED_WARNINGS = (
    ".*does not have many workers.*",  # batches are cut from a tensor in memory: workers would only copy
    ".*exists and is not empty.*",  # resuming writes where the broken run wrote
    ".*treespec, LeafSpec.*",  # between Lightning and torch
    ".*callbacks used to create the checkpoint.*",  # a resumed run may write checkpoints further apart
    ".*sync_dist=True.*",  # the validation accuracy is the same in every process
)


class TrainingRun(ABC):
    """A module, its batches and where its checkpoints go, checked before the first step.

    Args:
        module: what is trained; its ``config`` has ``epochs``, ``checkpoint_epochs`` and ``precision``.
        archive: training images.
        loader: batches of them, of a sampler whose ``set_epoch`` decides a pass.
        directory: receives ``last.ckpt``, ``best.ckpt`` and the TensorBoard log.
        validation: chooses ``best.ckpt``; without one the last epoch is the best.
        measurements: callbacks that measure and choose nothing.
        device: "cpu" or "cuda".
        devices: processes on this machine, a GPU each where ``device`` is "cuda"; torchrun or Lightning starts them.
        num_nodes: machines, which share the file system that ``directory`` is on.
        resume: continue from ``last.ckpt`` where there is one, for more epochs too if ``module.can_go_on``. At an
            epoch's end the resumed run is in the state that the unbroken run would have had.
        on_epoch: called with (epochs done, mean loss of the last epoch).
        progress: draw a progress bar.

    Raises:
        ImportError: Lightning or TensorBoard is missing.
        OSError: ``last.ckpt`` cannot be read.
        ValueError: batches that the processes cannot share, or a ``last.ckpt`` of other settings.
    """

    def __init__(
        self,
        module: ImageTraining,
        archive: ImageArchive,
        loader: DataLoader,
        directory: str | Path,
        *,
        validation: BestCheckpoint | None,
        measurements: Sequence[Callback] = (),
        device: torch.device | str = "cpu",
        devices: int = 1,
        num_nodes: int = 1,
        resume: bool = False,
        on_epoch: Callable[[int, float], None] | None = None,
        progress: bool = False,
    ) -> None:
        for name, value in (("devices", devices), ("num_nodes", num_nodes)):
            check_at_least(name, value, 1)
        self.module, self.archive, self.directory = module, archive, Path(directory)
        self.config, self.device, self.validation = module.config, torch.device(device), validation
        self.start = self._start(self.directory / LAST) if resume else None
        self.epochs_done = _epochs_done(self.start) if self.start else 0
        # Lightning fetches the first batch of a resumed run before it tells the sampler the epoch.
        loader.sampler.set_epoch(self.epochs_done)
        self._loader = loader
        self._devices, self._num_nodes = devices, num_nodes
        if self._processes > 1:
            # Raises where the processes cannot share it; their ranks are known only once they run.
            self._shared(loader, 0, self._processes)
        self._means = EpochMeans(on_epoch, module.means)
        self._callbacks: list[Callback] = [self._means, *measurements]
        if validation:
            self._callbacks.append(validation)
        if progress:
            _extras.require("train", "tqdm")
            self._callbacks.append(ProgressBar(self._means, validation))

    @abstractmethod
    def _shared(self, loader: DataLoader, rank: int, processes: int) -> DataLoader:
        """The loader of one of several processes, from the loader of one process alone.

        Raises:
            ValueError: there is too little for so many.
        """

    def _trainer_options(self) -> dict[str, Any]:
        """What this kind of training asks of Lightning's trainer besides what all kinds do."""
        return {}

    def train(self) -> ImageTraining:
        """Trains to the last epoch.

        Returns:
            The module of ``best.ckpt``, in evaluation mode, on the device that trained it.

        Raises:
            FloatingPointError: the loss is not a number any more.
            KeyboardInterrupt: Ctrl-C; ``last.ckpt`` then holds the last checkpointed epoch.
            OSError: a checkpoint cannot be written; the one before it is whole.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.directory)
        with torch.random.fork_rng(), _quiet_lightning():
            trainer = self._trainer()
            loader = self._loader
            if trainer.world_size > 1:
                if self.device.type == "cpu":
                    let_gloo_finish()
                loader = self._shared(loader, trainer.global_rank, trainer.world_size)
            with _keyboard_interrupt(trainer):
                trainer.fit(self.module, loader, ckpt_path=self.start, weights_only=True)
            trainer.save_checkpoint(self.directory / LAST)
            if self.validation:
                self.module.load_state_dict(read_weights(self.directory / BEST)["state_dict"])
            else:
                trainer.save_checkpoint(self.directory / BEST)
        return self.module.to(trainer.strategy.root_device).eval()

    @property
    def has_checkpoint(self) -> bool:
        """Whether a broken run could go on from ``last.ckpt``."""
        return (self.directory / LAST).exists()

    def results(self) -> dict[str, float]:
        """Means over the last epoch, and the best validation accuracy with its epoch."""
        return {**self._means.means, **(self.validation.results() if self.validation else {})}

    @property
    def _processes(self) -> int:
        return self._devices * self._num_nodes

    def _start(self, last: Path) -> Path | None:
        if not last.exists():
            return None
        before, after = dict(read_checkpoint(last, self.module.stage)["hyper_parameters"]), dict(self.module.hparams)
        if difference := _began_otherwise(before["config"]):
            raise ValueError(
                f"{self.directory} holds a run that began with an earlier version, in which {difference}: "
                "take another output, or go on with that version"
            )
        with misfits_named(f"{last} does not fit this version of fewshot_ext"):
            # A setting that the checkpoint is older than had its default.
            before["config"] = asdict(self.module.config_type.from_dict(before["config"]))
        before["network"] = asdict(NetworkConfig.from_dict(before["network"]))
        # A run may go on with its checkpoints further apart: the result is the same. What describes the network is held
        # against the network itself.
        of_network = ("backbone", "image_size", "resize", "resize_mode", "mean", "std", "channels_last")
        free = dict.fromkeys(("checkpoint_epochs", *of_network))
        if self.module.can_go_on and self.config.epochs > before["config"]["epochs"]:
            free["epochs"] = self.config.epochs
        before["config"], after["config"] = before["config"] | free, after["config"] | free
        check_same_settings(before, after, self.directory)
        return last

    def _trainer(self) -> pl.Trainer:
        on_gpu, distributed = self.device.type == "cuda", self._processes > 1
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
            strategy="ddp" if distributed else "auto",
            use_distributed_sampler=False,
            precision=self.config.precision,
            max_epochs=self.config.epochs,
            logger=TensorBoardLogger(self.directory.parent, name="", version=self.directory.name),
            callbacks=[*self._callbacks, checkpoint],
            plugins=[AtomicCheckpointIO()],
            log_every_n_steps=1,
            enable_progress_bar=False,
            enable_model_summary=False,
            **self._trainer_options(),
        )


def _began_otherwise(config: Mapping[str, Any]) -> str | None:
    """What an earlier version did otherwise in a run with this config, as the checkpoint has it."""
    if "resize" in config:  # as those have that began since
        return None
    if config.get("loss") in ("contrastive", "triplet"):
        return "triplets were drawn by another rule"
    if config.get("image_size") is None:
        return None
    if config.get("augmentation", {}).get("crop_scale"):
        return "random crops were not antialiased"
    if config.get("local_features", {}).get("name") in ("grid", "sampling"):
        return "regions were cut from resized images"
    return None


def _epochs_done(checkpoint: Path) -> int:
    with misfits_named(f"{checkpoint} cannot be resumed"):
        content = read_checkpoint(checkpoint)
        check_schema(content, _LOOPS, "the file")
        return content["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]


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
