import math

import pytest
import torch
from torch import nn

from fewshot_ext.models import (
    Backbone,
    BackboneConfig,
    BNInception,
    ResNet12,
    ResNet18,
    WideResNet28,
    build_backbone,
    conv4,
)

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ["conv4", "resnet12", "resnet12_narrow", "resnet18", "resnet50", "wrn28_10"]


def narrow(name, **options):
    return build_backbone(BackboneConfig(name, width=4, **options), in_channels=1)


# conv4: Chen et al., A Closer Look at Few-shot Classification ("113 k").
# resnet12: MetaOptNet's and the negative-margin paper's network, which the DeepEMD and RFS papers give as 12.4 M.
# resnet18: torchvision documents 11,689,512 for its own, 513,000 of them the classifier of 1,000 classes.
# resnet50: likewise 25,557,032, 2,049,000 of them the classifier.
# bn_inception: 11,295,240 with pretrainedmodels' classifier of 1,025,000.
# wrn28_10: 36.5 M in Wide Residual Networks, table 4; 36,479,194 with CIFAR-10's classifier of 6,410.
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("conv4", 113_088),
        ("resnet12", 12_424_320),
        ("resnet18", 11_689_512 - 513_000),
        ("resnet50", 25_557_032 - 2_049_000),
        ("wrn28_10", 36_479_194 - 6_410),
        ("bn_inception", 11_295_240 - 1_025_000),
    ],
)
def test_published_parameter_counts(name, count):
    with torch.device("meta"):
        backbone = build_backbone(BackboneConfig(name))
    assert sum(parameter.numel() for parameter in backbone.parameters()) == count


@pytest.mark.parametrize(
    ("name", "size", "channels", "side"),
    [
        ("conv4", 84, 64, 5),
        ("resnet12", 84, 640, 5),
        ("resnet18", 224, 512, 7),
        ("wrn28_10", 80, 640, 20),
        ("resnet50", 224, 2048, 7),
        ("resnet12_narrow", 80, 512, 5),
        ("bn_inception", 224, 1024, 7),
    ],
)
def test_published_map_sizes(name, size, channels, side):
    with torch.device("meta"):
        backbone = build_backbone(BackboneConfig(name)).eval()
        features = backbone.feature_map(torch.empty(1, 3, size, size))
    assert features.shape == (1, channels, side, side)
    assert backbone.map_size(size, size) == (side, side)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (16, 70)])
def test_sizes_are_foretold(name, size):
    backbone = narrow(name).eval()
    images = torch.randn(2, 1, *size)
    assert backbone(images).shape == (2, backbone.feature_size(*size))
    assert backbone.feature_map(images).shape == (2, backbone.out_channels, *backbone.map_size(*size))


@pytest.mark.parametrize("size", [(32, 64), (31, 97), (33, 160)])
def test_sizes_of_bn_inception(size):
    backbone = build_backbone(BackboneConfig("bn_inception", width=2)).eval()
    assert backbone.feature_map(torch.randn(1, 3, *size)).shape == (1, 32, *backbone.map_size(*size))
    for odd in ((47, 64), (64, 16), (8, 8)):
        with pytest.raises(ValueError, match=f"BN-Inception needs sides such as multiples of 32, got {odd[0]} x"):
            backbone.map_size(*odd)
    with pytest.raises(ValueError, match="width: expected an even number of at least 2, got 3"):
        build_backbone(BackboneConfig("bn_inception", width=3))
    with pytest.raises(ValueError, match="drop_rate: expected 0 for bn_inception, which has no dropout"):
        BackboneConfig("bn_inception", drop_rate=0.1)


@pytest.mark.parametrize(("channels", "first"), [(1, 0), (2, 0), (3, 2), (4, 0)])
def test_bn_inception_turns_three_channels_round_and_no_others(channels, first):
    backbone = BNInception(channels, width=2).eval()
    with torch.no_grad():
        backbone.stem["conv1_7x7_s2"][0].weight[:, 1:] = 0  # only the first channel that it sees counts
    images = torch.randn(1, channels, 32, 32)
    others = images.clone()
    others[:, [channel for channel in range(channels) if channel != first]] += 1
    assert torch.equal(backbone.feature_map(others), backbone.feature_map(images))
    others[:, first] += 1
    assert not torch.equal(backbone.feature_map(others), backbone.feature_map(images))


@pytest.mark.parametrize("name", NAMES[1:])
def test_the_feature_vector_is_the_mean_of_the_map(name):
    backbone = narrow(name).eval()
    images = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(backbone(images), backbone.feature_map(images).mean((2, 3)))


def test_conv4_flattens_its_map():
    backbone = conv4().eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(backbone(images), backbone.feature_map(images).flatten(1))


@pytest.mark.parametrize(
    ("name", "side"), [("conv4", 16), ("resnet12", 16), ("resnet18", 1), ("resnet50", 1), ("wrn28_10", 1)]
)
def test_the_smallest_image(name, side):
    backbone = narrow(name).eval()
    assert backbone(torch.zeros(1, 1, side, side)).shape == (1, backbone.feature_size(side, side))
    with pytest.raises(ValueError, match=f"at least {side} x {side}, got {side - 1} x {side}"):
        backbone.feature_size(side - 1, side)


