import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios

import pytest
import torch
import yaml

from fewshot_ext import _extras
from fewshot_ext.cli import main
from fewshot_ext.data import ImageArchive, load_digits
from fewshot_ext.training import PreTraining, PreTrainingConfig
from fewshot_ext.training.pretraining import PreTrainingRun

# The command sets the number of threads of the process; the fixture sets it back.
pytestmark = pytest.mark.usefixtures("one_thread")

TINY = ["pretrain", "--threads", "1", "--margin", "-0.1", "--batch_size", "64"]
TINY += ["--backbone.width", "4", "--backbone.pooled_blocks", "2"]
TINY += ["--validation.epochs", "1", "--validation.episodes", "10", "--validation.way", "2", "--validation.shot", "1"]


@pytest.fixture(scope="module")
def three_splits(tmp_path_factory):
    """Digits with three base, two validation and five novel classes."""
    digits = load_digits()
    split = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 2], dtype=torch.uint8)
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    ImageArchive(digits.images, digits.labels, digits.class_names, split).save(path)
    return str(path)


def test_a_run_leaves_checkpoints_records_and_a_log(three_splits, tmp_path, capsys):
    output = tmp_path / "made" / "here"
    assert main([*TINY, "--data", three_splits, "--output", str(output), "--epochs", "3", "--seed", "4"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("trained 3 epochs: loss ")
    assert "on 10 validation episodes (2-way 1-shot, nearest class mean)" in printed.out
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


def test_the_record_of_a_run_repeats_it(three_splits, tmp_path, weights):
    first = [*TINY, "--data", three_splits, "--epochs", "2", "--seed", "9", "--loss", "softmax", "--margin", "0"]
    assert main([*first, "--output", str(tmp_path / "a")]) == 0
    assert main(["pretrain", "--config", str(tmp_path / "a" / "config.yaml"), "--output", str(tmp_path / "b")]) == 0
    a, b = (PreTraining.from_checkpoint(tmp_path / name / "last.ckpt") for name in "ab")
    assert torch.equal(weights(a), weights(b))
    assert (a.config.similarity, a.config.margin, a.config.scale) == ("softmax", 0.0, 5.0)


def test_without_validation_classes_the_last_epoch_is_the_best(tmp_path, capsys):
    assert main([*TINY, "--data", "digits", "--epochs", "1", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "no validation classes: the last epoch is the best" in printed.err
    assert "validation episodes" not in printed.out


def test_ctrl_c_leaves_a_checkpoint_that_resume_completes(three_splits, tmp_path, weights, capsys):
    arguments = [*TINY, "--data", three_splits, "--epochs", "40", "--output"]
    running = subprocess.Popen(
        [sys.executable, "-m", "fewshot_ext.cli", *arguments, str(tmp_path / "out")], stderr=subprocess.PIPE, text=True
    )
    for line in running.stderr:
        if line.startswith("epoch 2/40"):
            running.send_signal(signal.SIGINT)
            break
    rest = running.stderr.read()
    assert running.wait(timeout=60) == 130, rest
    assert "Traceback" not in rest
    assert f"interrupted; the same command with --resume goes on from {tmp_path / 'out' / 'last.ckpt'}" in rest

    assert main([*arguments, str(tmp_path / "out")]) == 2
    assert "--resume goes on from it; to train afresh take another folder" in capsys.readouterr().err
    assert main([*arguments, str(tmp_path / "out"), "--resume"]) == 0
    assert "going on after epoch " in capsys.readouterr().err
    assert main([*arguments, str(tmp_path / "unbroken")]) == 0
    a, b = (PreTraining.from_checkpoint(tmp_path / name / "last.ckpt") for name in ("out", "unbroken"))
    assert torch.equal(weights(a), weights(b))


def test_resume_without_a_checkpoint_starts_at_the_beginning(three_splits, tmp_path, capsys):
    assert main([*TINY, "--data", three_splits, "--epochs", "1", "--resume", "--output", str(tmp_path)]) == 0
    assert "going on" not in capsys.readouterr().err


def test_an_interrupt_before_the_first_checkpoint_says_so(three_splits, tmp_path, monkeypatch, capsys):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainingRun, "train", interrupt)
    assert main([*TINY, "--data", three_splits, "--output", str(tmp_path)]) == 130
    assert "interrupted; there is no checkpoint yet, so the same command starts again" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [OSError("cannot write the checkpoint x: full"), FloatingPointError("the loss is nan")]
)
def test_a_run_that_fails_says_why_and_how_to_go_on(three_splits, tmp_path, monkeypatch, capsys, error):
    def fail(self):
        raise error

    monkeypatch.setattr(PreTrainingRun, "train", fail)
    assert main([*TINY, "--data", three_splits, "--output", str(tmp_path)]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"fewshot-ext pretrain: error: {error}; there is no checkpoint yet")


def test_a_terminal_sees_one_bar_over_the_whole_run(three_splits, tmp_path):
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))
    running = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "fewshot_ext.cli",
            *TINY,
            "--epochs",
            "60",
            "--data",
            three_splits,
            "--output",
            tmp_path,
        ],
        stderr=slave,
        stdout=subprocess.DEVNULL,
    )
    os.close(slave)
    shown = b""
    try:
        while chunk := os.read(master, 4096):
            shown += chunk
    except OSError:  # the other side is closed
        pass
    os.close(master)
    assert running.wait(timeout=60) == 0, shown
    text = shown.decode()
    assert "epoch 1/60" in text
    assert "images/s" in text
    assert "accuracy" in text
    assert re.search(r"epoch \d+/60 \|.*% \d\d:\d\d<\d\d:\d\d, loss \d", text)
    assert "\nepoch" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--data must be given"),
        (["--data", "digits"], "--output must be given"),
        (["--data", "nowhere", "--output", "out"], "there is no image set 'nowhere'"),
        (["--loss", "hinge"], "hinge"),
        (["--data", "digits", "--output", "out", "--margin", "null"], "margin must be given for loss 'neg-cosine'"),
        (["--data", "digits", "--output", "out", "--loss", "cosine"], "margin must be 0 for loss 'cosine', got -0.1"),
        (["--data", "digits", "--output", "out", "--margin", "nan"], '"margin"'),
        (["--data", "digits", "--output", "out", "--scale", "0"], "scale must be above 0"),
        (["--data", "digits", "--output", "out", "--epochs", "0"], "epochs must be at least 1"),
        (["--data", "digits", "--output", "out", "--seed", "-1"], "seed must be at least 0"),
        (["--data", "digits", "--output", "out", "--threads", "0"], "threads must be at least 1"),
        (["--data", "digits", "--output", "out", "--devices", "0"], "devices must be at least 1"),
        (["--data", "digits", "--output", "out", "--device", "tpu"], "device must be auto, cpu or cuda, got 'tpu'"),
        (["--data", "digits", "--output", "out", "--backbone.name", "vgg"], "vgg"),
        (["--data", "digits", "--output", "out", "--backbone.pooled_blocks", "4"], "at least 16 x 16, got 8 x 8"),
        (["--data", "digits", "--output", "out", "--backbone.drop_rate", "0.1"], "drop_rate must be 0 for conv4"),
        (["--data", "digits", "--output", "out", "--backbone.name", "resnet12"], "pooled_blocks is an option of conv4"),
        (["--data", "digits", "--output", "out", "--validation.way", "1"], "way must be at least 2"),
        (["--data", "digits", "--output", "out", "--mean", "[0.5]"], "mean and std must both be given"),
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
    assert main([*TINY, *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1, printed.err
    assert printed.err.startswith("fewshot-ext")
    assert message in printed.err
    assert not (tmp_path / "out" / "run.json").exists()


def test_validation_classes_too_few_for_the_episodes(three_splits, tmp_path, capsys):
    assert main([*TINY, "--data", three_splits, "--output", str(tmp_path), "--validation.way", "5"]) == 2
    assert "validation classes: way 5 asks for more classes than there are: 2" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["lightning", "tensorboard", "tqdm"])
def test_a_missing_package_names_the_pip_line(module, monkeypatch, tmp_path, capsys):
    is_installed = _extras.is_installed
    monkeypatch.setattr(_extras, "is_installed", lambda name: name != module and is_installed(name))
    assert main([*TINY, "--data", "digits", "--output", str(tmp_path)]) == 2
    assert f"'{module}' is missing; pip install 'fewshot_ext[train]'" in capsys.readouterr().err


def test_help_is_grouped_and_needs_no_lightning():
    script = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"lightning", "kornia", "tensorboard", "tqdm"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
from fewshot_ext.cli import main
main(["pretrain", "--help"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    options = done.stdout[done.stdout.index("\noptions:") :]
    titles = [line for line in options.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles == ["options:", "run:", "loss:", "training:", "backbone:", "augmentation:", "validation:"]
