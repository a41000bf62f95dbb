import json
import re

import pytest
import torch
import yaml
from training_commands import METATRAIN, check_refused, same_weights

from fewshot_ext.cli import main
from fewshot_ext.data import ImageArchive
from fewshot_ext.training import MetaTraining, MetaTrainingConfig

# The command sets the number of threads of the process; the fixture sets it back.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def arguments(three_splits, checkpoints):
    return [*METATRAIN, "--data", three_splits, "--checkpoint", str(checkpoints[0])]


def test_a_run_leaves_checkpoints_records_and_a_log(arguments, checkpoints, three_splits, tmp_path, capsys):
    output = tmp_path / "made" / "here"
    assert main([*arguments, "--output", str(output), "--epochs", "3", "--seed", "4"]) == 0
    printed = capsys.readouterr()
    trained, before, best, written = printed.out.splitlines()
    assert trained.startswith("trained 3 epochs: loss ")
    assert re.fullmatch(r"before meta-training: \d+\.\d\d % on the same validation episodes", before)
    line = r"best epoch \d: \d+\.\d\d \+- \d+\.\d\d % on 10 validation episodes \(2-way 1-shot, deepemd\)"
    assert re.fullmatch(line, best)
    assert written.startswith(f"written: {output / 'best.ckpt'}, ")
    # Not a terminal: one line an epoch, no bar, none of Lightning's notices.
    lines = printed.err.splitlines()
    heads = ["base classes", "backbone", "images", "head", "episodes", *(f"epoch {epoch}/3" for epoch in (1, 2, 3))]
    assert [line.split(":")[0] for line in lines] == heads
    assert lines[1].endswith(f"parameters, {checkpoints[0]}")
    assert lines[2] == "images: 1 regions of 8 features each (fcn)"
    assert lines[3] == "head: deepemd, temperature 12.5"
    assert "validation " in lines[-1]
    assert list(output.glob("events.out.tfevents*"))

    record = json.loads((output / "run.json").read_text())
    assert record["seed"] == 4
    assert record["versions"]["torch"] == torch.__version__
    assert record["data"]["sha256"] == ImageArchive.load(three_splits).checksum()
    assert re.fullmatch("[0-9a-f]{64}", record["checkpoint"]["sha256"])
    assert record["network"]["backbone"]["width"] == 8
    results = record["results"]
    assert 100 * results["best_validation_accuracy"] == pytest.approx(float(best.split()[3]), abs=0.005)
    assert 100 * results["best_validation_interval"] == pytest.approx(float(best.split()[5]), abs=0.005)
    assert MetaTraining.from_checkpoint(output / "best.ckpt").config == MetaTrainingConfig.from_dict(record["config"])
    assert yaml.safe_load((output / "config.yaml").read_text())["seed"] == 4


def test_the_record_of_a_run_repeats_it(arguments, tmp_path):
    regions = ["--local_features.name", "sampling", "--local_features.regions", "3"]
    first = [*arguments, "--epochs", "2", "--seed", "9", "--shot", "2", "--classifier.passes", "2", *regions]
    assert main([*first, "--output", str(tmp_path / "a")]) == 0
    assert main(["meta-train", "--config", str(tmp_path / "a" / "config.yaml"), "--output", str(tmp_path / "b")]) == 0
    assert same_weights(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(("weighting", "head"), [("cross_reference", "deepemd"), ("uniform", "deepemd_uniform")])
def test_the_record_of_a_run_of_version_0_1_repeats_it(weighting, head, arguments, tmp_path, capsys):
    assert main([*arguments, "--head", head, "--epochs", "1", "--output", str(tmp_path / "a")]) == 0
    settings = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    del settings["head"]
    settings |= {"weighting": weighting, "temperature": 12.5}
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(settings))
    capsys.readouterr()
    assert main(["meta-train", "--config", str(tmp_path / "old.yaml"), "--output", str(tmp_path / "b")]) == 0
    told = f"old.yaml: version 0.1's 'weighting: {weighting}' is now 'head: {head}', which is taken"
    assert told in capsys.readouterr().err
    assert same_weights(tmp_path / "a", tmp_path / "b")
    assert yaml.safe_load((tmp_path / "b" / "config.yaml").read_text())["head"] == head


