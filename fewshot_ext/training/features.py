"""What training is for: a network from uint8 images to feature vectors, with or without Lightning."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from fewshot_ext._weights import load_weights
from fewshot_ext.data import AugmentationConfig, ImageInput
from fewshot_ext.models import build_backbone
from fewshot_ext.training.config import PreTrainingConfig
from fewshot_ext.training.metric_config import MetricTrainingConfig

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
    arguments = checkpoint["hyper_parameters"]
    # Augmentation is for training, and would ask for kornia.
    config = replace(config_class(arguments).from_dict(arguments["config"]), augmentation=AugmentationConfig())
    extractor = FeatureExtractor(config, arguments["image_size"], arguments["mean"], arguments["std"])
    load_extractor(extractor, checkpoint)
    return extractor.eval()


def config_class(arguments: Mapping[str, Any]) -> type[PreTrainingConfig] | type[MetricTrainingConfig]:
    """Which settings ``config`` is among the hyper-parameters of a checkpoint."""
    return MetricTrainingConfig if arguments.get("stage") == METRIC_TRAINING else PreTrainingConfig


def load_extractor(extractor: FeatureExtractor, checkpoint: dict[str, Any]) -> None:
    """Gives ``extractor`` the weights of a checkpoint's.

    Raises:
        RuntimeError: they are of another shape.
    """
    prefix = "extractor."
    state = checkpoint["state_dict"].items()
    extractor.load_state_dict({key.removeprefix(prefix): value for key, value in state if key.startswith(prefix)})


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
    with _opened(path) as file:
        try:
            checkpoint = load_weights(file)
        except ValueError as error:
            raise ValueError(f"{path} is not the checkpoint of a {kind}, or is damaged: {error}") from error
    arguments = checkpoint.get("hyper_parameters") if isinstance(checkpoint, dict) else None
    if not isinstance(arguments, dict) or not {"config", "image_size"} <= arguments.keys():
        raise ValueError(f"{path} is not the checkpoint of a {kind}: it holds something else")
    # Pre-training had its checkpoints before there was another stage to tell it from.
    came = arguments.get("stage", PRE_TRAINING)
    if stage not in (None, came):
        raise ValueError(f"{path} is not the checkpoint of a {kind}: it is that of a {came}")
    return checkpoint


def _opened(path: str | Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        # Alone, errno and path do not tell which of many settings is meant.
        raise type(error)(error.errno, f"checkpoint cannot be read: {error.strerror}", str(path)) from error
