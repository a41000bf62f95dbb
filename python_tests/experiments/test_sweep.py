import json
from dataclasses import replace

import pytest
import torch
from experiments_cases import FEW, TINY
from worker_tasks import KilledOnce

from fewshot_ext.data import ImageArchive, Split
from fewshot_ext.evaluation import ProtocolConfig
from fewshot_ext.experiments.margins import margin_runs, margins_table, summarize, write_margins
from fewshot_ext.experiments.measurements import FewShotAccuracy
from fewshot_ext.experiments.runs import SweepImages, SweepRun
from fewshot_ext.experiments.sweep import Sweep
from fewshot_ext.experiments.sweep_task import TrainAndMeasure
from fewshot_ext.models import load_network

pytestmark = pytest.mark.usefixtures("one_thread")


def small_sweep(digits, output, margins=(0.0, -0.2), measurement=FEW, **options):
    runs = margin_runs("digits", TINY, {"cosine": margins}, [0])
    return Sweep(runs, digits, output, measurement=measurement, **options)


def test_rows_of_every_run_class_and_shot(trained):
    keys = [(row["loss"], row["margin"], row["seed"], row["classes"], row["shot"]) for row in trained.rows]
    assert len(keys) == len(set(keys)) == 4 * 2 * (2 * 2 + 1)
    assert all(len(row["correct"]) == 6 and row["queries"] == 15 for row in trained.rows if row["shot"])


def test_plain_classification_of_base_classes(trained, digits):
    """Features and class vectors straight from the checkpoint, image by image."""
    (row,) = (row for row in trained.tasks[1].rows() if not row["shot"])
    task = trained.tasks[1]
    state = torch.load(task.checkpoint, weights_only=True)["state_dict"]
    weight = torch.nn.functional.normalize(state["head.weight"])
    network, held_out = load_network(task.checkpoint).eval(), SweepImages.part(digits, task.run).test["base"]
    right = [[] for _ in range(5)]
    for image, label in zip(*held_out[:], strict=True):
        with torch.no_grad():
            right[label].append((weight @ network(image[None])[0]).argmax() == label)
    shares = [sum(own).item() / len(own) for own in right]
    assert (row["classes"], row["way"], row["queries"]) == ("base", 5, 1)
    assert row["correct"] == pytest.approx(shares, abs=1e-6)
    assert row["accuracy"] == pytest.approx(20 * sum(shares), abs=1e-3)


def test_images_that_the_set_holds_out_are_those_that_measure(digits):
    mark = (torch.arange(len(digits)) % 3 == 0).long()
    archive = replace(digits, image_fields={"held_out": mark})
    parts = SweepImages.part(archive, SweepRun("digits", TINY))
    base = archive.class_split[archive.labels] == Split.BASE
    assert torch.equal(parts.training.images, archive.images[base & (mark == 0)])
    assert torch.equal(parts.test["base"].images, archive.images[base & (mark == 1)])
    assert len(parts.test["novel"]) == (~base).sum()
    assert archive.checksum() != digits.checksum()


def test_runs_of_one_seed_share_images_and_episodes(trained, digits):
    one, two, other = (trained.tasks[i].run for i in (0, 1, 4))
    assert (one.seed, two.seed, other.seed) == (0, 0, 1)
    drawn = [FEW.draw(run, "novel", SweepImages.part(digits, run).test["novel"].labels, 1).query for run in (one, two)]
    assert torch.equal(*drawn)
    held_out = [SweepImages.part(digits, run).test["base"].images for run in (one, two, other)]
    assert torch.equal(held_out[0], held_out[1])
    assert not torch.equal(held_out[0], held_out[2])


def test_no_run_trains_on_what_measures_it(digits):
    parts = SweepImages.part(digits, SweepRun("digits", TINY))
    training = {image.numpy().tobytes() for image in parts.training.images}
    test = [image.numpy().tobytes() for image in parts.test["base"].images]
    assert len(parts.training) + len(test) == len(digits.subset(Split.BASE))
    assert sum(image in training for image in test) <= 2  # the set holds some images twice


