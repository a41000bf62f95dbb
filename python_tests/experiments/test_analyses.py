"""What is measured on the runs of a sweep beside their accuracy."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from experiments_cases import FEW, TINY

from fewshot_ext.data import ImageArchive, Split
from fewshot_ext.evaluation import FrozenBackbone, ProtocolConfig
from fewshot_ext.experiments.accuracies import select
from fewshot_ext.experiments.angles import AngleMeasurement, angles_table, write_angles
from fewshot_ext.experiments.finetuning_margin import FineTuningMargins, write_finetuning_margin
from fewshot_ext.experiments.label_distribution import (
    GroupAccuracy,
    LabelDistribution,
    group_classes,
    pictured_rows,
    write_label_distribution,
)
from fewshot_ext.experiments.margins import margin_runs
from fewshot_ext.experiments.measures import base_class_probabilities, inter_class_variance
from fewshot_ext.experiments.runs import SweepImages, SweepRun
from fewshot_ext.experiments.shots import _tick_labels, write_shots
from fewshot_ext.experiments.sweep import Sweep
from fewshot_ext.experiments.tables import write_table
from fewshot_ext.experiments.tsne import Embedding, write_tsne
from fewshot_ext.experiments.variance import VarianceMeasurement, base_similarities, check_propositions, write_variance
from fewshot_ext.models import load_network
from fewshot_ext.models.network import read_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

PAIRS = replace(FEW, protocol=ProtocolConfig(episodes=4, way=2, shots=(1,), queries=3))


@pytest.fixture
def cosine(trained):
    return trained.restrict(lambda run: run.pretraining.similarity == "cosine")


def pictures(written):
    return {path.name for path in written if path.stat().st_size > 1000 or path.suffix != ".png"}


def test_variances_are_those_of_the_features(cosine, tmp_path):
    sweep = cosine.remeasure(VarianceMeasurement())
    rows = sweep.run()
    assert len(rows) == 6 * 2
    task = sweep.tasks[0]
    novel = SweepImages.part(sweep.archive, task.run).test["novel"]
    with torch.no_grad():
        features = load_network(task.checkpoint)(novel.images)
    (row,) = select(rows, margin=-0.2, seed=0, classes="novel")
    assert row["inter"] == pytest.approx(inter_class_variance(features, novel.labels).item(), rel=1e-4)
    assert 1 / 5 <= row["same_class"] <= 1
    propositions = check_propositions(rows)
    assert [(row["seed"], row["margin"], row["larger_margin"]) for row in propositions] == [
        (0, -0.2, 0.0),
        (0, 0.0, 0.2),
        (1, -0.2, 0.0),
        (1, 0.0, 0.2),
    ]
    names = {"variance.json", "variance.csv", "variance.png", "proposition.json", "proposition.csv"}
    assert pictures(write_variance(tmp_path, rows)) == names
    assert json.loads((tmp_path / "variance.json").read_text())["rows"] == rows


def test_base_similarities_take_the_trained_classifier(cosine, trained):
    for task in (cosine.tasks[0], trained.tasks[3]):
        features = torch.randn(4, 8)
        weight = read_checkpoint(task.checkpoint)["state_dict"]["head.weight"]
        found, scale = base_similarities(task.checkpoint, features)
        if load_network(task.checkpoint).similarity == "cosine":
            assert scale == 30.0
            expected = torch.nn.functional.cosine_similarity(features.unsqueeze(1), weight.unsqueeze(0), dim=-1)
        else:
            assert scale == 5.0
            expected = features @ weight.T
        torch.testing.assert_close(found, expected)


def test_a_checkpoint_without_a_classifier_is_of_the_wrong_kind():
    path = Path(__file__).parents[1] / "fixtures/version_0_1/metric.ckpt"
    with pytest.raises(ValueError, match=r"metric.ckpt is a checkpoint of the wrong kind: it holds no classifier"):
        base_similarities(path, torch.ones(1, 4))


def test_label_distribution_and_its_groups(cosine, tmp_path):
    rows = cosine.remeasure(LabelDistribution(2, PAIRS)).run()
    assert len(rows) == 6 * 5
    task = cosine.tasks[1]
    novel = SweepImages.part(cosine.archive, task.run).test["novel"]
    backbone = FrozenBackbone.from_checkpoint(task.checkpoint)
    with torch.no_grad():
        similarities, scale = base_similarities(task.checkpoint, backbone.network(novel.images))
    expected = base_class_probabilities(similarities, novel.labels, scale)
    found = torch.tensor([row["probabilities"] for row in select(rows, margin=0.0, seed=0)])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    for row in rows:
        assert row["same_class"] == pytest.approx(sum(p * p for p in row["probabilities"]), abs=1e-4)

    groups = group_classes(rows, 2)
    assert sorted(map(len, groups)) == [2, 3]
    assert sorted(name for group in groups for name in group) == ["5", "6", "7", "8", "9"]
    accuracies = cosine.remeasure(GroupAccuracy(groups, PAIRS)).run()
    assert len(accuracies) == 6 * 2
    written = write_label_distribution(tmp_path, rows, accuracies, groups)
    assert "label_distribution.png" in pictures(written)
    described = json.loads((tmp_path / "group_accuracy.json").read_text())["groups"]
    assert described[0]["same_class"] <= described[1]["same_class"]
    written_rows = json.loads((tmp_path / "label_distribution.json").read_text())["rows"]
    kept = [row for row in written_rows if "probabilities" in row]
    assert {(row["margin"], row["seed"]) for row in kept} == {(0.0, 0)}
    assert len(kept) == 5


def test_many_classes_are_drawn_evenly():
    names = [f"{i:03}" for i in range(100)]
    rows = [{"margin": 0.0, "seed": 0, "class": name} for name in names]
    drawn = [row["class"] for row in pictured_rows(rows, (names[:50], names[50:]))]
    assert drawn == names[::3]


def test_groups_hold_the_classes_that_they_name(cosine):
    """Episodes of a group are drawn from its classes and from no others, and groups draw apart."""
    images = SweepImages.part(cosine.archive, cosine.tasks[0].run)
    measurement = GroupAccuracy((("5", "6"), ("7", "9")), PAIRS)
    assert [[5 + i for i in members.tolist()] for members in measurement._members(images)] == [[5, 6], [7, 9]]


def test_fewer_classes_than_groups_need(cosine):
    with pytest.raises(ValueError, match=r"groups: 3 groups of 2-way episodes need 6 classes .* but digits has 5"):
        cosine.remeasure(LabelDistribution(3, PAIRS))
    with pytest.raises(ValueError, match="groups: expected at least 1, got 0"):
        LabelDistribution(0)


def test_margins_of_the_fine_tuning(cosine, tmp_path):
    one = cosine.restrict(lambda run: run.pretraining.margin == -0.2)
    novel = replace(FEW, classes=("novel",))
    rows = one.remeasure(FineTuningMargins((-0.3, 0.0), novel)).run()
    assert len(rows) == 2 * 2 * 2
    # At margin 0 it is the accuracy of the sweep itself.
    own = [row["correct"] for row in select(rows, finetuning_margin=0.0)]
    assert own == [row["correct"] for row in select(one.rows, classes="novel")]
    assert "finetuning_margin.png" in pictures(write_finetuning_margin(tmp_path, rows))


@pytest.mark.parametrize(
    ("margins", "message"), [((), "at least one margin"), ((0.1, 0.1), "none twice"), ((float("inf"),), "finite")]
)
def test_bad_margins_of_the_fine_tuning(margins, message):
    with pytest.raises(ValueError, match=message):
        FineTuningMargins(margins)


def test_shots(cosine, tmp_path):
    many = replace(FEW, protocol=replace(FEW.protocol, shots=(1, 20)), classes=("novel",))
    rows = cosine.remeasure(many).run()
    assert {row["shot"] for row in rows} == {1, 20}
    assert "shots.png" in pictures(write_shots(tmp_path, rows))
    assert "shots.png" in pictures(write_shots(tmp_path, select(rows, margin=0.2)))


@pytest.mark.parametrize(
    ("shots", "labels"),
    [
        ([1, 5, 10, 20, 50, 100, 200, 300], ["1", "5", "10", "20", "50", "100", "", "300"]),
        ([1, 2, 3, 5], ["1", "2", "3", "5"]),
        ([5], ["5"]),
    ],
)
def test_numbers_of_shots_do_not_run_into_each_other(shots, labels):
    assert _tick_labels(shots) == labels


def test_embeddings(cosine, tmp_path):
    one = cosine.restrict(lambda run: run.seed == 0)
    rows = one.remeasure(Embedding(num_classes=3, images=10, perplexity=5.0, accuracy=FEW)).run()
    assert len(rows) == 3 * 2
    for row in rows:
        assert len(row["points"]) == len(row["labels"]) == 30
        assert sorted(set(row["labels"])) == [0, 1, 2]
    names = {tuple(row["class_names"]) for row in select(rows, classes="base")}
    assert len(names) == 1, "every margin shows the same classes"
    (accuracy,) = select(one.rows, classes="novel", margin=0.0, shot=1)
    assert select(rows, classes="novel", margin=0.0)[0]["accuracy"] == accuracy["accuracy"]
    assert "tsne.png" in pictures(write_tsne(tmp_path, rows))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_classes": 1}, "num_classes: expected at least 2, got 1"),
        ({"num_classes": 8}, "num_classes: expected at most 7 to be told apart, got 8"),
        ({"images": 1}, "images: expected at least 2"),
        ({"perplexity": 0.0}, "perplexity: expected a number above 0"),
    ],
)
def test_bad_embeddings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Embedding(**settings)


def test_embeddings_that_the_images_do_not_allow(cosine):
    with pytest.raises(ValueError, match="num_classes: expected at most 5, the base classes of digits, got 6"):
        cosine.remeasure(Embedding(num_classes=6, accuracy=FEW))
    with pytest.raises(ValueError, match=r"perplexity: expected less than the 10 images of a picture, got 30"):
        cosine.remeasure(Embedding(num_classes=2, images=5, accuracy=FEW))


@pytest.fixture(scope="module")
def plane(tmp_path_factory, digits):
    config = replace(TINY, backbone=replace(TINY.backbone, embedding=2))
    runs = margin_runs("digits", config, {"cosine": [-0.2, 0.2]}, [0])
    sweep = Sweep(runs, digits, tmp_path_factory.mktemp("plane"), measurement=AngleMeasurement(bins=36))
    sweep.run()
    return sweep


def test_angles(plane, tmp_path):
    rows = plane.rows
    assert len(rows) == 2 * (5 + 5)
    for row in rows:
        assert len(row["histogram"]) == 36
        assert sum(row["histogram"]) == pytest.approx(1, abs=1e-3)
        assert row["peaks"] >= 1
        assert 0 <= row["intra"] <= 1
    assert "angles.png" in pictures(write_angles(tmp_path, rows))
    assert angles_table(rows).splitlines()[2].startswith("margin -0.2")


def test_angles_of_features_with_more_dimensions(digits, tmp_path, plane, trained):
    with pytest.raises(ValueError, match=r"backbone.embedding: expected 2 for directions in a plane, got None"):
        trained.remeasure(AngleMeasurement())
    with pytest.raises(ValueError, match="bins: expected at least 1"):
        AngleMeasurement(bins=0)


def few_classes(digits, base, novel):
    split = torch.full((10,), Split.VALIDATION)
    split[:base], split[base : base + novel] = Split.BASE, Split.NOVEL
    return ImageArchive(digits.images, digits.labels, digits.class_names, split.byte())


@pytest.mark.parametrize("measurement", [VarianceMeasurement(), AngleMeasurement()])
def test_intervals_need_three_classes(digits, measurement):
    config = replace(TINY, backbone=replace(TINY.backbone, embedding=2))
    run = SweepRun("digits", config)
    for base, novel, name in ((2, 5, "base"), (5, 2, "novel")):
        images = SweepImages.part(few_classes(digits, base, novel), run)
        with pytest.raises(ValueError, match=f"{name} classes of digits.* at least 3 classes"):
            measurement.check(run, images)


def test_validation_classes_count_as_unseen(digits, tmp_path):
    run = SweepRun("digits", TINY)
    images = SweepImages.part(few_classes(digits, 4, 3), run)
    assert set(images.test) == {"base", "validation", "novel"}
    LabelDistribution(3, PAIRS).check(run, images)
    names = ("7", "5")
    members = GroupAccuracy((names,), PAIRS)._members(images)
    # Validation classes come first: 7, 8, 9, then the novel 4, 5, 6.
    assert members[0].tolist() == [0, 4]


def test_tables_keep_their_rows(tmp_path):
    rows = [{"a": 1, "b": [1, 2]}, {"a": 2, "c": "x"}]
    write_table(tmp_path, "shots", rows, note="n")
    assert json.loads((tmp_path / "shots.json").read_text()) == {"analysis": "shots", "note": "n", "rows": rows}
    assert (tmp_path / "shots.csv").read_text() == "a,c\n1,\n2,x\n"
