import csv
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from fewshot_ext import _extras
from fewshot_ext.data import ImageArchive, Split, load_digits, load_images
from fewshot_ext.evaluation import (
    Comparison,
    ComparisonConfig,
    FeatureCache,
    FrozenBackbone,
    ProtocolConfig,
    mean_and_interval,
)
from fewshot_ext.evaluation import comparison as comparison_module
from fewshot_ext.heads import HEADS, FineTuningConfig
from fewshot_ext.models import as_network

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ProtocolConfig(episodes=12, shots=(1, 3), queries=4)


class Scaled(nn.Module):
    """Pixels, and how often they were asked for."""

    def __init__(self, noise=0.0):
        super().__init__()
        self.noise, self.images_seen = noise, 0

    def forward(self, images):
        self.images_seen += len(images)
        pixels = images.flatten(1) / 255
        return pixels + self.noise * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))


def frozen(name, module, **record):
    """The module takes uint8 itself."""
    return FrozenBackbone(name, as_network(module, nn.Identity()), **record)


def compare(*backbones, cache=None, archive=None, **settings):
    config = ComparisonConfig(**{"heads": ("protonet",), "protocol": SMALL, **settings})
    return Comparison(config, archive or load_digits(), list(backbones), data_name="digits", cache=cache)


def tiny_archive(counts, splits):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return ImageArchive(
        images=torch.randint(256, (len(labels), 1, 8, 8), dtype=torch.uint8),
        labels=labels,
        class_names=tuple(f"class_{k}" for k in range(len(counts))),
        class_split=torch.tensor(splits, dtype=torch.uint8),
    )


def test_two_backbones_meet_the_same_episodes_and_the_difference_is_paired(tmp_path):
    good, poor = Scaled(), Scaled(noise=0.5)
    comparison = compare(frozen("good", good), frozen("poor", poor), heads=("protonet", "finetune"))
    results = comparison.run(tmp_path)
    assert [(row.backbone, row.head, row.shot) for row in results.accuracies] == [
        (backbone, head, shot) for backbone in ("good", "poor") for head in ("protonet", "finetune") for shot in (1, 3)
    ]
    row, first = results.find("poor", "protonet", 3), results.find("good", "protonet", 3)
    gaps = np.array(row.correct) / 20 * 100 - np.array(first.correct) / 20 * 100
    mean, interval = results.difference(row)
    assert mean == pytest.approx(gaps.mean())
    assert interval == pytest.approx(1.96 * gaps.std() / math.sqrt(12))
    assert results.difference(first) is None
    assert mean < 0

    again = compare(frozen("good", Scaled()), heads=("finetune", "protonet")).run()
    assert again.find("good", "finetune", 1) == results.find("good", "finetune", 1)
    other = compare(frozen("good", Scaled()), seed=1).run()
    assert other.find("good", "protonet", 1) != results.find("good", "protonet", 1)


def test_equal_backbones_are_equal_under_every_head():
    twins = [frozen(name, Scaled()) for name in ("one", "two")]
    results = compare(*twins, heads=tuple(HEADS), finetuning=FineTuningConfig(steps=1, lr=1e-4)).run()
    half = len(results.accuracies) // 2
    for row, twin in zip(results.accuracies[:half], results.accuracies[half:], strict=True):
        assert row.correct == twin.correct, row.head
        assert results.difference(twin) == (0.0, 0.0)


