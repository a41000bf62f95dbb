"""Backbones that turn images into feature vectors."""

from fewshot_ext.models.conv import ConvBackbone, ConvBlock, conv4

__all__ = ["ConvBackbone", "ConvBlock", "conv4"]
