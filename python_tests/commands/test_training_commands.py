"""What ``pretrain``, ``meta-train`` and ``metric-train`` have in common."""

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios

import pytest
from training_commands import METATRAIN, METRIC_TRAIN, PRETRAIN, same_weights

from fewshot_ext import _extras
from fewshot_ext.cli import main
from fewshot_ext.training.run import TrainingRun

# The commands set the number of threads of the process; the fixture sets it back.
pytestmark = pytest.mark.usefixtures("one_thread")

COMMANDS = {"pretrain": PRETRAIN, "meta-train": METATRAIN, "metric-train": METRIC_TRAIN}
TITLES = {
    "pretrain": ["loss:", "training:", "backbone:", "validation:", "augmentation:"],
    "meta-train": ["training:", "local_features:", "classifier:", "validation:", "augmentation:"],
    "metric-train": ["training:", "anti_collapse:", "backbone:", "measurement:", "augmentation:"],
}


@pytest.fixture
def command(name, checkpoints):
    return [*COMMANDS[name], *(["--checkpoint", str(checkpoints[0])] if name == "meta-train" else [])]


@pytest.mark.parametrize("name", COMMANDS)
def test_without_validation_classes_the_last_epoch_is_the_best(command, tmp_path, capsys):
    assert main([*command, "--data", "digits", "--epochs", "1", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "no validation classes: the last epoch is the best" in printed.err
    assert "validation episodes" not in printed.out
    assert "best epoch" not in printed.out


@pytest.mark.parametrize(("name", "epochs"), [("pretrain", 40), ("meta-train", 12), ("metric-train", 12)])
def test_ctrl_c_leaves_a_checkpoint_that_resume_completes(command, epochs, three_splits, tmp_path, capsys):
    arguments = [*command, "--data", three_splits, "--epochs", str(epochs), "--output"]
    running = subprocess.Popen(
        [sys.executable, "-m", "fewshot_ext.cli", *arguments, str(tmp_path / "out")], stderr=subprocess.PIPE, text=True
    )
    for line in running.stderr:
        if line.startswith(f"epoch 2/{epochs}"):
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


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError("cannot write the checkpoint x: full"), 1, "{}: error: cannot write the checkpoint x: full"),
        (FloatingPointError("the loss is nan"), 1, "{}: error: the loss is nan"),
    ],
)
def test_a_run_that_ends_early_says_why_and_how_to_go_on(
    error, code, line, name, command, three_splits, tmp_path, monkeypatch, capsys
):
    def fail(self):
        raise error

    monkeypatch.setattr(TrainingRun, "train", fail)
    assert main([*command, "--data", three_splits, "--output", str(tmp_path)]) == code
    expected = f"{line.format(f'fewshot-ext {name}')}; there is no checkpoint yet, so the same command starts again"
    assert capsys.readouterr().err.splitlines()[-1].startswith(expected)


@pytest.mark.parametrize(
    ("name", "options", "epochs"), [("pretrain", [], 60), ("meta-train", ["--episodes_per_step", "3"], 8)]
)
def test_a_terminal_sees_one_bar_over_the_whole_run(command, options, epochs, three_splits, tmp_path):
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))
    arguments = [*command, *options, "--data", three_splits, "--epochs", str(epochs), "--output", str(tmp_path)]
    running = subprocess.Popen(
        [sys.executable, "-m", "fewshot_ext.cli", *arguments], stderr=slave, stdout=subprocess.DEVNULL
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
    assert f"epoch 1/{epochs}" in text
    assert "images/s" in text
    assert "accuracy" in text
    assert re.search(rf"epoch \d+/{epochs} \|.*% \d\d:\d\d<\d\d:\d\d, loss \d", text)
    shares = [(int(epoch), int(share)) for epoch, share in re.findall(r"epoch (\d+)/\d+ \|[^|]*\| +(\d+)% ", text)]
    # How often it is drawn depends on the machine, what is drawn does not: it counts batches, however many make a step.
    away = [share - 100 * (epoch - 0.5) / epochs for epoch, share in shares]
    assert away and max(map(abs, away)) <= 100 / epochs, shares
    assert "\nepoch" not in text


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        *((name, module, "train") for name in COMMANDS for module in ("lightning", "tensorboard", "tqdm")),
        ("metric-train", "pytorch_metric_learning", "metric"),
    ],
)
def test_a_missing_package_names_the_pip_line(command, module, extra, monkeypatch, tmp_path, capsys):
    is_installed = _extras.is_installed
    monkeypatch.setattr(_extras, "is_installed", lambda name: name != module and is_installed(name))
    loss = ["--loss", "triplet"] if extra == "metric" else []
    assert main([*command, *loss, "--data", "digits", "--output", str(tmp_path)]) == 2
    assert f"'{module}' is missing; pip install 'fewshot_ext[{extra}]'" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_grouped_and_needs_no_lightning(name):
    script = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {{"lightning", "kornia", "tensorboard", "tqdm"}}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
from fewshot_ext.cli import main
main(["{name}", "--help"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    options = done.stdout[done.stdout.index("\noptions:") :]
    titles = [part.partition("\n")[0] for part in options.strip().split("\n\n") if not part.startswith(" ")]
    titles = [title.strip() for title in titles if title.endswith(":")]
    assert titles == ["options:", "run:", *TITLES[name]]
    if name == "meta-train":
        assert "DeepEMD's authors advise against it" in " ".join(done.stdout.split())


@pytest.mark.parametrize("name", ["pretrain", "metric-train"])
def test_data_and_output_are_enough(name, tmp_path, capsys):
    assert main([name, "--data", "digits", "--output", str(tmp_path), "--epochs", "1", "--threads", "1"]) == 0
    printed = capsys.readouterr().err
    assert "conv4" in printed
    assert ("margin -0.3" if name == "pretrain" else "batches: 5 classes") in printed
