import csv
import json
from dataclasses import replace

import pytest
import torch

from fewshot_ext.data import ImageArchive, Split, load_digits
from fewshot_ext.evaluation import ProtocolConfig
from fewshot_ext.experiments import Accuracy, MarginSweep, MarginSweepConfig, SweepResults
from fewshot_ext.heads import FineTuningConfig
from fewshot_ext.training import BackboneConfig, PreTrainingConfig

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = MarginSweepConfig(
    margins=(-0.2, 0.0),
    runs=2,
    protocol=ProtocolConfig(episodes=6, shots=(1, 2), queries=3),
    pretraining=PreTrainingConfig(epochs=1, batch_size=128, backbone=BackboneConfig(width=8, pooled_blocks=3)),
    finetuning=FineTuningConfig(steps=3),
)


@pytest.fixture(scope="module")
def digits():
    return load_digits()


def accuracy(run=0, margin=0.0, classes="novel", shot=1, correct=(5, 10)):
    return Accuracy(run, margin, classes, shot, correct, queries=10)


def results(*rows):
    return SweepResults({"seed": 0}, {"torch": "2"}, 5, list(rows))


def test_a_sweep_measures_every_run_margin_split_and_shot(digits, tmp_path):
    found = MarginSweep(TINY, digits, tmp_path).run()
    keys = [(row.run, row.margin, row.classes, row.shot) for row in found.accuracies]
    assert len(keys) == len(set(keys)) == 2 * 2 * 2 * 2
    assert SweepResults.read(tmp_path / "results.json") == found
    with (tmp_path / "results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 16
    assert (tmp_path / "accuracy_over_margin.png").stat().st_size > 1000
    assert (tmp_path / "run_1" / "margin_-0.2" / "last.ckpt").exists()


def test_interrupted_and_resumed_equals_unbroken(digits, tmp_path, monkeypatch):
    (tmp_path / "unbroken").mkdir()
    (tmp_path / "broken").mkdir()
    unbroken = MarginSweep(TINY, digits, tmp_path / "unbroken").run()

    sweep = MarginSweep(TINY, digits, tmp_path / "broken")
    measure = sweep._measure

    def interrupted_measure(run, margin, progress):
        if (run.number, margin) == (1, -0.2):
            raise KeyboardInterrupt
        return measure(run, margin, progress)

    monkeypatch.setattr(sweep, "_measure", interrupted_measure)
    with pytest.raises(KeyboardInterrupt):
        sweep.run()
    partial = SweepResults.read(tmp_path / "broken" / "results.json")
    assert partial.finished == {(0, -0.2), (0, 0.0)}

    resumed = MarginSweep(TINY, digits, tmp_path / "broken", resume=True)
    assert resumed.results.accuracies == partial.accuracies
    assert resumed.run() == unbroken


def test_resume_may_add_margins_and_runs_but_nothing_else(digits, tmp_path):
    one = replace(TINY, margins=(0.0,), runs=1)
    MarginSweep(one, digits, tmp_path).run()
    more = MarginSweep(TINY, digits, tmp_path, resume=True)
    assert more.results.finished == {(0, 0.0)}
    with pytest.raises(ValueError, match=r"cannot resume .*: its seed is 0, not 1"):
        MarginSweep(replace(one, seed=1), digits, tmp_path, resume=True)
    longer = replace(one, pretraining=replace(one.pretraining, epochs=2))
    with pytest.raises(ValueError, match=r"its pretraining.epochs is 1, not 2"):
        MarginSweep(longer, digits, tmp_path, resume=True)


def test_results_older_than_a_setting_resume_by_its_default(digits, tmp_path):
    one = replace(TINY, margins=(0.0,), runs=1)
    MarginSweep(one, digits, tmp_path).run()
    path = tmp_path / "results.json"
    results = json.loads(path.read_text())
    for name in ("optimizer", "decay_epochs"):
        del results["config"]["pretraining"][name]
    path.write_text(json.dumps(results))
    assert MarginSweep(one, digits, tmp_path, resume=True).results.finished == {(0, 0.0)}
    other = replace(one, pretraining=replace(one.pretraining, optimizer="sgd"))
    with pytest.raises(ValueError, match=r"its pretraining\.optimizer is adam, not sgd"):
        MarginSweep(other, digits, tmp_path, resume=True)


def test_a_fresh_sweep_removes_what_an_earlier_one_left(digits, tmp_path, monkeypatch):
    for name in ("results.csv", "accuracy_over_margin.png"):
        (tmp_path / name).write_text("stale")
    sweep = MarginSweep(TINY, digits, tmp_path)
    monkeypatch.setattr(sweep, "_measure", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        sweep.run()
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_resume_refuses_a_file_that_is_no_result(digits, tmp_path):
    (tmp_path / "results.json").write_text('{"config": ')
    with pytest.raises(ValueError, match="does not hold the results of a margin sweep"):
        MarginSweep(TINY, digits, tmp_path, resume=True)


def test_impossible_protocols_are_found_before_training(digits, tmp_path):
    greedy = replace(TINY, protocol=ProtocolConfig(shots=(70,)))
    with pytest.raises(ValueError, match="base classes: 70 shots and 16 queries need 86 images a class"):
        MarginSweep(greedy, digits, tmp_path)
    deep = replace(TINY, pretraining=replace(TINY.pretraining, backbone=BackboneConfig(pooled_blocks=4)))
    with pytest.raises(ValueError, match="at least 16 x 16, got 8 x 8"):
        MarginSweep(deep, digits, tmp_path)
    base_alone = ImageArchive(
        digits.images, digits.labels, digits.class_names, torch.full((10,), Split.BASE, dtype=torch.uint8)
    )
    with pytest.raises(ValueError, match="no novel classes"):
        MarginSweep(TINY, base_alone, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"margins": ()}, "margins: expected at least one"),
        ({"margins": (0.0, float("nan"))}, "margins: expected a finite number, got nan"),
        ({"margins": (0.1, 0.1)}, "margins: expected all to be different"),
        ({"runs": 0}, "runs: expected at least 1"),
        ({"seed": -1}, "seed: expected at least 0"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


def test_means_and_differences():
    found = results(
        accuracy(0, 0.0, correct=(5, 10)),
        accuracy(1, 0.0, correct=(0, 5)),
        accuracy(0, -0.3, correct=(6, 10)),
    )
    assert found.percent(0.0, "novel", 1)[0] == pytest.approx(50.0)
    assert found.differences(-0.3, 0.0, "novel", 1) == pytest.approx([5.0])


def test_table_and_findings_say_what_the_numbers_say(tmp_path):
    rows = []
    for margin, base, novel in ((-0.3, (4, 4), (9, 8)), (0.0, (10, 10), (7, 7))):
        rows += [accuracy(0, margin, "base", 1, base), accuracy(0, margin, "novel", 1, novel)]
    found = results(*rows)
    lines = found.table().splitlines()
    assert len(lines) == 6
    assert lines[-2].split() == ["-0.3", "40.00", "±", "0.00", "85.00", "±", "6.93"]
    assert found.findings()[:2] == [
        "base classes, 1-shot: margin +0 is best",
        "novel classes, 1-shot: margin -0.3 is best; against margin 0, run by run: +15.00 points",
    ]
    found.write(tmp_path)
    summary = json.loads((tmp_path / "results.json").read_text())["summary"]
    assert summary[0] == {"margin": -0.3, "classes": "base", "shot": 1, "accuracy": 40.0, "interval": 0.0}


def test_writing_leaves_the_old_file_where_it_fails(tmp_path, monkeypatch):
    found = results(accuracy(classes="base"), accuracy(classes="novel"))
    (tmp_path / "results.csv").write_text("old")
    monkeypatch.setattr(SweepResults, "_csv", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        found.write(tmp_path)
    assert (tmp_path / "results.csv").read_text() == "old"
    assert not list(tmp_path.glob(".*"))
