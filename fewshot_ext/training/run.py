"""The base of every training run: repeatable epochs, checkpoints, resuming, several processes."""

import logging
import signal
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fewshot_ext import _extras

_extras.require("train", "lightning", "tensorboard")

import lightning.pytorch as pl  # noqa: E402  (the check above words a missing Lightning better than Python does)
from lightning.pytorch.callbacks import Callback, ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import TensorBoardLogger  # noqa: E402

from fewshot_ext._files import file_sha256, remove_leftovers  # noqa: E402
from fewshot_ext._formats import check_schema, misfits_named, read_weights  # noqa: E402
from fewshot_ext._random import derive_seed  # noqa: E402
from fewshot_ext._record import check_same_settings  # noqa: E402
from fewshot_ext._validation import check_at_least  # noqa: E402
from fewshot_ext.data import ImageArchive  # noqa: E402
from fewshot_ext.evaluation import extract_features  # noqa: E402
from fewshot_ext.evaluation.backbones import state_checksum  # noqa: E402
from fewshot_ext.heads import HeadChoice  # noqa: E402
from fewshot_ext.models import (  # noqa: E402
    Backbone,
    BackboneConfig,
    CheckpointSettings,
    Network,
    NetworkConfig,
    build_network,
)
from fewshot_ext.models.checkpoint import FORMAT_VERSION, upgraded  # noqa: E402
from fewshot_ext.models.network import DEFAULT, TIMM, own_network, read_checkpoint  # noqa: E402
from fewshot_ext.training.callbacks import BestCheckpoint, EpochMeans, ProgressBar  # noqa: E402
from fewshot_ext.training.checkpoints import AtomicCheckpointIO  # noqa: E402
from fewshot_ext.training.config import PreTrainingConfig  # noqa: E402
from fewshot_ext.training.distributed import let_gloo_finish  # noqa: E402
from fewshot_ext.training.meta_config import MetaTrainingConfig  # noqa: E402
from fewshot_ext.training.metric_config import MetricTrainingConfig  # noqa: E402

TrainingConfig = PreTrainingConfig | MetaTrainingConfig | MetricTrainingConfig

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


class ImageTraining(pl.LightningModule):
    """A network that is being trained; a subclass brings the loss and the optimizer.

    A training step returns ``loss``, to be minimized, and of its batch ``mean_loss`` and what ``means`` names.
    Learning rates are logged as their means over an epoch's steps.

    Args:
        config: settings of the training.
        network: what is trained; see ``describe_network``.
        seed: with the epoch's number it decides what is random in that epoch.
        others: what a checkpoint has among its hyper-parameters besides these; plain containers and numbers.

    Attributes:
        network: a ``Network``.

    Shape:
        ``[B, C, H, W]`` uint8 -> features ``[B, D]``.
    """

    stage: str  # what its checkpoints are the checkpoints of
    config_type: type  # of its settings
    others: tuple[str, ...] = ()  # what it is made with besides settings, network and seed
    means: tuple[str, ...] = ("accuracy",)  # what is logged beside the loss
    rates: tuple[str, ...] = ("learning_rate",)  # what the rates of the optimizer's groups are logged as
    can_go_on = True  # whether a run may be resumed for more epochs: not where their number decides its rates

    def __init__(self, config: TrainingConfig, network: NetworkConfig, seed: int, **others: Any) -> None:
        super().__init__()
        self.config, self.seed = config, seed
        self.network, self._image_shape = build_network(network, config.augmentation), network.image_shape
        # Plain containers, so that a checkpoint loads with weights_only and survives a renamed class.
        self.save_hyperparameters(
            {
                "format_version": FORMAT_VERSION,
                "stage": self.stage,
                "network": asdict(network),
                "config": asdict(config),
                "seed": seed,
                **others,
            }
        )
        self._rates: list[list[float]] = []

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> "ImageTraining":
        """The trained module behind a checkpoint of this training, on the CPU; no code in the file is run.

        Raises:
            ImportError: a package of the training is missing; ``load_network`` needs none.
            OSError: the file cannot be read.
            ValueError: it is not the checkpoint of such a training.
        """
        checkpoint = read_checkpoint(path, cls.stage)
        with misfits_named(f"{path} does not fit this version of fewshot_ext"):
            own = checkpoint["hyper_parameters"]
            config, network = cls.config_type.from_dict(own["config"]), NetworkConfig.from_dict(own["network"])
            others = {name: own[name] for name in cls.others if name in own}
            module = cls(config, network, seed=own["seed"], **others)
            module.load_state_dict(checkpoint["state_dict"])
        return module.eval()

    @property
    def backbone(self) -> Backbone:
        return self.network.backbone

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    @torch.inference_mode()
    def feature_shape(self, name: str, choice: HeadChoice, shot: int) -> tuple[int, ...]:
        """Shape of an image's features for a head, ``[D]`` or ``[N, C]``, found by trying one image.

        Args:
            name: what a message calls the head.
            choice: the head, and the features that it takes.
            shot: number of support images of a class.

        Raises:
            ValueError: images too small for the regions, or too few regions for the head.
        """
        image, extractor = torch.zeros(1, *self._image_shape, dtype=torch.uint8), self.network
        if choice.local_features is not None:
            extractor = self.network.local_features(choice.local_features)
            sides = tuple(self.network.eval().feature_map(image).shape[2:])
            for side in choice.local_features.pyramid:
                if side > min(sides):
                    raise ValueError(
                        f"local_features.pyramid: expected sides of at most {min(sides)}, for the feature map is "
                        f"{sides[0]} x {sides[1]}, got {side}"
                    )
        shape = tuple(extract_features(extractor, image).shape[1:])
        self.train()
        if choice.head.takes_maps:
            try:
                choice.head.check_regions(shape[0] * shot)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        return shape

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = upgraded(checkpoint)["state_dict"]  # a run of version 0.1 goes on

    def on_train_epoch_start(self) -> None:
        # Augmentation and dropout draw from the global generator. Setting it by the epoch's number makes a resumed
        # run draw what the unbroken run would have drawn; other processes draw other numbers for their images.
        rank = (self.global_rank,) if self.global_rank else ()
        torch.manual_seed(derive_seed(self.seed, self.current_epoch, *rank))
        self._rates = []

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        # At an epoch's end the schedule has moved on to the rate of the next.
        self._rates.append([group["lr"] for group in self.trainer.optimizers[0].param_groups])

    def on_train_epoch_end(self) -> None:
        for name, rates in zip(self.rates, zip(*self._rates, strict=True), strict=False):
            self.log(f"train/{name}", fmean(rates))


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


