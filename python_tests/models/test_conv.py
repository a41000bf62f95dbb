import pytest
import torch

from fewshot_ext.models import ConvBackbone, conv4


def test_conv4_has_the_published_parameter_count():
    # Four blocks of 64 channels on RGB images, as in Chen et al., A Closer Look at Few-shot Classification.
    assert sum(p.numel() for p in conv4().parameters()) == 113_088


@pytest.mark.parametrize(
    ("channels", "pooled_blocks", "size", "features"),
    [
        ((64,) * 4, 4, (84, 84), 1600),
        ((64,) * 4, 2, (8, 8), 256),
        ((8, 16), 0, (5, 7), 560),
        ((8,), 1, (9, 6), 96),
    ],
)
def test_feature_size(channels, pooled_blocks, size, features):
    backbone = ConvBackbone(1, channels, pooled_blocks)
    assert backbone.feature_size(*size) == features
    assert backbone(torch.randn(2, 1, *size)).shape == (2, features)


def test_initial_weights_are_those_of_the_official_negative_margin_code():
    """Convolutions normal by the fan-out; torch's own are uniform by the fan-in."""
    torch.manual_seed(0)
    for block in conv4(width=64).blocks:
        convolution, norm = block[0], block[1]
        weight = convolution.weight / (2 / (3 * 3 * 64)) ** 0.5
        assert weight.std().item() == pytest.approx(1, rel=0.05)
        assert weight.abs().max() > 2.5  # a uniform distribution ends at 1.7 deviations
        assert (norm.weight == 1).all()
        assert (norm.bias == 0).all()


def test_too_small_images_are_named():
    with pytest.raises(ValueError, match="4 pooled blocks need images of at least 16 x 16, got 8 x 20"):
        conv4().feature_size(8, 20)


@pytest.mark.parametrize(("channels", "pooled_blocks"), [((), 0), ((8, 0), 1), ((8,), 2), ((8,), -1)])
def test_bad_shapes_are_named(channels, pooled_blocks):
    with pytest.raises(ValueError, match=r"channels|pooled_blocks"):
        ConvBackbone(1, channels, pooled_blocks)
