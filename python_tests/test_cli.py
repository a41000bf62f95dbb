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
from fewshot_ext.models import load_network

TINY = ["--epochs", "1", "--episodes", "4", "--seeds", "0", "--jobs", "1", "--finetuning.steps", "2"]


# The command sets the number of threads of the process; the fixture sets it back.
pytestmark = pytest.mark.usefixtures("one_thread")


def rows(folder):
    return json.loads((folder / "margins.json").read_text())["rows"]


def test_demo_prints_one_table_and_writes_its_files(tmp_path, capsys):
    output = tmp_path / "made" / "here"
    assert main(["demo", *TINY, "--cosine-margins", "-0.3", "0", "--output", str(output)]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("-way accuracy (%)") == 1
    assert "margin -0.3 " in printed.out
    assert "novel 5-shot: margin" in printed.out
    # Not a terminal: what is to come, one line a run, no bars, none of Lightning's notices.
    first, *lines = printed.err.splitlines()
    assert first == "0 of 2 runs are there already"
    assert [line.split(":")[0] for line in lines] == [
        "1/2 cosine, margin -0.3, seed 0",
        "2/2 cosine, margin +0, seed 0",
    ]
    content = json.loads((output / "margins.json").read_text())
    assert content["config"]["cosine_margins"] == [-0.3, 0.0]
    assert content["versions"]["torch"] == torch.__version__
    for name in ("margins.csv", "margins.png", "margins.yaml"):
        assert (output / name).stat().st_size > 0
    (checkpoint,) = output.glob("runs/cosine_margin+0_seed0_*/last.ckpt")
    assert load_network(checkpoint).out_features == 64
    # As its help says: another analysis looks at its networks.
    assert main(["analyze", "variance", "--sweep", str(output)]) == 0


def test_config_file_and_options_give_the_same_numbers(tmp_path):
    assert main(["demo", *TINY, "--cosine-margins", "0.1", "--seeds", "7", "--output", str(tmp_path / "a")]) == 0
    config = ["--config", str(tmp_path / "a" / "margins.yaml"), "--jobs", "1"]
    assert main(["demo", *config, "--output", str(tmp_path / "b")]) == 0
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    # The demo is this analysis with other defaults.
    assert main(["analyze", "margins", "--data", "digits", *config, "--output", str(tmp_path / "c")]) == 0
    assert rows(tmp_path / "a") == rows(tmp_path / "c")
    assert main(["demo", *config, "--output", str(tmp_path / "d"), "--seeds", "8"]) == 0
    assert rows(tmp_path / "d") != rows(tmp_path / "a")


def test_ctrl_c_leaves_results_that_the_same_command_completes(tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, "-m", "fewshot_ext.cli", "demo", *TINY, "--output", str(output)]
    command += ["--cosine-margins", "-0.3", "0", "0.3", "--episodes", "100"]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # The second line on stderr says that a margin is finished; the second margin is then under way.
    assert first.stderr.readline() == "0 of 3 runs are there already\n"
    assert first.stderr.readline().startswith("1/3 cosine, margin -0.3")
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=60)
    assert first.returncode == 130, err
    assert "Traceback" not in err
    assert "of 3 runs done; the same command goes on from there" in err
    assert "margin -0.3 " in out
    assert str(output / "margins.json") in out
    assert -0.3 in {row["margin"] for row in rows(output)}

    assert main(command[3:]) == 0
    assert {row["margin"] for row in rows(output)} == {-0.3, 0.0, 0.3}
    assert main([*command[3:], "--output", str(tmp_path / "unbroken")]) == 0
    assert rows(tmp_path / "unbroken") == rows(output)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--device", "tpu"], "device: expected auto, cpu or cuda, got 'tpu'"),
        (["demo", "--cosine-margins", "nan"], "margins"),
        (["demo", "--cosine-margins"], "expected at least one argument"),
        (["demo", "--cosine-margins", "wide"], "wide"),
        (
            ["demo", "--cosine-margins", "0", "0"],
            "runs: expected all to be different",
        ),
        (["demo", "--episodes", "0"], "episodes: expected at least 1, got 0"),
        (["demo", "--episodes", "-3"], "episodes: expected at least 1, got -3"),
        (["demo", "--epochs", "0"], "epochs: expected at least 1, got 0"),
        (["demo", "--jobs", "0"], "jobs: expected at least 1, got 0"),
        (["demo", "--threads", "0"], "threads: expected at least 1, got 0"),
        (["demo", "--seeds", "-1"], "seed: expected at least 0, got -1"),
        (["demo", "--seeds", "x"], "seeds"),
        (["demo", "--shots", "0"], "shots: expected at least 1, got 0"),
        (["demo", "--shots", "100"], "100 shots and 16 queries need 116 images a class"),
        (["demo", "--set", "batch_size=1"], "batch_size: expected at least 2, got 1"),
        (["demo", "--losses", "euclidean"], "euclidean"),
        (["demo", "--set", "backbone.pooled_blocks=4"], "at least 16 x 16"),
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
    config.write_text("cosine_margins: []\n")
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
    assert "--cosine-margins" in done.stdout


def test_hyphens_are_shown_and_underscores_are_taken_too(capsys):
    shown = {}
    for name in ("meta-train", "metatrain", "analyze label-smoothing", "analyze label_smoothing"):
        with pytest.raises(SystemExit):
            main([*name.split(), "--help"])
        shown[name] = capsys.readouterr().out
    assert shown["meta-train"] == shown["metatrain"]
    assert shown["analyze label-smoothing"] == shown["analyze label_smoothing"]
    assert "--local-features.name" in shown["meta-train"]
    assert not re.search(r"--\w+_", shown["meta-train"])
    printed = []
    for option in ("--num-nodes", "--num_nodes"):
        with pytest.raises(SystemExit):
            main(["pretrain", option, "3", "--print-config"])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert "num_nodes: 3" in printed[0]
