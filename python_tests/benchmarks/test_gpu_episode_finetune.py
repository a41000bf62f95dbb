"""Cases, contenders, tables and goals of the fine-tuning part of the GPU report. All times here are made up."""

import gpu_comparison
import gpu_episode_finetune as operator
import pytest
import torch
from episode_finetune_peers import batched
from gpu_comparison import Contender, Outcome
from harness import Timing

from fewshot_ext import reference

CASE = operator.title(operator.GOAL_JOB)


@pytest.fixture(scope="module")
def inputs():
    return operator.Inputs("1,16", True, torch.device("cpu"), torch.Generator().manual_seed(0))


def test_jobs_with_goals_come_first():
    assert operator.jobs(quick=False)[0] == operator.jobs(quick=True)[0] == operator.GOAL_JOB
    assert CASE == "5-way 5-shot, D = 512"


def test_what_the_peers_compute_is_the_loop_of_torch_sgd(inputs):
    double = [x.double() if x.is_floating_point() else x for x in inputs.tensors]
    expected = reference.finetune_episodes(*double[:3], weight=double[3], order=double[4])
    torch.testing.assert_close(batched(*double), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(inputs.exact(None)[0], expected, rtol=1e-10, atol=1e-12)
    for function in (operator.ours, batched):
        torch.testing.assert_close(inputs.run(function)[0].double(), expected, rtol=1e-4, atol=1e-6)


def test_floor_counts_every_tensor_once(inputs):
    support, target, query, weight, order = inputs.tensors
    floats = support.numel() + query.numel() + weight.numel() + query.shape[0] * query.shape[1] * 5
    assert inputs.nbytes() == 4 * floats + 8 * (target.numel() + order.numel())


def test_both_forms_are_forced_on_a_gpu():
    found = {contender.name: contender for contender in operator.contenders("cuda")}
    assert found[operator.SPAN].environment == {"FEWSHOT_EXT_EPISODE_FINETUNE_FORM": "span"}
    assert found[operator.DIRECT].environment == {"FEWSHOT_EXT_EPISODE_FINETUNE_FORM": "direct"}
    assert found[operator.OURS].kernel == found[operator.SPAN].kernel
    assert operator.SPAN not in {contender.name for contender in operator.contenders("cpu")}


def outcomes(*times):
    """Outcomes of ours, plain PyTorch and torch.compile with such medians; None was not timed."""
    for name, time in zip((operator.OURS, operator.PLAIN, operator.COMPILED), times, strict=True):
        outcome = Outcome(Contender(name), notes=[] if time else ["broken"], error=1e-7)
        if time:
            outcome.timings = {kind: Timing(time - 0.1, time, time + 0.1, 9) for kind in ("graph", "stream")}
        yield outcome


def made_up(*times, floor=0.25):
    common = {"case": CASE, "input_sets": 2}
    return gpu_comparison.of_outcomes(list(outcomes(*times)), operator.OURS, common, {"floor_ms": floor})


def test_rows_and_tables():
    rows = made_up(0.5, 2.0, None)
    assert [row["timing"] for row in rows] == ["graph", "stream", "graph", "stream", ""]
    assert rows[0]["times_floor"] == "2.000" and rows[2]["times_fewshot_ext"] == "4.000"
    text = operator.tables(rows)
    assert f"### {CASE}\n\nFloor 250 us." in text
    assert "| fewshot_ext | 500 | 400 - 600 | 2.000 | 500 | 400 - 600 |" in text and "| broken |" in text
    assert "Floor not measured." in operator.tables(made_up(0.5, 2.0, None, floor=0.0))


@pytest.mark.parametrize(
    ("times", "met"),
    [((0.5, 2.0, 3.0), [True, True]), ((6.0, 2.0, None), [False, False]), ((None, 2.0, 3.0), [None, None])],
)
def test_goals(times, met):
    assert [goal.met for goal in operator.goals(made_up(*times))] == met
    assert [goal.met for goal in operator.goals([])] == [None, None]
