"""The BN-Inception backbone of metric learning: GoogLeNet's second version, with batch normalization."""

import torch
from torch import Tensor, nn

from fewshot_ext.models.backbone import Backbone, initialize

# Channels of each block at a width of 64: of the 1 x 1 branch, of the reduction and the 3 x 3 convolution behind it, of
# the reduction and the two 3 x 3 convolutions behind it, and of the projection behind the pooling. 0 for none: such
# blocks halve the map.
_BLOCKS = {
    "3a": (64, 64, 64, 64, 96, 32),
    "3b": (64, 64, 96, 64, 96, 64),
    "3c": (0, 128, 160, 64, 96, 0),
    "4a": (224, 64, 96, 96, 128, 128),
    "4b": (192, 96, 128, 96, 128, 128),
    "4c": (160, 128, 160, 128, 160, 128),
    "4d": (96, 128, 192, 160, 192, 128),
    "4e": (0, 128, 192, 192, 256, 0),
    "5a": (352, 192, 320, 160, 224, 128),
    "5b": (352, 192, 320, 192, 224, 128),
}


def _convolution(inputs: int, outputs: int, side: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, side, stride, padding=side // 2), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class InceptionBlock(nn.ModuleDict):
    """Convolutions of three depths and a pooling side by side, their maps joined."""

    def __init__(self, inputs: int, channels: tuple[int, ...], pool: nn.Module) -> None:
        one, reduced, three, twice_reduced, double, projected = channels
        stride = 1 if one else 2
        super().__init__({"1x1": _convolution(inputs, one, 1)} if one else {})
        self["3x3_reduce"] = _convolution(inputs, reduced, 1)
        self["3x3"] = _convolution(reduced, three, 3, stride)
        self["double_3x3_reduce"] = _convolution(inputs, twice_reduced, 1)
        self["double_3x3_1"] = _convolution(twice_reduced, double, 3)
        self["double_3x3_2"] = _convolution(double, double, 3, stride)
        self["pool"] = pool
        if projected:
            self["pool_proj"] = _convolution(inputs, projected, 1)
        self.out_channels = one + three + double + (projected or inputs)

    def forward(self, features: Tensor) -> Tensor:
        branches = [("1x1",), ("3x3_reduce", "3x3"), ("double_3x3_reduce", "double_3x3_1", "double_3x3_2")]
        maps = []
        for branch in (*branches, ("pool", "pool_proj")):
            found = features
            for name in branch:
                found = self[name](found) if name in self else found
            if found is not features:
                maps.append(found)
        return torch.cat(maps, 1)


class BNInception(Backbone):
    """BN-Inception as Caffe's weights of ImageNet have it: for 224 x 224 images, with channels in the order BGR.

    Args:
        in_channels: channels of the images; three are turned round, and any other number is taken as it is.
        width: channels of the first convolution; all others are in proportion.

    Shape:
        ``[N, in_channels, H, W]`` -> ``[N, 16 width]``; the map of 224 x 224 is ``[N, 16 width, 7, 7]``. Sides have to
        let the map be halved evenly, as multiples of 32 do.

    Raises:
        ValueError: a width below 2 or odd.

    Reference:
        Ioffe and Szegedy, Batch Normalization, ICML 2015.

    Example:
        >>> BNInception().feature_size(224, 224)
        1024
    """

    def __init__(self, in_channels: int = 3, width: int = 64) -> None:
        super().__init__()
        if width < 2 or width % 2:
            raise ValueError(f"width: expected an even number of at least 2, got {width}")
        self.stem = nn.ModuleDict(
            {
                "conv1_7x7_s2": _convolution(in_channels, width, 7, 2),
                "conv2_3x3_reduce": _convolution(width, width, 1),
                "conv2_3x3": _convolution(width, 3 * width, 3),
            }
        )
        self.pool = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.blocks, inputs = nn.ModuleDict(), 3 * width
        for name, channels in _BLOCKS.items():
            if name == "5b":
                pool = nn.MaxPool2d(3, stride=1, padding=1)
            else:
                pool = nn.AvgPool2d(3, stride=1, padding=1) if channels[0] else self.pool
            self.blocks[name] = InceptionBlock(inputs, tuple(count * width // 64 for count in channels), pool)
            inputs = self.blocks[name].out_channels
        self.out_channels = inputs
        initialize(self)

    def feature_map(self, images: Tensor) -> Tensor:
        first, reduce, second = self.stem.values()
        features = self.pool(first(images.flip(1) if images.shape[1] == 3 else images))
        features = self.pool(second(reduce(features)))
        for block in self.blocks.values():
            features = block(features)
        return features

    def map_size(self, height: int, width: int) -> tuple[int, int]:
        sides = []
        for side in (height, width):
            halved = (side + 1) // 2 // 2 // 2
            # Beside convolutions of stride 2, which round up, stands a pooling, which rounds down.
            if halved == 0 or halved % 4:
                raise ValueError(f"BN-Inception needs sides such as multiples of 32, got {height} x {width}")
            sides.append(halved // 4)
        return sides[0], sides[1]
