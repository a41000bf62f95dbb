import csv

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch import nn

from fewshot_ext.data import load_digits
from fewshot_ext.evaluation import (
    Comparison,
    ComparisonConfig,
    FrozenBackbone,
    ProtocolConfig,
    accuracy_over_rejection,
    auroc,
    episode_scores,
    open_set_measures,
)
from fewshot_ext.heads import HEADS

pytestmark = pytest.mark.usefixtures("one_thread")


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 9), st.integers(1, 6))
def test_auroc_is_that_of_scikit_learn(seed, known, unknown, values):
    generator = torch.Generator().manual_seed(seed)  # few values, so that there are ties
    scores = torch.randint(values, (4, known + unknown), generator=generator).float()
    truth = torch.arange(known + unknown) < known
    expected = [roc_auc_score(truth.numpy(), row.numpy()) for row in scores]
    assert auroc(scores[:, :known], scores[:, known:]).tolist() == pytest.approx(expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_accuracy_over_rejection_is_its_definition(seed, queries):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(3, queries, generator=generator)
    right = torch.rand(3, queries, generator=generator) < 0.5
    found = accuracy_over_rejection(scores, right)
    for episode in range(3):
        for rejected in range(queries):
            kept = sorted(range(queries), key=lambda q: scores[episode, q].item())[rejected:]
            expected = sum(right[episode, q].item() for q in kept) / len(kept)
            assert found[episode, rejected].item() == pytest.approx(expected)


def test_unknown_queries_are_never_right():
    scores = torch.tensor([[[9.0, 0.0], [0.0, 8.0], [7.0, 0.0], [0.0, 6.0]]])
    measures = open_set_measures(scores, torch.tensor([0, 1, 2, 2]))
    assert measures["auroc"] == (100.0, 0.0)
    assert measures["accuracy_at_0_rejected"][0] == 50.0
    assert measures["accuracy_at_50_rejected"][0] == 100.0
    assert measures["accuracy_over_rejection"][0] == pytest.approx(100 * (1 / 2 + 2 / 3 + 1 + 1) / 4)


def comparison(**protocol):
    protocol = {"episodes": 20, "way": 3, "shots": (1, 3), "queries": 4, "open_set": 2} | protocol
    config = ComparisonConfig(heads=("protonet", "finetune"), protocol=ProtocolConfig(**protocol))
    return Comparison(config, load_digits(), [FrozenBackbone.open(nn.Flatten())], data_name="digits")


def test_the_known_classes_alone_have_support_images(tmp_path):
    run = comparison()
    results, episodes = run.run(), run.episodes[3]
    assert episodes.classes.shape == (20, 5)
    features = run.images.images.flatten(1) / 255
    found = episode_scores(features, episodes, head=HEADS["protonet"], unknown=2)
    assert found.shape == (20, 20, 3)
    means = features[episodes.support[:, :3]].mean(2)
    distances = (features[episodes.query.flatten(1)].unsqueeze(2) - means.unsqueeze(1)).square().sum(-1)
    torch.testing.assert_close(found, -distances, rtol=1e-4, atol=1e-4)

    row = results.find("Flatten", "protonet", 3)
    assert row.queries == 12
    assert row.correct == tuple((found[:, :12].argmax(-1) == torch.arange(3).repeat_interleave(4)).sum(1).tolist())
    surest, truth = found.max(-1).values, torch.arange(20) < 12
    expected = [100 * roc_auc_score(truth.numpy(), episode.numpy()) for episode in surest]
    assert row.measures["auroc"][0] == pytest.approx(sum(expected) / 20)
    text = results.table()
    assert "AUROC (%) of the known classes against 2 unknown classes" in text
    assert "accuracy (%) with 20 % of all queries rejected" in text
    assert "expected calibration error (%) at temperature 1\n" in text
    results.write(tmp_path)
    with open(tmp_path / "results.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert float(rows[1]["auroc"]) == pytest.approx(row.measures["auroc"][0], abs=1e-4)
    assert {"auroc_interval", "accuracy_over_rejection", "accuracy_at_90_rejected", "ece"} <= rows[0].keys()


@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        ({"open_set": 3}, "at most 2, for the novel classes of digits are 5 and way takes 3 of them, got 3"),
        ({"open_set": 1, "way": 6}, "open_set: expected at most 0"),
        ({"open_set": -1}, "open_set: expected at least 0, got -1"),
    ],
)
def test_too_few_classes(protocol, message):
    with pytest.raises(ValueError, match=message):
        comparison(**protocol)
