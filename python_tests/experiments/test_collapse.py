"""Trainings with and without Anti-Collapse: their runs, intervals over seeds, table, picture and claims."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from experiments_cases import CLEAR, made_up
from metric_cases import TINY_METRIC

from fewshot_ext.data import ImageArchive, Split, load_digits
from fewshot_ext.experiments.collapse import (
    CollapseSweep,
    SeedMean,
    arms_of,
    collapse_table,
    gain,
    last_epoch,
    summarize,
    write_collapse,
)
from fewshot_ext.experiments.figures import curve_styles
from fewshot_ext.experiments.metric_runs import Arm, TrainEmbedding, metric_runs
from fewshot_ext.training import AntiCollapseConfig, BackboneConfig, MeasurementConfig

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = replace(TINY_METRIC, epochs=2, milestones=(), measurement=replace(TINY_METRIC.measurement, epochs=1))
HEAD = {"data": {"name": "digits", "sha256": "0"}, "versions": {"torch": "2"}}


@pytest.fixture(scope="module")
def digits():
    return load_digits()


PAIR = Arm("pair", 0.1)


def test_the_runs_of_a_sweep():
    runs = metric_runs(
        "digits", TINY, ["contrastive", "proxy_nca"], [3, 4], pair_weights=[0.1, 0.2], proxy_weights=[1.0]
    )
    assert [run.name for run in runs[:5]] == [
        "contrastive, without, seed 3",
        "contrastive, Anti-Collapse pair 0.1, seed 3",
        "contrastive, Anti-Collapse pair 0.2, seed 3",
        "ProxyNCA, without, seed 3",
        "ProxyNCA, Anti-Collapse batch_proxy 1, seed 3",
    ]
    assert [run.training.anti_collapse.variant for run in runs[:5]] == ["none", "pair", "pair", "none", "batch_proxy"]
    assert len({run.folder(Path("runs"), "0") for run in runs}) == len(runs) == 10
    spread = metric_runs("digits", TINY, ["proxy_nca"], [0], proxy_variant="all_proxy")
    assert spread[1].training.anti_collapse.variant == "all_proxy"


def test_a_loss_with_proxies_can_spread_its_embeddings_too():
    runs = metric_runs("digits", TINY, ["triplet", "proxy_nca"], [0], proxy_pair_weights=[1.0, 0.1])
    assert [run.arm for run in runs] == [
        Arm(),
        Arm("pair", 0.1),
        Arm(),
        Arm("batch_proxy", 1.0),
        Arm("pair", 1.0),
        Arm("pair", 0.1),
    ]
    assert [run.labels["variant"] for run in runs[2:]] == ["none", "batch_proxy", "pair", "pair"]
    # The variants of one weight are told apart, and so are their folders.
    assert len({run.folder(Path("runs"), "0").name.rsplit("_", 1)[0] for run in runs}) == len(runs)


def test_arms_of_one_weight_are_not_mixed():
    rows = made_up({("proxy_anchor", 0.0, 0): 0.4, ("proxy_anchor", 1.0, 0): 0.3})
    rows += [
        {**row, "variant": "pair", "recall_at_1": 0.7} for row in made_up({("proxy_anchor", 1.0, 0): 0.6}, epochs=(2,))
    ]
    assert arms_of(rows) == [Arm(), Arm("batch_proxy", 1.0), Arm("pair", 1.0)]
    assert gain(rows, "proxy_anchor", Arm("pair", 1.0), "unseen", "recall_at_1").by_seed == pytest.approx((0.3,))
    assert gain(rows, "proxy_anchor", Arm("batch_proxy", 1.0), "unseen", "recall_at_1").by_seed == pytest.approx(
        (-0.1,)
    )
    cells = [(row["variant"], row["mean"]) for row in summarize(rows) if row["quantity"] == "recall_at_1"]
    assert cells == [("none", 0.4), ("batch_proxy", 0.3), ("pair", 0.7)] * 2
    table = collapse_table(rows)
    assert (
        table.count("ProxyAnchor, Anti-Collapse batch_proxy 1") == table.count("ProxyAnchor, Anti-Collapse pair 1") == 2
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": []}, "losses: expected at least one"),
        ({"seeds": [1, 1]}, "seeds: expected at least one, and none twice"),
        ({"pair_weights": []}, "pair_weights: expected at least one"),
        ({"proxy_weights": [0.0]}, "proxy_weights: expected a number above 0"),
        ({"proxy_pair_weights": [-1.0]}, "proxy_pair_weights: expected a number above 0"),
        ({"proxy_pair_weights": [1.0, 1.0]}, "proxy_pair_weights: expected none twice"),
        ({"proxy_variant": "pair"}, "proxy_variant: expected one of"),
        ({"seeds": [-1]}, "seed: expected at least 0"),
        ({"losses": ["hinge"]}, "loss: expected one of"),
    ],
)
def test_runs_that_make_no_sweep(changes, message):
    arguments = {"losses": ["triplet"], "seeds": [0], **changes}
    with pytest.raises(ValueError, match=message):
        metric_runs("digits", TINY, **arguments)


def test_a_mean_over_seeds_has_the_interval_of_students_t():
    found = SeedMean.of([1.0, 2.0, 3.0, 6.0])
    deviation = torch.tensor([1.0, 2.0, 3.0, 6.0]).std().item()
    assert found.mean == 3.0
    assert found.interval == pytest.approx(3.182446 * deviation / 2, rel=1e-6)
    assert SeedMean.of([2.0]).mean == 2.0
    assert math.isnan(SeedMean.of([2.0]).interval)
    assert SeedMean.of([0.5, 0.7]).text("+.1f", 100) == "+60.0 ± 127.1"
    assert SeedMean.of([0.5]).text(".2f") == "0.50"


def test_gains_are_paired_by_seed_in_the_last_epoch():
    rows = made_up(CLEAR)
    found = gain(rows, "triplet", PAIR, "unseen", "recall_at_1")
    assert found.by_seed == pytest.approx((0.10, 0.11, 0.11))
    assert (
        gain(made_up({("triplet", 0.0, 0): 0.5, ("triplet", 0.1, 1): 0.6}), "triplet", PAIR, "seen", "map_at_r") is None
    )
    assert {row["epoch"] for row in last_epoch(rows)} == {2}


def test_a_run_that_has_not_come_as_far_counts_by_its_own_last_epoch():
    rows = made_up({("triplet", 0.0, 0): 0.5}, epochs=(1, 2)) + made_up({("triplet", 0.1, 0): 0.6}, epochs=(1,))
    assert gain(rows, "triplet", PAIR, "unseen", "recall_at_1").by_seed == pytest.approx((0.1,))


def test_summary_and_table_tell_the_same():
    rows = made_up(CLEAR)
    summary = summarize(rows)
    cell = next(
        row
        for row in summary
        if (row["classes"], row["loss"], row["weight"], row["quantity"]) == ("unseen", "triplet", 0.1, "recall_at_1")
    )
    mean, difference = SeedMean.of([0.60, 0.63, 0.59]), SeedMean.of([0.10, 0.11, 0.11])
    assert (cell["mean"], cell["interval"]) == pytest.approx((mean.mean, mean.interval), abs=1e-6)
    assert cell["difference"] == pytest.approx(difference.mean, abs=1e-6)
    assert cell["difference_interval"] == pytest.approx(difference.interval, abs=1e-6)
    text = collapse_table(rows)
    assert "After 2 epochs, mean ± 95 % t interval over 3 seeds" in text
    assert f"{100 * mean.mean:.2f} ± {100 * mean.interval:.2f}" in text
    assert "triplet, Anti-Collapse pair 0.1" in text
    assert "from 1 seed" in collapse_table(made_up({("triplet", 0.0, 0): 0.5}))


def test_files_and_picture(tmp_path):
    folder = tmp_path / "digits"
    folder.mkdir()
    written = write_collapse(folder, made_up(CLEAR), **HEAD)
    assert [path.name for path in written] == ["collapse.json", "collapse.csv", "collapse.png"]
    rows = json.loads((folder / "collapse.json").read_text())["rows"]
    assert rows == json.loads(json.dumps(made_up(CLEAR)))
    assert (folder / "collapse.png").stat().st_size > 10_000


def test_a_sweep_trains_resumes_and_takes_over(digits, tmp_path, monkeypatch, capsys):
    def sweep(seeds, losses=("triplet",)):
        return CollapseSweep(metric_runs("digits", TINY, losses, seeds), digits, tmp_path)

    rows = sweep([0]).run()
    assert [(row["weight"], row["epoch"], row["classes"]) for row in rows] == [
        (weight, epoch, classes) for weight in (0.0, 0.1) for epoch in (1, 2) for classes in ("seen", "unseen")
    ]
    assert "triplet, without, seed 0: seen Recall@1 " in capsys.readouterr().err
    trained = []
    call = TrainEmbedding.__call__
    monkeypatch.setattr(
        TrainEmbedding, "__call__", lambda self, report: trained.append(self.name) or call(self, report)
    )
    again = sweep([0, 1]).run()
    assert again[: len(rows)] == rows
    assert trained == ["triplet, without, seed 1", "triplet, Anti-Collapse pair 0.1, seed 1"]
    # A run that was broken off goes on from its last epoch.
    folder = sweep([1]).tasks[0].folder
    before = json.loads((folder / "run.json").read_text())
    (folder / "run.json").unlink()
    assert sweep([1]).run()[:4] == again[8:12]
    assert json.loads((folder / "run.json").read_text())["rows"] == before["rows"]


def test_a_folder_with_a_run_of_other_settings(digits, tmp_path):
    runs = metric_runs("digits", TINY, ["triplet"], [0])
    task = CollapseSweep(runs, digits, tmp_path).tasks[0]
    task.folder.mkdir(parents=True)
    settings = runs[0].settings(digits.checksum())
    settings["training"]["learning_rate"] = 0.5
    (task.folder / "run.json").write_text(json.dumps({"settings": settings, "rows": []}))
    with pytest.raises(ValueError, match=r"its training\.learning_rate is 0\.5"):
        CollapseSweep(runs, digits, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes_per_batch": 6}, "classes_per_batch: expected at most 5, the classes to train on, got 6"),
        ({"backbone": BackboneConfig(embedding=4)}, "at least 16 x 16, got 8 x 8"),
        ({"measurement": MeasurementConfig(ks=(2,))}, "measurement.ks: expected 1 among them"),
        ({"measurement": MeasurementConfig(ks=(1, 10_000))}, "ks: expected K in"),
    ],
)
def test_what_no_run_could_do_is_found_before_the_first(changes, message, digits, tmp_path):
    config = replace(TINY, anti_collapse=AntiCollapseConfig(), **changes)
    with pytest.raises(ValueError, match=message):
        CollapseSweep(metric_runs("digits", config, ["triplet"], [0]), digits, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_unseen_class_with_one_image(digits, tmp_path):
    keep = torch.cat([(digits.labels < 9).nonzero()[:, 0], (digits.labels == 9).nonzero()[:1, 0]])
    lone = ImageArchive(digits.images[keep], digits.labels[keep], digits.class_names, digits.class_split)
    assert lone.subset(Split.NOVEL).num_classes == 5
    with pytest.raises(ValueError, match=r"unseen classes, .*got none for 1 queries"):
        CollapseSweep(metric_runs("digits", TINY, ["triplet"], [0]), lone, tmp_path)


def test_more_arms_than_colors_are_told_apart():
    styles = curve_styles(Arm("pair", k + 1).title for k in range(20))
    assert len({tuple(style.values()) for style in styles.values()}) == 20