def test_finished_runs_are_taken_over_and_margins_added(digits, tmp_path, monkeypatch, capsys):
    first = small_sweep(digits, tmp_path, margins=(0.0,)).run()
    trained = []
    train = TrainAndMeasure._train
    monkeypatch.setattr(TrainAndMeasure, "_train", lambda self, *rest: trained.append(self.name) or train(self, *rest))
    rows = small_sweep(digits, tmp_path).run()
    assert trained == ["cosine, margin -0.2, seed 0"]
    assert rows[: len(first)] == first
    assert "1 of 2 runs are there already" in capsys.readouterr().err
    # Another protocol measures anew, and does not train.
    more = replace(FEW, protocol=replace(FEW.protocol, episodes=7))
    rows = small_sweep(digits, tmp_path, measurement=more).run()
    assert len(trained) == 1
    assert len(rows[0]["correct"]) == 7


def test_two_sweeps_may_share_their_runs(digits, tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).mkdir()
    small_sweep(digits, tmp_path / "a", margins=(0.0,)).run()
    monkeypatch.setattr(TrainAndMeasure, "_train", lambda *_: pytest.fail("trained again"))
    shared = small_sweep(digits, tmp_path / "b", margins=(0.0,), checkpoints=tmp_path / "a" / "runs")
    assert shared.run()


def test_an_interrupted_run_goes_on_to_the_same_result(digits, tmp_path, monkeypatch):
    for name in ("broken", "unbroken"):
        (tmp_path / name).mkdir()
    runs = [SweepRun("digits", replace(TINY, epochs=3))]
    unbroken = Sweep(runs, digits, tmp_path / "unbroken", measurement=FEW).run()
    broken = Sweep(runs, digits, tmp_path / "broken", measurement=FEW)

    def interrupt(epochs, remark=""):
        if epochs == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken.tasks[0](interrupt)
    assert not broken.tasks[0].is_trained
    assert broken.tasks[0].checkpoint.exists()
    assert broken.tasks[0].work == 4
    assert Sweep(runs, digits, tmp_path / "broken", measurement=FEW).run() == unbroken


def test_a_failing_run_is_named_and_the_others_go_on(digits, tmp_path, capsys):
    sweep = small_sweep(digits, tmp_path)
    sweep.tasks[0].folder.mkdir(parents=True)
    (sweep.tasks[0].folder / "last.ckpt").write_text("no checkpoint")
    rows = sweep.run()
    assert {row["margin"] for row in rows} == {-0.2}
    (failure,) = sweep.failures
    assert failure.name == "cosine, margin +0, seed 0"
    assert "is not the checkpoint of a pre-training" in failure.error
    assert "Traceback" in failure.log.read_text()
    assert "cosine, margin +0, seed 0: failed: ValueError" in capsys.readouterr().err
    # Mended, it is tried again.
    (sweep.tasks[0].folder / "last.ckpt").unlink()
    assert len(small_sweep(digits, tmp_path).run()) == 2 * len(rows)


def test_processes_find_what_one_process_finds(digits, tmp_path, trained):
    runs = [task.run for task in trained.tasks[:2]]
    sweep = Sweep(runs, digits, tmp_path, measurement=FEW)
    assert sweep.run(jobs=2) == trained.rows[: len(sweep.rows)]


def test_a_run_whose_process_is_killed_is_named_and_goes_on_to_the_same_bits(digits, tmp_path):
    runs = margin_runs("digits", replace(TINY, epochs=4), {"cosine": [0.0, -0.2]}, [0])
    sweeps = {}
    for name in ("unbroken", "broken"):
        (tmp_path / name).mkdir()
        sweeps[name] = Sweep(runs, digits, tmp_path / name, measurement=FEW)
    broken = sweeps["broken"]
    broken.tasks[0] = KilledOnce(tmp_path / "told", runs[0], broken, epoch=3)
    unbroken = sweeps["unbroken"].run()
    assert broken.run(jobs=2) == [row for row in unbroken if row["margin"]]
    (failure,) = broken.failures
    assert (failure.name, failure.error) == ("cosine, margin +0, seed 0", "its process ended with SIGKILL(-9)")
    assert broken.run(jobs=2) == unbroken
    assert not broken.failures
    killed, rest = (tmp_path / "told").read_text().split("killed")
    assert killed.split() == ["1", "2", "3"]
    # From the checkpoint, and not from the beginning.
    assert list(dict.fromkeys(rest.split())) == ["2", "3", "4"]
    first, second = (torch.load(sweeps[name].tasks[0].checkpoint)["state_dict"] for name in sweeps)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_of_other_settings_is_not_taken_over(digits, tmp_path):
    small_sweep(digits, tmp_path, margins=(0.0,)).run()
    sweep = small_sweep(digits, tmp_path, margins=(0.0,))
    record = sweep.tasks[0].folder / "run.json"
    content = json.loads(record.read_text())
    content["settings"]["pretraining"]["weight_decay"] = 0.5
    record.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"cannot resume .*: its pretraining.weight_decay is 0.5, not 0.0"):
        small_sweep(digits, tmp_path, margins=(0.0,))


