"""A backbone whose features are projected to a few dimensions, as for pictures of the feature space."""

from torch import Tensor, nn

from fewshot_ext.models.backbone import Backbone


class EmbeddedBackbone(Backbone):
    """A backbone with a linear layer behind the mean of its feature map.

    Args:
        backbone: what is projected.
        features: dimensions of the feature vector.

    Shape:
        ``[N, C, H, W]`` -> ``[N, features]``.

    Example:
        >>> import torch
        >>> from fewshot_ext.models import conv4
        >>> EmbeddedBackbone(conv4(1), features=2)(torch.zeros(3, 1, 28, 28)).shape
        torch.Size([3, 2])
    """

    def __init__(self, backbone: Backbone, features: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.out_channels = backbone.out_channels
        self.projection = nn.Linear(backbone.out_channels, features)

    def feature_map(self, images: Tensor) -> Tensor:
        return self.backbone.feature_map(images)

    def map_size(self, height: int, width: int) -> tuple[int, int]:
        return self.backbone.map_size(height, width)

    def feature_size(self, height: int, width: int) -> int:
        self.map_size(height, width)
        return self.projection.out_features

    def forward(self, images: Tensor) -> Tensor:
        return self.projection(self.feature_map(images).mean((2, 3)))
