"""The interface of every backbone: feature vectors, dense feature maps, and their sizes beforehand."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Backbone(nn.Module, ABC):
    """A convolutional network from images to feature vectors.

    A subclass computes ``feature_map`` and foretells its size by ``map_size``; the feature vector is the mean over the
    map's positions, unless the subclass says otherwise.

    Attributes:
        out_channels: C', channels of the feature map.

    Shape:
        ``[N, C, H, W]`` -> ``[N, D]`` with D = ``feature_size(H, W)``.
    """

    out_channels: int

    @abstractmethod
    def feature_map(self, images: Tensor) -> Tensor:
        """Dense features ``[N, C', h, w]`` of images ``[N, C, H, W]``, with ``(h, w) = map_size(H, W)``."""

    @abstractmethod
    def map_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the feature map of an image of ``height`` x ``width`` pixels.

        Raises:
            ValueError: nothing is left of an image this small.
        """

    def feature_size(self, height: int, width: int) -> int:
        """Features D of an image of ``height`` x ``width`` pixels.

        Raises:
            ValueError: nothing is left of an image this small.
        """
        self.map_size(height, width)
        return self.out_channels

    def forward(self, images: Tensor) -> Tensor:
        return self.feature_map(images).mean((2, 3))


def pooled_size(name: str, poolings: int, height: int, width: int) -> tuple[int, int]:
    """What ``poolings`` of 2 x 2 each leave of ``height`` x ``width`` pixels.

    Raises:
        ValueError: they leave nothing.
    """
    side = 2**poolings
    if min(height, width) < side:
        raise ValueError(f"{name} need images of at least {side} x {side}, got {height} x {width}")
    return height // side, width // side


@torch.no_grad()
def initialize(module: nn.Module) -> None:
    """He's normal initialization over the fan-out for convolutions, as the field's backbones start.

    Reference:
        He et al., Delving Deep into Rectifiers, ICCV 2015.
    """
    for part in module.modules():
        # Without memory there is nothing to draw, and torch would import its compiler to find that out.
        if isinstance(part, nn.Conv2d) and not part.weight.is_meta:
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
