import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewshot_ext.experiments.measures import (
    class_centers,
    discriminative_function,
    inter_class_variance,
    intra_class_variance,
    measure_discriminability,
)


@st.composite
def labeled_features(draw, least_classes=2):
    """Features of random size, with a class more than once here and there."""
    classes, dimension = draw(st.integers(least_classes, 6)), draw(st.integers(1, 5))
    extra = draw(st.lists(st.integers(0, classes - 1), max_size=12))
    labels = torch.tensor([*range(classes), *extra])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    order = torch.randperm(len(labels), generator=generator)
    features = torch.randn(len(labels), dimension, generator=generator, dtype=torch.float64)
    return features, labels[order]


def slow(features, labels):
    """Equations 2 to 4 as they are written, one class and one image at a time."""
    unit = [z / z.norm() for z in features]
    classes = int(labels.max()) + 1
    members = [[z for z, label in zip(unit, labels, strict=True) if label == j] for j in range(classes)]
    centers = [sum(own) / len(own) for own in members]
    inter = sum((centers[j] - centers[k]).square().sum() for j in range(classes) for k in range(classes) if j != k) / (
        classes * (classes - 1)
    )
    intra = sum(
        sum((z - center).square().sum() for z in own) / len(own) for own, center in zip(members, centers, strict=True)
    )
    return centers, inter, intra / classes


@given(labeled_features())
def test_equal_to_the_equations_as_they_are_written(case):
    features, labels = case
    centers, inter, intra = slow(features, labels)
    torch.testing.assert_close(class_centers(features, labels), torch.stack(centers))
    torch.testing.assert_close(inter_class_variance(features, labels), inter)
    torch.testing.assert_close(intra_class_variance(features, labels), intra)
    if intra > 1e-9:
        torch.testing.assert_close(discriminative_function(features, labels), inter / intra)


@given(labeled_features(), st.floats(0.1, 10))
def test_neither_lengths_nor_a_rotation_nor_the_order_matter(case, length):
    features, labels = case
    before = inter_class_variance(features, labels), intra_class_variance(features, labels)
    rotation, _ = torch.linalg.qr(torch.randn(features.shape[1], features.shape[1], dtype=torch.float64))
    order = torch.randperm(len(labels))
    moved = (length * features @ rotation)[order]
    torch.testing.assert_close(inter_class_variance(moved, labels[order]), before[0])
    torch.testing.assert_close(intra_class_variance(moved, labels[order]), before[1])


@given(labeled_features())
def test_ranges_of_unit_vectors(case):
    features, labels = case
    assert 0 <= inter_class_variance(features, labels) <= 4 + 1e-9
    assert 0 <= intra_class_variance(features, labels) <= 1 + 1e-9


@given(labeled_features(least_classes=3))
def test_intervals_are_those_of_leaving_out_each_class(case):
    features, labels = case
    found = measure_discriminability(features, labels)
    classes = int(labels.max()) + 1
    without = []
    for j in range(classes):
        kept = labels != j
        relabeled = labels[kept] - (labels[kept] > j).long()
        without.append(
            (inter_class_variance(features[kept], relabeled), intra_class_variance(features[kept], relabeled))
        )
    for column, (value, interval) in enumerate(
        ((found.inter, found.inter_interval), (found.intra, found.intra_interval))
    ):
        left = torch.stack([row[column] for row in without])
        error = ((classes - 1) * (left - left.mean()).square().mean()).sqrt()
        assert interval == pytest.approx(1.96 * error.item(), rel=1e-6, abs=1e-9)
        assert value == pytest.approx(slow(features, labels)[column + 1].item(), abs=1e-12)
    if found.intra > 1e-9:
        assert found.ratio == pytest.approx(found.inter / found.intra)


def test_a_common_direction_does_not_eat_the_digits():
    features = torch.tensor([[1.0, 1e-4], [1.0, -1e-4]], dtype=torch.float32)
    found = inter_class_variance(features, torch.tensor([0, 1]))
    assert found.item() == pytest.approx(4e-8, rel=1e-4)


def test_gradients_flow():
    features = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    assert torch.autograd.gradcheck(lambda x: discriminative_function(x, labels), features)


def test_a_zero_vector_counts_as_zero():
    assert class_centers(torch.zeros(2, 3), torch.tensor([0, 0])).abs().sum() == 0


TWO, LABELS = torch.eye(2), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("features", "labels", "error", "message"),
    [
        ([[1.0]], LABELS, TypeError, "features: expected a float32 or float64 tensor, got list"),
        (TWO.half(), LABELS, TypeError, "features: expected .* got torch.float16"),
        (torch.ones(2), LABELS, ValueError, r"features: expected shape \[N, D\] with N at least 1, got \[2\]"),
        (
            torch.ones(0, 2),
            LABELS[:0],
            ValueError,
            r"features: expected shape \[N, D\] with N at least 1, got \[0, 2\]",
        ),
        (TWO, [0, 1], TypeError, "labels: expected a tensor .*, got list"),
        (TWO, LABELS.int(), TypeError, "labels: expected dtype torch.int64, got torch.int32"),
        (TWO, LABELS[:1], ValueError, r"labels: expected shape \[2\], got \[1\]"),
        (TWO, LABELS - 1, ValueError, "labels: expected no negative value, got -1"),
        (TWO, LABELS * 2, ValueError, "class 1 has no images"),
        (TWO, LABELS * 0, ValueError, "labels: expected at least 2 classes, got 1"),
    ],
)
def test_bad_input_is_named(features, labels, error, message):
    with pytest.raises(error, match=message):
        inter_class_variance(features, labels)


def test_intervals_need_three_classes():
    with pytest.raises(ValueError, match="at least 3 classes, got 2"):
        measure_discriminability(TWO, LABELS)
