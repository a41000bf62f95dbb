import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fewshot_ext.experiments.measures import (
    MarginMeasures,
    base_class_probabilities,
    check_proposition,
    same_class_probability,
)


def slow(similarities, labels, scale):
    """Equation 5 as it is written."""
    table = []
    for j in range(int(labels.max()) + 1):
        members = [row for row, label in zip(similarities.tolist(), labels.tolist(), strict=True) if label == j]
        sums = [0.0] * similarities.shape[1]
        for row in members:
            total = sum(math.exp(scale * value) for value in row)
            sums = [s + math.exp(scale * value) / total for s, value in zip(sums, row, strict=True)]
        table.append([s / len(members) for s in sums])
    return torch.tensor(table, dtype=torch.float64)


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 10), st.floats(0.1, 30), st.integers(0, 2**31))
def test_equal_to_the_equation_as_it_is_written(classes, base, extra, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(classes), torch.randint(classes, (extra,), generator=generator)])
    similarities = torch.rand(len(labels), base, generator=generator, dtype=torch.float64) * 2 - 1
    found = base_class_probabilities(similarities, labels, scale)
    torch.testing.assert_close(found, slow(similarities, labels, scale))
    own = same_class_probability(found)
    torch.testing.assert_close(own, torch.tensor([sum(p * p for p in row) for row in found.tolist()]).double())
    assert (own >= 1 / base - 1e-9).all()
    assert (own <= 1 + 1e-9).all()


def test_large_scales_do_not_overflow():
    found = base_class_probabilities(torch.tensor([[1.0, -1.0]]), torch.tensor([0]), scale=1e4)
    assert found.tolist() == [[1.0, 0.0]]


def test_gradients_flow():
    similarities = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 0, 1, 1])
    assert torch.autograd.gradcheck(
        lambda x: same_class_probability(base_class_probabilities(x, labels, 5.0)), similarities
    )


ONE = torch.zeros(1, 2)


@pytest.mark.parametrize(
    ("similarities", "labels", "scale", "error", "message"),
    [
        ([[0.0]], torch.tensor([0]), 1.0, TypeError, "similarities: expected a float32 or float64 tensor, got list"),
        (ONE.half(), torch.tensor([0]), 1.0, TypeError, "got torch.float16"),
        (ONE[0], torch.tensor([0]), 1.0, ValueError, r"similarities: expected shape \[N, B\]"),
        (torch.zeros(1, 0), torch.tensor([0]), 1.0, ValueError, r"similarities: expected shape \[N, B\]"),
        (ONE, torch.tensor([0]), 0.0, ValueError, "scale: expected a number above 0, got 0.0"),
        (ONE, torch.tensor([1]), 1.0, ValueError, "class 0 has no images"),
        (ONE, torch.tensor([0, 0]), 1.0, ValueError, r"labels: expected shape \[1\], got \[2\]"),
    ],
)
def test_bad_input_is_named(similarities, labels, scale, error, message):
    with pytest.raises(error, match=message):
        base_class_probabilities(similarities, labels, scale)


def test_probabilities_of_one_class_alone_are_refused():
    with pytest.raises(ValueError, match=r"probabilities: expected shape \[C, B\], got \[3\]"):
        same_class_probability(torch.ones(3))


positive = st.floats(0.05, 4)


@st.composite
def modeled(draw, margin):
    """Measures whose D_intra of novel classes is what the proof takes it to be, up to one P^s for both margins."""
    return MarginMeasures(margin, draw(positive), draw(positive), draw(positive), 1.0, 0.5)


@given(modeled(-0.3), modeled(0.2), st.floats(0.01, 0.99))
def test_the_proposition_is_true_where_the_model_of_its_proof_is(smaller, larger, same_class):
    smaller, larger = (
        replace(one, same_class=same_class, novel_intra=replace(one, same_class=same_class).modeled_novel_intra)
        for one in (smaller, larger)
    )
    found = check_proposition(smaller, larger)
    assume(found.r > 0 and found.t > 0)
    # The bound's denominator is that of the proof's last step, whose sign decides the direction of the inequality.
    denominator = found.t * (1 - 1 / smaller.base_ratio) + found.r * smaller.inter_ratio
    assume(denominator > 1e-6 and abs(same_class - found.bound) > 1e-9)
    assert found.conclusion == (same_class < found.bound)
    assert found.premises == found.conclusion


@given(modeled(-0.3), modeled(0.2))
def test_the_bound_is_the_one_before_r_and_t_are_put_in(smaller, larger):
    found = check_proposition(smaller, larger)
    one, two = smaller.inter_ratio, larger.inter_ratio
    denominator = one * (1 - 1 / larger.base_ratio) - two * (1 - 1 / smaller.base_ratio)
    assume(abs(denominator) > 1e-6)
    assert found.bound == pytest.approx((one - two) / denominator, rel=1e-6, abs=1e-9)


LOOSE = MarginMeasures(-0.3, 1.0, 0.4, novel_inter=0.5, novel_intra=0.8, same_class=0.2)
TIGHT = MarginMeasures(0.3, 1.5, 0.2, novel_inter=0.5, novel_intra=1.3, same_class=0.2)


@pytest.mark.parametrize(
    "changed",
    [
        {"same_class": 0.9},  # above the bound
        {"base_intra": 2.0},  # phi of the base classes falls: r < 0
        {"novel_inter": 1.5},  # psi rises: t < 0
    ],
)
def test_each_premise_matters(changed):
    assert check_proposition(LOOSE, TIGHT).premises
    assert not check_proposition(LOOSE, replace(TIGHT, **changed)).premises


def test_the_larger_same_class_probability_decides():
    assert check_proposition(replace(LOOSE, same_class=0.4), TIGHT).same_class == 0.4


def test_margins_must_rise():
    with pytest.raises(ValueError, match=r"margins: expected to rise from smaller to larger, got 0.3 and -0.3"):
        check_proposition(TIGHT, LOOSE)