def test_files_hold_everything_that_is_needed_to_repeat_it(tmp_path):
    backbones = [frozen("a", Scaled(), sha256="12" * 32, path="a.ckpt"), frozen("b", Scaled(0.5))]
    results = compare(*backbones, seed=7).run(tmp_path)
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["config"]["seed"] == 7
    assert content["config"]["device"] == "cpu"
    assert content["config"]["head_settings"] == {"protonet": {"metric": "euclidean", "scale": 1.0}}
    assert content["config"]["protocol"]["shots"] == [1, 3]
    assert content["versions"]["torch"] == torch.__version__
    assert content["data"] == {
        "name": "digits",
        "sha256": load_digits().checksum(),
        "split": "novel",
        "classes": 5,
        "images": 896,
    }
    assert content["backbones"][0] == {"name": "a", "similarity": "cosine", "sha256": "12" * 32, "path": "a.ckpt"}
    assert content["accuracies"][0]["correct"] == list(results.accuracies[0].correct)

    with open(tmp_path / "results.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 4
    assert rows[0]["difference"] == ""
    assert float(rows[2]["difference"]) == content["accuracies"][2]["difference"]
    assert (rows[0]["backbone_sha256"], rows[0]["seed"], rows[0]["split"]) == ("12" * 32, "7", "novel")
    assert (rows[0]["data_sha256"], rows[0]["torch"]) == (load_digits().checksum(), torch.__version__)
    assert "correct" not in rows[0]


def test_table_shows_accuracies_and_differences():
    results = compare(frozen("first", Scaled()), frozen("second", Scaled(0.5))).run()
    table = results.table()
    mean = results.accuracies[0].per_episode().mean().item()
    lines = table.splitlines()
    assert lines[0] == "5-way accuracy (%) on the novel classes of digits"
    assert lines[1] == "mean ± 95 % interval over 12 episodes, 4 queries a class"
    assert lines[3].split() == ["backbone", "head", "1-shot", "3-shot"]
    assert lines[4].startswith("first     protonet")
    assert f"{mean:.2f} ± " in lines[4]
    assert "difference to first on the same episodes, in points" in table
    assert lines[-1].startswith("second    protonet")
    assert "difference" not in compare(frozen("alone", Scaled())).run().table()


def test_simpleshot_centers_on_the_base_classes(monkeypatch):
    module, means = Scaled(), []
    comparison = compare(frozen("pixels", module), heads=("simpleshot",))
    measure = comparison_module.episode_scores
    monkeypatch.setattr(
        comparison_module,
        "episode_scores",
        lambda *args, base_mean, **settings: means.append(base_mean) or measure(*args, base_mean=base_mean, **settings),
    )
    comparison.run()
    base = load_digits().subset(Split.BASE).images.flatten(1) / 255
    torch.testing.assert_close(means, [base.mean(0)] * 2)


def test_every_head_beats_chance_on_the_pixels():
    results = compare(frozen("pixels", Scaled()), heads=tuple(HEADS), finetuning=FineTuningConfig(lr=0.1)).run()
    for row in results.accuracies:
        assert row.per_episode().mean() > 60, row


# Nearest class mean of raw pixels over 300 episodes, as measured when these packs were made, by other code.
@pytest.mark.parametrize(
    ("data", "way", "shots", "accuracies"),
    [
        ("omniglot28", 5, (1, 5), (42.7, 68.9)),
        ("omniglot28", 20, (1,), (23.1,)),
        ("miniimagenet32_small", 5, (1, 5), (25.1, 29.6)),
    ],
)
def test_real_pixels_are_as_hard_as_others_found_them(data, way, shots, accuracies, real_data):
    real_data(f"{data}.npz")
    protocol = ProtocolConfig(episodes=300, way=way, shots=shots, queries=15)
    comparison = compare(frozen("pixels", Scaled()), archive=load_images(data), protocol=protocol)
    for row, expected in zip(comparison.run().accuracies, accuracies, strict=True):
        mean, interval = mean_and_interval(row.per_episode())
        # Three deviations of the difference of two independent means.
        assert abs(mean - expected) < 3 / 1.96 * math.sqrt(2) * interval, (row.shot, mean)


def test_features_are_kept_and_found_again(tmp_path):
    first, again, other = Scaled(), Scaled(), Scaled()
    cache = FeatureCache(tmp_path / "features")
    expected = compare(frozen("x", first, sha256="aa" * 32), cache=cache).run().accuracies
    before = again.images_seen
    comparison = compare(frozen("x", again, sha256="aa" * 32), cache=cache)
    assert comparison.run().accuracies == expected
    assert again.images_seen - before == 1  # the image that shows whether the backbone fits
    compare(frozen("x", other, sha256="bb" * 32), cache=cache).run()
    assert other.images_seen > 800
    assert len(list((tmp_path / "features").iterdir())) == 2


def test_a_file_of_the_same_name_and_another_key_is_not_believed(tmp_path):
    cache = FeatureCache(tmp_path)
    key = {"split": "novel", "checkpoint": "a" * 64}
    cache.save(key, torch.ones(2, 3))
    assert torch.equal(cache.load(key), torch.ones(2, 3))
    assert cache.load({**key, "checkpoint": "a" * 63 + "b"}) is None


def test_features_of_a_module_without_checksum_are_not_kept(tmp_path):
    compare(frozen("x", Scaled()), cache=FeatureCache(tmp_path / "features")).run()
    assert not (tmp_path / "features").exists()


@pytest.mark.parametrize("damage", ["cut", "text", "pickle", "dtype", "rows"])
def test_a_damaged_cache_is_computed_again(damage, tmp_path):
    backbone = frozen("x", Scaled(), sha256="aa" * 32)
    cache = FeatureCache(tmp_path)
    expected = compare(backbone, cache=cache).run().accuracies
    (file,) = tmp_path.iterdir()
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:1000])
    elif damage == "text":
        file.write_text("features")
    else:
        with np.load(file) as arrays:
            key, features = arrays["key"], arrays["features"]
        changed = {
            "pickle": np.array([{}], dtype=object),
            "dtype": features.astype(np.float64),
            "rows": features[:3],
        }
        np.savez(file, features=changed[damage], key=key)
    assert compare(backbone, cache=cache).run().accuracies == expected


