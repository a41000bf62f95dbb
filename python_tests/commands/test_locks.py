"""No two processes write to one folder: the second is refused, and a killed one is in nobody's way."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time

import pytest
import training_commands
from filelock import FileLock

from fewshot_ext.cli import main

# The commands set the number of threads of the process; the fixture sets it back.
pytestmark = pytest.mark.usefixtures("one_thread")

PRETRAIN = [*training_commands.PRETRAIN, "--data", "digits"]
NETWORK = ["backbone.pooled_blocks=3", "backbone.width=4", "batch_size=64"]
SWEEP = ["--data", "digits", "--seeds", "0", "--set", *NETWORK]
EPISODES = ["--shots", "1", "--episodes", "2", "--queries", "3", "--finetuning.steps", "2"]
MARGINS = ["analyze", "margins", "--losses", "cosine", "--cosine_margins", "0", *SWEEP, *EPISODES]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("command", "lock", "resume", "goes_on"),
    [
        (PRETRAIN, ".lock", ["--resume"], "going on after epoch "),
        (MARGINS, ".margins.lock", [], "1/1 cosine, margin +0, seed 0: "),
    ],
)
def test_the_second_is_refused_until_the_first_is_killed(command, lock, resume, goes_on, tmp_path, capsys):
    output = tmp_path / "out"
    command = [*command, "--epochs", "15", "--output", str(output)]
    first = subprocess.Popen([sys.executable, "-m", "fewshot_ext.cli", *command], stderr=subprocess.DEVNULL)
    try:
        while first.poll() is None and not list(output.rglob("last.ckpt")):
            time.sleep(0.01)
        first.send_signal(signal.SIGSTOP)
        # The signal stops one thread after another; TensorBoard's writes to the folder.
        os.waitid(os.P_PID, first.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        before = contents(output)
        for options in ([], resume):
            assert main([*command, *options]) == 2
            error = capsys.readouterr().err
            assert f"error: output '{output}' is in use by process {first.pid} on " in error
            assert len(error.splitlines()) == 1
        assert contents(output) == before
    finally:
        first.kill()
        first.wait()
    assert (output / lock).exists()
    assert main([*command, *resume]) == 0
    assert goes_on in capsys.readouterr().err
    assert not list(output.rglob("*.lock"))


@pytest.fixture
def held(tmp_path):
    """Holds a lock as another process would."""
    locks = []

    def hold(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        locks.append(FileLock(path, timeout=0))
        locks[-1].acquire()
        path.write_text("process 7 on a machine\n")

    yield hold
    for lock in locks:
        lock.release()


@pytest.mark.parametrize("command", [training_commands.METATRAIN, training_commands.METRIC_TRAIN])
def test_every_training_is_refused(command, held, checkpoints, tmp_path, capsys):
    held(tmp_path / ".lock")
    options = {"meta-train": ["--checkpoint", str(checkpoints[0]), "--data", "digits"], "metric-train": SWEEP[:2]}
    before = contents(tmp_path)
    assert main([*command, *options.get(command[0], []), "--output", str(tmp_path)]) == 2
    assert f"output '{tmp_path}' is in use by process 7 on a machine: wait until it ends" in capsys.readouterr().err
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("margins", [*SWEEP, *EPISODES]),
        ("angles", SWEEP),
        ("regularizers", [*SWEEP, *EPISODES, "--without_augmentation", "false"]),
        ("label_smoothing", [*SWEEP, *EPISODES]),
        ("collapse", [*SWEEP[:-1], "classes_per_batch=3", "--seeds", "0"]),
    ],
)
def test_every_sweep_is_refused(name, options, held, tmp_path, capsys):
    held(tmp_path / f".{name}.lock")
    before = contents(tmp_path)
    assert main(["analyze", name, *options, "--output", str(tmp_path)]) == 2
    assert f"output '{tmp_path}' is in use by process 7 on a machine" in capsys.readouterr().err
    assert contents(tmp_path) == before


@pytest.fixture
def pictures(tmp_path_factory):
    """Two pictures of each of two classes."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    for name in ("dark/1", "dark/2", "light/1", "light/2"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("L", (8, 8), 9 * len(name)).save(folder / f"{name}.png")
    return folder


