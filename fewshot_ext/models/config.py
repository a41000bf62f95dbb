"""Backbones by name, with typed settings."""

from dataclasses import dataclass, replace
from typing import Literal

from fewshot_ext._validation import check_choice, check_count, check_fraction, plain_numbers
from fewshot_ext.models.backbone import Backbone
from fewshot_ext.models.bn_inception import BNInception
from fewshot_ext.models.conv import conv4
from fewshot_ext.models.drop_block import RAMP_STEPS
from fewshot_ext.models.efficientnet_lite import EfficientNetLite0
from fewshot_ext.models.embedding import POOLINGS, EmbeddedBackbone
from fewshot_ext.models.resnet import NarrowResNet12, ResNet12, ResNet18, ResNet50
from fewshot_ext.models.wide_resnet import WideResNet28

_POOLED_BLOCKS = 4  # as published, for 84 x 84 pixels
_RESNETS = {"resnet12": ResNet12, "resnet12_narrow": NarrowResNet12, "resnet18": ResNet18, "resnet50": ResNet50}
_PLAIN = {"bn_inception": BNInception, "efficientnet_lite0": EfficientNetLite0}
_WITHOUT_DROPOUT = ("conv4", *_PLAIN)
_NAMES = "conv4, resnet12, resnet12_narrow, resnet18, resnet50, wrn28_10, bn_inception or efficientnet_lite0"


@dataclass(frozen=True)
class BackboneConfig:
    """Which backbone, and its shape.

    Args:
        name: conv4, resnet12, resnet12_narrow (as few-shot-meta-baseline has it), resnet18, resnet50, wrn28_10,
            bn_inception or efficientnet_lite0 (published for 84, 84, 80, 224, 224, 80, 224 and 224 pixels).
        width: number of channels in the first stage; null takes the published number: 64, 160 for wrn28_10 and 32 for
            efficientnet_lite0.
        pooled_blocks: number of blocks that halve the image (conv4 only); null takes the published 4, or fewer where
            images are too small for them: 3 for 8 x 8.
        drop_rate: rate of dropout and DropBlock in a ResNet, or of dropout in wrn28_10; conv4,
            bn_inception and efficientnet_lite0 have neither.
        drop_block_size: side of DropBlock's blocks in a ResNet.
        drop_ramp_steps: number of training steps in which DropBlock's rate grows from 0.
        embedding: number of dimensions that a linear layer projects the features to; null adds no such layer.
        pooling: what is projected: the mean of the feature map (average), or mean and maximum added (average_max).

    Raises:
        ValueError: a value out of range, or an option that the backbone does not have.
    """

    name: Literal[
        "conv4",
        "resnet12",
        "resnet12_narrow",
        "resnet18",
        "resnet50",
        "wrn28_10",
        "bn_inception",
        "efficientnet_lite0",
    ] = "conv4"
    width: int | None = None
    pooled_blocks: int | None = None
    drop_rate: float = 0.0
    drop_block_size: int = 5
    drop_ramp_steps: int = RAMP_STEPS
    embedding: int | None = None
    pooling: Literal["average", "average_max"] = "average"

    def __post_init__(self) -> None:
        plain_numbers(self)
        if self.name not in ("conv4", "wrn28_10", *_PLAIN, *_RESNETS):
            raise ValueError(f"name: expected {_NAMES}, got {self.name!r}")
        if self.width is not None:
            check_count("width", self.width, 1)
            if self.name == "resnet12" and self.width % 2:
                raise ValueError(
                    f"width: expected an even number for resnet12 (its second stage has 2.5 times it), got {self.width}"
                )
        if self.pooled_blocks is not None and not 0 <= self.pooled_blocks <= _POOLED_BLOCKS:
            raise ValueError(f"pooled_blocks: expected a number in [0, {_POOLED_BLOCKS}], got {self.pooled_blocks}")
        if self.pooled_blocks not in (None, _POOLED_BLOCKS) and self.name != "conv4":
            raise ValueError(f"pooled_blocks is an option of conv4, got {self.pooled_blocks} for {self.name}")
        check_fraction("drop_rate", self.drop_rate)
        if self.drop_rate and self.name in _WITHOUT_DROPOUT:
            raise ValueError(f"drop_rate: expected 0 for {self.name}, which has no dropout, got {self.drop_rate}")
        check_count("drop_block_size", self.drop_block_size, 1)
        check_count("drop_ramp_steps", self.drop_ramp_steps, 0)
        if self.embedding is not None:
            check_count("embedding", self.embedding, 1)
        check_choice("pooling", self.pooling, *POOLINGS)
        if self.embedding is None and self.pooling != POOLINGS[0]:
            raise ValueError(f"pooling is an option of backbones with an embedding, got {self.pooling!r} without one")


def fitted(config: BackboneConfig, height: int, width: int) -> BackboneConfig:
    """The same settings with a number of pooled blocks, where it was left open, that suits such images.

    Example:
        >>> fitted(BackboneConfig(), 8, 8).pooled_blocks
        3
    """
    if config.name != "conv4" or config.pooled_blocks is not None:
        return config
    return replace(config, pooled_blocks=min(_POOLED_BLOCKS, min(height, width).bit_length() - 1))


def build_backbone(config: BackboneConfig, in_channels: int = 3) -> Backbone:
    """A fresh backbone, its weights drawn from torch's global generator.

    Args:
        config: see ``BackboneConfig``.
        in_channels: channels of the images.

    Example:
        >>> build_backbone(BackboneConfig("resnet12")).feature_size(84, 84)
        640
    """
    backbone = _build_plain(config, in_channels)
    return backbone if config.embedding is None else EmbeddedBackbone(backbone, config.embedding, config.pooling)


def _build_plain(config: BackboneConfig, in_channels: int) -> Backbone:
    shape = {} if config.width is None else {"width": config.width}
    if config.name == "conv4":
        return conv4(
            in_channels, **shape, pooled_blocks=_POOLED_BLOCKS if config.pooled_blocks is None else config.pooled_blocks
        )
    if config.name in _PLAIN:
        return _PLAIN[config.name](in_channels, **shape)
    if config.name == "wrn28_10":
        return WideResNet28(in_channels, **shape, drop_rate=config.drop_rate)
    return _RESNETS[config.name](
        in_channels,
        **shape,
        drop_rate=config.drop_rate,
        block_size=config.drop_block_size,
        ramp_steps=config.drop_ramp_steps,
    )