@pytest.mark.parametrize(
    ("head", "images"),
    [
        ("deepemd", "1 regions of 8 features each (fcn)"),
        ("protonet", "8 features each"),
        ("matchingnet@sampling", "9 regions of 8 features each (sampling)"),
    ],
)
def test_its_checkpoints_are_evaluated(head, images, arguments, three_splits, checkpoints, tmp_path, capsys):
    assert main([*arguments, "--head", head, "--epochs", "1", "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert f"images: {images}\nhead: {head}, temperature " in printed.err
    assert f"10 validation episodes (2-way 1-shot, {head})" in printed.out
    assert json.loads((tmp_path / "out" / "run.json").read_text())["config"]["head"] == head
    evaluate = ["evaluate", "--data", three_splits, "--output", str(tmp_path / "table"), "--episodes", "5"]
    evaluate += ["--checkpoint", str(checkpoints[0]), str(tmp_path / "out" / "best.ckpt")]
    assert main([*evaluate, "--way", "3", "--heads", head, "--queries", "3"]) == 0
    assert "difference to " in capsys.readouterr().out


def test_from_scratch(three_splits, tmp_path, capsys):
    options = ["--backbone.name", "conv4", "--backbone.width", "4", "--backbone.pooled_blocks", "1", "--epochs", "1"]
    scratch = [*METATRAIN, *options, "--data", three_splits, "--checkpoint", "scratch", "--output", str(tmp_path)]
    assert main(scratch) == 0
    error = capsys.readouterr().err
    assert "parameters, random weights" in error
    assert "images: 16 regions of 4 features each (fcn)" in error
    assert json.loads((tmp_path / "run.json").read_text())["checkpoint"] == {"name": "scratch", "sha256": None}
    # The record of a run from scratch repeats it too, its backbone included.
    again = ["meta-train", "--config", str(tmp_path / "config.yaml"), "--output", str(tmp_path / "again")]
    assert main(again) == 0
    assert same_weights(tmp_path, tmp_path / "again")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", None], "--data: expected a value, got none"),
        (["--output", None], "--output: expected a value, got none"),
        (["--checkpoint", None], "--checkpoint: expected a file of any training, or scratch, got none"),
        (["--checkpoint", "missing.ckpt"], "missing.ckpt"),
        (["--checkpoint", "text.ckpt"], "text.ckpt is not the checkpoint of a"),
        (["--data", "nowhere"], "there is no image set 'nowhere'"),
        (["--way", "4"], "base classes: way 4 asks for more classes than there are: 3"),
        (["--way", "1"], "way: expected at least 2"),
        (["--queries", "500"], "base classes: 1 shots and 500 queries need 501 images a class"),
        (["--validation.way", "3"], "validation classes: way 3 asks for more classes than there are: 2"),
        (["--backbone.name", "resnet12"], "backbone: expected null beside a checkpoint"),
        (["--backbone.name", "vgg"], "vgg"),
        (["--local_features.name", "patches"], "patches"),
        (["--head", "svm"], "head: expected one of finetune, protonet,"),
        (["--head", "fc_dot"], "got 'fc_dot', which trains a classifier of its own in each episode: evaluate it on a"),
        (["--head", "knn"], "head knn: neighbors: expected at most 1, the local features of the class with the fewest"),
        (["--head", "protonet", "--temperature", "0"], "temperature: expected a number above 0"),
        (["--validation.head", "simpleshot"], "error: validation.head: expected one without need of the mean feature"),
        (["--validation.head", "nonsense"], "error: validation.head: expected one of finetune, "),
        (["--validation.head", "knn@nowhere"], "error: validation.head: regions after @: expected one of fcn, "),
        (["--local_features.pyramid", "[2]"], "local_features.pyramid: expected sides of at most 1"),
        (["--local_features.name", "grid", "--local_features.grids", "[5]"], "images: expected at least 10 x 10"),
        (["--learning_rate", "0"], "learning_rate: expected a number above 0"),
        (["--episodes_per_step", "3", "--devices", "2"], "episodes_per_step 3 is shared by 2 processes"),
        (["--epochs", "0"], "epochs: expected at least 1"),
        (["--seed", "-1"], "seed: expected at least 0"),
        (["--device", "tpu"], "device: expected auto, cpu or cuda, got 'tpu'"),
        (["--config", "resnet"], "there is no recipe 'resnet'; the recipes are cifarfs_resnet12_deepemd_fcn_10way"),
        (["--margin", "0.1"], "margin"),
    ],
)
def test_a_wrong_argument_gets_one_line_and_exit_code_2(options, message, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.ckpt").write_text("nothing")
    given = [*arguments, "--output", "out"]
    if options[1] is None:
        place = given.index(options[0])
        del given[place : place + 2]
        options = []
    check_refused([*given, *options], message, capsys)


def test_a_wrong_checkpoint_is_found_before_the_images_are_loaded(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fewshot_ext.commands.training.load_data", lambda name: pytest.fail("images were loaded"))
    (tmp_path / "text.ckpt").write_text("nothing")
    assert main([*arguments, "--output", str(tmp_path), "--checkpoint", str(tmp_path / "text.ckpt")]) == 2
    assert "text.ckpt is not the checkpoint of a" in capsys.readouterr().err
