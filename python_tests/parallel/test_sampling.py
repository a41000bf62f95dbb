"""Partial FC: the softmax of a step is over the classes of the batch and a random choice of the others."""

import math

import pytest
import torch

from fewshot_ext import margin_cosine_loss

from .problems import BATCHES, Problem

RATE = 0.3


def chosen_rows(module):
    """Classes of the last step, by the gradient that they got; smoothing gives one to every class that takes part."""
    return module.weight.grad.full_tensor().any(dim=1).nonzero()[:, 0]


def step(module, features, target, **options):
    module.zero_grad()
    loss = module(features, target, **options)
    (loss[0] if isinstance(loss, tuple) else loss).backward()
    return loss


def among(rows, target, classes):
    """Labels by their place among the chosen rows."""
    place = torch.full((classes,), -1)
    place[rows] = torch.arange(len(rows))
    counted = target != -100
    assert (place[target[counted]] >= 0).all()
    return place[target.where(counted, torch.tensor(0))].where(counted, torch.tensor(-100))


def in_range(numbers, classes):
    return int(((numbers >= classes.start) & (numbers < classes.stop)).sum())


def sampled_steps(rank, problem):
    module = problem.module(sample_rate=RATE)
    features, target = problem.tensors()
    own = problem.own(rank)
    draws = []
    for _ in range(3):
        x = features[own].clone().requires_grad_()
        loss, prediction = step(module, x, target[own], return_prediction=True)
        rows = chosen_rows(module)
        draws.append(rows.tolist())

        # The loss over the chosen classes, by one process that knows no others.
        weight = module.weight.full_tensor().detach()[rows].requires_grad_()
        whole = features.clone().requires_grad_()
        expected, predictions = margin_cosine_loss(
            whole, weight, among(rows, target, problem.classes), return_prediction=True, **problem.options
        )
        expected.backward()
        close = {"rtol": 1e-10, "atol": 1e-12}
        torch.testing.assert_close(loss, expected, **close)
        torch.testing.assert_close(x.grad, len(problem.sizes) * whole.grad[own], **close)
        torch.testing.assert_close(module.weight.grad.full_tensor()[rows], weight.grad, **close)
        assert torch.equal(prediction, rows[predictions[own]])

        size, present = len(module.classes), in_range(target[target != -100].unique(), module.classes)
        assert in_range(rows, module.classes) == min(size, max(2, present, math.ceil(RATE * size)))
    assert draws[0] != draws[1] != draws[2]
    return draws


@pytest.mark.parametrize("uneven", (False, True), ids=("even", "uneven"))
def test_loss_is_that_of_the_chosen_classes(ranks, uneven):
    options = {"margin": 0.2, "scale": 5.0, "label_smoothing": 0.2}
    draws = ranks.run(sampled_steps, Problem(BATCHES[ranks.size][uneven], 60, options=options))
    assert all(draw == draws[0] for draw in draws)


def small_shards(rank, problem):
    module = problem.module(sample_rate=0.01, label_smoothing=0.1)
    features, target = problem.tensors()
    loss = step(module, features[problem.own(rank)], target[problem.own(rank)])
    rows = chosen_rows(module)
    expected = margin_cosine_loss(
        features,
        module.weight.full_tensor().detach()[rows],
        among(rows, target, problem.classes),
        label_smoothing=0.1,
    )
    torch.testing.assert_close(loss.detach(), expected)


@pytest.mark.parametrize("classes", (2, 5, 9))
def test_more_classes_in_the_batch_than_the_rate_allows(ranks, classes):
    """On some ranks all that they have, which on four may be none."""
    for sizes in BATCHES[ranks.size]:
        ranks.run(small_shards, Problem(sizes, classes))


def without_smoothing(rank, problem):
    """The kernel then does not need to know how many classes take part."""
    options = {"sample_rate": RATE, "margin": 0.2, "scale": 5.0}
    module, smoothed = problem.module(**options), problem.module(label_smoothing=0.1, **options)
    features, target = problem.tensors()
    own = problem.own(rank)
    for each in (smoothed, module):
        loss = step(each, features[own], target[own])
    rows = chosen_rows(smoothed)
    assert torch.equal(chosen_rows(module), rows)
    weight = module.weight.full_tensor()[rows].detach()
    expected = margin_cosine_loss(features, weight, among(rows, target, problem.classes), 0.2, 5.0)
    torch.testing.assert_close(loss.detach(), expected)


def test_without_smoothing(ranks):
    ranks.run(without_smoothing, Problem(BATCHES[ranks.size][1], 60))


def evaluated(rank, problem):
    module, whole = problem.module(sample_rate=RATE).eval(), problem.module()
    features, target = (tensor[problem.own(rank)] for tensor in problem.tensors())
    assert torch.equal(module(features, target), whole(features, target))
    assert module.sampling_step == 0


def test_evaluation_is_over_all_classes(two_ranks):
    two_ranks.run(evaluated, Problem((3, 5), 60))


def resumed(rank, problem):
    features, target = (tensor[problem.own(rank)] for tensor in problem.tensors())
    options = {"sample_rate": RATE, "label_smoothing": 0.1}
    unbroken = problem.module(**options)
    for _ in range(2):
        step(unbroken, features, target)
    broken_off = {name: value.clone() for name, value in unbroken.state_dict().items()}
    step(unbroken, features, target)

    again = problem.module(**options)
    again.load_state_dict(broken_off)
    step(again, features, target)
    assert torch.equal(again.weight.grad.full_tensor(), unbroken.weight.grad.full_tensor())

    other_seed = problem.module(seed=1, **options)
    other_seed.load_state_dict(broken_off)
    step(other_seed, features, target)
    assert not torch.equal(chosen_rows(other_seed), chosen_rows(unbroken))


def test_resumed_run_draws_what_the_unbroken_one_draws(two_ranks):
    two_ranks.run(resumed, Problem((3, 5), 60))


def draw_many(rank, problem, steps):
    module = problem.module(sample_rate=RATE, label_smoothing=0.1)
    features, target = (tensor[problem.own(rank)] for tensor in problem.tensors())
    counts = torch.zeros(problem.classes)
    for _ in range(steps):
        step(module, features, target)
        counts[chosen_rows(module)] += 1
    return counts.tolist()


def test_negative_classes_are_drawn_alike(two_ranks):
    problem, steps = Problem((1, 0), 41), 400
    counts, other = two_ranks.run(draw_many, problem, steps)
    assert counts == other
    (positive,) = problem.tensors()[1].tolist()
    assert counts[positive] == steps
    for shard in (range(21), range(21, 41)):
        negatives = [counts[j] for j in shard if j != positive]
        drawn = math.ceil(RATE * len(shard)) - (positive in shard)
        chance = drawn / len(negatives)
        spread = 4.5 * math.sqrt(steps * chance * (1 - chance))
        assert sum(negatives) == drawn * steps
        assert all(abs(count - steps * chance) < spread for count in negatives)
