"""The oracle itself, against equation 1 of the paper written as a loop over samples and classes."""

import math

import pytest
import torch

from fewshot_ext import reference

LABELS = (0, 3, -1, 2, 3)
IGNORED = -1


def loop(similarity, margin, scale, label_smoothing):
    """Loss of every row as the equation reads, for a similarity function; 0 where the label is ignored."""
    losses = []
    for i, label in enumerate(LABELS):
        if label == IGNORED:
            losses.append(0.0)
            continue
        scores = [similarity(i, j) - (margin if j == label else 0.0) for j in range(4)]
        total = sum(math.exp(scale * score) for score in scores)
        surprise = [-math.log(math.exp(scale * score) / total) for score in scores]
        losses.append((1 - label_smoothing) * surprise[label] + label_smoothing * sum(surprise) / len(scores))
    return losses


@pytest.mark.parametrize("label_smoothing", (0.0, 0.2))
@pytest.mark.parametrize("margin", (-0.3, 0.0, 0.4))
@pytest.mark.parametrize("name", ("margin_cosine_loss", "margin_softmax_loss"))
def test_equals_equation_1(name, margin, label_smoothing):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(5, 3, dtype=torch.float64, generator=generator)
    weight = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    target = torch.tensor(LABELS)

    def product(i, j):
        return sum(x * w for x, w in zip(features[i].tolist(), weight[j].tolist(), strict=True))

    def cosine(i, j):
        return product(i, j) / math.hypot(*features[i].tolist()) / math.hypot(*weight[j].tolist())

    similarity = cosine if name == "margin_cosine_loss" else product
    rows = loop(similarity, margin, 3.0, label_smoothing)
    options = {"ignore_index": IGNORED, "label_smoothing": label_smoothing}
    expected = {"none": rows, "sum": sum(rows), "mean": sum(rows) / sum(label != IGNORED for label in LABELS)}
    for reduction, value in expected.items():
        found = getattr(reference, name)(features, weight, target, margin, 3.0, reduction=reduction, **options)
        torch.testing.assert_close(found, torch.tensor(value, dtype=torch.float64))

    _, prediction = getattr(reference, name)(features, weight, target, return_prediction=True, **options)
    assert prediction.tolist() == [max(range(4), key=lambda j: similarity(i, j)) for i in range(5)]
