"""What is trained: the Lightning module of every training, and the network that it starts from."""

from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor

from fewshot_ext._files import file_sha256
from fewshot_ext._formats import misfits_named
from fewshot_ext._random import derive_seed
from fewshot_ext.data import ImageArchive
from fewshot_ext.evaluation import extract_features
from fewshot_ext.evaluation.backbones import state_checksum
from fewshot_ext.heads import HeadChoice
from fewshot_ext.models import (
    Backbone,
    BackboneConfig,
    CheckpointSettings,
    Network,
    NetworkConfig,
    build_network,
)
from fewshot_ext.models.checkpoint import FORMAT_VERSION, upgraded
from fewshot_ext.models.network import DEFAULT, TIMM, own_network, read_checkpoint
from fewshot_ext.training.config import TrainingConfig


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
