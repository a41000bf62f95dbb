"""What comes from outside while a command runs: closed pipes, full disks, signals, folders that are removed."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import training_commands

from fewshot_ext import cli
from fewshot_ext.cli import main
from fewshot_ext.commands.common import print_written

# The commands set the number of threads of the process; the fixture sets it back.
pytestmark = pytest.mark.usefixtures("one_thread")

PACK = [sys.executable, "-m", "fewshot_ext.cli", "data", "pack"]
NETWORK = ["backbone.pooled_blocks=3", "backbone.width=4", "batch_size=64"]
MARGINS = ["analyze", "margins", "--data", "digits", "--losses", "cosine", "--shots", "1", "--queries", "3"]
MARGINS += ["--epochs", "1", "--finetuning.steps", "2", "--seeds", "0", "--set", *NETWORK]


@pytest.fixture
def pictures(tmp_path):
    from PIL import Image

    (tmp_path / "pictures" / "a").mkdir(parents=True)
    Image.new("L", (8, 8)).save(tmp_path / "pictures" / "a" / "1.png")
    return tmp_path / "pictures"


@pytest.mark.parametrize("streams", ["1", "2", "1 and 2"])
def test_item_27_a_reader_that_has_gone_loses_no_results(streams, pictures, tmp_path):
    read, write = os.pipe()
    os.close(read)
    given = {"stdout": write if "1" in streams else subprocess.PIPE, "stderr": write if "2" in streams else None}
    given["stderr"] = given["stderr"] or subprocess.PIPE
    command = [*PACK, "--source", str(pictures), "--output", str(tmp_path / "a.npz")]
    done = subprocess.run(command, text=True, **given)
    os.close(write)
    assert done.returncode == 0
    assert not done.stderr
    assert (tmp_path / "a.npz").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_item_27_a_full_standard_output_is_one_line_and_loses_no_results(pictures, tmp_path):
    command = [*PACK, "--source", str(pictures), "--output", str(tmp_path / "a.npz")]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, text=True, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr == "fewshot-ext: error: cannot write to standard output: No space left on device\n"
    assert (tmp_path / "a.npz").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_item_27_help_that_cannot_be_printed_is_an_error():
    with open("/dev/full", "w") as full:
        done = subprocess.run([*PACK, "--help"], text=True, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr == "fewshot-ext: error: cannot write to standard output: No space left on device\n"


@pytest.mark.skipif(os.name != "posix", reason="by a shell")
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_item_27_streams_that_are_closed_lose_no_results(closed, pictures, tmp_path):
    command = [*PACK, "--source", str(pictures), "--output", str(tmp_path / "a.npz")]
    done = subprocess.run(f"{shlex.join(command)} {closed}", shell=True, text=True, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "a.npz").exists()


def test_item_27_a_pipe_in_place_of_a_checkpoint_is_refused(tmp_path, capsys):
    os.mkfifo(tmp_path / "a.ckpt")
    command = ["evaluate", "--data", "digits", "--checkpoint", str(tmp_path / "a.ckpt"), "--output", str(tmp_path)]
    assert main(command) == 2
    assert "checkpoint cannot be read: it is a pipe, not a file" in capsys.readouterr().err


def test_item_27_help_for_a_reader_that_has_gone():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "fewshot_ext.cli", "--help"], text=True, stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_item_27_a_pipe_among_the_pictures_is_passed_over(pictures, tmp_path, capsys):
    os.mkfifo(pictures / "a" / "2.png")
    assert main(["data", "pack", "--source", str(pictures), "--output", str(tmp_path / "a.npz")]) == 0
    assert "1 images of 8 x 8 pixels" in capsys.readouterr().out


def test_item_27_an_output_folder_that_is_removed_during_a_training_is_an_error(tmp_path, monkeypatch, capsys):
    from fewshot_ext.training.callbacks import EpochMeans

    on_train_epoch_end = EpochMeans.on_train_epoch_end

    def removing(self, trainer, module):
        on_train_epoch_end(self, trainer, module)
        if trainer.current_epoch == 1:
            shutil.rmtree(tmp_path / "out")

    monkeypatch.setattr(EpochMeans, "on_train_epoch_end", removing)
    command = [*training_commands.PRETRAIN, "--data", "digits", "--epochs", "3", "--output", str(tmp_path / "out")]
    assert main(command) == 1
    printed = capsys.readouterr()
    assert "written" not in printed.out
    assert "fewshot-ext pretrain: error: cannot write the checkpoint" in printed.err
    assert "No such file or directory" in printed.err


@pytest.mark.parametrize(
    "command", [MARGINS, ["demo", "--seeds", "0", "--cosine_margins", "0", "--jobs", "1", "--finetuning.steps", "2"]]
)
def test_item_27_an_output_folder_that_is_removed_before_the_results_is_an_error(
    command, tmp_path, monkeypatch, capsys
):
    from fewshot_ext.evaluation import protocol
    from fewshot_ext.experiments import measurements

    def removing(*arguments, **options):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        return protocol.episode_accuracies(*arguments, **options)

    monkeypatch.setattr(measurements, "episode_accuracies", removing)
    assert main([*command, "--epochs", "1", "--episodes", "2", "--output", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr()
    assert "written" not in printed.out
    assert "No such file or directory" in printed.err
    assert "Traceback" not in printed.err


def test_item_27_written_is_said_of_what_is_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.txt is gone: somebody removed it during the run"):
        print_written([tmp_path, tmp_path / "missing.txt"])


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_item_27_other_ends_are_as_ctrl_c_and_leave_no_process(name, tmp_path):
    command = [sys.executable, "-m", "fewshot_ext.cli", *MARGINS, "--cosine_margins", "0", "-0.1", "0.1", "0.2"]
    command += ["--episodes", "300", "--jobs", "2", "--output", str(tmp_path)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr.readline() == "0 of 4 runs are there already\n"
    assert process.stderr.readline().startswith("1/4 cosine, margin")
    # To all of them, as a terminal that is closed does.
    os.killpg(process.pid, getattr(signal, name)) if name == "SIGHUP" else process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "of 4 runs done; the same command goes on from there" in error
    assert "failed" not in error and "Traceback" not in error
    assert_no_process_of(process.pid)
    assert not list(tmp_path.rglob("*.lock"))


def test_item_27_processes_end_with_a_parent_that_was_killed(tmp_path):
    script = tmp_path / "sleepers.py"
    script.write_text("""
import time
from fewshot_ext.experiments.workers import run_tasks
class Sleep:
    work = 1
    def __init__(self, name): self.name = name
    def __call__(self, report):
        report(0, "asleep")
        time.sleep(600)
if __name__ == "__main__":
    list(run_tasks([Sleep("a"), Sleep("b")], jobs=2, on_report=lambda *_: print("asleep", flush=True)))
""")
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout.readline() == "asleep\n"
    process.kill()
    process.wait()
    assert_no_process_of(process.pid)


def assert_no_process_of(group):
    """No process of a group is left, after a while."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.killpg(group, signal.SIGKILL)
    pytest.fail("a process is still there")


def test_item_27_what_a_caller_ignores_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        monkeypatch.setattr(cli, "_main", lambda arguments: signal.raise_signal(signal.SIGHUP) or 0)
        assert main([]) == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
