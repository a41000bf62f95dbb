"""Singular values of embeddings, what is told of them, and that the coding rate agrees with them."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fewshot_ext import coding_rate
from fewshot_ext.retrieval import effective_rank, measure_spread, singular_spectrum, spectral_decay

pytestmark = pytest.mark.usefixtures("one_thread")


def embeddings(count, dimensions, seed=0, dtype=torch.float64):
    return torch.randn(count, dimensions, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 1000), st.sampled_from([torch.float32, torch.float64]))
def test_they_are_those_of_the_normalized_matrix(count, dimensions, seed, dtype):
    points = embeddings(count, dimensions, seed, dtype)
    found = singular_spectrum(points)
    expected = torch.linalg.svdvals(F.normalize(points.double(), dim=1)) / math.sqrt(count)
    assert found.dtype == torch.float64
    assert found.shape == (dimensions,)
    torch.testing.assert_close(found[: len(expected)], expected, atol=1e-6, rtol=1e-5)
    assert found[len(expected) :].abs().max() < 1e-6 if dimensions > count else True
    assert found.square().sum().item() == pytest.approx(1, abs=1e-5)


@given(st.integers(1, 30), st.integers(1, 12), st.floats(0.1, 2))
def test_the_coding_rate_follows_from_them(count, dimensions, eps):
    points = embeddings(count, dimensions)
    spread = measure_spread(points, eps)
    expected = 0.5 * torch.log1p(dimensions * spread.spectrum.square() / eps**2).sum().item()
    assert spread.coding_rate == pytest.approx(expected, rel=1e-6)
    assert spread.coding_rate == pytest.approx(coding_rate(F.normalize(points, dim=1), eps).item(), rel=1e-9)


def test_lengths_do_not_count():
    points = embeddings(20, 5)
    torch.testing.assert_close(
        singular_spectrum(points * torch.rand(20, 1).double().add(0.1)), singular_spectrum(points)
    )


def test_a_collapsed_and_an_even_spectrum():
    even, one = torch.eye(4).repeat(3, 1), torch.eye(4)[[0] * 12]
    assert effective_rank(singular_spectrum(even)) == pytest.approx(4)
    assert spectral_decay(singular_spectrum(even)) == pytest.approx(0, abs=1e-6)
    assert effective_rank(singular_spectrum(one)) == pytest.approx(1)
    assert spectral_decay(singular_spectrum(one)) > 5
    assert measure_spread(even).coding_rate > measure_spread(one).coding_rate


def test_spectral_decay_is_the_divergence_of_the_uniform_distribution():
    spectrum = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    uniform = torch.full((3,), 1 / 3, dtype=torch.float64)
    assert spectral_decay(7 * spectrum) == pytest.approx(F.kl_div(spectrum.log(), uniform, reduction="sum").item())


def test_a_row_is_plain():
    row = measure_spread(embeddings(10, 3)).row()
    assert list(row) == ["coding_rate", "effective_rank", "spectral_decay", "spectrum"]
    assert [type(value) for value in row["spectrum"]] == [float] * 3


def test_a_row_with_an_empty_direction_is_strict_json():
    spread = measure_spread(torch.eye(4)[[0, 1] * 6])
    assert spread.spectral_decay == float("inf")
    assert spread.row()["spectral_decay"] is None
    json.dumps(spread.row(), allow_nan=False)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_types_are_measured_in_float32(half):
    points = embeddings(30, 4).to(half)
    torch.testing.assert_close(singular_spectrum(points), singular_spectrum(points.float()))


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (torch.ones(3), r"embeddings: expected shape \[n, D\]"),
        (torch.ones(0, 3), "embeddings: expected shape"),
        (torch.tensor([[1.0, math.nan]]), "embeddings: expected finite entries"),
    ],
)
def test_bad_embeddings(points, message):
    for measure in (singular_spectrum, measure_spread):
        with pytest.raises(ValueError, match=message):
            measure(points)


def test_a_bad_distortion():
    with pytest.raises(ValueError, match="eps"):
        measure_spread(torch.eye(2), 0.0)
