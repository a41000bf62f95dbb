"""Sweeps on the workers of a Dask cluster: two processes of this machine, one of which is killed."""

import json
import time
from dataclasses import replace

import pytest
import torch
from distributed import LocalCluster
from experiments_cases import FEW, TINY
from worker_tasks import Die, KilledOnce, Patient, Square

from fewshot_ext import _extras
from fewshot_ext.cli import main
from fewshot_ext.commands.locks import release_locks
from fewshot_ext.experiments import workers
from fewshot_ext.experiments.margins import margin_runs
from fewshot_ext.experiments.sweep import Sweep
from fewshot_ext.experiments.workers import connect, run_tasks

pytestmark = pytest.mark.usefixtures("one_thread")

MARGINS = ["analyze", "margins", "--data", "digits", "--losses", "cosine", "--cosine-margins", "0", "--seeds", "0"]
MARGINS += ["--epochs", "1", "--set", "backbone.width=4", "--episodes", "2", "--finetuning.steps", "2"]


@pytest.fixture(scope="module")
def cluster():
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        yield cluster


@pytest.fixture
def executor(cluster):
    with connect(cluster.scheduler_address) as executor:
        yield executor


def test_every_task_is_done_and_a_failure_is_an_outcome(executor, tmp_path):
    reports = []
    tasks = [Square(number) for number in (2, -1, 3)]
    found = run_tasks(tasks, executor=executor, folder=tmp_path, on_report=lambda *report: reports.append(report))
    outcomes = {outcome.task.number: outcome for outcome in found}
    assert {number: outcome.value and outcome.value[:2] for number, outcome in outcomes.items()} == {
        2: (4, 1),
        -1: None,
        3: (9, 1),
    }
    assert outcomes[-1].error == "ValueError: no negative numbers"
    assert sorted((task.number, *rest) for task, *rest in reports) == [(number, 1, "half") for number in (-1, 2, 3)]
    assert not list(tmp_path.iterdir())


def test_a_run_whose_worker_is_killed_goes_on_elsewhere_to_the_same_bits(executor, digits, tmp_path):
    runs = margin_runs("digits", replace(TINY, epochs=4), {"cosine": [0.0, -0.2]}, [0])
    sweeps = {}
    for name in ("unbroken", "broken"):
        (tmp_path / name).mkdir()
        sweeps[name] = Sweep(runs, digits, tmp_path / name, measurement=FEW)
    sweeps["broken"].tasks[0] = KilledOnce(tmp_path / "told", runs[0], sweeps["broken"], epoch=3)
    unbroken = sweeps["unbroken"].run()
    assert sweeps["broken"].run(executor=executor) == unbroken
    assert not sweeps["broken"].failures
    killed, *rest = (tmp_path / "told").read_text().split("killed")
    assert killed.split() == ["1", "2", "3"]
    # From the checkpoint, and not from the beginning.
    assert [list(dict.fromkeys(text.split())) for text in rest] == [["2", "3", "4"]]
    first, second = (
        torch.load(sweeps[name].tasks[0].checkpoint, weights_only=True)["state_dict"] for name in ("unbroken", "broken")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_task_that_kills_every_worker_is_named(executor):
    outcomes = {outcome.task.number: outcome for outcome in run_tasks([Die(1), Square(2)], executor=executor)}
    assert "all those workers died while running it" in outcomes[1].error
    assert outcomes[2].value[0] == 4


def test_leaving_early_ends_what_is_under_way(executor, tmp_path):
    waiting = Patient(tmp_path / "ended")
    outcomes = run_tasks([Square(2), waiting], executor=executor)
    assert next(outcomes).value[0] == 4
    outcomes.close()
    for _ in range(100):
        if (tmp_path / "ended").exists():
            return
        time.sleep(0.1)
    pytest.fail("the task is still under way")


def test_the_command_finds_what_it_finds_without_a_cluster(cluster, tmp_path, monkeypatch, capsys):
    for name, options in (("here", []), ("there", ["--scheduler", cluster.scheduler_address])):
        (tmp_path / name).mkdir()
        # The paths of a cluster's workers begin where the command was called.
        monkeypatch.chdir(tmp_path / name)
        with release_locks():
            assert main([*MARGINS, *options, "--output", "out"]) == 0
    here, there = (json.loads((tmp_path / name / "out" / "margins.json").read_text()) for name in ("here", "there"))
    assert here == there
    assert "scheduler" not in (tmp_path / "there" / "out" / "margins.yaml").read_text()
    capsys.readouterr()
    assert main([*MARGINS, *options, "--output", "out", "--jobs", "2"]) == 2
    assert "error: jobs: expected 1 with --scheduler" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main([*MARGINS, *options, "--output", "out", "--device", "cuda"]) == 2
        assert "sees no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        ("tcp://127.0.0.1:1", "scheduler: expected a Dask scheduler that answers at tcp://127.0.0.1:1, got none: "),
        ("nonsense", "scheduler: expected an address such as tcp://host:8786, got 'nonsense'"),
        ("carrier-pigeon://roof:1", "scheduler: expected an address such as tcp://host:8786"),
    ],
)
def test_a_scheduler_that_does_not_answer_is_named(scheduler, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(workers, "_SECONDS_TO_ANSWER", 1)
    for command in (MARGINS, ["analyze", "collapse", "--data", "digits"]):
        assert main([*command, "--scheduler", scheduler, "--output", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("count", "message"), [(0, "expected workers at .*, got none"), (1, "expected workers of one thread .*, got 2")]
)
def test_workers_that_do_not_serve_are_named(count, message, monkeypatch):
    monkeypatch.setattr(workers, "_SECONDS_TO_ANSWER", 1)
    with (
        LocalCluster(n_workers=count, threads_per_worker=2, processes=False, dashboard_address=None) as cluster,
        pytest.raises((OSError, ValueError), match=f"scheduler: {message}"),
        connect(cluster.scheduler_address),
    ):
        pass


def test_the_missing_extra_is_named(tmp_path, monkeypatch, capsys):
    is_installed = _extras.is_installed
    monkeypatch.setattr(_extras, "is_installed", lambda name: name != "distributed" and is_installed(name))
    assert main([*MARGINS, "--scheduler", "tcp://host:8786", "--output", str(tmp_path)]) == 2
    assert "'distributed' is missing; pip install 'fewshot_ext[cluster]'" in capsys.readouterr().err
