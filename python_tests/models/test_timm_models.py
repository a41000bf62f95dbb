"""Models of timm: the maps of their transformers, sizes of images, weights for other sizes."""

import logging
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fewshot_ext import FewShotClassifier
from fewshot_ext.evaluation import FrozenBackbone
from fewshot_ext.models import CheckpointSettings, LocalFeaturesConfig, load_network
from fewshot_ext.models.network import rebuild_network, timm_network
from fewshot_ext.models.timm_models import TimmBackbone, timm_model

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 2}
# By name, the side of a patch and the tokens of class, distillation and registers.
FAMILIES = {
    "vit_tiny_patch16_224": (16, 1),
    "deit_tiny_distilled_patch16_224": (16, 2),
    "deit3_small_patch16_224": (16, 1),
    "vit_small_patch14_dinov2": (14, 1),
    "vit_small_patch14_reg4_dinov2": (14, 5),
    "vit_small_patch16_dinov3": (16, 5),
    "vit_base_patch32_clip_224": (32, 1),
    "vit_base_patch16_siglip_224": (16, 0),
    "eva02_tiny_patch14_224": (14, 1),
}


@pytest.fixture(scope="module")
def timm():
    """The real one; most environments of the tests do without."""
    return pytest.importorskip("timm", reason="needs the extra timm")


def small(name, **options):
    torch.manual_seed(0)
    return timm_model(name, **SMALL, **options).eval()


class Passing(nn.Module):
    """A block of a transformer that does nothing."""

    def forward(self, tokens, **_):
        return tokens


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_position_of_the_map_is_the_token_of_its_patch(name, timm):
    side, prefix = FAMILIES[name]
    model = small(name)
    assert model.num_prefix_tokens == prefix
    pixels = torch.randn(2, 3, 2 * side, 3 * side)
    tokens = model.forward_features(pixels)
    assert tokens.shape == (2, prefix + 6, 24)
    expected = tokens[:, prefix:].unflatten(1, (2, 3)).permute(0, 3, 1, 2)
    torch.testing.assert_close(TimmBackbone(model).feature_map(pixels), expected)

    # Without attention, positions and normalization, a token is the projection of the pixels of its patch.
    model.blocks = nn.Sequential(Passing())
    model.norm, model.norm_pre = nn.Identity(), nn.Identity()
    if getattr(model, "pos_embed", None) is not None:
        model.pos_embed.zero_()
    found = TimmBackbone(model).feature_map(pixels)
    for row in range(2):
        for column in range(3):
            patch = pixels[:, :, row * side : (row + 1) * side, column * side : (column + 1) * side]
            projection = patch.flatten(1) @ model.patch_embed.proj.weight.flatten(1).mT
            if model.patch_embed.proj.bias is not None:
                projection += model.patch_embed.proj.bias
            torch.testing.assert_close(found[:, :, row, column], projection, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("beit_base_patch16_224", 1),
        ("vit_relpos_small_patch16_224", 0),
        ("vit_tiny_r_s16_p8_224", 1),
    ],
)
@torch.no_grad()
def test_transformers_of_other_kinds(name, prefix, timm):
    model = small(name)
    pixels = torch.randn(1, 3, 224, 224)
    found = TimmBackbone(model).feature_map(pixels)
    torch.testing.assert_close(found.flatten(2).mT, model.forward_features(pixels)[:, prefix:], atol=1e-4, rtol=1e-4)
    assert found.shape[2] == found.shape[3]


@settings(max_examples=10)
@given(order=st.permutations(range(8)))
@torch.no_grad()
def test_patches_in_another_order_give_the_map_in_that_order(order, timm):
    model = small("vit_small_patch14_reg4_dinov2")
    model.pos_embed.zero_()
    patches = torch.randn(8, 3, 14, 14, generator=torch.Generator().manual_seed(1))

    def image(order):
        return patches[order].unflatten(0, (2, 4)).permute(2, 0, 3, 1, 4).reshape(1, 3, 28, 56)

    maps = [TimmBackbone(model).feature_map(image(order)) for order in (list(range(8)), list(order))]
    assert maps[0].shape == (1, 24, 2, 4)
    torch.testing.assert_close(maps[1].flatten(2), maps[0].flatten(2)[:, :, list(order)], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_vectors_are_those_of_timm(name, timm):
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=0, **SMALL).eval()
    pixels = torch.randn(1, *timm.data.resolve_model_data_config(plain)["input_size"])
    assert torch.equal(TimmBackbone(small(name))(pixels), plain(pixels))


