"""A mistake on one rank is one clear error on every rank, and nothing hangs."""

import datetime
import math
import os
import signal

import pytest
import torch
import torch.distributed as dist

from fewshot_ext.parallel import ClassParallelMarginLoss

from .problems import Problem
from .ranks import Ranks

PROBLEM = Problem((3, 5))


def raised(call):
    """Type and message, which travel where a traceback may not."""
    try:
        call()
    except Exception as error:
        return type(error), str(error)
    return None


def construct(rank, of_rank):
    """``of_rank``: the arguments of each rank."""
    return raised(lambda: ClassParallelMarginLoss(**{"in_features": 6, "num_classes": 11, **of_rank[rank]}))


@pytest.mark.parametrize(
    "name, first, second",
    (
        ("in_features", 6, 5),
        ("num_classes", 11, 12),
        ("margin", None, 0.1),
        ("scale", 4.0, 5.0),
        ("label_smoothing", 0.0, 0.1),
        ("ignore_index", -100, -1),
        ("reduction", "mean", "sum"),
        ("sample_rate", 1.0, 0.5),
        ("backbone_gradients", "mean", "sum"),
        ("seed", 0, 1),
        ("check", True, False),
        ("dtype", torch.float32, torch.float64),
    ),
)
def test_ranks_that_differ_in_a_setting(two_ranks, name, first, second):
    one, other = two_ranks.run(construct, ({name: first}, {name: second}))
    shown = -0.3 if first is None else first
    message = f"{name}: expected the same on every rank, got {shown} on rank 0 and {second} on rank 1"
    assert one == other == (ValueError, message)