def test_ctrl_c_keeps_the_backbones_that_are_done(tmp_path):
    class Interrupted(Scaled):
        def forward(self, images):
            if len(images) > 1:
                raise KeyboardInterrupt
            return super().forward(images)

    comparison = compare(frozen("done", Scaled()), frozen("broken", Interrupted()))
    with pytest.raises(KeyboardInterrupt):
        comparison.run(tmp_path)
    assert {row.backbone for row in comparison.results.accuracies} == {"done"}
    assert len(json.loads((tmp_path / "results.json").read_text())["accuracies"]) == 2
    assert "done" in comparison.results.table()


def test_results_of_an_earlier_run_are_gone_when_the_next_one_starts(tmp_path):
    compare(frozen("x", Scaled())).run(tmp_path)
    comparison = compare(frozen("x", Scaled()))
    comparison.results.write(tmp_path)
    assert not (tmp_path / "results.csv").exists()
    assert json.loads((tmp_path / "results.json").read_text())["accuracies"] == []


class Flat(nn.Module):
    def forward(self, images):
        return images.float()


class Diverged(nn.Module):
    def forward(self, images):
        return images.flatten(1) * float("nan")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": ()}, r"heads: expected at least one head, and none twice, got \[\]"),
        ({"heads": ("protonet", "protonet")}, "none twice"),
        ({"heads": ("svm",)}, "head: expected one of finetune, .*, got 'svm'"),
        ({"split": "test"}, "split: expected one of base, validation, novel, got 'test'"),
        ({"seed": -1}, "seed: expected at least 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ComparisonConfig(**settings)


@pytest.mark.parametrize(
    ("backbones", "settings", "message"),
    [
        ([], {}, "backbones: expected at least one"),
        (["x", "x"], {}, r"names all different, got \['x', 'x'\]"),
        (["x"], {"split": "validation"}, "no validation classes"),
        (["x"], {"protocol": ProtocolConfig(way=6)}, "novel classes of digits: way 6 asks for more classes"),
        (
            ["x"],
            {"protocol": ProtocolConfig(shots=(5, 170))},
            "170 shots and 16 queries need 186 images a class, but of the novel classes of digits '8' has 174",
        ),
        (
            ["x"],
            {"heads": ("simpleshot",), "archive": tiny_archive([9] * 5, [Split.NOVEL] * 5)},
            "simpleshot needs the mean feature of the base classes, and digits has none",
        ),
        ([nn.Linear(3, 2)], {}, "backbone odd does not take the 1x8x8 images of digits"),
        ([Flat()], {}, r"backbone odd: expected features \[B, D\], got \[1, 1, 8, 8\]"),
        ([Diverged()], {}, "backbone odd gives features that are not finite"),
    ],
)
def test_what_cannot_work_is_found_before_any_work(backbones, settings, message):
    backbones = [frozen(b, Scaled()) if isinstance(b, str) else frozen("odd", b) for b in backbones]
    with pytest.raises(ValueError, match=message):
        compare(*backbones, **settings)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(_extras, "is_installed", lambda name: name != "tqdm")
    with pytest.raises(ImportError, match="'tqdm' is missing"):
        compare(frozen("x", Scaled()))


def test_a_result_that_is_not_there():
    with pytest.raises(KeyError):
        compare(frozen("x", Scaled())).run().find("x", "protonet", 2)
