import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewshot_ext import coding_rate, rate_reduction, reference

from .coding_rate_case import drawn_embeddings


def by_the_formula(embeddings, labels, eps):
    """Class by class, from the reference."""
    embeddings = embeddings.double()
    rates = torch.stack([reference.coding_rate(embeddings[labels == label], eps) for label in labels.unique()])
    shares = labels.unique(return_counts=True)[1].double() / len(labels)
    expansion = reference.coding_rate(embeddings, eps)
    compression = (shares * rates).sum()
    return expansion - compression, expansion, compression, rates


@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=8),
    dimensions=st.integers(1, 10),
    dtype=st.sampled_from((torch.float64, torch.float32, torch.bfloat16)),
    eps=st.sampled_from((0.25, 0.5, 2.0)),
    seed=st.integers(0, 2**32),
)
def test_equals_the_formula(sizes, dimensions, dtype, eps, seed):
    generator = torch.Generator().manual_seed(seed)
    names = 1000 * torch.randperm(len(sizes), generator=generator) - 3000
    labels = names.repeat_interleave(torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    embeddings = drawn_embeddings("unit rows", len(labels), dimensions, seed=seed).to(dtype).requires_grad_()
    leaf = embeddings.detach().double().requires_grad_()

    found, expected = rate_reduction(embeddings, labels, eps), by_the_formula(leaf, labels, eps)
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    for part, value in zip(found[:4], expected, strict=True):
        assert part.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(part.double(), value, **tolerance)
    assert torch.equal(found.classes, labels.unique())

    for part, value in zip(found[:3], expected, strict=False):
        (gradient,) = torch.autograd.grad(part, embeddings, retain_graph=True)
        (expected_gradient,) = torch.autograd.grad(value, leaf, retain_graph=True)
        loose = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else tolerance
        torch.testing.assert_close(gradient.double(), expected_gradient, **loose)


def test_second_derivatives():
    labels = torch.tensor([4, 1, 4, 4, 1, 7])
    embeddings = drawn_embeddings("normal", 6, 3).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda rows: rate_reduction(rows, labels).reduction, (embeddings,))


def test_gradients_of_vmap_and_vmap_of_gradients():
    labels = torch.tensor([4, 1, 4, 4, 1, 7])
    embeddings = torch.stack([drawn_embeddings("normal", 6, 3, seed=seed) for seed in range(3)])

    def reduction(rows):
        return rate_reduction(rows, labels).reduction

    expected = torch.stack([torch.func.grad(reduction)(rows) for rows in embeddings])
    mapped = torch.func.vmap(reduction)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(reduction))(embeddings), expected)
    torch.testing.assert_close(torch.func.grad(lambda rows: mapped(rows).sum())(embeddings), expected)
    torch.testing.assert_close(torch.func.jacrev(mapped)(embeddings).sum(0), expected)


def test_orthogonal_classes_reduce_most():
    """Four directions by classes of two, against the same four shared by all."""
    labels = torch.tensor([0, 0, 1, 1])
    apart = rate_reduction(torch.eye(4), labels)
    one_class = rate_reduction(torch.eye(4), torch.zeros(4, dtype=torch.int64))
    alone = rate_reduction(torch.eye(4), torch.arange(4))
    assert apart.reduction.item() == pytest.approx(2 * math.log(5) - math.log(9))
    assert one_class.reduction == 0
    assert alone.reduction.item() == pytest.approx(2 * math.log(5) - math.log(17) / 2)


def test_no_samples():
    found = rate_reduction(torch.zeros(0, 5, requires_grad=True), torch.zeros(0, dtype=torch.int64))
    assert [part.item() for part in found[:3]] == [0, 0, 0]
    assert found.class_rates.shape == found.classes.shape == (0,)


def test_one_large_class_does_not_pad_the_small_ones():
    """A thousand classes of two beside one of two thousand: padded to one size they would take 8 GB."""
    labels = torch.cat([torch.arange(1000).repeat(2), torch.full((2000,), 1000)])
    embeddings = drawn_embeddings("unit rows", 4000, 4).float()
    with torch.profiler.profile(profile_memory=True) as profile:
        found = rate_reduction(embeddings, labels)
    assert sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages()) < 8 << 20
    torch.testing.assert_close(found.class_rates[1000], coding_rate(embeddings[2000:]))
    torch.testing.assert_close(found.class_rates[17], coding_rate(embeddings[[17, 1017]]))


@pytest.mark.parametrize(
    "change, error, message",
    (
        ({"embeddings": [[1.0]]}, TypeError, "embeddings: expected a tensor [n, D], got list"),
        ({"embeddings": torch.zeros(2, 4, 3)}, ValueError, "embeddings: expected shape [n, D], got [2, 4, 3]"),
        ({"embeddings": torch.zeros(4, 3).long()}, TypeError, "embeddings: expected dtype float32"),
        ({"labels": [0, 1]}, TypeError, "labels: expected a tensor [n], got list"),
        ({"labels": torch.zeros(4, 1).long()}, ValueError, "labels: expected shape [n], got [4, 1]"),
        ({"labels": torch.zeros(4)}, TypeError, "labels: expected dtype torch.int64, got torch.float32"),
        ({"labels": torch.zeros(5).long()}, ValueError, "labels: expected shape [4] to fit embeddings, got [5]"),
        ({"labels": torch.zeros(4, device="meta").long()}, ValueError, "labels: expected device cpu"),
        ({"eps": 0.0}, ValueError, "eps: expected a number above 0, got 0.0"),
        ({"eps": "small"}, TypeError, "eps: expected a number, got str"),
    ),
)
def test_bad_input(change, error, message):
    arguments = {"embeddings": torch.zeros(4, 3), "labels": torch.zeros(4).long(), **change}
    with pytest.raises(error) as raised:
        rate_reduction(**arguments)
    assert message in str(raised.value)
