"""The residual backbones of the few-shot literature: ResNet-12, ResNet-18 and ResNet-50."""

import torch.nn.functional as F
from torch import Tensor, nn

from fewshot_ext.models.backbone import Backbone, initialize, pooled_size
from fewshot_ext.models.drop_block import RAMP_STEPS, stage_dropout


def conv_norm(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
    """Convolution without bias, padded to keep the size at stride 1, and batch normalization."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
    )


class ResNet12Block(nn.Module):
    """Three 3 x 3 convolutions beside a 1 x 1 shortcut, 2 x 2 max-pooling, LeakyReLU of slope 0.1, ``dropout``."""

    def __init__(self, in_channels: int, out_channels: int, dropout: nn.Module) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            conv_norm(in_channels, out_channels, 3),
            nn.LeakyReLU(0.1, inplace=True),
            conv_norm(out_channels, out_channels, 3),
            nn.LeakyReLU(0.1, inplace=True),
            conv_norm(out_channels, out_channels, 3),
        )
        self.shortcut = conv_norm(in_channels, out_channels, 1)
        self.pool = nn.MaxPool2d(2)
        self.dropout = dropout

    def forward(self, features: Tensor) -> Tensor:
        # The maximum first: it commutes with LeakyReLU, which then has a quarter of the map to work on.
        pooled = self.pool(self.residual(features) + self.shortcut(features))
        return self.dropout(F.leaky_relu(pooled, 0.1, inplace=True))


class ResNet12(Backbone):
    """ResNet-12 as MetaOptNet, DeepEMD and the negative-margin paper have it, for 84 x 84 images.

    Args:
        in_channels: channels of the images.
        width: channels of the first of the four stages; the published 64 gives 64-160-320-640.
        drop_rate: of dropout after the first two stages and of DropBlock after the last two.
        block_size: side of DropBlock's blocks.
        ramp_steps: training steps over which DropBlock's rate grows from 0.

    Shape:
        ``[N, in_channels, H, W]`` with H, W >= 16 -> ``[N, 10 width]``; the map is ``[N, 10 width, H // 16, W // 16]``.

    Raises:
        ValueError: a width below 2 or odd, or a value out of ``DropBlock``'s range.

    Reference:
        Lee et al., Meta-Learning with Differentiable Convex Optimization, CVPR 2019.

    Example:
        >>> import torch
        >>> ResNet12().eval().feature_map(torch.zeros(1, 3, 84, 84)).shape
        torch.Size([1, 640, 5, 5])
    """

    def __init__(
        self,
        in_channels: int = 3,
        width: int = 64,
        *,
        drop_rate: float = 0.0,
        block_size: int = 5,
        ramp_steps: int = RAMP_STEPS,
    ) -> None:
        super().__init__()
        channels = self._stage_channels(width)
        inputs = (in_channels, *channels[:-1])
        self.out_channels = channels[-1]
        self.stages = nn.Sequential(
            *(
                ResNet12Block(i, o, stage_dropout(stage, drop_rate, block_size, ramp_steps))
                for stage, (i, o) in enumerate(zip(inputs, channels, strict=True))
            )
        )
        initialize(self)

    @staticmethod
    def _stage_channels(width: int) -> tuple[int, ...]:
        if width < 2 or width % 2:
            raise ValueError(
                f"width: expected an even number of at least 2 (the second stage has 2.5 times as many), got {width}"
            )
        return width, width * 5 // 2, width * 5, width * 10

    def feature_map(self, images: Tensor) -> Tensor:
        return self.stages(images)

    def map_size(self, height: int, width: int) -> tuple[int, int]:
        return pooled_size("the four stages of ResNet-12", 4, height, width)


class NarrowResNet12(ResNet12):
    """ResNet-12 as few-shot-meta-baseline has it: each stage twice as wide as the one before, 64-128-256-512.

    The arguments are those of ``ResNet12``.

    Shape:
        ``[N, in_channels, H, W]`` with H, W >= 16 -> ``[N, 8 width]``; the map is ``[N, 8 width, H // 16, W // 16]``.

    Raises:
        ValueError: a width below 1, or a value out of ``DropBlock``'s range.

    Reference:
        Chen et al., Meta-Baseline: Exploring Simple Meta-Learning for Few-Shot Learning, ICCV 2021.

    Example:
        >>> NarrowResNet12().feature_size(80, 80)
        512
    """

    @staticmethod
    def _stage_channels(width: int) -> tuple[int, ...]:
        _check_width(width)
        return width, 2 * width, 4 * width, 8 * width


def _check_width(width: int) -> None:
    if width < 1:
        raise ValueError(f"width: expected at least 1, got {width}")


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut, ReLU, ``dropout``."""

    growth = 1

    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout: nn.Module) -> None:
        super().__init__()
        self.residual = self._convolutions(in_channels, out_channels, stride)
        unchanged = in_channels == out_channels and stride == 1
        self.shortcut = nn.Identity() if unchanged else conv_norm(in_channels, out_channels, 1, stride)
        self.dropout = dropout

    @staticmethod
    def _convolutions(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            conv_norm(in_channels, out_channels, 3, stride),
            nn.ReLU(inplace=True),
            conv_norm(out_channels, out_channels, 3),
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.dropout(F.relu(self.residual(features) + self.shortcut(features), inplace=True))


class Bottleneck(BasicBlock):
    """Convolutions of 1 x 1, 3 x 3 and 1 x 1, the last four times as wide, beside a shortcut, ReLU, ``dropout``. The
    middle one has the stride, as in torchvision."""

    growth = 4

    @staticmethod
    def _convolutions(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
        inner = out_channels // Bottleneck.growth
        return nn.Sequential(
            conv_norm(in_channels, inner, 1),
            nn.ReLU(inplace=True),
            conv_norm(inner, inner, 3, stride),
            nn.ReLU(inplace=True),
            conv_norm(inner, out_channels, 1),
        )


class ResNet18(Backbone):
    """ResNet-18 as A Closer Look at Few-shot Classification has it, for 224 x 224 images; ImageNet's, headless.

    Args:
        in_channels: channels of the images.
        width: channels of the first of the four stages; each later one has twice those of the one before.
        drop_rate: of dropout after the blocks of the first two stages and of DropBlock after those of the last two.
        block_size: side of DropBlock's blocks.
        ramp_steps: training steps over which DropBlock's rate grows from 0.

    Shape:
        ``[N, in_channels, H, W]`` -> ``[N, 8 width]``; the map is ``[N, 8 width, ceil(H / 32), ceil(W / 32)]``.

    Raises:
        ValueError: a width below 1, or a value out of ``DropBlock``'s range.

    Reference:
        He et al., Deep Residual Learning for Image Recognition, CVPR 2016; Chen et al., A Closer Look at Few-shot
        Classification, ICLR 2019.

    Example:
        >>> import torch
        >>> ResNet18().eval().feature_map(torch.zeros(1, 3, 224, 224)).shape
        torch.Size([1, 512, 7, 7])
    """

    name, counts, block = "ResNet-18", (2, 2, 2, 2), BasicBlock

    def __init__(
        self,
        in_channels: int = 3,
        width: int = 64,
        *,
        drop_rate: float = 0.0,
        block_size: int = 5,
        ramp_steps: int = RAMP_STEPS,
    ) -> None:
        super().__init__()
        _check_width(width)
        growth = self.block.growth
        self.out_channels = 8 * width * growth
        self.stem = nn.Sequential(
            conv_norm(in_channels, width, 7, stride=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2, padding=1)
        )
        blocks: list[nn.Module] = []
        channels = width
        for stage, count in enumerate(self.counts):
            for number in range(count):
                inputs, channels = channels, width * 2**stage * growth
                stride = 2 if stage and not number else 1
                blocks.append(
                    self.block(inputs, channels, stride, stage_dropout(stage, drop_rate, block_size, ramp_steps))
                )
        self.blocks = nn.Sequential(*blocks)
        initialize(self)

    def feature_map(self, images: Tensor) -> Tensor:
        return self.blocks(self.stem(images))

    def map_size(self, height: int, width: int) -> tuple[int, int]:
        if min(height, width) < 1:
            raise ValueError(f"{self.name} needs images of at least 1 x 1, got {height} x {width}")
        return -(-height // 32), -(-width // 32)


class ResNet50(ResNet18):
    """ResNet-50 of ImageNet as torchvision has it, for 224 x 224 images, headless.

    The arguments are those of ``ResNet18``.

    Shape:
        ``[N, in_channels, H, W]`` -> ``[N, 32 width]``; the map is ``[N, 32 width, ceil(H / 32), ceil(W / 32)]``.

    Raises:
        ValueError: a width below 1, or a value out of ``DropBlock``'s range.

    Reference:
        He et al., Deep Residual Learning for Image Recognition, CVPR 2016; the stride stands in the 3 x 3 convolution,
        as in torchvision.

    Example:
        >>> ResNet50().feature_size(224, 224)
        2048
    """

    name, counts, block = "ResNet-50", (3, 4, 6, 3), Bottleneck
