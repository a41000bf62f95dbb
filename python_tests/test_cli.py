import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

from fewshot_ext import _extras
from fewshot_ext.cli import main
from fewshot_ext.experiments import SweepResults

TINY = ["--epochs", "1", "--episodes", "4", "--runs", "1", "--finetuning.steps", "2"]


# The command sets the number of threads of the process; the fixture sets it back.
pytestmark = pytest.mark.usefixtures("one_thread")


def test_demo_prints_one_table_and_writes_its_files(tmp_path, capsys):
    output = tmp_path / "made" / "here"
    assert main(["demo", *TINY, "--margins", "-0.3", "0", "--output", str(output)]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("-way accuracy (%)") == 1
    assert "    -0.3 " in printed.out
    assert "novel classes, 5-shot: margin" in printed.out
    # Not a terminal: what is to come, one line a backbone, no bars, none of Lightning's notices.
    first, *lines = printed.err.splitlines()
    assert first == f"2 trainings, 0 of them done, into {output}"
    assert [line.split(":")[0] for line in lines] == [
        "run 0, margin -0.3",
        "run 0, margin +0",
    ]
    content = json.loads((output / "results.json").read_text())
    assert content["config"]["margins"] == [-0.3, 0.0]
    assert content["versions"]["torch"] == torch.__version__
    for name in ("results.csv", "accuracy_over_margin.png", "config.yaml", "run_0/margin_+0/last.ckpt"):
        assert (output / name).stat().st_size > 0


def test_config_file_and_options_give_the_same_numbers(tmp_path, capsys):
    assert main(["demo", *TINY, "--margins", "0.1", "--seed", "7", "--output", str(tmp_path / "a")]) == 0
    config = tmp_path / "a" / "config.yaml"
    assert main(["demo", "--config", str(config), "--output", str(tmp_path / "b")]) == 0
    first, second = (SweepResults.read(tmp_path / name / "results.json") for name in ("a", "b"))
    assert first == second
    assert main(["demo", "--config", str(config), "--output", str(tmp_path / "c"), "--seed", "8"]) == 0
    assert SweepResults.read(tmp_path / "c" / "results.json").accuracies != first.accuracies


def test_ctrl_c_leaves_results_that_resume_completes(tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, "-m", "fewshot_ext.cli", "demo", *TINY, "--output", str(output)]
    command += ["--margins", "-0.3", "0", "0.3", "--episodes", "100"]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # The second line on stderr says that a margin is finished; the second margin is then under way.
    assert first.stderr.readline().startswith("3 trainings, 0 of them done")
    assert first.stderr.readline().startswith("run 0, margin -0.3")
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=60)
    assert first.returncode == 130, err
    assert "Traceback" not in err
    assert "of 3 backbones done; the same command with --resume goes on from" in err
    assert "    -0.3 " in out
    assert str(output / "results.json") in out
    assert (0, -0.3) in SweepResults.read(output / "results.json").finished

    assert main([*command[3:], "--resume"]) == 0
    resumed = SweepResults.read(output / "results.json")
    assert resumed.margins == [-0.3, 0.0, 0.3]
    assert main([*command[3:-2], "--episodes", "100", "--output", str(tmp_path / "unbroken")]) == 0
    assert SweepResults.read(tmp_path / "unbroken" / "results.json") == resumed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--device", "tpu"], "device: expected auto, cpu or cuda, got 'tpu'"),
        (["demo", "--margins", "nan"], "margins"),
        (["demo", "--margins"], "expected at least one argument"),
        (["demo", "--margins", "wide"], "wide"),
        (["demo", "--margins", "0", "0"], "margins: expected all to be different"),
        (["demo", "--episodes", "0"], "episodes: expected at least 1, got 0"),
        (["demo", "--episodes", "-3"], "episodes: expected at least 1, got -3"),
        (["demo", "--epochs", "0"], "epochs: expected at least 1, got 0"),
        (["demo", "--runs", "0"], "runs: expected at least 1, got 0"),
        (["demo", "--threads", "0"], "threads: expected at least 1, got 0"),
        (["demo", "--seed", "-1"], "seed: expected at least 0, got -1"),
        (["demo", "--seed", "x"], "seed"),
        (["demo", "--shots", "0"], "shots: expected at least 1, got 0"),
        (["demo", "--shots", "100"], "100 shots and 16 queries need 116 images a class"),
        (["demo", "--pretraining.batch_size", "1"], "batch_size: expected at least 2, got 1"),
        (["demo", "--pretraining.similarity", "euclidean"], "euclidean"),
        (["demo", "--pretraining.backbone.pooled_blocks", "4"], "at least 16 x 16"),
        (["demo", "--config", "missing.yaml"], "missing.yaml"),
        (["demo", "--unknown", "1"], "unknown"),
        (["fly"], "fly"),
        ([], 'expected "command" to be one of {'),
    ],
)
def test_a_wrong_argument_gets_one_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1, printed.err
    assert printed.err.startswith("fewshot-ext")
    assert ": error: " in printed.err
    assert message in printed.err


def test_no_margins_in_a_config_file(tmp_path, capsys):
    config = tmp_path / "empty.yaml"
    config.write_text("margins: []\n")
    assert main(["demo", "--config", str(config), "--output", str(tmp_path / "out")]) == 2
    assert "margins" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu(capsys):
    assert main(["demo", "--device", "cuda"]) == 2
    assert "sees no CUDA device" in capsys.readouterr().err


def test_output_below_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["demo", "--output", str(tmp_path / "file" / "out")]) == 2
    error = capsys.readouterr().err
    assert "cannot write to the output folder" in error
    assert len(error.splitlines()) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_without_permission(tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert main(["demo", "--output", str(tmp_path / "out")]) == 2
    assert "Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["lightning", "kornia", "matplotlib", "sklearn", "jsonargparse", "tensorboard"])
def test_a_missing_package_names_the_pip_line(module, monkeypatch, tmp_path, capsys):
    is_installed = _extras.is_installed
    monkeypatch.setattr(_extras, "is_installed", lambda name: name != module and is_installed(name))
    assert main(["demo", "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"'{module}' is missing; pip install 'fewshot_ext[train]'" in error
    assert len(error.splitlines()) == 1


def test_help_and_the_package_need_none_of_the_optional_packages():
    script = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"lightning", "kornia", "matplotlib", "sklearn", "tensorboard", "tqdm"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import fewshot_ext
from fewshot_ext.cli import main
main(["demo", "--help"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--margins" in done.stdout


def test_hyphens_are_shown_and_underscores_are_taken_too(capsys):
    shown = {}
    for name in ("meta-train", "metatrain"):
        with pytest.raises(SystemExit):
            main([name, "--help"])
        shown[name] = capsys.readouterr().out
    assert shown["meta-train"] == shown["metatrain"]
    assert "--local-features.name" in shown["meta-train"]
    assert not re.search(r"--\w+_", shown["meta-train"])
    printed = []
    for option in ("--num-nodes", "--num_nodes"):
        with pytest.raises(SystemExit):
            main(["pretrain", option, "3", "--print-config"])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert "num_nodes: 3" in printed[0]
