import math

import pytest

from fewshot_ext.training import warmup_cosine

# The paper's run on CUB: 200 epochs, 50 of them warm-up, one step an epoch here.
CUB = {"total_steps": 200, "warmup_steps": 50, "peak": 3e-3, "minimum": 1e-6, "warmup_multiplier": 16.0}


def test_warmup_is_linear_from_a_sixteenth():
    assert warmup_cosine(0, **CUB) == pytest.approx(3e-3 / 16)
    assert warmup_cosine(25, **CUB) == pytest.approx((3e-3 / 16 + 3e-3) / 2)
    assert warmup_cosine(50, **CUB) == pytest.approx(3e-3)


@pytest.mark.parametrize("epoch", [50, 87, 125, 199, 200])
def test_then_half_a_cosine_to_the_minimum(epoch):
    angle = math.pi * (epoch - 50) / 150
    expected = 1e-6 + (3e-3 - 1e-6) * (1 + math.cos(angle)) / 2
    assert warmup_cosine(epoch, **CUB) == pytest.approx(expected, rel=1e-12)


def test_it_ends_at_the_minimum_and_stays():
    assert warmup_cosine(200, **CUB) == pytest.approx(1e-6)
    assert warmup_cosine(1000, **CUB) == pytest.approx(1e-6)


def test_without_warmup_it_starts_at_the_peak():
    assert warmup_cosine(0, **{**CUB, "warmup_steps": 0}) == pytest.approx(3e-3)