def describe_network(
    config: TrainingConfig, backbone: BackboneConfig, archive: ImageArchive, similarity: str = "cosine"
) -> NetworkConfig:
    """The network that a training asks for; without ``mean`` and ``std`` in its settings they are those of the images.

    Raises:
        ValueError: not one number a channel.
    """
    shape = tuple(archive.images.shape[1:])
    mean, std = (config.mean, config.std) if config.mean is not None else archive.channel_statistics()
    if len(mean) != shape[0] or len(std) != shape[0]:
        raise ValueError(f"mean and std: expected one number a channel: the images have {shape[0]} channels")
    resizing = (config.resize, config.resize_mode)
    return NetworkConfig(backbone, shape, mean, std, config.image_size, config.channels_last, similarity, *resizing)


class Start(NamedTuple):
    """The network that a training goes on from, what describes it, and the checksum of its file if it has one."""

    network: Network
    config: NetworkConfig
    sha256: str | None


def read_start(source: str | Path, archive: ImageArchive, settings: CheckpointSettings) -> Start:
    """The network of a checkpoint, for images of the shape of those in ``archive``.

    Args:
        source: a file as ``read_checkpoint`` takes it, or "timm:NAME" or "timm:NAME=FILE" for one of timm's models that
            are backbones of this package.
        archive: training images.
        settings: what a checkpoint of other code does not hold.

    Raises:
        ImportError: timm is named and missing.
        OSError: the file cannot be read.
        ValueError: it is no checkpoint, its network takes images of other channels or is none of this package, or
            weights are not finite.
    """
    shape = tuple(archive.images.shape[1:])
    network = own_network(source, settings)
    # A name stands for weights too, and a run that goes on has to have begun with the same.
    named = source == DEFAULT or str(source).startswith(TIMM)
    sha256 = state_checksum(network) if named else file_sha256(Path(source).expanduser())
    if network.channels != shape[0]:
        raise ValueError(
            f"checkpoint {source} takes images of {network.channels} channels, as it was trained on, got {shape[0]}"
        )
    for name, value in network.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"checkpoint {source} holds NaN or infinity in network.{name}")
    config = NetworkConfig.from_dict(network.made_from["network"])
    return Start(network, replace(config, image_shape=shape), sha256)


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