def test_item_25_damaged_files_of_a_run_are_named_before_the_work(digits, tmp_path):
    task = small_sweep(digits, tmp_path, margins=(0.0,)).tasks[0]
    task(lambda *_: None)
    for file, damage in (
        (task._measured, lambda rows: rows[0].pop("correct")),
        (task._measured, lambda rows: rows[0].update(queries=None)),
        (task._measured, lambda rows: rows.append(3)),
        (task.folder / "run.json", lambda record: record.update(settings={})),
        (task.folder / "run.json", lambda record: record["settings"].update(pretraining="x")),
    ):
        whole = file.read_text()
        content = json.loads(whole)
        damage(content)
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=rf"{file.name} does not hold"):
            small_sweep(digits, tmp_path, margins=(0.0,))
        file.write_text(whole)


def test_a_new_setting_with_its_default_changes_no_folder(tmp_path, monkeypatch):
    run = SweepRun("digits", TINY)
    before = run.folder(tmp_path, "checksum")
    settings = SweepRun.settings

    def later(self, checksum):
        values = settings(self, checksum)
        return {**values, "pretraining": {**values["pretraining"], "batch_size": 256}}

    monkeypatch.setattr(SweepRun, "settings", later)
    assert run.folder(tmp_path, "checksum") != before
    monkeypatch.undo()
    longer = replace(TINY, checkpoint_epochs=5, validation=replace(TINY.validation, episodes=7))
    assert SweepRun("digits", longer).folder(tmp_path, "checksum") == before
    assert SweepRun("digits", TINY, variant="plain").folder(tmp_path, "checksum") == before
    for other in (replace(run, seed=1), replace(run, held_out=0.3), replace(run, pretraining=replace(TINY, margin=0))):
        assert other.folder(tmp_path, "checksum") != before
    assert run.folder(tmp_path, "another") != before


def test_runs_that_are_not_trained_yet_are_left_out(digits, tmp_path, capsys):
    small_sweep(digits, tmp_path, margins=(0.0,)).run()
    small_sweep(digits, tmp_path).write_plan()
    sweep = Sweep.read(tmp_path, FEW)
    assert [row["margin"] for row in sweep.run()] == [0.0] * 5
    assert "left out, because they are not trained yet: 1 of" in capsys.readouterr().err


def test_a_plan_is_read_back(trained, capsys):
    again = Sweep.read(trained.output, FEW)
    assert [task.run for task in again.tasks] == [task.run for task in trained.tasks]
    assert again.run() == trained.rows
    assert "left out" not in capsys.readouterr().err
    softmax = Sweep.read(trained.output, FEW, choose=lambda run: run.pretraining.loss == "softmax")
    assert len(softmax.tasks) == 2


