"""Conversion to checkpoints of this package and back: the same weights under the same names, and what was assumed."""

import pytest
import torch
from checkpoint_cases import meta_baseline, negative_margin, resnet12, torchvision

from fewshot_ext.cli import main
from fewshot_ext.models import BackboneConfig, build_backbone, load_network
from fewshot_ext.models.network import read_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def convert(source, output, *options):
    return main(["convert", str(source), str(output), *options])


def load(path):
    return torch.load(path, weights_only=True)


def check_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["conv4", "resnet12", "resnet18", "wrn28_10"])
def test_official_to_ours_and_back(name, bias, tmp_path, capsys):
    case, content = negative_margin(name, bias)
    torch.save(content, tmp_path / "in.tar")
    assert convert(tmp_path / "in.tar", tmp_path / "ours.ckpt") == 0
    assert convert(tmp_path / "ours.ckpt", tmp_path / "out.tar", "--to", "official") == 0
    assert capsys.readouterr().out.endswith("out.tar (for the official code of Negative Margin Matters)\n")
    found = load(tmp_path / "out.tar")
    assert found.keys() == content.keys()
    check_same(found["state"], content["state"])
    # The official code loads the optimizer whenever it loads the weights: a state for each of its parameters.
    (group,) = found["optimizer"]["param_groups"]
    parameters = {value.data_ptr() for key, value in case.state.items() if key.endswith((".weight", ".bias"))}
    assert len(group["params"]) == len(parameters)
    pixels = torch.randn(2, 3, case.side, case.side)
    for path in ("ours.ckpt", "out.tar"):
        with torch.no_grad():
            torch.testing.assert_close(load_network(tmp_path / path).backbone(pixels), case.features(pixels))


@pytest.mark.parametrize("prefix", ["", "module.encoder."])
def test_deepemd_to_ours_and_back(prefix, tmp_path, capsys):
    case = resnet12(prefix)
    torch.save({"params": case.state}, tmp_path / "in.pth")
    assert convert(tmp_path / "in.pth", tmp_path / "ours.ckpt") == 0
    assert convert(tmp_path / "ours.ckpt", tmp_path / "out.pth", "--to", "official") == 0
    assert "(for the official code of DeepEMD)" in capsys.readouterr().out
    found = load(tmp_path / "out.pth")
    assert found.keys() == {"params"}
    check_same(found["params"], {key.removeprefix(prefix): value for key, value in case.state.items()})


@pytest.mark.parametrize("depth", [18, 50])
def test_torchvision_to_ours_and_back(depth, tmp_path):
    case = torchvision(depth)
    torch.save(case.state, tmp_path / "in.pth")
    assert convert(tmp_path / "in.pth", tmp_path / "ours.ckpt") == 0
    assert convert(tmp_path / "ours.ckpt", tmp_path / "out.pth", "--to", "torchvision") == 0
    check_same(load(tmp_path / "out.pth"), case.state)


def test_from_one_code_to_another(tmp_path, capsys):
    case, content = meta_baseline("resnet12-wide")
    torch.save(content, tmp_path / "in.pth")
    assert convert(tmp_path / "in.pth", tmp_path / "out.tar", "--to", "official") == 0
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(load_network(tmp_path / "out.tar").backbone(pixels), case.features(pixels))
    capsys.readouterr()
    assert convert(tmp_path / "in.pth", tmp_path / "out.pth", "--to", "torchvision") == 2
    assert "to: torchvision or timm has resnet18, resnet50, and this is a resnet12" in capsys.readouterr().err


def test_what_was_assumed_is_kept(tmp_path, caplog):
    torch.save(negative_margin("resnet12")[1], tmp_path / "in.tar")
    assert convert(tmp_path / "in.tar", tmp_path / "ours.ckpt", "--image-size", "80", "--similarity", "dot") == 0
    assert "in.tar is read as" in caplog.text
    own = load(tmp_path / "ours.ckpt")["hyper_parameters"]
    assert own["stage"] == "conversion" and own["origin"]["file"] == "in.tar" and len(own["origin"]["sha256"]) == 64
    assert own["origin"]["assumed"].keys() == {"mean", "std", "resize", "scale"}
    caplog.clear()
    network = load_network(tmp_path / "ours.ckpt")
    assert (network.similarity, network.preprocessing.image_size, network.preprocessing.resize) == ("dot", 80, 92)
    assert not caplog.records, "ours says all itself"


def test_the_classifier_over_base_classes_comes_along(tmp_path):
    from fewshot_ext.experiments.variance import base_similarities

    content = negative_margin("resnet12")[1]
    torch.save(content, tmp_path / "in.tar")
    features = torch.randn(3, 40)
    similarities, scale = base_similarities(tmp_path / "in.tar", features)
    weight = content["state"]["classifier.weight"]
    expected = torch.nn.functional.cosine_similarity(features[:, None], weight[None], dim=-1)
    torch.testing.assert_close(similarities, expected)
    assert scale == 30.0


def test_a_training_of_ours(checkpoints, tmp_path):
    assert convert(checkpoints[0], tmp_path / "out.ckpt") == 0
    assert (tmp_path / "out.ckpt").stat().st_size < checkpoints[0].stat().st_size
    images = torch.randint(256, (3, 1, 8, 8), dtype=torch.uint8)
    assert torch.equal(load_network(tmp_path / "out.ckpt")(images), load_network(checkpoints[0])(images))
    assert convert(checkpoints[0], tmp_path / "out.tar", "--to", "official") == 0
    found, own = load(tmp_path / "out.tar")["state"], read_checkpoint(checkpoints[0])["state_dict"]
    assert torch.equal(found["feature.trunk.2.C.bias"], own["network.backbone.blocks.2.0.bias"])
    assert torch.equal(found["classifier.weight"], own["head.weight"])


@pytest.mark.parametrize(
    ("source", "output", "options", "message"),
    [
        ("in.pth", "in.pth", [], "OUT: expected another file than IN, got "),
        ("in.pth", "none/out.pth", [], "OUT: expected a file in a folder that there is, got "),
        ("in.pth", ".", [], "OUT: expected a file, got the folder "),
        ("in.pth", "out.pth", ["--to", "keras"], "to: expected one of official"),
        ("none.pth", "out.pth", [], "checkpoint cannot be read"),
        ("in.pth", "out.pth", ["--to", "official"], "has no projection behind the backbone, and this one has it"),
        ("in.pth", "out.pth", ["--scale", "-1"], "scale: expected a number above 0, got -1"),
    ],
)
def test_mistakes_get_one_line_and_write_nothing(source, output, options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(build_backbone(BackboneConfig(width=4, embedding=2)).state_dict(), "in.pth")
    assert convert(source, output, *options) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in.pth"]
