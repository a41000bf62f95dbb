import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewshot_ext.experiments.measures import angle_histogram, count_peaks


def around(*degrees, spread=2.0, images=200):
    """Features about these directions, by a fixed generator."""
    generator = torch.Generator().manual_seed(0)
    angles = torch.cat([torch.randn(images, generator=generator) * spread + center for center in degrees])
    radians = angles * (math.pi / 180)
    return torch.stack([radians.cos(), radians.sin()], 1) * 3.0


@given(st.lists(st.floats(-179.9, 179.9), min_size=1, max_size=30), st.integers(1, 50))
def test_histogram_counts_each_direction_once(degrees, bins):
    radians = torch.tensor(degrees, dtype=torch.float64) * (math.pi / 180)
    found = angle_histogram(torch.stack([radians.cos(), radians.sin()], 1), bins)
    assert found.sum().item() == pytest.approx(1.0)
    expected = torch.zeros(bins, dtype=torch.float64)
    for value in torch.atan2(radians.sin(), radians.cos()).tolist():
        expected[int((value + math.pi) * (bins / (2 * math.pi))) % bins] += 1 / len(degrees)
    torch.testing.assert_close(found, expected)


def test_the_seam_of_the_circle():
    both = torch.tensor([[-1.0, 0.0], [-1.0, -0.0]])
    assert angle_histogram(both, 4).tolist() == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("directions", "peaks"), [((0,), 1), ((180,), 1), ((0, 90), 2), ((-120, 0, 120), 3), ((0, 5), 1)]
)
def test_peaks(directions, peaks):
    assert count_peaks(angle_histogram(around(*directions), 180)) == peaks


def test_a_small_peak_counts_by_its_height():
    histogram = angle_histogram(torch.cat([around(0, images=1000), around(90, images=50)]), 180)
    assert count_peaks(histogram, least=0.1) == 1
    assert count_peaks(histogram, least=0.01) == 2


def test_a_flat_histogram_has_one_peak():
    assert count_peaks(torch.full((90,), 1 / 90)) == 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: angle_histogram([[1.0, 0.0]]), TypeError, "features: expected a tensor of floating dtype, got list"),
        (lambda: angle_histogram(torch.ones(2, 2).long()), TypeError, "got torch.int64"),
        (lambda: angle_histogram(torch.ones(2, 3)), ValueError, r"features: expected shape \[N, 2\] .* got \[2, 3\]"),
        (lambda: angle_histogram(torch.ones(0, 2)), ValueError, r"with N at least 1"),
        (lambda: angle_histogram(torch.ones(1, 2), 0), ValueError, "bins: expected at least 1, got 0"),
        (lambda: count_peaks(torch.ones(2, 2)), ValueError, r"histogram: expected shape \[bins\], got \[2, 2\]"),
        (lambda: count_peaks(torch.ones(4), width=0.0), ValueError, "width: expected a number above 0"),
        (lambda: count_peaks(torch.ones(4), least=1.0), ValueError, r"least: expected a number in \[0, 1\)"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