@pytest.mark.parametrize(
    "arguments, error, message",
    (
        ({"in_features": 0}, ValueError, "in_features: expected at least 1, got 0"),
        ({"in_features": 6.0}, TypeError, "in_features: expected an integer, got float"),
        ({"num_classes": 1}, ValueError, "num_classes: expected at least 2, got 1"),
        ({"margin": math.inf}, ValueError, "margin: expected a finite number, got inf"),
        ({"scale": 0}, ValueError, "scale: expected a number above 0, got 0"),
        ({"label_smoothing": 2}, ValueError, "label_smoothing: expected a number in [0, 1], got 2"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index: expected an integer, got float"),
        ({"similarity": "l2"}, ValueError, "similarity: expected one of cosine, dot, got 'l2'"),
        ({"reduction": "max"}, ValueError, "reduction: expected one of none, mean, sum, got 'max'"),
        ({"sample_rate": 0.0}, ValueError, "sample_rate: expected a number above 0, got 0.0"),
        ({"sample_rate": 1.5}, ValueError, "sample_rate: expected a number in [0, 1], got 1.5"),
        ({"backbone_gradients": "max"}, ValueError, "backbone_gradients: expected one of mean, sum, got 'max'"),
        ({"seed": -1}, ValueError, "seed: expected at least 0, got -1"),
        ({"check": 1}, TypeError, "check: expected True or False, got int"),
        (
            {"dtype": torch.int64},
            TypeError,
            "dtype: expected dtype float32, float64, bfloat16 or float16, got torch.int64",
        ),
    ),
    ids=str,
)
def test_bad_setting_of_one_rank(two_ranks, arguments, error, message):
    assert two_ranks.run(construct, ({}, arguments)) == [(error, f"rank 1: {message}")] * 2


def step(rank, problem, change, at_rank):
    """A step in which one rank changes its arguments, and then one in which none does."""
    module = problem.module()
    features, target = (tensor[problem.own(rank)] for tensor in problem.tensors())
    arguments = {"module": module, "features": features, "target": target, "return_prediction": False}
    if rank == at_rank:
        arguments = CHANGES[change](**arguments)

    def wrong_step():
        arguments["module"](
            arguments["features"], arguments["target"], return_prediction=arguments["return_prediction"]
        )

    before = {name: value.clone() for name, value in module.state_dict().items()}
    found = raised(wrong_step)
    assert all(torch.equal(before[name].full_tensor(), v.full_tensor()) for name, v in module.state_dict().items())
    module.train().requires_grad_(True)
    assert module(features, target).isfinite()
    return found


def changed(name, change):
    return lambda **arguments: {**arguments, name: change(arguments[name])}


def with_label(label):
    return changed("target", lambda target: target.index_fill(0, torch.tensor([1]), label))


CHANGES = {
    "features a list": changed("features", lambda x: x.tolist()),
    "features narrow": changed("features", lambda x: x[:, :5]),
    "features of rank 1": changed("features", lambda x: x[0]),
    "integer features": changed("features", lambda x: x.long()),
    "float32 features": changed("features", lambda x: x.float()),
    "target short": changed("target", lambda y: y[:-1]),
    "int32 target": changed("target", lambda y: y.int()),
    "label 11": with_label(11),
    "label -2": with_label(-2),
    "flag": changed("return_prediction", lambda flag: 1),
    "wants predictions": changed("return_prediction", lambda flag: True),
    "features with gradient": changed("features", lambda x: x.clone().requires_grad_()),
    "frozen weight": changed("module", lambda module: module.requires_grad_(False)),
    "evaluation": changed("module", lambda module: module.eval()),
}


def differs(name, first, second):
    return ValueError, f"{name}: expected the same on every rank, got {first} on rank 0 and {second} on rank 1"


@pytest.mark.parametrize(
    "change, error",
    (
        ("features a list", (TypeError, "rank 1: features: expected a tensor [N, D], got list")),
        ("features narrow", (ValueError, "rank 1: weight: expected shape [C, 5] to fit features, got [5, 6]")),
        ("features of rank 1", (ValueError, "rank 1: features: expected shape [N, D], got [6]")),
        (
            "integer features",
            (
                TypeError,
                "rank 1: features: expected dtype float32, float64, bfloat16 or float16, got torch.int64",
            ),
        ),
        (
            "float32 features",
            (TypeError, "rank 1: weight: expected dtype torch.float32 as features has, got torch.float64"),
        ),
        ("target short", (ValueError, "rank 1: target: expected shape [5] to fit features, got [4]")),
        ("int32 target", (TypeError, "rank 1: target: expected dtype torch.int64, got torch.int32")),
        (
            "label 11",
            (
                ValueError,
                "rank 1: target: expected labels in [0, 11) or ignore_index = -100, got 11 at index 1",
            ),
        ),
        (
            "label -2",
            (
                ValueError,
                "rank 1: target: expected labels in [0, 11) or ignore_index = -100, got -2 at index 1",
            ),
        ),
        ("flag", (TypeError, "rank 1: return_prediction: expected True or False, got int")),
        ("wants predictions", differs("return_prediction", False, True)),
        ("features with gradient", differs("features: requires_grad", False, True)),
        ("frozen weight", differs("weight: requires_grad", True, False)),
        ("evaluation", differs("training", True, False)),
    ),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_step_of_one_rank(two_ranks, change, error):
    assert two_ranks.run(step, PROBLEM, change, 1) == [error] * 2


def no_samples(rank, reduction, check):
    module = Problem((0, 0), options={"reduction": reduction}).module(check=check)
    features = torch.empty(0, 6, dtype=torch.float64, requires_grad=True)

    def whole_step():
        loss = module(features, torch.empty(0, dtype=torch.int64))
        loss.sum().backward()
        assert loss.sum() == 0 and not module.weight.grad.full_tensor().any()

    return raised(whole_step)


@pytest.mark.parametrize("check", (True, False))
def test_no_samples_on_any_rank(two_ranks, check):
    assert two_ranks.run(no_samples, "sum", check) == [None, None]
    assert two_ranks.run(no_samples, "none", check) == [None, None]
    message = "features: got no samples on any rank, which have no mean; use reduction='sum' or 'none'"
    assert two_ranks.run(no_samples, "mean", check) == [(ValueError, message)] * 2


def unchecked_label(rank, label):
    module = PROBLEM.module(check=False)
    target = torch.tensor([0, label if rank == 1 else 1])
    return raised(lambda: module(torch.ones(2, 6, dtype=torch.float64), target))


@pytest.mark.parametrize("label", (11, -1))
def test_label_without_check(two_ranks, label):
    """The index counts the rows of all ranks: each sees all labels."""
    message = f"target: expected labels in [0, 11) or ignore_index = -100, got {label} at index 3"
    assert two_ranks.run(unchecked_label, label) == [(ValueError, message)] * 2


def outside_of_the_group(rank):
    group = dist.new_group([0])
    return raised(lambda: ClassParallelMarginLoss(6, 11, group=group)) if rank == 1 else None


def test_group_without_this_process(two_ranks):
    _, error = two_ranks.run(outside_of_the_group)
    assert error == (ValueError, "group: this process is not in it")


def test_without_a_process_group():
    with pytest.raises(RuntimeError, match=r"torch\.distributed is not initialized; call .* under torchrun"):
        ClassParallelMarginLoss(6, 11)


def stay_away(rank, seconds):
    group = dist.new_group(timeout=datetime.timedelta(seconds=seconds))
    module = PROBLEM.module(group=group)
    features, target = (tensor[PROBLEM.own(rank)] for tensor in PROBLEM.tensors())
    return raised(lambda: module(features, target)) if rank == 0 else None


def test_rank_that_does_not_come(two_ranks):
    error, _ = two_ranks.outcomes(stay_away, 2)
    assert error[0] is RuntimeError and "imed out" in error[1]


def die(rank, in_backward):
    """Rank 1 is killed where a crash or the kernel's out-of-memory killer would: between two collectives."""
    module = PROBLEM.module()
    features, target = (tensor[PROBLEM.own(rank)] for tensor in PROBLEM.tensors())
    loss = module(features, target)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return raised(loss.backward if in_backward else lambda: module(features, target))


@pytest.mark.parametrize("in_backward", (False, True), ids=("forward", "backward"))
def test_rank_that_dies(in_backward):
    ranks = Ranks(2)
    try:
        error, dead = ranks.outcomes(die, in_backward)
        assert dead is None
        assert error[0] is RuntimeError
    finally:
        ranks.stop()