def test_other_sizes(timm):
    backbone = TimmBackbone(small("vit_tiny_patch16_224"))
    assert backbone(torch.zeros(1, 3, 32, 64)).shape == (1, 24)
    for call in (backbone, backbone.feature_map):
        with pytest.raises(ValueError, match="image_size: expected a multiple of 16, the side of a patch of VisionTr"):
            call(torch.zeros(1, 3, 32, 40))
    fixed = TimmBackbone(small("vit_relpos_small_patch16_224"))
    with pytest.raises(
        ValueError,
        match=r"image_size: expected one that VisionTransformerRelPos takes, got 32 x 32: .*match model \(224",
    ):
        fixed.feature_map(torch.zeros(1, 3, 32, 32))
    if not hasattr(fixed.model, "set_input_size"):
        pytest.skip("needs a timm that sets the size of this model")
    sized = TimmBackbone(small("vit_relpos_small_patch16_224", image_size=32))
    assert sized.feature_map(torch.zeros(1, 3, 32, 32)).shape == (1, 24, 2, 2)


def test_a_model_of_tokens_without_a_map_says_so(timm):
    mixer = TimmBackbone(timm_model("gmixer_12_224").eval())
    with pytest.raises(ValueError, match="a model that timm can make, got 'gmixer_12_224': No pretrained weights"):
        load_network("timm:gmixer_12_224")
    with pytest.raises(ValueError, match=r"MlpMixer gives features .*, no map of 384 channels"):
        mixer.feature_map(torch.zeros(1, 3, 224, 224))


