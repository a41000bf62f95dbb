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
from fewshot_ext.training import MetaTraining, MetaTrainingConfig, MetaTrainingRun

# The command sets the number of threads of the process; the fixture sets it back.
pytestmark = pytest.mark.usefixtures("one_thread")

TINY = ["metatrain", "--threads", "1", "--way", "3", "--queries", "3", "--steps", "2", "--learning_rate", "0.01"]
TINY += ["--validation.episodes", "10", "--validation.way", "2", "--validation.queries", "3"]


@pytest.fixture(scope="module")
def three_splits(tmp_path_factory):
    """Digits with three base, two validation and five novel classes."""
    digits = load_digits()
    split = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 2], dtype=torch.uint8)
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    ImageArchive(digits.images, digits.labels, digits.class_names, split).save(path)
    return str(path)


@pytest.fixture(scope="module")
def arguments(three_splits, checkpoints):
    return [*TINY, "--data", three_splits, "--checkpoint", str(checkpoints[0])]


def same_weights(first, second):
    states = [MetaTraining.from_checkpoint(path / "last.ckpt").state_dict() for path in (first, second)]
    return all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_run_leaves_checkpoints_records_and_a_log(arguments, checkpoints, three_splits, tmp_path, capsys):
    output = tmp_path / "made" / "here"
    assert main([*arguments, "--output", str(output), "--epochs", "3", "--seed", "4"]) == 0
    printed = capsys.readouterr()
    trained, before, best, written = printed.out.splitlines()
    assert trained.startswith("trained 3 epochs: loss ")
    assert re.fullmatch(r"before meta-training: \d+\.\d\d % on the same validation episodes", before)
    line = r"best epoch \d: \d+\.\d\d \+- \d+\.\d\d % on 10 validation episodes \(2-way 1-shot, DeepEMD\)"
    assert re.fullmatch(line, best)
    assert written.startswith(f"written: {output / 'best.ckpt'}, ")
    # Not a terminal: one line an epoch, no bar, none of Lightning's notices.
    lines = printed.err.splitlines()
    heads = ["base classes", "backbone", "images", "episodes", *(f"epoch {epoch}/3" for epoch in (1, 2, 3))]
    assert [line.split(":")[0] for line in lines] == heads
    assert lines[1].endswith(f"parameters, {checkpoints[0]}")
    assert lines[2] == "images: 1 regions of 8 features each (fcn)"
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
    assert main(["metatrain", "--config", str(tmp_path / "a" / "config.yaml"), "--output", str(tmp_path / "b")]) == 0
    assert same_weights(tmp_path / "a", tmp_path / "b")


def test_its_checkpoints_are_evaluated(arguments, three_splits, checkpoints, tmp_path, capsys):
    assert main([*arguments, "--epochs", "1", "--output", str(tmp_path / "out")]) == 0
    evaluate = ["evaluate", "--data", three_splits, "--output", str(tmp_path / "table"), "--episodes", "5"]
    evaluate += ["--checkpoint", str(checkpoints[0]), str(tmp_path / "out" / "best.ckpt")]
    assert main([*evaluate, "--way", "3", "--heads", "protonet", "--queries", "3"]) == 0
    assert "difference to " in capsys.readouterr().out


def test_from_scratch(three_splits, tmp_path, capsys):
    options = ["--backbone.name", "conv4", "--backbone.width", "4", "--backbone.pooled_blocks", "1", "--epochs", "1"]
    scratch = [*TINY, *options, "--data", three_splits, "--checkpoint", "scratch", "--output", str(tmp_path)]
    assert main(scratch) == 0
    error = capsys.readouterr().err
    assert "parameters, random weights" in error
    assert "images: 16 regions of 4 features each (fcn)" in error
    assert json.loads((tmp_path / "run.json").read_text())["checkpoint"] == {"name": "scratch", "sha256": None}
    # The record of a run from scratch repeats it too, its backbone included.
    again = ["metatrain", "--config", str(tmp_path / "config.yaml"), "--output", str(tmp_path / "again")]
    assert main(again) == 0
    assert same_weights(tmp_path, tmp_path / "again")


