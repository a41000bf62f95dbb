import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from fewshot_ext._files import file_sha256
from fewshot_ext.data import ImageInput, load_digits
from fewshot_ext.evaluation import FrozenBackbone, extract_features
from fewshot_ext.evaluation.backbones import distinct_names, state_checksum
from fewshot_ext.models import LocalFeaturesConfig, NetworkConfig, as_network, load_network
from fewshot_ext.models.network import rebuild_network

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_checkpoint_gives_the_features_of_its_module(checkpoints):
    from fewshot_ext.training import PreTraining

    backbone = FrozenBackbone.from_checkpoint(checkpoints[0])
    images = load_digits().images[:10]
    trained = PreTraining.from_checkpoint(checkpoints[0])
    assert torch.equal(extract_features(backbone.network, images), extract_features(trained, images))
    assert (backbone.network.channels, backbone.network.image_size, backbone.network.similarity) == (1, 8, "cosine")
    assert backbone.sha256 == file_sha256(checkpoints[0])
    assert backbone.path == str(checkpoints[0])
    again = rebuild_network(backbone.network.content())
    assert torch.equal(extract_features(again, images), extract_features(backbone.network, images))


@pytest.mark.parametrize("content", ["text", "other dict", "cut", "pickle", "no weights"])
def test_a_file_that_is_no_checkpoint_is_named(content, checkpoints, tmp_path):
    path = tmp_path / "x.ckpt"
    if content == "text":
        path.write_text("not a checkpoint")
    elif content == "cut":
        path.write_bytes(checkpoints[0].read_bytes()[:5000])
    else:
        whole = torch.load(checkpoints[0], weights_only=True)
        torch.save(
            {
                "other dict": {"state_dict": {}},
                "pickle": {"hyper_parameters": Path("x"), "state_dict": nn.Linear(1, 1)},
                "no weights": {"hyper_parameters": whole["hyper_parameters"], "state_dict": {}},
            }[content],
            path,
        )
    message = r"x\.ckpt (is not the checkpoint of a pre-training.*|does not fit this version of fewshot_ext): "
    with pytest.raises(ValueError, match=message):
        FrozenBackbone.open(path)


def test_a_missing_checkpoint_is_named(tmp_path):
    for source in (tmp_path / "missing", str(tmp_path / "missing.ckpt")):
        with pytest.raises(FileNotFoundError, match="missing"):
            FrozenBackbone.open(source)


def test_a_module_gets_pixels_in_0_to_1_or_what_the_preprocessing_makes():
    images = torch.randint(256, (4, 3, 2, 2), dtype=torch.uint8)
    plain = FrozenBackbone.open(nn.Flatten())
    torch.testing.assert_close(plain.network(images), images.flatten(1) / 255)
    assert (plain.network.channels, plain.network.image_size, plain.sha256) == (None, None, None)
    assert plain.network.content() == {}
    centered = FrozenBackbone.open(nn.Flatten(), lambda x: x - 100.0)
    torch.testing.assert_close(centered.network(images), images.flatten(1) - 100.0)
    normalized = FrozenBackbone.open(nn.Flatten(), ImageInput((0.5,) * 3, (0.25,) * 3))
    torch.testing.assert_close(normalized.network(images), (images.flatten(1) / 255 - 0.5) / 0.25)
    assert normalized.network.channels == 3


def test_files_come_in_the_size_that_evaluation_cuts_the_middle_out_of(tmp_path):
    from fewshot_ext.training import BackboneConfig, PreTraining, PreTrainingConfig

    assert FrozenBackbone.open(nn.Flatten(), ImageInput((0.5,), (0.25,), image_size=20)).network.image_size == 23
    config = PreTrainingConfig(image_size=20, backbone=BackboneConfig(width=4))
    module = PreTraining(config, NetworkConfig(config.backbone, (1, 40, 30), (0.5,), (0.25,), image_size=20), 2)
    torch.save(
        {"hyper_parameters": dict(module.hparams), "state_dict": module.state_dict()}, tmp_path / "resizing.ckpt"
    )
    assert FrozenBackbone.open(tmp_path / "resizing.ckpt").network.image_size == 23


def test_a_trained_module_brings_its_network(checkpoints):
    from fewshot_ext.training import PreTraining

    images = load_digits().images[:3]
    module = PreTraining.from_checkpoint(checkpoints[0])
    backbone = FrozenBackbone.open(module)
    assert backbone.network is module.network
    assert (backbone.network.channels, backbone.network.similarity) == (1, "cosine")
    assert backbone.network(images).shape[0] == 3


def test_a_module_with_an_image_input_takes_uint8_itself():
    images = load_digits().images[:3]
    module = nn.Sequential(ImageInput((0.5,), (0.25,)), nn.Flatten())
    network = FrozenBackbone.open(module).network
    assert network.channels == 1
    torch.testing.assert_close(network(images), module(images))


def test_maps_of_everything_that_holds_a_checkpoint(checkpoints):
    from fewshot_ext.training import PreTraining

    images = load_digits().images[:5]
    extractor = load_network(checkpoints[0])
    expected = extractor.feature_map(images).flatten(2).mT
    for source in (checkpoints[0], extractor, PreTraining.from_checkpoint(checkpoints[0]), extractor.backbone):
        preprocessing = extractor.preprocessing if source is extractor.backbone else None
        backbone = FrozenBackbone.open(source, preprocessing)
        maps = extract_features(backbone.network.local_features(LocalFeaturesConfig()), images)
        torch.testing.assert_close(maps, expected, msg=type(source).__name__)
        grid = backbone.network.local_features(LocalFeaturesConfig("grid", grids=(2,)))
        assert extract_features(grid, images).shape == (5, 4, expected.shape[2])
        assert not grid.training


