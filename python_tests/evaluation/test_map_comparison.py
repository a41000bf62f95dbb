"""Heads for maps in a comparison: the same numbers as by hand, features once and kept, and what cannot work."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from fewshot_ext.data import Split, load_digits, load_images
from fewshot_ext.evaluation import (
    Comparison,
    ComparisonConfig,
    FeatureCache,
    FrozenBackbone,
    ProtocolConfig,
    episode_accuracies,
    extract_features,
)
from fewshot_ext.evaluation import comparison as comparison_module
from fewshot_ext.heads import HEAD_GROUPS, HEADS, DeepEMDHead, find_map_head
from fewshot_ext.models import Grid, LocalFeaturesConfig, StructuredClassifierConfig

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ProtocolConfig(episodes=6, shots=(1, 2), queries=3)
QUICK = DeepEMDHead(classifier=StructuredClassifierConfig(passes=2))


class Blocks(nn.Module):
    """A backbone of pixels: its feature map has one channel for each pixel of a 2 x 2 block."""

    def __init__(self):
        super().__init__()
        self.images_seen = 0

    def feature_map(self, images):
        self.images_seen += len(images)
        return nn.functional.pixel_unshuffle(images, 2)

    def forward(self, images):
        return self.feature_map(images).flatten(1)


def blocks(name="blocks", module=None, sha256=None):
    opened = FrozenBackbone.open(module or Blocks())
    return FrozenBackbone(name, opened.network, sha256=sha256)


def compare(*backbones, cache=None, archive=None, **settings):
    config = ComparisonConfig(**{"heads": ("deepemd",), "protocol": SMALL, "deepemd": QUICK, **settings})
    return Comparison(config, archive or load_digits(), list(backbones), data_name="digits", cache=cache)


def test_vectors_and_maps_stand_in_one_table(tmp_path):
    heads = ("deepemd@grid", "protonet", "knn", "deepemd", "protonet@fcn")
    comparison = compare(blocks(), heads=heads)
    results = comparison.run(tmp_path)
    assert [(row.head, row.shot) for row in results.accuracies] == [(head, shot) for head in heads for shot in (1, 2)]
    images = load_digits().subset(Split.NOVEL).images
    features = {
        "protonet": nn.functional.pixel_unshuffle(images / 255, 2).flatten(1),
        "knn": nn.functional.pixel_unshuffle(images / 255, 2).flatten(2).mT,
        "deepemd@grid": extract_features(Grid(Blocks(), preprocessing=lambda x: x / 255).eval(), images),
    }
    heads = {
        "protonet": HEADS["protonet"],
        "knn": find_map_head("knn"),
        "deepemd@grid": QUICK,
    }
    for name, head in heads.items():
        seed = comparison_module.derive_seed(0, comparison_module._HEAD, 2)
        expected = episode_accuracies(features[name], comparison.episodes[2], head=head, seed=seed)
        found = torch.tensor(results.find("blocks", name, 2).correct) / 15
        torch.testing.assert_close(found.double(), expected, msg=name)
    recorded = json.loads((tmp_path / "results.json").read_text())["config"]["head_settings"]
    assert recorded["deepemd@grid"]["maps"] == {"name": "grid", "grids": [2, 3], "ratio": 2.0}
    assert recorded["deepemd"]["classifier"]["passes"] == 2
    assert "maps" not in recorded["protonet"]


def test_the_table_of_the_paper_on_a_checkpoint(checkpoints):
    heads = HEAD_GROUPS["deepemd_table"]
    local_features = LocalFeaturesConfig(regions=3)
    backbone = FrozenBackbone.from_checkpoint(checkpoints[0])
    config = {"heads": heads, "local_features": local_features, "protocol": ProtocolConfig(30, shots=(5,), queries=5)}
    # The checkpoint's map has one position alone: one shot has too few for three neighbors.
    results = compare(backbone, deepemd=DeepEMDHead(), **config).run()
    assert len(results.accuracies) == len(heads)
    for row in results.accuracies:
        # One epoch of training, and three crops of 8 x 8 pixels, are a little better than chance.
        assert row.per_episode().mean() > 23, row.head


def test_maps_are_extracted_once_for_all_heads_and_kept(tmp_path):
    first, again = Blocks(), Blocks()
    cache = FeatureCache(tmp_path)
    heads = ("deepemd", "knn", "fc_dot", "prediction_fusion")
    expected = compare(blocks(module=first, sha256="aa" * 32), cache=cache, heads=heads).run().accuracies
    assert first.images_seen == 896 + 1  # and the image that shows whether the backbone fits
    assert compare(blocks(module=again, sha256="aa" * 32), cache=cache, heads=heads).run().accuracies == expected
    assert again.images_seen == 1
    other = LocalFeaturesConfig("grid", grids=(2,))
    assert len(list(tmp_path.iterdir())) == 1
    compare(blocks(sha256="aa" * 32), cache=cache, heads=("knn",), local_features=other).run()
    compare(blocks(sha256="aa" * 32), cache=cache, heads=("knn",), map_dtype="float16").run()
    assert len(list(tmp_path.iterdir())) == 3


def test_half_precision_changes_no_accuracy(tmp_path):
    heads = ("deepemd", "knn", "prediction_fusion", "fc_cosine")
    cache = FeatureCache(tmp_path)
    wide = compare(blocks(sha256="aa" * 32), heads=heads).run()
    half = compare(blocks(sha256="aa" * 32), heads=heads, map_dtype="float16", cache=cache).run()
    (file,) = tmp_path.iterdir()
    with np.load(file) as arrays:
        assert arrays["features"].dtype == np.float16
    for row, other in zip(wide.accuracies, half.accuracies, strict=True):
        # A query of two nearly equal scores may go either way.
        assert abs(row.per_episode().mean() - other.per_episode().mean()) < 1.2, row.head


def test_half_precision_on_real_features(real_data, tmp_path):
    """Random weights would do no better than chance: pixels, which are told apart a little."""
    real_data("miniimagenet32_small.npz")
    protocol = ProtocolConfig(episodes=100, shots=(1,), queries=15)
    archive = load_images("miniimagenet32_small")
    config = {"heads": ("deepemd", "knn"), "protocol": protocol, "local_features": LocalFeaturesConfig("grid")}
    wide, half = (compare(blocks(), archive=archive, map_dtype=d, **config).run() for d in ("float32", "float16"))
    for row, other in zip(wide.accuracies, half.accuracies, strict=True):
        changed = (torch.tensor(row.correct) - torch.tensor(other.correct)).abs().sum().item()
        assert changed <= 0.002 * 100 * 75, (row.head, changed)


def test_ctrl_c_keeps_the_heads_that_are_done(tmp_path, monkeypatch):
    measure, calls = comparison_module.episode_scores, []

    def interrupted(*arguments, **settings):
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return measure(*arguments, **settings)

    monkeypatch.setattr(comparison_module, "episode_scores", interrupted)
    comparison = compare(blocks(), heads=("deepemd", "protonet"))
    with pytest.raises(KeyboardInterrupt):
        comparison.run(tmp_path)
    assert [row["head"] for row in json.loads((tmp_path / "results.json").read_text())["accuracies"]] == ["deepemd"] * 2
    assert comparison.finished == 0


class NoMaps(nn.Module):
    def forward(self, images):
        return images.flatten(1)


class NotANumber(Blocks):
    def feature_map(self, images):
        return super().feature_map(images) * float("nan")


@pytest.mark.parametrize(
    ("module", "settings", "message"),
    [
        (NoMaps(), {}, "backbone NoMaps does not take .*: the backbone gives no feature maps, which matching needs"),
        (NotANumber(), {}, "backbone odd gives features that are not finite"),
        (nn.Conv2d(3, 4, 3), {}, "Conv2d has no method feature_map"),
        (
            Blocks(),
            {"local_features": LocalFeaturesConfig(pyramid=(2, 5))},
            "1x8x8 images of digits: pyramid: expected sides of at most 4, for the feature map is 4 x 4, got 5",
        ),
        (
            Blocks(),
            {"heads": ("deepemd@grid",), "local_features": LocalFeaturesConfig(grids=(5,))},
            "images: expected at least 10 x 10 pixels for a grid of 5 x 5, got 8 x 8",
        ),
        (
            Blocks(),
            {"heads": ("knn",), "local_features": LocalFeaturesConfig("grid", grids=(1,))},
            "head knn on backbone odd: neighbors: expected at most 1, the local features of the class with the fewest",
        ),
        (
            Blocks(),
            {"map_memory": 1e-5},
            r"map_memory: expected at least 0\.01 GiB for head deepemd on backbone odd, with 16 x 4 numbers for each "
            "of 896 images, got 1e-05; raise it, keep them in map_dtype float16 or take fewer regions",
        ),
    ],
)
def test_what_cannot_work_is_found_before_any_work(module, settings, message):
    name = "NoMaps" if isinstance(module, NoMaps) else "odd"
    backbone = FrozenBackbone(name, FrozenBackbone.open(module).network)
    seen = getattr(module, "images_seen", 0)
    with pytest.raises(ValueError, match=message):
        compare(backbone, **settings)
    assert getattr(module, "images_seen", 0) <= seen + 9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": ("finetune@fcn",)}, "head 'finetune@fcn' asks for maps, but finetune takes feature vectors"),
        ({"heads": ("deepemd@patch",)}, "regions after @: expected one of fcn, grid, sampling"),
        ({"map_dtype": "bfloat16"}, "map_dtype: expected one of float32, float16, got 'bfloat16'"),
        ({"map_memory": 0.0}, "map_memory: expected a number above 0"),
        ({"map_memory": float("nan")}, "map_memory: expected a finite number"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ComparisonConfig(**settings)


def test_more_shots_than_images_are_named():
    with pytest.raises(ValueError, match="174 shots and 3 queries need 177 images a class, but of the novel classes"):
        compare(blocks(), protocol=ProtocolConfig(shots=(1, 174), queries=3))


@pytest.mark.parametrize(
    ("features", "head", "message"),
    [
        (torch.zeros(9, 4), DeepEMDHead(), r"features: expected maps \[N, P, D\] for DeepEMDHead, got \[9, 4\]"),
        (
            torch.zeros(9, 2, 4),
            HEADS["protonet"],
            r"expected vectors \[N, D\] for ProtoNet",
        ),
    ],
)
def test_features_of_the_other_kind_are_named(features, head, message):
    episodes = compare(blocks()).episodes[1]
    with pytest.raises(ValueError, match=message):
        episode_accuracies(features, episodes, head=head)