def test_without_validation_classes_the_last_epoch_is_the_best(checkpoints, tmp_path, capsys):
    arguments = [*TINY, "--data", "digits", "--checkpoint", str(checkpoints[0]), "--epochs", "1"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "no validation classes: the last epoch is the best" in printed.err
    assert "validation episodes" not in printed.out


def test_ctrl_c_leaves_a_checkpoint_that_resume_completes(arguments, tmp_path, capsys):
    arguments = [*arguments, "--epochs", "12", "--output"]
    running = subprocess.Popen(
        [sys.executable, "-m", "fewshot_ext.cli", *arguments, str(tmp_path / "out")], stderr=subprocess.PIPE, text=True
    )
    for line in running.stderr:
        if line.startswith("epoch 2/12"):
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
    assert same_weights(tmp_path / "out", tmp_path / "unbroken")


@pytest.mark.parametrize("error", [OSError("cannot write x: full"), FloatingPointError("the loss is nan")])
def test_a_run_that_fails_says_why_and_how_to_go_on(arguments, tmp_path, monkeypatch, capsys, error):
    def fail(self):
        raise error

    monkeypatch.setattr(MetaTrainingRun, "train", fail)
    assert main([*arguments, "--output", str(tmp_path)]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"fewshot-ext metatrain: error: {error}; there is no checkpoint yet")


def test_a_terminal_sees_one_bar_over_the_whole_run(arguments, tmp_path):
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))
    command = [sys.executable, "-m", "fewshot_ext.cli", *arguments, "--episodes_per_step", "3", "--epochs", "8"]
    running = subprocess.Popen([*command, "--output", tmp_path], stderr=slave, stdout=subprocess.DEVNULL)
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
    assert re.search(r"epoch \d/8 \|.*% \d\d:\d\d<\d\d:\d\d, loss \d", text)
    assert "images/s" in text
    shares = [(int(epoch), int(share)) for epoch, share in re.findall(r"epoch (\d)/8 \|[^|]*\| +(\d+)% ", text)]
    # How often it is drawn depends on the machine, what is drawn does not: it counts episodes, three of them a step.
    assert shares and all(abs(share - 100 * (epoch - 0.5) / 8) <= 100 / 8 for epoch, share in shares), shares
    assert "\nepoch" not in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", None], "--data must be given"),
        (["--output", None], "--output must be given"),
        (["--checkpoint", None], "--checkpoint must be given: a file of fewshot-ext pretrain, or scratch"),
        (["--checkpoint", "missing.ckpt"], "missing.ckpt"),
        (["--checkpoint", "text.ckpt"], "text.ckpt is not the checkpoint of a"),
        (["--data", "nowhere"], "there is no image set 'nowhere'"),
        (["--way", "4"], "base classes: way 4 asks for more classes than there are: 3"),
        (["--way", "1"], "way must be at least 2"),
        (["--queries", "500"], "base classes: 1 shots and 500 queries need 501 images a class"),
        (["--validation.way", "3"], "validation classes: way 3 asks for more classes than there are: 2"),
        (["--backbone.name", "resnet12"], "backbone must be null beside a checkpoint"),
        (["--backbone.name", "vgg"], "vgg"),
        (["--local_features.name", "patches"], "patches"),
        (["--local_features.pyramid", "[2]"], "local_features.pyramid must name sides of at most 1"),
        (["--local_features.name", "grid", "--local_features.grids", "[5]"], "images must be at least 10 x 10"),
        (["--learning_rate", "0"], "learning_rate must be above 0"),
        (["--episodes_per_step", "3", "--devices", "2"], "episodes_per_step 3 is shared by 2 processes"),
        (["--epochs", "0"], "epochs must be at least 1"),
        (["--seed", "-1"], "seed must be at least 0"),
        (["--device", "tpu"], "device must be auto, cpu or cuda, got 'tpu'"),
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
    assert main([*given, *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1, printed.err
    assert printed.err.startswith("fewshot-ext")
    assert message in printed.err
    assert not list(tmp_path.glob("out/*"))


def test_a_wrong_checkpoint_is_found_before_the_images_are_loaded(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fewshot_ext.commands.training.load_images", lambda name: pytest.fail("images were loaded"))
    (tmp_path / "text.ckpt").write_text("nothing")
    assert main([*arguments, "--output", str(tmp_path), "--checkpoint", str(tmp_path / "text.ckpt")]) == 2
    assert "text.ckpt is not the checkpoint of a" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["lightning", "tensorboard", "tqdm"])
def test_a_missing_package_is_named(module, arguments, monkeypatch, tmp_path, capsys):
    is_installed = _extras.is_installed
    monkeypatch.setattr(_extras, "is_installed", lambda name: name != module and is_installed(name))
    assert main([*arguments, "--output", str(tmp_path)]) == 2
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
main(["metatrain", "--help"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    options = done.stdout[done.stdout.index("\noptions:") :]
    titles = [line for line in options.splitlines() if line.endswith(":") and not line.startswith(" ")]
    parts = ["local_features:", "classifier:", "augmentation:", "validation:"]
    assert titles == ["options:", "run:", "training:", *parts]
    assert "authors of DeepEMD advise against" in " ".join(done.stdout.split())
