"""What training is for: a network from uint8 images to feature vectors, with or without Lightning."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewshot_ext._formats import check_schema, misfits_named, read_weights
from fewshot_ext.data import AugmentationConfig, ImageInput
from fewshot_ext.models import build_backbone
from fewshot_ext.training.config import PreTrainingConfig
from fewshot_ext.training.metric_config import MetricTrainingConfig

# What every training writes. Each has settings of its own beside these.
CHECKPOINT_SCHEMA = {
    "hyper_parameters": {
        "config": dict,
        "image_size": [int],
        "mean": [float],
        "std": [float],
        "stage?": str,
        "num_classes?": int,
    },
    "state_dict": {str: Tensor},
}
PRE_TRAINING, META_TRAINING, METRIC_TRAINING = "pre-training", "meta-training", "metric training"


class FeatureExtractor(nn.Module):
    """The preprocessing that a backbone was trained with, and the backbone.

    Args:
        config: see ``PreTrainingConfig`` or ``MetricTrainingConfig``; the loss has no part in this.
        image_size: (channels, height, width) of the images that will come.
        mean, std: one number a channel, for pixels in [0, 1].

    Shape:
        ``[B, C, H, W]`` uint8 -> features ``[B, D]``.

    Raises:
        ValueError: images too small for the backbone.
    """

    def __init__(
        self,
        config: PreTrainingConfig | MetricTrainingConfig,
        image_size: tuple[int, int, int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        super().__init__()
        channels, height, width = image_size
        if config.image_size is not None:
            height = width = config.image_size
        self.input = ImageInput(mean, std, config.augmentation, config.image_size)
        self.backbone = build_backbone(config.backbone, channels)
        self.out_features = self.backbone.feature_size(height, width)
        self.channels_last = config.channels_last
        if config.channels_last:
            self.backbone.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone(self._pixels(images))

    def feature_map(self, images: Tensor) -> Tensor:
        """Dense features ``[B, C', h, w]`` of the same images."""
        return self.backbone.feature_map(self._pixels(images))

    def _pixels(self, images: Tensor) -> Tensor:
        pixels = self.input(images)
        return pixels.contiguous(memory_format=torch.channels_last) if self.channels_last else pixels


def load_backbone(path: str | Path) -> FeatureExtractor:
    """The trained backbone behind a checkpoint with its preprocessing, in evaluation mode on the CPU.

    Needs neither Lightning nor kornia; the file is read without running code in it.

    Args:
        path: ``last.ckpt`` or ``best.ckpt`` of any training.

    Returns:
        A module from ``[B, C, H, W]`` uint8 images to ``[B, D]`` features.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not the checkpoint of a training.
    """
    return build_extractor(read_checkpoint(path))


def build_extractor(checkpoint: dict[str, Any]) -> FeatureExtractor:
    """As ``load_backbone``, from the content of the file, of which hyper-parameters and weights are enough."""
    extractor = _new_extractor(checkpoint["hyper_parameters"])
    load_extractor(extractor, checkpoint)
    return extractor.eval()


def check_network(checkpoint: dict[str, Any]) -> None:
    """Raises ValueError or RuntimeError unless the weights of a checkpoint are those of the network in its settings."""
    # Without memory: the sizes in a file may be anything, until they are those of the weights in it.
    arguments, weights = checkpoint["hyper_parameters"], checkpoint["state_dict"].values()
    if arguments.get("num_classes", 0) > sum(value.numel() for value in weights):
        raise ValueError(f"num_classes: expected no more than there are weights, got {arguments['num_classes']}")
    with torch.device("meta"):
        load_extractor(_new_extractor(arguments), checkpoint, assign=True)


def _new_extractor(arguments: Mapping[str, Any]) -> FeatureExtractor:
    # Augmentation is for training, and would ask for kornia.
    config = replace(config_class(arguments).from_dict(arguments["config"]), augmentation=AugmentationConfig())
    size, mean, std = (arguments[name] for name in ("image_size", "mean", "std"))
    if len(size) != 3 or min(size) < 1 or not len(mean) == len(std) == size[0]:
        raise ValueError(f"expected (channels, height, width) and a mean and std of each channel, got {size}")
    return FeatureExtractor(config, size, tuple(map(float, mean)), tuple(map(float, std)))


def config_class(arguments: Mapping[str, Any]) -> type[PreTrainingConfig] | type[MetricTrainingConfig]:
    """Which settings ``config`` is among the hyper-parameters of a checkpoint."""
    return MetricTrainingConfig if arguments.get("stage") == METRIC_TRAINING else PreTrainingConfig


def load_extractor(extractor: FeatureExtractor, checkpoint: dict[str, Any], *, assign: bool = False) -> None:
    """Gives ``extractor`` the weights of a checkpoint's, or with ``assign`` makes them its own.

    Raises:
        RuntimeError: they are of another shape.
    """
    prefix = "extractor."
    state = checkpoint["state_dict"].items()
    own = {key.removeprefix(prefix): value for key, value in state if key.startswith(prefix)}
    extractor.load_state_dict(own, assign=assign)


def read_checkpoint(path: str | Path, stage: str | None = None) -> dict[str, Any]:
    """The content of a training's checkpoint, on the CPU, read without running code in it.

    Args:
        path: the file.
        stage: the training that it must be of, such as ``PRE_TRAINING``; None for any that has a feature extractor.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no checkpoint, or that of another stage.
    """
    kind = stage or f"{PRE_TRAINING} or of another training"
    try:
        checkpoint = read_weights(Path(path))
    except OSError as error:
        # Alone, errno and path do not tell which of many settings is meant.
        raise type(error)(error.errno, f"checkpoint cannot be read: {error.strerror}", str(path)) from error
    except ValueError as error:
        raise ValueError(f"{path} is not the checkpoint of a {kind}, or is damaged: {error}") from error
    with misfits_named(f"{path} is not the checkpoint of a {kind}"):
        check_schema(checkpoint, CHECKPOINT_SCHEMA, "the file")
    arguments = checkpoint["hyper_parameters"]
    # Pre-training had its checkpoints before there was another stage to tell it from.
    came = arguments.get("stage", PRE_TRAINING)
    if stage not in (None, came):
        raise ValueError(f"{path} is not the checkpoint of a {kind}: it is that of a {came}")
    with misfits_named(f"{path} does not fit this version of fewshot_ext"):
        check_network(checkpoint)
    return checkpoint
