"""A backbone whose features are projected to a few dimensions, for retrieval and for pictures of the feature space."""

from torch import Tensor, nn

from fewshot_ext._validation import check_choice
from fewshot_ext.models.backbone import Backbone

POOLINGS = ("average", "average_max")


class EmbeddedBackbone(Backbone):
    """A backbone with a linear layer behind its pooled feature map.

    Args:
        backbone: what is projected.
        features: dimensions of the feature vector.
        pooling: "average" projects the mean over the map's positions, "average_max" the sum of mean and maximum.

    Raises:
        ValueError: another pooling.

    Shape:
        ``[N, C, H, W]`` -> ``[N, features]``.

    Example:
        >>> import torch
        >>> from fewshot_ext.models import conv4
        >>> EmbeddedBackbone(conv4(1), features=2)(torch.zeros(3, 1, 28, 28)).shape
        torch.Size([3, 2])
    """

    def __init__(self, backbone: Backbone, features: int, pooling: str = "average") -> None:
        super().__init__()
        check_choice("pooling", pooling, *POOLINGS)
        self.backbone, self.pooling = backbone, pooling
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
        features = self.feature_map(images)
        pooled = features.mean((2, 3))
        if self.pooling == "average_max":
            pooled = pooled + features.amax((2, 3))
        return self.projection(pooled)
