"""WRN-28-10, the widest backbone of the few-shot literature."""

import torch.nn.functional as F
from torch import Tensor, nn

from fewshot_ext._validation import check_fraction
from fewshot_ext.models.backbone import Backbone, initialize

_STEM_CHANNELS = 16


def _conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)


class WideBlock(nn.Module):
    """Normalization and ReLU before each of two 3 x 3 convolutions, dropout between them, beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, drop_rate: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = _conv(in_channels, out_channels, 3, stride)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.dropout = nn.Dropout(drop_rate) if drop_rate else nn.Identity()
        self.conv2 = _conv(out_channels, out_channels, 3)
        self.shortcut = None if in_channels == out_channels else _conv(in_channels, out_channels, 1, stride)

    def forward(self, features: Tensor) -> Tensor:
        activated = F.relu(self.norm1(features), inplace=True)
        residual = self.dropout(F.relu(self.norm2(self.conv1(activated)), inplace=True))
        # A shortcut that changes the channels shares the normalization; one that does not leaves the input as it is.
        return self.conv2(residual) + (features if self.shortcut is None else self.shortcut(activated))


class WideResNet28(Backbone):
    """WRN-28-10 as S2M2 and the negative-margin paper have it, for 80 x 80 images.

    Args:
        in_channels: channels of the images.
        width: channels of the first of the three stages; the published 160 (16 times 10) gives 160-320-640.
        drop_rate: of dropout between the two convolutions of a block.

    Shape:
        ``[N, in_channels, H, W]`` -> ``[N, 4 width]``; the map is ``[N, 4 width, ceil(H / 4), ceil(W / 4)]``.

    Raises:
        ValueError: a width below 1 or a rate outside [0, 1).

    Reference:
        Zagoruyko and Komodakis, Wide Residual Networks, BMVC 2016.

    Example:
        >>> WideResNet28().map_size(80, 80)
        (20, 20)
    """

    def __init__(self, in_channels: int = 3, width: int = 160, *, drop_rate: float = 0.0) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width: expected at least 1, got {width}")
        check_fraction("drop_rate", drop_rate)
        self.out_channels = 4 * width
        self.stem = _conv(in_channels, _STEM_CHANNELS, 3)
        blocks, channels = [], _STEM_CHANNELS
        for stage in range(3):
            for block in range(4):
                inputs, channels = channels, width * 2**stage
                blocks.append(WideBlock(inputs, channels, 2 if stage and not block else 1, drop_rate))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(channels)
        initialize(self)

    def feature_map(self, images: Tensor) -> Tensor:
        return F.relu(self.norm(self.blocks(self.stem(images))), inplace=True)

    def map_size(self, height: int, width: int) -> tuple[int, int]:
        if min(height, width) < 1:
            raise ValueError(f"WRN-28-10 needs images of at least 1 x 1, got {height} x {width}")
        return -(-height // 4), -(-width // 4)