@pytest.mark.parametrize("name", NAMES[1:])
def test_convolutions_start_by_he_over_the_fan_out(name):
    torch.manual_seed(0)
    for module in build_backbone(BackboneConfig(name, width=32)).modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight.detach()
            fan_out = weight.shape[0] * weight[0, 0].numel()
            spread = 5 * math.sqrt(2 / fan_out) / math.sqrt(2 * weight.numel())
            assert weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), abs=spread)


@pytest.mark.parametrize("name", NAMES)
def test_channels_last_gives_the_same_features_and_gradients(name):
    torch.manual_seed(0)
    backbone = narrow(name).double()
    images = torch.randn(3, 1, 32, 32, dtype=torch.float64)
    expected = backbone(images)
    expected.square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in backbone.parameters()]
    backbone.zero_grad()
    backbone.to(memory_format=torch.channels_last)
    features = backbone(images.contiguous(memory_format=torch.channels_last))
    features.square().sum().backward()
    torch.testing.assert_close(features, expected)
    for parameter, gradient in zip(backbone.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("name", ["resnet12", "resnet18"])
def test_compiles_in_training_without_graph_breaks(name):
    backbone = narrow(name, drop_rate=0.2, drop_ramp_steps=5).train()
    compiled = torch.compile(backbone, fullgraph=True, backend="aot_eager")
    compiled(torch.randn(2, 1, 32, 32)).sum().backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


@pytest.mark.parametrize(
    ("name", "drop_blocks", "dropouts"), [("resnet12", 2, 2), ("resnet18", 4, 4), ("wrn28_10", 0, 12)]
)
def test_where_activations_are_dropped(name, drop_blocks, dropouts):
    backbone = narrow(name, drop_rate=0.1, drop_block_size=3)
    kinds = [type(module).__name__ for module in backbone.modules()]
    assert (kinds.count("DropBlock"), kinds.count("Dropout")) == (drop_blocks, dropouts)
    assert not {"DropBlock", "Dropout"} & {type(module).__name__ for module in narrow(name).modules()}


def test_drop_block_resumes_inside_a_backbone():
    backbone = narrow("resnet12", drop_rate=0.1).train()
    for _ in range(3):
        backbone(torch.randn(2, 1, 16, 16))
    state = backbone.state_dict()
    assert [state[key].item() for key in state if key.endswith("dropout.steps")] == [3, 3]


def test_resnet12_by_its_formula():
    """One block against the plain formula, with statistics that are not those of a fresh normalization."""
    torch.manual_seed(0)
    block = ResNet12(1, 4).stages[0].double().eval()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)

    def conv_norm(images, layer):
        conv, norm = layer
        images = nn.functional.conv2d(images, conv.weight, padding=conv.kernel_size[0] // 2)
        normal = (images - norm.running_mean.view(-1, 1, 1)) / (norm.running_var.view(-1, 1, 1) + norm.eps).sqrt()
        return normal * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)

    def leaky(images):
        return torch.where(images > 0, images, 0.1 * images)

    images = torch.randn(2, 1, 6, 6, dtype=torch.float64)
    hidden = leaky(conv_norm(images, block.residual[0]))
    hidden = leaky(conv_norm(hidden, block.residual[2]))
    hidden = leaky(conv_norm(hidden, block.residual[4]) + conv_norm(images, block.shortcut))
    expected = hidden.unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2))
    torch.testing.assert_close(block(images), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "vgg"}, "name: expected conv4, resnet12, .* or efficientnet_lite0, got 'vgg'"),
        ({"width": 0}, "width: expected at least 1, got 0"),
        ({"name": "resnet12", "width": 5}, "width: expected an even number for resnet12"),
        ({"pooled_blocks": 5}, r"pooled_blocks: expected a number in \[0, 4\], got 5"),
        ({"name": "resnet18", "pooled_blocks": 2}, "pooled_blocks is an option of conv4, got 2 for resnet18"),
        ({"drop_rate": 0.1}, "drop_rate: expected 0 for conv4"),
        ({"name": "resnet12", "drop_rate": 1.0}, r"drop_rate: expected a number in \[0, 1\)"),
        ({"name": "resnet12", "drop_block_size": 0}, "drop_block_size: expected at least 1"),
        ({"name": "resnet12", "drop_ramp_steps": -1}, "drop_ramp_steps: expected at least 0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        BackboneConfig(**settings)


@pytest.mark.parametrize(
    ("backbone", "arguments", "message"),
    [
        (ResNet12, {"width": 3}, "width: expected an even number"),
        (ResNet18, {"width": 0}, "width: expected at least 1"),
        (WideResNet28, {"width": 0}, "width: expected at least 1"),
        (WideResNet28, {"width": 4, "drop_rate": 1.0}, "drop_rate: expected a number in"),
        (ResNet12, {"width": 2, "drop_rate": -0.1}, r"expected a number in \[0, 1\)|between 0 and 1"),
    ],
)
def test_bad_arguments_are_named(backbone, arguments, message):
    with pytest.raises(ValueError, match=message):
        backbone(**arguments)


def test_a_backbone_without_a_feature_map_is_none():
    """It fails where it is made, not in the first batch."""

    class NoMap(Backbone):
        def map_size(self, height, width):
            return height, width

    with pytest.raises(TypeError, match=r"abstract method '?feature_map'?"):
        NoMap()