class TestASizeOfImages:
    IMAGES = torch.randint(256, (3, 3, 50, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    @pytest.fixture
    def file(self, timm, tmp_path):
        """Weights of a small model for images of 160 x 160, with a classifier."""
        torch.manual_seed(0)
        torch.save(timm.create_model("test_vit", num_classes=5).state_dict(), tmp_path / "own.pth")
        return tmp_path / "own.pth"

    def test_images_are_brought_to_it(self, file):
        network = load_network(f"timm:test_vit={file}", CheckpointSettings(image_size=64))
        assert network.image_size == 64
        assert network.feature_map(self.IMAGES).shape == (3, 64, 4, 4)
        whole = load_network(f"timm:test_vit={file}", CheckpointSettings(image_size=48, resize=64))
        assert whole.image_size == 64
        assert whole.preprocessing(self.IMAGES).shape[2:] == (48, 48)
        again = rebuild_network(network.content())
        assert torch.equal(again(self.IMAGES), network(self.IMAGES)) and again.image_size == 64
        with pytest.raises(ValueError, match="resize: expected null without an image_size, got 64"):
            load_network(f"timm:test_vit={file}", CheckpointSettings(resize=64))
        with pytest.raises(ValueError, match=r"image_size: expected a multiple of 16, .* got 50 x 50"):
            load_network(f"timm:test_vit={file}", CheckpointSettings(image_size=50))
        with pytest.raises(ValueError, match="mean: expected null for a model of timm"):
            load_network(f"timm:test_vit={file}", CheckpointSettings(mean=(0,) * 3, std=(1,) * 3))

    def test_images_as_they_are_without_it(self, file):
        backbone = FrozenBackbone.from_checkpoint(f"timm:test_vit={file}")
        assert backbone.network.image_size == 160
        images = self.IMAGES[:1, :, :32, :48]
        assert backbone.try_out(images, "pets", LocalFeaturesConfig()).shape == (1, 6, 64)
        assert backbone.try_out(images, "pets", LocalFeaturesConfig("sampling")).shape == (1, 9, 64)
        with pytest.raises(ValueError, match=r"take the 3x50x50 images of pets: image_size: expected a multiple of 16"):
            backbone.try_out(self.IMAGES[:1], "pets")

    def test_a_saved_classifier_keeps_it(self, file, tmp_path):
        network = load_network(f"timm:test_vit={file}", CheckpointSettings(image_size=64))
        classifier = FewShotClassifier(network, "deepemd").fit(self.IMAGES, ["a", "b", "c"])
        assert classifier.predict(self.IMAGES) == ["a", "b", "c"]
        classifier.save(tmp_path / "a.pt")
        again = FewShotClassifier.load(tmp_path / "a.pt")
        assert torch.equal(again.decision_function(self.IMAGES), classifier.decision_function(self.IMAGES))
        content = torch.load(tmp_path / "a.pt", weights_only=True)
        content["backbone"]["side"] = 3
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=r"a\.pt does not hold .*expected a checksum, a checkpoint or a model"):
            FewShotClassifier.load(tmp_path / "a.pt")

    def test_weights_for_another_one(self, timm, tmp_path, caplog):
        model = timm.create_model("test_vit", num_classes=0, img_size=64)
        with torch.no_grad():
            model.pos_embed[:, 0], model.pos_embed[:, 1:] = 3.0, 2.0
        torch.save({"state_dict": model.state_dict()}, tmp_path / "own64.pth")
        found = load_network(f"timm:test_vit={tmp_path / 'own64.pth'}").backbone.model
        # The mean of equal neighbors is what they are; the class has no place on the grid.
        torch.testing.assert_close(found.pos_embed[:, 1:], torch.full((1, 100, 64), 2.0))
        assert (found.pos_embed[:, 0] == 3).all()
        assert torch.equal(found.norm.weight, model.norm.weight)
        (told,) = caplog.messages
        assert told.endswith("own64.pth to its test_vit: pos_embed [1, 17, 64] becomes [1, 101, 64]")
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            sized = load_network(f"timm:test_vit={tmp_path / 'own64.pth'}", CheckpointSettings(image_size=64))
        assert not caplog.messages
        state = sized.backbone.model.state_dict()
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())

    def test_weights_in_the_layout_of_the_authors(self, file, tmp_path, caplog):
        own = load_network(f"timm:test_vit={file}").backbone.model.state_dict()
        torch.save({**own, "mask_token": torch.zeros(1, 64)}, tmp_path / "dinov2.pth")  # which only the training needs
        found = load_network(f"timm:test_vit={tmp_path / 'dinov2.pth'}").backbone.model.state_dict()
        assert all(torch.equal(found[key], value) for key, value in own.items())
        assert caplog.messages[0].endswith("dinov2.pth to its test_vit: mask_token is renamed or left out")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda state: state.pop("blocks.1.norm1.bias"), r"it lacks blocks\.1\.norm1\.bias"),
            (lambda state: state.update(more=torch.ones(1)), "left over are more"),
            (lambda state: state.update({"norm.bias": torch.ones(3)}), r"size mismatch for norm\.bias"),
        ],
    )
    @pytest.mark.parametrize("image_size", [None, 64])
    def test_what_timm_cannot_convert_is_named(self, change, message, image_size, file, tmp_path):
        state = torch.load(file, weights_only=True)
        change(state)
        torch.save(state, tmp_path / "other.pth")
        with pytest.raises(ValueError, match=rf"other\.pth does not hold the weights of timm's test_vit: .*{message}"):
            load_network(f"timm:test_vit={tmp_path / 'other.pth'}", CheckpointSettings(image_size=image_size))


class StandIn(nn.Module):
    """A transformer with the interface of timm's: two tokens that are no patches, then a mean for each patch."""

    num_features, num_prefix_tokens, dynamic_img_size = 3, 2, True
    default_cfg = types.MappingProxyType({"classifier": "head"})

    def __init__(self, grid):
        super().__init__()
        self.patch_embed = types.SimpleNamespace(feat_ratio=lambda as_scalar: (4, 4))
        self.pos_embed = nn.Parameter(torch.arange(3.0 * grid**2).view(1, grid**2, 3))

    def set_input_size(self, img_size):
        pytest.fail("the size is given before there are weights")

    def forward(self, pixels):
        return pixels.mean((2, 3))

    def forward_features(self, pixels):
        pytest.fail("the public road is forward_intermediates")

    def forward_intermediates(self, pixels, indices, norm, output_fmt, intermediates_only):
        assert (indices, norm, output_fmt, intermediates_only) == (1, True, "NCHW", True)
        assert pixels.shape[2] < 100, "Input height does not match"
        return [nn.functional.avg_pool2d(pixels, 4)]


