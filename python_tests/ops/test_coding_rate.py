"""The coding rate beyond the contract: what the formula implies, sets that cannot be coded, and sizes."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fewshot_ext import coding_rate

from .coding_rate_case import VALUES, drawn_embeddings

SIZES = st.integers(1, 12)


@given(values=st.sampled_from(VALUES), samples=SIZES, dimensions=SIZES, seed=st.integers(0, 2**32))
def test_gradient_counts_the_directions(values, samples, dimensions, seed):
    """<Z, grad R> = n - tr M^-1, the number of directions that are coded, for M = I + alpha Z Z^T."""
    embeddings = drawn_embeddings(values, samples, dimensions, seed=seed).requires_grad_()
    (gradient,) = torch.autograd.grad(coding_rate(embeddings, alpha=3.0), embeddings)
    embeddings = embeddings.detach()
    inverse = torch.linalg.inv(torch.eye(samples, dtype=torch.float64) + 3.0 * embeddings @ embeddings.mT)
    torch.testing.assert_close((embeddings * gradient).sum(), samples - inverse.trace())


@given(values=st.sampled_from(VALUES), samples=SIZES, dimensions=SIZES, seed=st.integers(0, 2**32))
def test_sides_and_rotations_do_not_matter(values, samples, dimensions, seed):
    embeddings = drawn_embeddings(values, samples, dimensions, seed=seed)
    rotation = torch.linalg.qr(torch.randn(dimensions, dimensions, dtype=torch.float64))[0]
    expected = coding_rate(embeddings, alpha=2.0)
    torch.testing.assert_close(coding_rate(embeddings.mT, alpha=2.0), expected)
    torch.testing.assert_close(coding_rate(embeddings @ rotation, alpha=2.0), expected)
    torch.testing.assert_close(coding_rate(embeddings.flip(0), alpha=2.0), expected)


def test_orthonormal_rows_have_a_known_rate():
    """And the largest that rows of length 1 can have."""
    rows = torch.eye(6, 16, dtype=torch.float64)
    best = coding_rate(rows)
    assert best.item() == pytest.approx(6 / 2 * math.log1p(16 / (6 * 0.25)))
    others = F.normalize(
        torch.randn(50, 6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    assert (coding_rate(others) < best).all()
    assert (coding_rate(rows[:1].expand(6, -1)) < coding_rate(others)).all()


def test_batch_shapes_and_alphas():
    embeddings = drawn_embeddings("normal", 2, 3, 4, 5)
    together = coding_rate(embeddings, 0.25)
    assert together.shape == (2, 3)
    torch.testing.assert_close(together[1, 2], coding_rate(embeddings[1, 2], 0.25))
    torch.testing.assert_close(together, coding_rate(embeddings, alpha=5 / (4 * 0.25**2)))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("shape", ((5, 8), (8, 5)), ids=str)
@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
def test_a_set_that_is_not_finite_has_no_rate_and_leaves_the_others_alone(bad, shape, dtype):
    embeddings = drawn_embeddings("normal", 3, *shape).to(dtype)
    expected = coding_rate(embeddings)
    embeddings[1, 3, 2] = bad
    embeddings.requires_grad_()
    rates = coding_rate(embeddings)
    (gradient,) = torch.autograd.grad(rates.sum(), embeddings)
    torch.testing.assert_close(rates[[0, 2]], expected[[0, 2]])
    assert rates[1].isnan()
    assert gradient[[0, 2]].isfinite().all()
    assert gradient[1].isnan().all()


@pytest.mark.parametrize("shape", ((24, 64), (64, 24)), ids=str)
def test_10_gradients_of_long_sets_of_low_rank(shape):
    """In float32 arithmetic these are off by 15 %: eigenvalues of 1 stand beside one of 3e5."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(shape[0], 2, generator=generator) @ torch.randn(2, shape[1], generator=generator)
    embeddings *= (6e5 / embeddings.square().sum()).sqrt()
    embeddings.requires_grad_()
    rate = coding_rate(embeddings, alpha=1.0)
    (gradient,) = torch.autograd.grad(rate, embeddings)
    left, singular, right = np.linalg.svd(embeddings.detach().double().numpy(), full_matrices=False)
    expected = (left * (singular / (1 + singular**2))) @ right
    assert np.linalg.norm(gradient.numpy() - expected) < 1e-6 * np.linalg.norm(expected)
    assert rate.item() == pytest.approx(0.5 * np.log1p(singular**2).sum(), rel=1e-6)


@pytest.mark.parametrize("shape", ((24, 64), (64, 24)), ids=str)
def test_10_sets_too_long_for_a_right_gradient_are_refused(shape):
    """At 1e15 the gradient is off by 11 % in float64 too."""
    generator = torch.Generator().manual_seed(0)
    low_rank = torch.randn(shape[0], 2, generator=generator) @ torch.randn(2, shape[1], generator=generator)
    low_rank = low_rank.double() / low_rank.double().norm()
    sets = (torch.stack([low_rank, low_rank]) * torch.tensor([0.9e6, 3e7])[:, None, None]).requires_grad_()
    rates = coding_rate(sets, alpha=1.0)
    for create_graph in (False, True):
        (gradient,) = torch.autograd.grad(rates.sum(), sets, retain_graph=True, create_graph=create_graph)
        left, singular, right = np.linalg.svd(sets[0].detach().numpy(), full_matrices=False)
        expected = (left * (singular / (1 + singular**2))) @ right
        assert np.linalg.norm(gradient[0].detach().numpy() - expected) < 1e-3 * np.linalg.norm(expected)
        assert gradient[1].isnan().all()
    assert rates[0].isfinite()
    assert rates[1].isnan()


@pytest.mark.parametrize("shape", ((3, 4), (4, 3)), ids=str)
def test_a_failed_factorization_is_nan_and_not_the_half_that_it_managed(shape):
    """Beside 2^62 the 1 of the identity is lost in float64: the second pivot is 0."""
    collapsed = torch.zeros(2, *shape)
    collapsed[0] = 2.0**30
    collapsed.requires_grad_()
    rates = coding_rate(collapsed, alpha=1.0)
    (gradient,) = torch.autograd.grad(rates.sum(), collapsed)
    assert rates[0].isnan()
    assert gradient[0].isnan().all()
    assert rates[1] == 0
    assert (gradient[1] == 0).all()


def test_half_types_are_computed_in_float32_under_autocast_too():
    embeddings = drawn_embeddings("unit rows", 6, 40).to(torch.bfloat16)
    expected = coding_rate(embeddings.float())
    assert expected.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for given_embeddings in (embeddings, embeddings.float()):
            assert torch.equal(coding_rate(given_embeddings), expected)


@pytest.mark.parametrize("samples, dimensions", ((11_318, 64), (64, 11_318)))
def test_only_the_smaller_matrix_is_made(samples, dimensions):
    """The larger one would take 512 MB, and hours of one core."""
    embeddings = F.normalize(drawn_embeddings("normal", samples, dimensions).float(), dim=-1).requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profile:
        coding_rate(embeddings).backward()
    allocations = [event.self_cpu_memory_usage for event in profile.key_averages() if event.self_cpu_memory_usage > 0]
    assert sum(allocations) < 8 * embeddings.nbytes
