"""Every subcommand of ``fewshot-ext analyze`` on the digits: what it writes and prints, and what it refuses."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from filelock import FileLock

from fewshot_ext import _extras
from fewshot_ext.cli import main
from fewshot_ext.commands.analyze import COMMANDS
from fewshot_ext.data import Split, load_digits

pytestmark = pytest.mark.usefixtures("one_thread")

TRAINING = ["--data", "digits", "--epochs", "1", "--seeds", "0"]
TRAINING += ["--set", "backbone.pooled_blocks=3", "backbone.width=8", "batch_size=128"]
NOT_AUGMENTED = [f"augmentation.{name}=0" for name in ("rotation", "translation", "zoom")]  # more of --set
EPISODES = ["--episodes", "4", "--queries", "3", "--finetuning.steps", "2"]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    output, threads = tmp_path_factory.mktemp("margins"), torch.get_num_threads()
    margins = ["--cosine_margins", "-0.2", "0", "0.2", "--softmax_margins", "0"]
    assert main(["analyze", "margins", *TRAINING, *EPISODES, *margins, "--shots", "1", "--output", str(output)]) == 0
    torch.set_num_threads(threads)
    return output


def test_margins_of_both_losses(sweep, capsys):
    content = json.loads((sweep / "margins.json").read_text())
    assert {(row["loss"], row["margin"]) for row in content["rows"]} == {
        ("cosine", -0.2),
        ("cosine", 0.0),
        ("cosine", 0.2),
        ("softmax", 0.0),
    }
    assert content["config"]["epochs"] == 1
    assert content["pretraining"]["backbone"]["width"] == 8
    assert content["versions"]["torch"] == torch.__version__
    assert str(sweep) not in (sweep / "margins.json").read_text()
    # The same settings from the file, with nothing left to do.
    again = ["analyze", "margins", "--config", str(sweep / "margins.yaml"), "--output", str(sweep)]
    assert main(again) == 0
    printed = capsys.readouterr()
    assert "4 of 4 runs are there already" in printed.err
    assert "5-way accuracy (%)" in printed.out
    assert "softmax" in printed.out
    assert json.loads((sweep / "margins.json").read_text())["rows"] == content["rows"]


LOOKERS = {
    "variance": [],
    "label_distribution": ["--groups", "2", "--way", "2", *EPISODES],
    "tsne": ["--num_classes", "3", "--images", "12", "--perplexity", "5", *EPISODES],
    "shots": ["--shots", "1", "10", *EPISODES],
    "finetuning_margin": ["--margins", "-0.2", "--finetuning_margins", "-0.1", "0", *EPISODES],
}


@pytest.mark.parametrize("name", LOOKERS)
def test_analyzes_of_a_sweep(name, sweep, tmp_path, capsys):
    assert main(["analyze", name, "--sweep", str(sweep), "--output", str(tmp_path), *LOOKERS[name]]) == 0
    written = {path.name for path in tmp_path.iterdir()}
    assert {f"{name}.{suffix}" for suffix in ("json", "csv", "png", "yaml")} <= written
    assert "written:" in capsys.readouterr().out
    # The file of settings is enough to repeat it.
    before = json.loads((tmp_path / f"{name}.json").read_text())
    config = ["--config", str(tmp_path / f"{name}.yaml")]
    assert main(["analyze", name, "--sweep", str(sweep), "--output", str(tmp_path), *config]) == 0
    assert json.loads((tmp_path / f"{name}.json").read_text())["rows"] == before["rows"]


@pytest.mark.parametrize("name", LOOKERS)
def test_an_analysis_that_another_process_makes_is_refused(name, sweep, tmp_path, capsys):
    with FileLock(tmp_path / f".{name}.lock"):
        assert main(["analyze", name, "--sweep", str(sweep), "--output", str(tmp_path), *LOOKERS[name]]) == 2
        assert f"output '{tmp_path}' is in use by another process" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == [f".{name}.lock"]


TRAINERS = {
    "angles": [*TRAINING, "--margins", "-0.2", "0.2", "--bins", "36"],
    "regularizers": [*TRAINING, *EPISODES, "--shots", "1", "--without_augmentation", "false"],
    "label_smoothing": [*TRAINING, *EPISODES, "--shots", "1"],
    "losses": [*TRAINING, *EPISODES, "--shots", "1", "--classes", "novel"],
}


@pytest.mark.parametrize("name", TRAINERS)
def test_analyzes_that_train(name, tmp_path, capsys):
    assert main(["analyze", name, *TRAINERS[name], "--output", str(tmp_path)]) == 0
    written = {path.name for path in tmp_path.iterdir()}
    assert {f"{name}.{suffix}" for suffix in ("json", "csv", "png", "yaml")} <= written
    assert "margin" in capsys.readouterr().out


@pytest.fixture(scope="module")
def two_sets(tmp_path_factory):
    """The digits in two parts, each with base, validation and novel classes."""
    folder, digits = tmp_path_factory.mktemp("sets"), load_digits()
    for name, roles in (("low", dict(zip("01234", (0, 0, 1, 1, 2), strict=True))), ("high", {"5": 0, "6": 1, "8": 2})):
        digits.with_roles({digit: Split(role) for digit, role in roles.items()}).save(folder / f"{name}.npz")
    return str(folder / "low.npz"), str(folder / "high.npz")


FOUR_LOSSES = [*TRAINING[2:], *EPISODES, "--recipe", "digits_conv4_cosine", "--way", "2", "--shots", "1"]


def test_a_set_of_one_base_class_is_refused_before_any_run(two_sets, tmp_path, capsys):
    command = ["analyze", "losses", "--data", *two_sets, *FOUR_LOSSES, "--seeds", "0", "--output", str(tmp_path)]
    assert main(command) == 2
    assert f"base classes of {two_sets[1]}: expected at least 2, got 1" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_losses_over_several_sets(two_sets, tmp_path, capsys):
    low, high = two_sets
    data = ["--data", low, f"{high}+{low}"]
    command = ["analyze", "losses", *data, *FOUR_LOSSES, "--output", str(tmp_path)]
    assert main([*command, "--cosine-margins", "-0.1", "-0.2", "--seeds", "0", "1"]) == 0
    content = json.loads((tmp_path / "losses.json").read_text())
    assert {(row["data"], row["variant"], row["margin"]) for row in content["rows"]} == {
        (name, variant, margins.get(variant, 0))
        for name, margins in (
            ("low", {"neg-softmax": -1.0, "neg-cosine": -0.1}),
            ("high+low", {"neg-softmax": -1.0, "neg-cosine": -0.2}),
        )
        for variant in ("softmax", "neg-softmax", "cosine", "neg-cosine")
    }
    assert {row["classes"] for row in content["rows"]} == {"validation"}
    # A loss with a margin is compared with the same one without, on the same set.
    for row in content["summary"]:
        plain = (
            next(
                other
                for other in content["summary"]
                if (other["data"], f"neg-{other['variant']}") == (row["data"], row["variant"])
            )
            if "difference" in row
            else None
        )
        assert (plain is not None) == row["variant"].startswith("neg-")
        if plain:
            assert row["difference"] == pytest.approx(row["accuracy"] - plain["accuracy"], abs=1e-3)
    assert [part["data"]["name"] for part in content["sets"]] == data[1:]
    printed = capsys.readouterr()
    assert "2-way accuracy (%) on validation classes" in printed.out
    assert "high+low: neg-cosine, seed 1" in printed.err
    # Each run is one of its own set: the same ones serve another analysis.
    again = ["analyze", "losses", "--data", low, *FOUR_LOSSES, "--output", str(tmp_path / "one")]
    assert main([*again, "--runs", str(tmp_path / "runs")]) == 0
    assert "4 of 4 runs are there already" in capsys.readouterr().err


def test_every_subcommand_has_its_test():
    # test_metric_train.py has the test of "collapse", test_matches.py that of "matches".
    names = {name.replace("-", "_") for name in COMMANDS}
    assert names == {"margins", "collapse", "matches", *LOOKERS, *TRAINERS}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["margins", "--output", "out"], "--data: expected a value, got none"),
        (["margins", "--data", "digits"], "--output: expected a value, got none"),
        (["margins", *TRAINING, "--output", "out", "--losses", "angular"], "losses: expected cosine or softmax"),
        (
            ["margins", *TRAINING, "--output", "out", "--cosine_margins", "0", "0"],
            "a loss, margin or seed is given twice",
        ),
        (["margins", *TRAINING, "--output", "out", "--cosine_margins", "nan"], "Got value: nan"),
        (["margins", *TRAINING, "--output", "out", "--jobs", "0"], "jobs: expected at least 1, got 0"),
        (["margins", *TRAINING, "--output", "out", "--threads", "0"], "threads: expected at least 1, got 0"),
        (["margins", *TRAINING, "--output", "out", "--recipe", "fast"], "there is no recipe 'fast'"),
        (["margins", *TRAINING, "--output", "out", "--set", "width"], "set: expected KEY=VALUE"),
        (["margins", *TRAINING, "--output", "out", "--set", "widht=3"], "there is no setting 'widht'"),
        (["margins", *TRAINING, "--output", "out", "--set", "margin=3"], "there is no setting 'margin'"),
        (
            ["margins", *TRAINING, "--output", "out", "--set", "backbone=3"],
            "set.backbone",
        ),
        (["margins", *TRAINING, "--output", "out", "--set", "batch_size=1"], "batch_size: expected at least 2"),
        (["margins", *TRAINING, "--output", "out", "--set", "batch_size=many"], "Got value: many"),
        (["margins", *TRAINING, "--output", "out", "--held_out", "0"], "held_out: expected a number in (0, 1)"),
        (["margins", *TRAINING, "--output", "out", "--shots", "99"], "99 shots and 16 queries need 115 images a class"),
        (["margins", *TRAINING, "--output", "out", "--way", "9"], "way 9 asks for more classes than there are: 5"),
        (["margins", "--data", "no_such_set", "--output", "out"], "no_such_set"),
        (["losses", "--output", "out"], "--data: expected a value, got none"),
        (["losses", *TRAINING, "--output", "out"], "digits has no validation classes"),
        (
            ["losses", *TRAINING, "--output", "out", "--classes", "all"],
            "classes: expected one of base, validation, novel",
        ),
        (["losses", *TRAINING, "--output", "out", "--cosine_margins", "0"], "margin of neg-cosine: expected another"),
        (
            ["losses", *TRAINING, "--output", "out", "--softmax_margins", "-1", "-2"],
            "softmax_margins: expected one value or one for each of 1 image sets, got 2",
        ),
        (
            ["losses", "--data", "digits", "digits", "--output", "out"],
            "data: expected each image set once, got 'digits'",
        ),
        (["variance"], "--sweep: expected the output folder of analyze margins, got none"),
        (["variance", "--sweep", "nowhere"], "there is no sweep in 'nowhere'"),
        (["regularizers", *TRAINING, "--output", "out", "--margin", "0"], "margin: expected another value than 0"),
        (["regularizers", *TRAINING, "--output", "out", "--drop_rate", "0.1"], "drop_rate: expected 0 for conv4"),
        (["regularizers", *TRAINING, *NOT_AUGMENTED, "--output", "out"], "has the settings of 'margin -0.1'"),
        (
            ["label_smoothing", *TRAINING, "--output", "out", "--label_smoothing", "2"],
            "label_smoothing: expected a number in",
        ),
        (["angles", *TRAINING, "--output", "out", "--bins", "0"], "bins: expected at least 1"),
        (["angles", *TRAINING, "--output", "out", "--margins"], "expected at least one argument"),
        (["fly"], "fly"),
    ],
)
def test_a_wrong_argument_gets_one_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["analyze", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1, printed.err
    assert printed.err.startswith("fewshot-ext analyze")
    assert message in printed.err
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["variance", "--margins", "0.7"], "none in"),
        (["variance", "--losses", "angular"], "losses: expected one of cosine, softmax, got 'angular'"),
        (["shots", "--losses", "cosine", "softmax"], "losses: expected one loss here, got cosine softmax"),
        (["shots", "--classes", "test"], "classes: expected some of base, validation, novel"),
        (["shots", "--classes", "validation"], "digits has no validation classes"),
        (["shots", "--shots", "300"], "novel classes of digits: 300 shots and 16 queries need 316 images a class"),
        (["tsne", "--num_classes", "6"], "num_classes: expected at most 5, the base classes of digits"),
        (["tsne", "--perplexity", "1000"], "perplexity: expected less than"),
        (["label_distribution", "--groups", "2"], "2 groups of 5-way episodes need 10 classes"),
        (["finetuning_margin", "--finetuning_margins", "0", "0"], "none twice"),
    ],
)
def test_a_sweep_that_does_not_allow_it(arguments, message, sweep, capsys):
    before = {path.name for path in sweep.iterdir()}
    assert main(["analyze", *arguments, "--sweep", str(sweep)]) == 2
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1, printed.err
    assert message in printed.err
    assert {path.name for path in sweep.iterdir()} == before


def test_a_checkpoint_of_the_wrong_kind_fails_by_name(tmp_path, capsys):
    assert main(["analyze", "margins", *TRAINING, *EPISODES, "--losses", "cosine", "--cosine_margins", "0", "-0.1",
                 "--shots", "1", "--output", str(tmp_path)]) == 0  # fmt: skip
    broken = next((tmp_path / "runs").glob("cosine_margin-0.1*")) / "last.ckpt"
    checkpoint = torch.load(broken, weights_only=True)
    del checkpoint["state_dict"]["head.weight"]
    torch.save(checkpoint, broken)
    capsys.readouterr()
    arguments = ["--groups", "1", "--way", "2", *EPISODES]
    assert main(["analyze", "label_distribution", "--sweep", str(tmp_path), *arguments]) == 1
    error = capsys.readouterr().err
    assert "failed: cosine, margin -0.1, seed 0: ValueError: last.ckpt is a checkpoint of the wrong kind" in error
    assert "1 of 2 runs failed; the same command tries them again" in error
    rows = json.loads((tmp_path / "label_distribution.json").read_text())["rows"]
    assert {row["margin"] for row in rows} == {0.0}


def test_ctrl_c_says_how_to_go_on(tmp_path):
    command = [sys.executable, "-m", "fewshot_ext.cli", "analyze", "margins", *TRAINING, *EPISODES]
    command += ["--losses", "cosine", "--cosine_margins", "0", "-0.1", "0.1", "--shots", "1", "--output", str(tmp_path)]
    command += ["--episodes", "300"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr.readline() == "0 of 3 runs are there already\n"
    assert process.stderr.readline().startswith("1/3 cosine, margin +0, seed 0")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "of 3 runs done; the same command goes on from there" in err
    assert "margin +0" in out
    assert main(command[3:]) == 0
    assert len(json.loads((tmp_path / "margins.json").read_text())["rows"]) == 3 * 3


@pytest.mark.parametrize(
    ("module", "name", "extra"),
    [("lightning", "margins", TRAINING), ("matplotlib", "variance", []), ("sklearn", "tsne", [])],
)
def test_a_missing_package_names_the_pip_line(module, name, extra, sweep, monkeypatch, tmp_path, capsys):
    is_installed = _extras.is_installed
    monkeypatch.setattr(_extras, "is_installed", lambda asked: asked != module and is_installed(asked))
    place = ["--output", str(tmp_path)] if extra else ["--sweep", str(sweep)]
    assert main(["analyze", name, *extra, *place]) == 2
    error = capsys.readouterr().err
    assert f"'{module}' is missing; pip install 'fewshot_ext[train]'" in error
    assert len(error.splitlines()) == 1


def test_help_needs_neither_lightning_nor_matplotlib(capsys, monkeypatch):
    for module in ("lightning", "matplotlib", "sklearn", "scipy"):
        monkeypatch.setitem(sys.modules, module, None)
    for arguments in ([], *([name] for name in COMMANDS)):
        with pytest.raises(SystemExit) as stopped:
            main(["analyze", *arguments, "--help"])
        assert stopped.value.code == 0
    assert "label-distribution" in capsys.readouterr().out
