"""Backbones that turn images into feature vectors."""

from fewshot_ext.models.backbone import Backbone
from fewshot_ext.models.config import BackboneConfig, build_backbone
from fewshot_ext.models.conv import ConvBackbone, ConvBlock, conv4
from fewshot_ext.models.drop_block import DropBlock
from fewshot_ext.models.resnet import ResNet12, ResNet18
from fewshot_ext.models.wide_resnet import WideResNet28

__all__ = [
    "Backbone",
    "BackboneConfig",
    "ConvBackbone",
    "ConvBlock",
    "DropBlock",
    "ResNet12",
    "ResNet18",
    "WideResNet28",
    "build_backbone",
    "conv4",
]