@pytest.fixture
def stand_in(monkeypatch):
    """A timm with one transformer; what it was asked for, but for trials without memory."""
    asked = []

    def create_model(name, pretrained, num_classes, img_size=8, pretrained_cfg_overlay=None, **options):
        assert name == "vit" and num_classes == 0
        model = StandIn(img_size // 4)
        if model.pos_embed.is_meta:
            return model
        asked.append({"pretrained": pretrained, "img_size": img_size, **options})
        if pretrained_cfg_overlay is not None:
            asked[-1]["weights"] = len(pretrained_cfg_overlay["state_dict"])
        if pretrained_cfg_overlay is not None:
            state = dict(pretrained_cfg_overlay["state_dict"])
            assert pretrained_cfg_overlay["num_classes"] == 0
            if state.keys() == {"old"}:  # the layout of its authors
                state = {"pos_embed": state["old"][:, : model.pos_embed.shape[1]]}
            model.load_state_dict(state)
        return model

    module = types.ModuleType("timm")
    module.is_model, module.create_model = lambda name: name == "vit", create_model
    config = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.25,) * 3}
    module.data = types.SimpleNamespace(resolve_model_data_config=lambda model: config)
    monkeypatch.setitem(sys.modules, "timm", module)
    monkeypatch.setattr("fewshot_ext._extras.is_installed", lambda name: True)
    return asked


def test_a_stand_in_for_a_transformer(stand_in):
    network = timm_network("vit")
    assert stand_in == [{"pretrained": True, "img_size": 8, "dynamic_img_size": True}]
    images = torch.randint(256, (2, 3, 8, 12), dtype=torch.uint8)
    expected = nn.functional.avg_pool2d((images / 255 - 0.5) / 0.25, 4)
    torch.testing.assert_close(network.feature_map(images), expected)
    torch.testing.assert_close(network.local_features(LocalFeaturesConfig())(images), expected.flatten(2).mT)
    with pytest.raises(ValueError, match="image_size: expected a multiple of 4, the side of a patch of StandIn, got 8"):
        network(images[..., :9])
    with pytest.raises(ValueError, match="expected one that StandIn takes, got 100 x 8: Input height does not match"):
        network.feature_map(torch.zeros(1, 3, 100, 8, dtype=torch.uint8))


def test_a_stand_in_of_a_size(stand_in):
    network = timm_network("vit", image_size=12, resize=16)
    assert stand_in == [{"pretrained": True, "img_size": 12, "dynamic_img_size": True}]
    assert network.image_size == 16
    assert network.feature_map(torch.zeros(1, 3, 20, 20, dtype=torch.uint8)).shape == (1, 3, 3, 3)
    again = rebuild_network(network.content())
    assert again.image_size == 16 and again.backbone.model.pos_embed.shape == (1, 9, 3)


def test_a_stand_in_with_weights_that_timm_converts(stand_in, tmp_path, caplog):
    torch.save({"old": torch.ones(1, 30, 3), "head.weight": torch.ones(1)}, tmp_path / "old.pth")
    network = load_network(f"timm:vit={tmp_path / 'old.pth'}")
    assert torch.equal(network.backbone.model.pos_embed, torch.ones(1, 4, 3))
    assert caplog.messages[0].endswith("old.pth to its vit: old is renamed or left out")
    for other, message in (({"else": torch.ones(2)}, ", and left over are else"), ({"head.bias": torch.ones(2)}, "$")):
        torch.save(other, tmp_path / "else.pth")
        with pytest.raises(ValueError, match=rf"it lacks pos_embed{message}"):
            load_network(f"timm:vit={tmp_path / 'else.pth'}")
    assert all(asked["weights"] for asked in stand_in if asked["pretrained"]), "nothing is downloaded"