# What each command writes its lock for, its own options, and how it is told where to write.
WRITERS = {
    "classify": (".lock", ["--support", "{pictures}", "--query", "{pictures}", "--checkpoint", "{checkpoint}"], ""),
    "retrieve": (
        ".lock",
        ["--query", "{pictures}", "--checkpoint", "{checkpoint}", "--neighbors", "1", "--ks", "1"],
        "",
    ),
    "evaluate": (".lock", ["--data", "digits", "--checkpoint", "{checkpoint}"], ""),
    "analyze matches": (".matches.lock", ["--data", "digits", "--checkpoint", "{checkpoint}"], ""),
    "data download": (".lock", ["omniglot"], ""),
    "data pack": (".a.npz.lock", ["--source", "{pictures}"], "a.npz"),
    "data info": (".a.png.lock", ["digits"], "a.png"),
}


@pytest.mark.parametrize("command", WRITERS)
def test_item_23_every_command_that_writes_is_refused(command, held, pictures, checkpoints, tmp_path, capsys):
    lock, options, file = WRITERS[command]
    places = {"pictures": pictures, "checkpoint": checkpoints[0]}
    output = tmp_path / "out"
    held(output / lock)
    before = contents(output)
    option = "--preview" if command == "data info" else "--output"
    command = [*command.split(), *(text.format(**places) for text in options), option, str(output / file)]
    assert main(command) == 2
    assert f"output '{output}' is in use by process 7 on a machine: wait until it ends" in capsys.readouterr().err
    assert contents(output) == before


def test_item_28_the_next_run_removes_what_a_killed_one_was_writing(tmp_path):
    output = tmp_path / "out"
    train = f"""
import os, signal
from unittest import mock
import torch
from fewshot_ext.cli import main

def killed(content, file):
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

with mock.patch.object(torch, "save", killed):
    main({[*PRETRAIN, "--epochs", "1", "--output", str(output)]!r})
"""
    assert subprocess.run([sys.executable, "-c", train], stderr=subprocess.DEVNULL).returncode == -signal.SIGKILL
    (left,) = output.glob(".*.partial.ckpt")
    assert left.read_bytes() == b"half"
    assert main([*PRETRAIN, "--epochs", "1", "--output", str(output)]) == 0
    assert not list(output.glob(".*"))


def test_sweeps_share_a_folder_of_runs_as_long_as_they_train_different_ones(held, tmp_path, capsys):
    runs = tmp_path / "runs"
    command = [*MARGINS, "--epochs", "1", "--runs", str(runs), "--output"]
    assert main([*command, str(tmp_path / "a")]) == 0
    (trained,) = runs.iterdir()
    (trained / "run.json").unlink()
    held(runs / f".{trained.name}.lock")
    capsys.readouterr()
    assert main([*command, str(tmp_path / "b")]) == 2
    message = f"run 'cosine, margin +0, seed 0' in '{runs}' is in use by process 7 on a machine"
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "b").iterdir())
    assert main([*command, str(tmp_path / "b"), "--seeds", "1"]) == 0


def test_an_analysis_is_refused_and_another_beside_it_is_not(held, tmp_path, capsys):
    assert main([*MARGINS, "--epochs", "1", "--output", str(tmp_path)]) == 0
    held(tmp_path / ".variance.lock")
    capsys.readouterr()
    variance = ["analyze", "variance", "--sweep", str(tmp_path)]
    assert main(variance) == 2
    assert f"output '{tmp_path}' is in use by process 7 on a machine" in capsys.readouterr().err
    assert main([*variance, "--output", str(tmp_path / "elsewhere")]) == 0
    # A trained run is nobody's any more, and other results go into other files.
    assert main([*MARGINS, "--epochs", "1", "--output", str(tmp_path)]) == 0


def test_a_mistake_leaves_the_folder_free(tmp_path, capsys):
    assert main([*PRETRAIN, "--output", str(tmp_path), "--backbone.pooled_blocks", "4"]) == 2
    assert "at least 16 x 16" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_holder_that_has_not_written_its_name_yet(held, tmp_path, capsys):
    held(tmp_path / ".lock")
    (tmp_path / ".lock").write_text("")
    assert main([*PRETRAIN, "--output", str(tmp_path)]) == 2
    assert "is in use by another process: wait" in capsys.readouterr().err


def test_where_there_are_no_locks_a_run_goes_on_without(tmp_path, monkeypatch, capsys):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert main([*PRETRAIN, "--epochs", "1", "--output", str(tmp_path)]) == 0
    error = capsys.readouterr().err
    assert f"output '{tmp_path}' cannot be locked (Function not implemented): start no second command" in error


def test_a_lock_that_cannot_be_made_is_an_error(tmp_path, capsys):
    (tmp_path / ".lock").mkdir()
    assert main([*PRETRAIN, "--output", str(tmp_path)]) == 2
    assert str(tmp_path / ".lock") in capsys.readouterr().err
