import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch import nn

from fewshot_ext.data import ImageArchive, load_digits
from fewshot_ext.evaluation import (
    Comparison,
    ComparisonConfig,
    FrozenBackbone,
    ProtocolConfig,
    calibration_errors,
    fit_temperature,
    log_losses,
)
from fewshot_ext.evaluation.calibration import TEMPERATURES

pytestmark = pytest.mark.usefixtures("one_thread")


def drawn(seed, episodes=6, queries=8, way=4, spread=2.0):
    """Logits that favor the true class somewhat, and the true classes."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(way, (queries,), generator=generator)
    logits = torch.randn(episodes, queries, way, generator=generator)
    logits[:, torch.arange(queries), target] += 1
    return spread * logits, target


def ece_by_hand(probabilities, target, bins):
    """The definition, prediction by prediction."""
    inside = [[] for _ in range(bins)]
    for episode in probabilities.double().tolist():
        for shares, label in zip(episode, target.tolist(), strict=True):
            confidence = max(shares)
            number = next(b for b in range(bins) if b / bins < confidence <= (b + 1) / bins)
            inside[number].append((confidence, shares.index(confidence) == label))
    total = sum(map(len, inside))
    gaps = [abs(sum(c for c, _ in part) - sum(right for _, right in part)) for part in inside if part]
    return sum(gaps) / total


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 20), st.floats(0.1, 10))
def test_the_calibration_error_is_its_definition(seed, bins, spread):
    logits, target = drawn(seed, spread=spread)
    shares = logits.softmax(-1)
    errors = calibration_errors(shares, target, bins)
    assert errors.shape == (6,)
    assert errors.mean().item() == pytest.approx(ece_by_hand(shares, target, bins), abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.2, 20))
def test_the_temperature_has_the_least_loss(seed, spread):
    logits, target = drawn(seed, spread=spread)
    truth = target.expand(logits.shape[:2])

    def loss(logarithm):
        scaled = logits.double() / math.exp(logarithm)
        return nn.functional.cross_entropy(scaled.flatten(0, 1), truth.flatten()).item()

    fitted = fit_temperature(logits, target)
    oracle = minimize_scalar(loss, bounds=[math.log(limit) for limit in TEMPERATURES], method="bounded")
    assert loss(math.log(fitted)) <= oracle.fun + 1e-6
    assert log_losses(logits, target, fitted).mean().item() == pytest.approx(loss(math.log(fitted)))
    assert fit_temperature(3 * logits, target) == pytest.approx(3 * fitted, rel=1e-4)


def test_what_has_no_best_temperature_gets_a_bound():
    sure = torch.tensor([[[3.0, 0.0]]])
    assert fit_temperature(sure, torch.tensor([0])) == pytest.approx(TEMPERATURES[0])
    assert fit_temperature(sure, torch.tensor([1])) == pytest.approx(TEMPERATURES[1])


@pytest.fixture(scope="module")
def three_splits():
    digits = load_digits()
    split = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 2], dtype=torch.uint8)
    return ImageArchive(digits.images, digits.labels, digits.class_names, split)


def compare(archive, **config):
    protocol = ProtocolConfig(episodes=30, way=config.pop("way", 2), shots=(1, 3), queries=6)
    config = ComparisonConfig(heads=("protonet", "finetune"), protocol=protocol, **config)
    return Comparison(config, archive, [FrozenBackbone.open(nn.Flatten())], data_name="digits").run()


def test_validation_classes_give_a_temperature_that_calibrates(three_splits, tmp_path):
    found = compare(three_splits, split="validation")
    for row in found.accuracies:
        assert row.measures["nll_at_fitted"][0] <= row.measures["nll"][0]
        again = compare(three_splits, split="validation", temperature=row.fitted_temperature).find(
            row.backbone, row.head, row.shot
        )
        assert again.measures["ece"] == pytest.approx(row.measures["ece_at_fitted"])
        assert again.fitted_temperature == pytest.approx(row.fitted_temperature)
        assert again.correct == row.correct
    text = found.table()
    assert "expected calibration error (%) at temperature 1\n" in text
    assert f"{found.accuracies[0].fitted_temperature:.4g}" in text
    found.write(tmp_path)
    rows = json.loads((tmp_path / "results.json").read_text())["accuracies"]
    assert rows[0]["fitted_temperature"] == pytest.approx(found.accuracies[0].fitted_temperature, abs=1e-4)
    assert {"ece", "ece_interval", "nll", "ece_at_fitted"} <= rows[0].keys()


def test_novel_classes_have_the_error_and_find_no_temperature(three_splits):
    row = compare(three_splits, way=5).accuracies[0]
    assert row.fitted_temperature is None
    assert set(row.measures) == {"ece", "nll"}
    assert "calibration" not in compare(three_splits, way=5).table()
    assert (
        "expected calibration error (%) at temperature 2.5\n" in compare(three_splits, way=5, temperature=2.5).table()
    )


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_none(temperature):
    with pytest.raises(ValueError, match="temperature: expected a"):
        ComparisonConfig(temperature=temperature)
