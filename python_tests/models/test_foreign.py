"""Checkpoints of other code: found by their names and shapes, the same function, and errors that say what was found."""

import logging
import sys
import types
from types import MappingProxyType

import pytest
import torch
from checkpoint_cases import bn_inception, libfewshot, meta_baseline, negative_margin, resnet, resnet12, torchvision
from hypothesis import given
from hypothesis import strategies as st

from fewshot_ext.models import BackboneConfig, CheckpointSettings, build_backbone, load_network
from fewshot_ext.models.network import read_checkpoint

BACKBONES = ("conv4", "resnet12", "resnet18", "wrn28_10")
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
NEGATIVE_MARGIN = {"mean": (0.507, 0.487, 0.441), "std": (0.267, 0.257, 0.276)}

pytestmark = pytest.mark.usefixtures("one_thread")


def saved(content, folder, name="file.pth"):
    torch.save(content, folder / name)
    return folder / name


def same_features(network, case):
    pixels = torch.randn(2, 3, case.side, case.side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(network.backbone(pixels), case.features(pixels))


def check_normalization(network, expected):
    for key, value in expected.items():
        torch.testing.assert_close(getattr(network.preprocessing, key).flatten(), torch.tensor(value))


@pytest.mark.parametrize("embedding", [None, 3])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", [*BACKBONES, "resnet12_narrow", "resnet50", "bn_inception"])
def test_state_dicts_of_our_own_backbones(name, prefix, embedding, tmp_path):
    backbone = build_backbone(BackboneConfig(name, width=4, embedding=embedding), in_channels=1).eval()
    path = saved({prefix + key: value for key, value in backbone.state_dict().items()}, tmp_path)
    network = load_network(path, CheckpointSettings(image_size=32))
    images = torch.randint(256, (2, 1, 32, 32), dtype=torch.uint8)
    assert torch.equal(network(images), backbone(images / 255))
    assert (network.channels, network.image_size, network.similarity) == (1, 32, "cosine")


def test_what_training_alone_needs_may_be_there_or_not(tmp_path):
    backbone = build_backbone(BackboneConfig("resnet12", width=4, drop_rate=0.1))
    state = {key: value for key, value in backbone.state_dict().items() if "num_batches_tracked" not in key}
    assert any("dropout.steps" in key for key in state)
    network = load_network(saved(state, tmp_path))
    images = torch.zeros(1, 3, 84, 84, dtype=torch.uint8)
    assert torch.equal(network(images), backbone.eval()(images / 255))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", BACKBONES)
def test_files_of_the_official_negative_margin_code(name, legacy, tmp_path, caplog):
    case, content = negative_margin(name)
    torch.save(content, tmp_path / "best_model.tar", _use_new_zipfile_serialization=not legacy)
    network = load_network(tmp_path / "best_model.tar")
    same_features(network, case)
    size = {"conv4": 84, "resnet12": 84, "resnet18": 224, "wrn28_10": 80}[name]
    assert network.preprocessing.image_size == size
    check_normalization(network, NEGATIVE_MARGIN)
    (record,) = caplog.records
    for part in ("best_model.tar is read as the official code of Negative Margin Matters", name, f"image_size {size}"):
        assert part in record.message
    assert "mean (0.507, 0.487, 0.441)" in record.message and "similarity cosine, scale 30.0" in record.message
    load_network(tmp_path / "best_model.tar")
    assert len(caplog.records) == 1, "it is said once"


@pytest.mark.parametrize("prefix", ["", "encoder.", "module.encoder."])
def test_files_of_the_official_deepemd_code(prefix, tmp_path, caplog):
    case = resnet12(prefix)
    network = load_network(saved({"params": case.state}, tmp_path, "max_acc.pth"))
    same_features(network, case)
    assert (network.preprocessing.image_size, network.similarity) == (84, "cosine")
    mean = network.preprocessing.mean.flatten() * 255
    torch.testing.assert_close(mean, torch.tensor([125.3, 123.0, 113.9]))
    assert "max_acc.pth is read as the official code of DeepEMD: resnet12" in caplog.text
    assert "scale" not in caplog.text, "which a file without a classifier does not need"


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize("depth", [18, 50])
def test_weights_of_torchvision_and_timm(depth, wrapper, tmp_path):
    case = torchvision(depth)
    # Its older files have no counters.
    state = {key: value for key, value in case.state.items() if depth == 50 or "num_batches" not in key}
    network = load_network(saved(state if wrapper is None else {wrapper: state, "epoch": 90}, tmp_path))
    same_features(network, case)
    check_normalization(network, IMAGENET)
    assert (network.preprocessing.image_size, network.similarity) == (224, "cosine")


@pytest.mark.parametrize("wrapper", [None, "state_dict"])
def test_weights_of_pretrainedmodels(wrapper, tmp_path):
    case = bn_inception()
    network = load_network(saved(case.state if wrapper is None else {wrapper: case.state}, tmp_path))
    same_features(network, case)
    check_normalization(network, {"mean": (128 / 255, 117 / 255, 104 / 255), "std": (1 / 255,) * 3})
    assert network.preprocessing.image_size == 224


def test_other_networks_of_torchvision_are_not_taken_for_ours(tmp_path):
    wide = torchvision(50).state
    wide["layer1.0.conv2.weight"] = torch.ones(8, 8, 3, 3)
    with pytest.raises(
        ValueError, match=r"with a resnet50 but for the shapes of layer1\.0\.conv2\.weight \[8, 8, 3, 3\]"
    ):
        load_network(saved(wide, tmp_path))
    deeper = resnet("", (3, 4, 6, 3), ("conv1", "bn1")).state
    with pytest.raises(ValueError, match=r"it is torchvision or timm with a resnet\d\d, but "):
        load_network(saved(deeper, tmp_path))


@pytest.mark.parametrize("kind", ["model_best", "emb_func_best", "model_last"])
@pytest.mark.parametrize("name", ["conv4", "resnet12"])
def test_files_of_libfewshot(name, kind, tmp_path, caplog):
    case = libfewshot(name, "" if kind == "emb_func_best" else "emb_func.")
    state = dict(case.state)
    if kind != "emb_func_best":
        state |= {"classifier.weight": torch.ones(5, 40), "temperature": torch.ones(())}
    content = {"epoch": 3, "model": state, "optimizer": {}, "lr_scheduler": {}} if kind == "model_last" else state
    network = load_network(saved(content, tmp_path, f"{kind}.pth"))
    same_features(network, case)
    mean = network.preprocessing.mean.flatten() * 255
    torch.testing.assert_close(mean, torch.tensor([120.39586422, 115.59361427, 104.54012653]))
    assert network.preprocessing.image_size == 84
    assert f"read as LibFewShot: {name}" in caplog.text and "(leaky_relu, maxpool_last2)" in caplog.text
    assert ("are passed over: classifier.weight, temperature" in caplog.text) == (kind != "emb_func_best")


def test_the_stem_of_libfewshots_resnet18_is_not_ours(tmp_path):
    state = resnet("emb_func.", (2, 2, 2, 2), ("conv1", "bn1")).state
    state["emb_func.conv1.weight"] = torch.ones(4, 3, 3, 3)
    with pytest.raises(
        ValueError, match=r"LibFewShot with a resnet18 but for the shapes of emb_func\.conv1\.weight \[4, 3, 3, 3\]"
    ):
        load_network(saved(state, tmp_path))


@pytest.mark.parametrize(
    ("name", "ours", "size"),
    [("resnet12", "resnet12_narrow", 80), ("resnet12-wide", "resnet12", 80), ("resnet18", "resnet18", 224)],
)
def test_files_of_few_shot_meta_baseline(name, ours, size, tmp_path, caplog):
    case, content = meta_baseline(name)
    network = load_network(saved(content, tmp_path, "max-va.pth"))
    same_features(network, case)
    check_normalization(network, IMAGENET)
    assert network.preprocessing.image_size == size
    assert f"read as few-shot-meta-baseline: {ours}, 4 channels wide" in caplog.text
    caplog.clear()
    state = {key: value for key, value in case.state.items() if key.startswith("encoder.")}
    second = {**content, "model": "meta-baseline", "model_sd": state | {"temp": torch.tensor(10.0)}}
    same_features(load_network(saved(second, tmp_path, "meta.pth")), case)
    assert "passed over: temp" in caplog.text


def test_a_bare_state_dict_of_the_official_negative_margin_code(tmp_path):
    case, content = negative_margin("resnet12")
    same_features(load_network(saved(content["state"], tmp_path)), case)


@pytest.mark.parametrize("shape", [(1 << 40, 0, 3, 3), (0, 3, 3, 3), (4, 0, 3, 3), (1 << 62, 0, 3, 3)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_sizes_that_no_weights_stand_behind_are_refused(shape, tmp_path):
    state = build_backbone(BackboneConfig(width=4)).state_dict()
    path = saved({**state, "blocks.0.0.weight": torch.empty(shape)}, tmp_path)
    with pytest.raises(ValueError, match=r"file\.pth"):
        load_network(path)


def test_what_the_file_says_and_what_is_given_is_not_assumed(tmp_path, caplog):
    content = negative_margin("resnet12", bias=True)[1]
    own = read_checkpoint(saved(content, tmp_path))["hyper_parameters"]
    assert own["config"] == {"similarity": "dot", "scale": 1.0} and own["num_classes"] == 6
    assumed = {"image_size": 84, "resize": 96, **NEGATIVE_MARGIN}
    assert own["origin"] == {"layout": "negative-margin", "file": "file.pth", "assumed": assumed}
    other = CheckpointSettings(similarity="cosine")
    own = read_checkpoint(saved(content, tmp_path, "a.tar"), settings=other)["hyper_parameters"]
    assert own["config"] == {"similarity": "cosine", "scale": 30.0} and "scale" in own["origin"]["assumed"]
    given = CheckpointSettings(80, (0.5,) * 3, (0.25,) * 3, "dot", 10.0, resize=90)
    caplog.clear()
    own = read_checkpoint(saved(content, tmp_path, "b.tar"), settings=given)["hyper_parameters"]
    assert own["config"] == {"similarity": "dot", "scale": 10.0} and own["origin"]["assumed"] == {}
    assert own["network"]["image_shape"] == (3, 80, 80) and own["network"]["std"] == (0.25,) * 3
    assert own["network"]["resize"] == 90
    assert caplog.messages[0].endswith("resnet12, 4 channels wide, images of 3 channels")
    content = negative_margin("resnet12")[1]
    scales = {
        similarity: read_checkpoint(
            saved(content, tmp_path, f"{similarity}.tar"), settings=CheckpointSettings(similarity=similarity)
        )["hyper_parameters"]["config"]["scale"]
        for similarity in ("cosine", "dot")
    }
    assert scales == {"cosine": 30.0, "dot": 10.0}, "as the official scripts for ResNet-12 have them"


@given(data=st.data())
def test_weights_that_are_missing_or_left_over_are_named(data, tmp_path_factory):
    state = dict(CASE.state)
    names = [name for name in state if "num_batches" not in name and name.startswith("feature.")]
    gone = data.draw(st.lists(st.sampled_from(names), max_size=5, unique=True))
    added = data.draw(st.lists(st.from_regex(r"feature\.extra[a-z]{1,5}", fullmatch=True), max_size=5, unique=True))
    for name in gone:
        del state[name]
    path = saved({"state": state | dict.fromkeys(added, torch.ones(2))}, tmp_path_factory.getbasetemp(), "drawn.tar")
    if not gone and not added:
        same_features(load_network(path), CASE)
        return
    with pytest.raises(ValueError, match=r"drawn\.tar is not .*Negative Margin Matters with a resnet12, but ") as error:
        load_network(path)
    missing, _, left = str(error.value).partition("left over are ")
    assert all(name in missing for name in gone) and all(name in left for name in added)
    assert ("it lacks" in missing) == bool(gone) and bool(left) == bool(added)


CASE = negative_margin("resnet12")[0]


def test_shapes_that_do_not_fit_are_named(tmp_path):
    state = negative_margin("resnet18")[0].state
    state["feature.layer2.0.C2.weight"] = torch.ones(8, 8, 1, 1)
    with pytest.raises(
        ValueError, match=r"resnet18 but for the shapes of feature.layer2.0.C2.weight \[8, 8, 1, 1\], expected \[8, 8,"
    ):
        load_network(saved({"state": state}, tmp_path))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (
            {"epoch": 3, "net": {f"a.{n}": torch.ones(n, 2) for n in range(5)}},
            r"it holds epoch, net; of its weights the first are a\.0 \[0, 2\], a\.1 \[1, 2\], a\.2 \[2, 2\]\. Known",
        ),
        ({"epoch": 3}, "it holds epoch; no weights. Known are: "),
        ({}, "it holds nothing; no weights"),
        ([torch.ones(2)], "it holds a list"),
        ({n: torch.ones(1) for n in range(9)}, "it holds 0, 1, 2, 3, 4 and 4 more; of its weights"),
    ],
)
def test_a_file_of_no_known_layout_says_what_is_in_it(content, found, tmp_path):
    with pytest.raises(ValueError, match=rf"file\.pth is not .*it fits no known layout: {found}") as error:
        load_network(saved(content, tmp_path))
    assert "the official code of Negative Margin Matters" in str(error.value)


def test_a_file_that_needs_code_is_refused_by_the_name_of_its_class(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path / "made").mkdir, ()

    path = saved({"state": CASE.state, "model": torch.nn.Flatten()}, tmp_path)
    with pytest.raises(ValueError, match=r"needs code to run: torch\.nn\.modules\.flatten\.Flatten"):
        load_network(path)
    with pytest.raises(ValueError, match=r"needs code to run: (getattr|pathlib)"):
        load_network(saved({"state": Trap()}, tmp_path))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 0}, "image_size: expected at least 1, got 0"),
        ({"mean": (0.5,)}, r"mean and std: expected both or neither, got \(0.5,\) and None"),
        ({"similarity": "euclidean"}, "similarity: expected one of cosine, dot, got 'euclidean'"),
        ({"scale": -1.0}, "scale: expected a number above 0, got -1.0"),
        ({"resize": 0}, "resize: expected at least 1, got 0"),
        ({"resize": 83}, "resize: expected at least image_size, 84, got 83"),
        ({"mean": (0.5,), "std": (0.25,)}, "image_shape: expected .*, and a mean and std for each channel"),
    ],
)
def test_bad_settings_are_named(settings, message, tmp_path):
    path = saved({"state": CASE.state}, tmp_path)
    with pytest.raises(ValueError, match=message):
        load_network(path, CheckpointSettings(**settings))


