"""The Conv-4 backbone of the few-shot literature (Vinyals et al. 2016; Chen et al. 2019)."""

from torch import Tensor, nn

from fewshot_ext.models.backbone import Backbone, initialize, pooled_size


class ConvBlock(nn.Sequential):
    """3 x 3 convolution, batch normalization, 2 x 2 max-pooling where ``pool`` is set, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, pool: bool) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1),
            nn.BatchNorm2d(out_channels),
            # The maximum first: it commutes with ReLU, which then has a quarter of the map to work on.
            nn.MaxPool2d(2) if pool else nn.Identity(),
            nn.ReLU(inplace=True),
        )


class ConvBackbone(Backbone):
    """A stack of ``ConvBlock``s whose last map, flattened, is the feature vector.

    Args:
        in_channels: channels of the images.
        channels: output channels of each block.
        pooled_blocks: how many of the blocks, from the first on, halve the image; the classic Conv-4 pools in
            all four, which needs images of at least 16 x 16.

    Shape:
        ``[N, in_channels, H, W]`` -> ``[N, D]`` with D = ``feature_size(H, W)``.

    Raises:
        ValueError: no blocks, or more pooled blocks than blocks.

    Example:
        >>> import torch
        >>> backbone = ConvBackbone(1, pooled_blocks=2)
        >>> backbone(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 256])
    """

    def __init__(
        self, in_channels: int = 3, channels: tuple[int, ...] = (64, 64, 64, 64), pooled_blocks: int = 4
    ) -> None:
        super().__init__()
        if not channels or min(channels) < 1:
            raise ValueError(f"channels: expected at least one block, each of at least 1 channel, got {channels}")
        if not 0 <= pooled_blocks <= len(channels):
            raise ValueError(f"pooled_blocks: expected a number in [0, {len(channels)}], got {pooled_blocks}")
        self.channels, self.pooled_blocks = tuple(channels), pooled_blocks
        self.out_channels = channels[-1]
        inputs = (in_channels, *channels[:-1])
        self.blocks = nn.Sequential(
            *(ConvBlock(i, o, pool=k < pooled_blocks) for k, (i, o) in enumerate(zip(inputs, channels, strict=True)))
        )
        initialize(self)

    def feature_map(self, images: Tensor) -> Tensor:
        return self.blocks(images)

    def map_size(self, height: int, width: int) -> tuple[int, int]:
        return pooled_size(f"{self.pooled_blocks} pooled blocks", self.pooled_blocks, height, width)

    def feature_size(self, height: int, width: int) -> int:
        map_height, map_width = self.map_size(height, width)
        return self.out_channels * map_height * map_width

    def forward(self, images: Tensor) -> Tensor:
        return self.feature_map(images).flatten(1)


def conv4(in_channels: int = 3, *, width: int = 64, pooled_blocks: int = 4) -> ConvBackbone:
    """The four-block backbone of the field, 64 channels wide; the arguments are those of ``ConvBackbone``."""
    return ConvBackbone(in_channels, (width,) * 4, pooled_blocks)
