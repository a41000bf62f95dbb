"""Loss and gradients over the ranks are those of one process."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fewshot_ext import MarginCosineLoss, MarginSoftmaxLoss
from fewshot_ext.parallel import ClassParallelMarginLoss

from .problems import BATCHES, Problem

SIMILARITIES = pytest.mark.parametrize("similarity", ("cosine", "dot"))


def compare(rank, problem, tolerances=None, **options):
    """``options`` of the module alone."""
    module = problem.module(**options)
    features, target = (tensor[problem.own(rank)] for tensor in problem.tensors())
    features.requires_grad_()
    loss, prediction = module(features, target, return_prediction=True)
    upstream = problem.upstream()
    loss.backward((upstream[problem.own(rank)] if upstream.dim() else upstream).to(loss.dtype))

    expected, predictions, features_gradient, weight_gradient = problem.in_one_process(module.weight.full_tensor())
    if expected.dim():
        expected = expected[problem.own(rank)]
    factor = 1 if options.get("backbone_gradients") == "sum" else len(problem.sizes)
    close = {"rtol": 1e-11, "atol": 1e-12} if problem.dtype == torch.float64 else tolerances or {}
    torch.testing.assert_close(loss.detach(), expected, **close)
    assert torch.equal(prediction, predictions[problem.own(rank)])
    torch.testing.assert_close(features.grad, factor * features_gradient[problem.own(rank)], **close)
    torch.testing.assert_close(module.weight.grad.full_tensor(), weight_gradient, **close)
    assert features.grad.any() or not problem.sizes[rank]


@SIMILARITIES
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("margin, smoothing", ((-0.4, 0.0), (0.3, 0.0), (0.2, 0.1), (0.0, 1.0)))
def test_every_option(ranks, similarity, reduction, margin, smoothing):
    options = {"margin": margin, "scale": 7.0, "reduction": reduction, "label_smoothing": smoothing}
    ranks.run(compare, Problem(BATCHES[ranks.size][1], similarity=similarity, options=options))


@pytest.mark.parametrize("classes", (2, 5, 8, 9, 11, 1500))
def test_uneven_shards_and_batches(ranks, classes):
    """5 classes on 4 ranks leave one of them none, 2 classes leave two; the initial weight comes in blocks of 1024."""
    for sizes in BATCHES[ranks.size]:
        ranks.run(compare, Problem(sizes, classes, options={"label_smoothing": 0.1}))


@SIMILARITIES
@pytest.mark.parametrize("ignore_index", (0, 3, -1, 1000))
def test_ignore_index(ranks, similarity, ignore_index):
    """Any number, one of a class too."""
    options = {"ignore_index": ignore_index, "reduction": "sum"}
    ranks.run(compare, Problem(BATCHES[ranks.size][1], similarity=similarity, options=options))


@SIMILARITIES
@pytest.mark.parametrize("scale", (5.0, 64.0))
def test_float32(ranks, similarity, scale):
    problem = Problem(BATCHES[ranks.size][1], 300, 64, torch.float32, similarity, {"margin": 0.2, "scale": scale})
    ranks.run(compare, problem, {"rtol": 1e-4, "atol": 1e-5})


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_types(two_ranks, dtype):
    problem = Problem((3, 5), 40, 32, dtype, options={"margin": 0.2, "scale": 10.0})
    two_ranks.run(compare, problem, {"rtol": 2 * torch.finfo(dtype).eps, "atol": torch.finfo(dtype).eps})


def test_sum_of_backbone_gradients(ranks):
    for reduction in ("mean", "none"):
        problem = Problem(BATCHES[ranks.size][1], options={"reduction": reduction})
        ranks.run(compare, problem, backbone_gradients="sum")


def test_without_check(ranks):
    ranks.run(compare, Problem(BATCHES[ranks.size][0]), check=False)


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5)).double()

    def forward(self, features):
        return self.layers(features)


def train(backbone, loss, batch, steps=4):
    """Weights after some steps with momentum, which would show a gradient that is off by a factor."""
    features, target = batch
    optimizer = torch.optim.SGD([*backbone.parameters(), *loss.parameters()], lr=0.1, momentum=0.9, weight_decay=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(backbone(features), target).backward()
        optimizer.step()
    return [parameter.detach() for parameter in backbone.parameters()]


def train_in_parallel(rank, problem, options):
    loss = ClassParallelMarginLoss(5, problem.classes, dtype=torch.float64, **options)
    one_process = MarginCosineLoss(5, problem.classes, dtype=torch.float64, **options)
    with torch.no_grad():
        one_process.weight.copy_(loss.weight.full_tensor())
    expected = train(Backbone(), one_process, problem.tensors())

    own = tuple(tensor[problem.own(rank)] for tensor in problem.tensors())
    found = train(DistributedDataParallel(Backbone()), loss, own)
    close = {"rtol": 1e-9, "atol": 1e-11}
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **close)
    torch.testing.assert_close(loss.weight.full_tensor().detach(), one_process.weight.detach(), **close)


@pytest.mark.parametrize("options", ({}, {"reduction": "sum", "scale": 3.0}), ids=("mean", "sum"))
def test_beside_ddp_equals_one_process(ranks, options):
    ranks.run(train_in_parallel, Problem(BATCHES[ranks.size][0]), options)


def autocast(rank, problem):
    module = problem.module()
    features, target = (tensor[problem.own(rank)] for tensor in problem.tensors())
    features = features.bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = module(features, target)
    loss.backward()
    torch.testing.assert_close(loss, module(features.float(), target))
    assert features.grad.dtype == torch.bfloat16 and module.weight.grad.dtype == torch.float32


def test_autocast(two_ranks):
    two_ranks.run(autocast, Problem((3, 5), dtype=torch.float32))


def only_one_of_both(rank, problem):
    features, target = (tensor[problem.own(rank)] for tensor in problem.tensors())
    module = problem.module()
    _, _, features_gradient, weight_gradient = problem.in_one_process(module.weight.full_tensor())
    module(features, target).backward(torch.tensor(1.5))
    torch.testing.assert_close(module.weight.grad.full_tensor(), weight_gradient)
    module.requires_grad_(False)
    features.requires_grad_()
    module(features, target).backward(torch.tensor(1.5))
    torch.testing.assert_close(features.grad, 2 * features_gradient[problem.own(rank)])
    with torch.no_grad():
        assert not module(features, target).requires_grad


def test_gradients_where_only_one_is_wanted(two_ranks):
    two_ranks.run(only_one_of_both, Problem((3, 5)))


def differing_upstream(rank, problem):
    features, target = (tensor[problem.own(rank)] for tensor in problem.tensors())
    module = problem.module()
    *_, weight_gradient = problem.in_one_process(module.weight.full_tensor())
    module(features, target).backward(torch.tensor(1.0 + rank))
    torch.testing.assert_close(module.weight.grad.full_tensor(), weight_gradient)


def test_upstream_gradients_are_averaged(two_ranks):
    """Of 1 and 2, one process has 1.5."""
    two_ranks.run(differing_upstream, Problem((3, 5)))


def twice(rank, problem):
    features, target = (tensor[problem.own(rank)] for tensor in problem.tensors())
    features.requires_grad_()
    module = problem.module()
    loss = module(features, target)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(loss, features, create_graph=True)


def test_second_derivatives_raise(two_ranks):
    two_ranks.run(twice, Problem((4, 4)))


def test_one_rank(one_rank):
    compare(0, Problem((8,), options={"label_smoothing": 0.1}))


def group_of_one(rank, problem):
    group = [torch.distributed.new_group([member]) for member in range(2)][rank]
    compare(0, problem, group=group)


def test_groups_within_the_default_group(two_ranks):
    two_ranks.run(group_of_one, Problem((8,)))


def initial_weight(rank, classes):
    module = ClassParallelMarginLoss(6, classes, seed=3)
    other = ClassParallelMarginLoss(6, classes, seed=4)
    assert not torch.equal(module.weight.full_tensor(), other.weight.full_tensor())
    assert [parameter.shape for parameter in module.parameters()] == [(classes, 6)]
    return module.weight.full_tensor().detach().numpy()


@pytest.mark.parametrize("classes", (11, 2500))
def test_initial_weight_is_that_of_any_number_of_ranks(one_rank, ranks, classes):
    expected = initial_weight(0, classes)
    for weight in ranks.run(initial_weight, classes):
        assert (weight == expected).all()
    rows = torch.from_numpy(expected)
    assert rows.unique(dim=0).shape == rows.shape
    assert rows.abs().max() <= 6**-0.5 and rows.abs().max() > 0.9 * 6**-0.5


def test_defaults_are_those_of_one_process(one_rank):
    for similarity, head in (("cosine", MarginCosineLoss), ("dot", MarginSoftmaxLoss)):
        module, expected = ClassParallelMarginLoss(6, 5, similarity=similarity), head(6, 5)
        for name in ("margin", "scale", "reduction", "ignore_index", "label_smoothing"):
            assert getattr(module, name) == getattr(expected, name)