def test_gray_images_need_a_mean(tmp_path):
    state = dict(CASE.state)
    for part in ("C1", "downsample.0"):
        state[f"feature.layer1.0.{part}.weight"] = state[f"feature.layer1.0.{part}.weight"][:, :1]
    path = saved({"state": state}, tmp_path)
    with pytest.raises(ValueError, match="mean and std: expected one number for each of the 1 channels"):
        load_network(path)
    assert load_network(path, CheckpointSettings(mean=(0.5,), std=(0.2,))).channels == 1


def test_settings_for_what_brings_its_own(checkpoints):
    with pytest.raises(ValueError, match="image_size: expected null beside a checkpoint, which brings its own, got 84"):
        load_network(checkpoints[0], CheckpointSettings(image_size=84))
    with pytest.raises(ValueError, match="scale: expected null for a model of timm, which brings its own"):
        load_network("timm:resnet18", CheckpointSettings(scale=1.0))


def test_our_own_checkpoints_are_read_in_silence(checkpoints, caplog):
    with caplog.at_level(logging.DEBUG):
        load_network(checkpoints[0])
    assert not caplog.records


class TestWeightsForTimm:
    @pytest.fixture(autouse=True)
    def timm(self, monkeypatch):
        """What stands for timm, which the tests do without: two models, of which one has a classifier."""
        timm = types.ModuleType("timm")

        def create_model(name, pretrained, num_classes):
            assert not pretrained and num_classes == 0, "nothing is downloaded"
            model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
            model.default_cfg = {"classifier": ("head", "head_dist") if name == "distilled" else "head"}
            return model

        timm.is_model, timm.create_model = lambda name: name in ("plain", "distilled"), create_model
        config = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.25,) * 3}
        timm.data = types.SimpleNamespace(resolve_model_data_config=lambda model: config)
        monkeypatch.setitem(sys.modules, "timm", timm)
        monkeypatch.setattr("fewshot_ext._extras.is_installed", lambda name: True)

    STATE = MappingProxyType({"0.weight": torch.randn(4, 3, 3, 3), "0.bias": torch.zeros(4)})

    @pytest.mark.parametrize("wrapper", [None, "state_dict"])
    @pytest.mark.parametrize(("name", "heads"), [("plain", ["head"]), ("distilled", ["head", "head_dist"])])
    def test_local_weights_without_the_classifier(self, name, heads, wrapper, tmp_path):
        state = {**self.STATE, **{f"{head}.weight": torch.ones(5, 4) for head in heads}}
        path = saved(state if wrapper is None else {wrapper: state, "epoch": 3}, tmp_path, "own.pth")
        network = load_network(f"timm:{name}={path}")
        assert torch.equal(network.backbone.model[0].weight, self.STATE["0.weight"])
        assert network.content().keys() == {"timm", "state_dict"} and network.content()["timm"] == name

    def test_what_does_not_fit_is_named(self, tmp_path):
        path = saved({"0.weight": torch.ones(4, 3, 3, 3), "head_dist.weight": torch.ones(5, 4)}, tmp_path, "own.pth")
        with pytest.raises(
            ValueError, match=r"own\.pth does not hold .* timm's plain: it lacks 0\.bias, and left over are head_dist"
        ):
            load_network(f"timm:plain={path}")
        with pytest.raises(ValueError, match=r"own\.pth does not hold .*: it holds no state_dict"):
            load_network(f"timm:plain={saved([1], tmp_path, 'own.pth')}")
        with pytest.raises(ValueError, match="a model that timm knows, got 'none'"):
            load_network(f"timm:none={path}")
        with pytest.raises(FileNotFoundError):
            load_network(f"timm:plain={tmp_path / 'none.pth'}")
        with pytest.raises(ValueError, match=r"own\.pth does not hold .*size mismatch"):
            load_network(f"timm:plain={saved(self.STATE | {'0.bias': torch.zeros(5)}, tmp_path, 'own.pth')}")