def test_a_plan_that_cannot_be_used(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no sweep in .* analyze margins"):
        Sweep.read(tmp_path, FEW)
    with pytest.raises(ValueError, match=r"none in .* is trained; the sweep has cosine, margin -0.2, seed 0"):
        Sweep.read(trained.output, FEW, choose=lambda run: run.seed == 7)
    plan = json.loads((trained.output / "sweep.json").read_text())
    for text, message in (
        ("{", "does not hold the plan of a sweep"),
        (json.dumps({"runs": []}), "does not hold the plan of a sweep"),
        (json.dumps({**plan, "runs": [{**plan["runs"][0], "color": 1}]}), "does not hold the plan of a sweep"),
        (json.dumps({**plan, "checksum": "0"}), "none in .* is trained"),
    ):
        (tmp_path / "sweep.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            Sweep.read(tmp_path, FEW)


def test_images_that_have_changed_are_noticed(trained, monkeypatch, digits):
    from fewshot_ext.experiments import sweep as module

    other = replace(digits, images=255 - digits.images)
    monkeypatch.setattr(module, "open_images", lambda name: other)
    with pytest.raises(ValueError, match=r"data digits is not what the sweep in .* was trained on"):
        Sweep.read(trained.output, FEW)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: margin_runs("digits", TINY, {}, [0]), "margins: expected at least one margin"),
        (lambda: margin_runs("digits", TINY, {"cosine": []}, [0]), "margins: expected at least one margin"),
        (
            lambda: margin_runs("digits", TINY, {"cosine": [float("nan")]}, [0]),
            "margins: expected a finite number, got nan",
        ),
        (lambda: margin_runs("digits", TINY, {"angular": [0.0]}, [0]), "loss: expected one of cosine, softmax"),
        (lambda: margin_runs("digits", TINY, {"cosine": [0.0]}, []), "seeds: expected at least one seed"),
        (lambda: margin_runs("digits", TINY, {"cosine": [0.0]}, [-1]), "seed: expected at least 0, got -1"),
        (lambda: SweepRun("digits", TINY, held_out=1.0), r"held_out: expected a number in \(0, 1\), got 1.0"),
        (lambda: FewShotAccuracy(classes=()), "classes: expected some of base, validation, novel"),
        (lambda: FewShotAccuracy(classes=("base", "base")), "none of them twice"),
        (lambda: FewShotAccuracy(classes=("test",)), "classes: expected some of"),
        (lambda: FewShotAccuracy(base_queries=0), "base_queries: expected at least 1"),
    ],
)
def test_bad_settings_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_impossible_sweeps_are_found_before_training(digits, tmp_path):
    with pytest.raises(ValueError, match="runs: expected at least one run"):
        Sweep([], digits, tmp_path)
    with pytest.raises(ValueError, match="runs: expected all to be different"):
        small_sweep(digits, tmp_path, margins=(0.1, 0.1))
    greedy = replace(FEW, protocol=ProtocolConfig(shots=(1, 400)))
    with pytest.raises(ValueError, match="base classes of digits: 400 shots and 16 queries need 416 images a class"):
        small_sweep(digits, tmp_path, measurement=greedy)
    deep = replace(TINY, backbone=replace(TINY.backbone, pooled_blocks=4))
    with pytest.raises(ValueError, match="at least 16 x 16, got 8 x 8"):
        Sweep([SweepRun("digits", deep)], digits, tmp_path)
    for split, missing in ((Split.BASE, "novel"), (Split.NOVEL, "base")):
        whole = ImageArchive(digits.images, digits.labels, digits.class_names, torch.full((10,), split).byte())
        with pytest.raises(ValueError, match=f"no {missing} classes"):
            small_sweep(whole, tmp_path)
    assert not list(tmp_path.iterdir())


def test_margins_are_summed_up_written_and_drawn(trained, tmp_path):
    found = summarize(trained.rows)
    assert len(found) == 4 * (2 * 2 + 1)
    assert found[0]["seeds"] == 2
    text = margins_table(trained.rows).splitlines()
    assert " ".join(text[2].split()).endswith("base 1-shot base 2-shot base all 5 novel 1-shot novel 2-shot")
    assert "over episodes of 2 seeds" in text[0]
    assert text[3].startswith("margin -0.2")
    assert text[-1].startswith("Intervals cover the draw of episodes")
    written = write_margins(tmp_path, trained.rows, versions={"torch": "2"})
    assert [path.name for path in written] == ["margins.json", "margins.csv", "margins.png"]
    assert all(path.stat().st_size > 100 for path in written)
    assert len((tmp_path / "margins.csv").read_text().splitlines()) == 1 + len(trained.rows)
    assert "correct" not in (tmp_path / "margins.csv").read_text()


def test_the_table_says_which_margin_is_best_and_what_it_gains_in_every_seed():
    correct = {(-0.3, 0): ((4, 4), (9, 8)), (0.0, 0): ((10, 10), (7, 7)), (-0.3, 1): ((4, 5), (9, 9))}
    rows = [
        {**dict(zip(("loss", "margin", "seed"), ("cosine", *run), strict=True)), "way": 5, "shot": 1}
        | {"classes": classes, "correct": found, "queries": 10}
        for run, of_run in correct.items()
        for classes, found in zip(("base", "novel"), of_run, strict=True)
    ]
    lines = margins_table(rows).splitlines()
    assert lines[-3:-1] == [
        "base 1-shot: margin +0 is best",
        "novel 1-shot: margin -0.3 is best; against margin 0, seed by seed: +15.00 points",
    ]
    assert "novel 1-shot: margin -0.3 is best" in margins_table([row for row in rows if row["margin"]])
