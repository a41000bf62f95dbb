import pytest
import torch

from fewshot_ext.models import BackboneConfig, EmbeddedBackbone, build_backbone


@pytest.mark.parametrize("pooling", ["average", "average_max"])
def test_features_are_a_linear_map_of_the_pooled_feature(pooling):
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(width=8, embedding=2, pooling=pooling), in_channels=1).eval()
    images = torch.randn(30, 1, 32, 32)
    with torch.no_grad():
        features = backbone(images)
        positions = backbone.backbone.feature_map(images).flatten(2)
        inner = positions.mean(2) + (positions.max(2).values if pooling == "average_max" else 0)
        expected = inner @ backbone.projection.weight.T + backbone.projection.bias
    torch.testing.assert_close(features, expected)
    assert (features < 0).any(), "a ReLU behind the projection would leave a quarter of the plane"


@pytest.mark.parametrize("name", ["conv4", "resnet12", "resnet18", "wrn28_10"])
def test_every_backbone_can_be_projected(name):
    with torch.device("meta"):
        backbone = build_backbone(BackboneConfig(name, embedding=2))
        assert isinstance(backbone, EmbeddedBackbone)
        assert backbone.feature_size(84, 84) == 2
        assert backbone(torch.zeros(2, 3, 84, 84)).shape == (2, 2)
        plain = build_backbone(BackboneConfig(name))
    assert backbone.map_size(84, 84) == plain.map_size(84, 84)
    assert backbone.out_channels == plain.out_channels


def test_images_too_small_and_bad_sizes_are_named():
    backbone = build_backbone(BackboneConfig(width=8, embedding=2), in_channels=1)
    with pytest.raises(ValueError, match="at least 16 x 16, got 8 x 8"):
        backbone.feature_size(8, 8)
    with pytest.raises(ValueError, match="embedding: expected at least 1, got 0"):
        BackboneConfig(embedding=0)
    with pytest.raises(ValueError, match="pooling: expected one of average, average_max, got 'max'"):
        BackboneConfig(embedding=2, pooling="max")
    with pytest.raises(ValueError, match="pooling is an option of backbones with an embedding, got 'average_max'"):
        BackboneConfig(pooling="average_max")
