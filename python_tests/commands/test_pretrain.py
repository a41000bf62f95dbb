import json

import pytest
import torch
import yaml
from PIL import Image
from training_commands import PRETRAIN, check_refused, same_weights

from fewshot_ext.cli import main
from fewshot_ext.data import ImageArchive, Split, load_digits
from fewshot_ext.training import PreTraining, PreTrainingConfig

# The command sets the number of threads of the process; the fixture sets it back.
pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_run_leaves_checkpoints_records_and_a_log(three_splits, tmp_path, capsys):
    output = tmp_path / "made" / "here"
    assert main([*PRETRAIN, "--data", three_splits, "--output", str(output), "--epochs", "3", "--seed", "4"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("trained 3 epochs: loss ")
    assert "on 10 validation episodes (2-way 1-shot, protonet_cosine)" in printed.out
    # Not a terminal: one line an epoch, no bar, none of Lightning's notices.
    lines = printed.err.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "base classes",
        "backbone",
        "loss",
        *(f"epoch {epoch}/3" for epoch in (1, 2, 3)),
    ]
    assert "images/s, validation " in lines[-1]
    assert list(output.glob("events.out.tfevents*"))

    record = json.loads((output / "run.json").read_text())
    assert record["seed"] == 4
    assert record["versions"]["torch"] == torch.__version__
    assert record["data"]["sha256"] == ImageArchive.load(three_splits).checksum()
    assert record["data"]["base"]["classes"] == 3
    assert record["data"]["validation"]["classes"] == 2
    assert 0 < record["results"]["best_validation_accuracy"] <= 1
    best = PreTraining.from_checkpoint(output / "best.ckpt")
    config = PreTrainingConfig.from_dict(record["config"])
    assert best.config == config
    assert (config.epochs, config.margin, config.scale) == (3, -0.1, 30.0)
    assert yaml.safe_load((output / "config.yaml").read_text())["seed"] == 4


def test_a_network_is_trained_in_one_domain_and_tested_in_another(three_splits, tmp_path, capsys):
    old, new = tmp_path / "old.npz", tmp_path / "new.npz"
    digits = ImageArchive.load(three_splits)
    digits.with_roles(dict.fromkeys("013", Split.NOVEL)).save(old)
    digits.with_roles(
        {"2": Split.BASE} | dict.fromkeys("46", Split.VALIDATION) | dict.fromkeys("57", Split.NOVEL)
    ).save(new)
    domains = ["--data", f"{old}+{new}"]
    assert main([*PRETRAIN, *domains, "--output", str(tmp_path / "run"), "--epochs", "1"]) == 0
    assert "left out 1 base classes of the second set" in capsys.readouterr().err
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["data"]["base"]["classes"] == 3 and record["data"]["validation"]["classes"] == 2
    protocol = ["--way", "2", "--shots", "1", "--episodes", "5", "--heads", "protonet"]
    checkpoint = ["--checkpoint", str(tmp_path / "run" / "best.ckpt"), "--output", str(tmp_path / "evaluation")]
    assert main(["evaluate", *checkpoint, *domains, *protocol]) == 0
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert results["data"]["name"] == "old+new"


def test_images_held_out_by_a_list_measure_the_base_classes(tmp_path, capsys):
    digits, pictures, lists = load_digits(), tmp_path / "pictures", {}
    for label in range(4):
        (pictures / f"c{label}").mkdir(parents=True)
        for index, image in enumerate(digits.images[digits.labels == label][:40]):
            path = f"c{label}/{index}.png"
            Image.fromarray(image[0].numpy()).save(pictures / path)
            role = "novel" if label > 2 else "base_val" if index >= 30 else "base"
            lists.setdefault(role, []).append((path, label))
    for role, entries in lists.items():
        paths, labels = zip(*entries, strict=True)
        content = {"label_names": [f"c{label}" for label in range(4)], "image_names": paths, "image_labels": labels}
        (tmp_path / f"{role}.json").write_text(json.dumps(content))
    packed = str(tmp_path / "packed.npz")
    assert (
        main(["data", "pack", "--source", str(pictures), "--split", str(tmp_path / "base.json"), "--output", packed])
        == 0
    )
    assert "held out from training: 30 images of base classes" in capsys.readouterr().out
    output = tmp_path / "run"
    assert main([*PRETRAIN, "--data", packed, "--output", str(output), "--epochs", "2"]) == 0
    printed = capsys.readouterr()
    assert "base classes: 90 images of 3 classes" in printed.err
    results = json.loads((output / "run.json").read_text())["results"]
    module, archive = PreTraining.from_checkpoint(output / "last.ckpt"), ImageArchive.load(packed)
    for name, count, held_out in (("training", 90, False), ("held_out", 30, True)):
        part = archive.subset(Split.BASE, held_out=held_out)
        with torch.no_grad():
            predicted = torch.nn.functional.normalize(module.head.weight) @ module.network(part.images).T
        accuracy = (predicted.argmax(0) == part.labels).double().mean().item()
        assert results[f"{name}_accuracy"] == pytest.approx(accuracy)
        assert f"{100 * accuracy:.2f} % of {count}" in printed.out


def test_the_record_of_a_run_repeats_it(three_splits, tmp_path):
    first = [*PRETRAIN, "--data", three_splits, "--epochs", "2", "--seed", "9", "--loss", "softmax", "--margin", "0"]
    assert main([*first, "--output", str(tmp_path / "a")]) == 0
    assert main(["pretrain", "--config", str(tmp_path / "a" / "config.yaml"), "--output", str(tmp_path / "b")]) == 0
    assert same_weights(tmp_path / "a", tmp_path / "b")
    config = PreTraining.from_checkpoint(tmp_path / "a" / "last.ckpt").config
    assert (config.similarity, config.margin, config.scale) == ("dot", 0.0, 5.0)


def test_resume_without_a_checkpoint_starts_at_the_beginning(three_splits, tmp_path, capsys):
    assert main([*PRETRAIN, "--data", three_splits, "--epochs", "1", "--resume", "--output", str(tmp_path)]) == 0
    assert "going on" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--data: expected a value, got none"),
        (["--data", "digits"], "--output: expected a value, got none"),
        (["--data", "nowhere", "--output", "out"], "there is no image set 'nowhere'"),
        (["--loss", "hinge"], "hinge"),
        (["--data", "digits", "--output", "out", "--loss", "cosine"], "margin: expected 0 for loss 'cosine', got -0.1"),
        (["--data", "digits", "--output", "out", "--margin", "nan"], '"margin"'),
        (["--data", "digits", "--output", "out", "--scale", "0"], "scale: expected a number above 0"),
        (["--data", "digits", "--output", "out", "--epochs", "0"], "epochs: expected at least 1"),
        (["--data", "digits", "--output", "out", "--seed", "-1"], "seed: expected at least 0"),
        (["--data", "digits", "--output", "out", "--threads", "0"], "threads: expected at least 1"),
        (["--data", "digits", "--output", "out", "--devices", "0"], "devices: expected at least 1"),
        (["--data", "digits", "--output", "out", "--device", "tpu"], "device: expected auto, cpu or cuda, got 'tpu'"),
        (["--data", "digits", "--output", "out", "--backbone.name", "vgg"], "vgg"),
        (["--data", "digits", "--output", "out", "--backbone.pooled_blocks", "4"], "at least 16 x 16, got 8 x 8"),
        (["--data", "digits", "--output", "out", "--backbone.drop_rate", "0.1"], "drop_rate: expected 0 for conv4"),
        (["--data", "digits", "--output", "out", "--backbone.name", "resnet12"], "pooled_blocks is an option of conv4"),
        (["--data", "digits", "--output", "out", "--validation.way", "1"], "way: expected at least 2"),
        (["--data", "digits", "--output", "out", "--mean", "[0.5]"], "mean and std: expected both or neither"),
        (
            ["--data", "digits", "--output", "out", "--optimizer", "sgd", "--warmup", "0.1"],
            "warmup is an option of optimizer adam, got 0.1 for sgd",
        ),
        (
            ["--data", "digits", "--output", "out", "--decay_epochs", "10"],
            "decay_epochs is an option of optimizer sgd, got 10 for adam",
        ),
        (["--data", "digits", "--output", "out", "--optimizer", "lion"], "lion"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--similarity", "cosine"], "similarity"),
    ],
)
def test_a_wrong_argument_gets_one_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    check_refused([*PRETRAIN, *arguments], message, capsys)


def test_validation_classes_too_few_for_the_episodes(three_splits, tmp_path, capsys):
    assert main([*PRETRAIN, "--data", three_splits, "--output", str(tmp_path), "--validation.way", "5"]) == 2
    assert "validation classes: way 5 asks for more classes than there are: 2" in capsys.readouterr().err