def test_images_are_tried_out_with_a_message_that_names_them(checkpoints):
    backbone = FrozenBackbone.from_checkpoint(checkpoints[0])
    image = load_digits().images[:1]
    assert backbone.try_out(image, "digits").shape == (1, 8)
    assert backbone.try_out(image, "digits", LocalFeaturesConfig("sampling", regions=3)).shape == (1, 3, 8)
    with pytest.raises(ValueError, match="does not take the 3x8x8 images of colors"):
        backbone.try_out(image.expand(-1, 3, -1, -1), "colors")


class TimmModel(nn.Module):
    """What timm's models have in common, with its maps in three layouts."""

    num_features = 6

    def __init__(self, layout):
        super().__init__()
        self.layout = layout

    def forward_features(self, pixels):
        maps = nn.functional.avg_pool2d(pixels, 2).repeat(1, 2, 1, 1)
        return {"NCHW": maps, "NHWC": maps.permute(0, 2, 3, 1), "tokens": maps.flatten(2).mT}[self.layout]


def test_maps_of_a_timm_model(monkeypatch):
    fake_timm(monkeypatch)
    images = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    for layout in ("NCHW", "NHWC"):
        sys.modules["timm"].create_model = lambda *_, layout=layout, **__: TimmModel(layout)
        module = FrozenBackbone.open("tiny").network.local_features(LocalFeaturesConfig())
        expected = nn.functional.avg_pool2d((images / 255 - 0.5) / 0.25, 2).repeat(1, 2, 1, 1).flatten(2).mT
        torch.testing.assert_close(module(images), expected, msg=layout)
    sys.modules["timm"].create_model = lambda *_, **__: TimmModel("tokens")
    backbone = FrozenBackbone.open("tiny")
    with pytest.raises(ValueError, match=r"images of pets: TimmModel gives features \[1, 4, 6\], no map of 6 channels"):
        backbone.try_out(images[:1], "pets", LocalFeaturesConfig())


def fake_timm(monkeypatch):
    """A timm with one model, whose weights are random until somebody asks for the trained ones."""
    module = types.ModuleType("timm")
    module.__spec__ = types.SimpleNamespace(name="timm")
    module.data = types.ModuleType("timm.data")

    def create_model(name, pretrained, num_classes):
        assert (name, num_classes) == ("tiny", 0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
        if pretrained:
            nn.init.constant_(model[1].weight, 0.5)
        return model

    module.is_model = lambda name: name == "tiny"
    module.create_model = create_model
    module.data.resolve_model_data_config = lambda model: {
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
        "input_size": (3, 4, 4),
    }
    monkeypatch.setitem(sys.modules, "timm", module)
    monkeypatch.setattr("fewshot_ext._extras.is_installed", lambda name: True)


def test_a_timm_model_by_name(monkeypatch):
    fake_timm(monkeypatch)
    backbone = FrozenBackbone.open("tiny")
    images = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    linear = backbone.network.backbone.model[1]
    torch.testing.assert_close(backbone.network(images), linear((images.flatten(1) / 255 - 0.5) / 0.25))
    assert (linear.weight == 0.5).all()
    assert (backbone.network.channels, backbone.network.image_size) == (3, 4)
    torch.testing.assert_close(rebuild_network(backbone.network.content())(images), backbone.network(images))
    with pytest.raises(ValueError, match="a checkpoint file or a model that timm knows, got 'huge'"):
        FrozenBackbone.open("huge")


def test_without_timm_a_name_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("fewshot_ext._extras.is_installed", lambda name: name != "timm")
    with pytest.raises(ImportError, match=r"'timm' is missing; pip install 'fewshot_ext\[timm\]'"):
        FrozenBackbone.open("resnet50")


def test_sources_that_are_none():
    with pytest.raises(TypeError, match=r"backbone: expected a module, the path of a checkpoint or .*, got int"):
        FrozenBackbone.open(3)
    with pytest.raises(ValueError, match="preprocessing: expected none for 'resnet50'"):
        FrozenBackbone.open("resnet50", preprocessing=nn.Identity())


def test_checksum_of_weights_sees_every_change():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    network = as_network(model)
    before = state_checksum(network)
    assert state_checksum(network) == before
    with torch.no_grad():
        model[1].running_mean[0] += 1
    assert state_checksum(network) != before


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/m_1/last.ckpt", "a/m_2/last.ckpt"], ["m_1", "m_2"]),
        (["a/x.ckpt", "a/y.ckpt"], ["x.ckpt", "y.ckpt"]),
        (["a/x.ckpt"], ["x.ckpt"]),
        (["a/x.ckpt", "b/c/x.ckpt"], ["a", "b/c"]),
        (["a", "a/b"], ["a", "a/b"]),
    ],
)
def test_names_tell_paths_apart(paths, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert distinct_names(paths) == names


def test_a_path_given_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is given twice"):
        distinct_names(["a/x.ckpt", str(tmp_path / "a" / "x.ckpt")])
