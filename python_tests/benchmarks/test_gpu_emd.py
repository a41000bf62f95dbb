"""Cases, contenders, tables and goals of the Earth Mover's Distance in the GPU report. All times here are made up."""

import sys

import gpu_comparison
import gpu_emd as operator
import pytest
import torch
from gpu_comparison import Contender, Outcome
from harness import Timing

from fewshot_ext._extras import is_installed

SMALL = "uniform,4,5"


def test_jobs_with_goals_come_first():
    jobs = operator.jobs(quick=False)
    assert jobs[:2] == ["deepemd,375,25", "deepemd,100000,25"]
    assert len(jobs) == len(set(jobs)) == len({operator.title(job) for job in jobs})
    assert operator.parse(jobs[1]) == ("deepemd", 100_000, 25)
    assert operator.title(jobs[1]) == "100,000 problems of 25 x 25, deepemd data"


def inputs(seed=0):
    return operator.Inputs(SMALL, torch.device("cpu"), seed)


@pytest.mark.parametrize("solver", (operator.ours, operator.forward, operator.on_host, operator.pot))
def test_results_are_values_and_flows_in_fresh_memory(solver):
    if solver is operator.pot:
        pytest.importorskip("ot")
    given = inputs()
    first, second = given.run(solver), given.run(solver)
    for result, again, exact in zip(first, second, given.exact(None), strict=True):
        torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-6)
        assert result.data_ptr() != again.data_ptr() and not result.requires_grad
    assert not any(tensor.requires_grad for tensor in given.problem)


def test_sets_of_inputs_differ():
    assert not torch.equal(inputs(0).problem[0], inputs(1).problem[0])


def named(job, device="cuda"):
    return {contender.name: contender for contender in operator.contenders(job, device)}


def test_kernels_are_told_apart():
    warps, blocks = (named(f"deepemd,375,{points}")[operator.OURS].kernel for points in (25, 49))
    assert warps != blocks == named("deepemd,375,196")[operator.FORWARD].kernel
    assert operator.HOST not in named(SMALL, "cpu")  # a rehearsal would time the same thing twice


def test_peers_that_are_missing_say_why(monkeypatch):
    monkeypatch.setattr(operator, "is_installed", lambda module: False)
    assert named(SMALL)[operator.POT].missing == "POT is not installed"
    monkeypatch.setattr(operator, "is_installed", lambda module: True)
    assert "beyond 1000 problems" in named(operator.BATCH_OF_25)[operator.POT].missing
    monkeypatch.setitem(sys.modules, "ot", None)
    assert "ot" in named(SMALL)[operator.POT].missing


def test_the_floor_is_the_traffic():
    assert operator.bytes_moved("uniform,10,3") == 4 * 10 * (9 + 6 + 1 + 9 + 6 + 5 + 1)
    assert operator.floors("uniform,10,3", {"copy_gb_per_s": 1.0}) == {"floor_ms": pytest.approx(1480e-6)}
    assert operator.floors("uniform,10,3", {}) == {"floor_ms": 0.0}


def rows_of(job, times, rates=True):
    """Rows as the worker makes them, from made-up milliseconds: contender -> kind -> time, or a note."""
    outcomes = []
    for name, known in times.items():
        outcome = Outcome(Contender(name))
        if isinstance(known, str):
            outcome.notes.append(known)
        else:
            outcome.error, outcome.memory = 1e-7, 1 << 20
            outcome.timings = {kind: Timing(0.9 * time, time, 1.2 * time, 9) for kind, time in known.items()}
        outcomes.append(outcome)
    common = {"case": operator.title(job), "problems": operator.parse(job)[1], "pivots": "21.8", "input_sets": 2}
    return gpu_comparison.of_outcomes(
        outcomes, operator.OURS, common, operator.floors(job, {"copy_gb_per_s": 3000.0} if rates else {})
    )


def test_the_table_tells_of_pivots_and_the_rate():
    times = {operator.OURS: {"graph": 0.08}, operator.FORWARD: {"graph": 0.05}, operator.POT: "a|b"}
    text = operator.tables(rows_of(operator.EPISODE_OF_25, times))
    assert "### 375 problems of 25 x 25, deepemd data" in text
    assert "21.8 pivots a problem; floor 0.700 us. 7.50 million problems a second, forward alone." in text
    assert f"| {operator.POT} |  |  |  |  |  |  |  | a\\|b |" in text
    assert "floor not measured" in operator.tables(rows_of(operator.EPISODE_OF_25, times, rates=False))


@pytest.mark.parametrize("time, met", ((0.06, True), (0.061, False)))
def test_goal_of_an_episode(time, met):
    goals = operator.goals(rows_of(operator.EPISODE_OF_25, {operator.OURS: {}, operator.FORWARD: {"graph": time}}))
    assert [goal.met for goal in goals] == [met, None]
    assert goals[0].measured == f"{1e3 * time:.1f} us"


@pytest.mark.parametrize("time, met", ((19.9, True), (20.1, False)))
def test_goal_of_a_long_batch(time, met):
    goals = operator.goals(rows_of(operator.BATCH_OF_25, {operator.OURS: {}, operator.FORWARD: {"graph": time}}))
    assert [goal.met for goal in goals] == [None, met]


def test_goals_that_nobody_measured_are_not_measured():
    assert [goal.met for goal in operator.goals([])] == [None, None]


def test_a_whole_job_on_the_rehearsal_device(one_thread):
    class Bench:
        device, quick, seconds, rates = gpu_comparison.RehearsalOnCpu(), True, 0.0, {}

        def begin(self, *arguments, **settings):
            pass

        def left_out(self, *arguments):
            return None

        def remaining(self):
            return 0.0

    rows = operator.measure(SMALL, Bench())
    by_contender = {row["contender"]: row for row in rows}
    for name in (operator.OURS, operator.FORWARD, *([operator.POT] if is_installed("ot") else [])):
        assert by_contender[name]["note"] == "" and float(by_contender[name]["p50_ms"]) > 0
        assert float(by_contender[name]["relative_error"]) < 1e-6
        assert by_contender[name]["times_floor"] == ""
    assert float(by_contender[operator.OURS]["pivots"]) >= 0
