import math

import pytest
import torch
from torch import nn

from fewshot_ext.data import sample_episodes
from fewshot_ext.evaluation import ProtocolConfig, episode_accuracies, extract_features, mean_and_interval
from fewshot_ext.heads import FineTuning, FineTuningConfig, ProtoNet

pytestmark = pytest.mark.usefixtures("one_thread")


class Pixels(nn.Module):
    """A backbone that hands the pixels on, and dropout that would show a forgotten evaluation mode."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.dropout = nn.Dropout(0.5)

    def forward(self, images):
        return self.dropout(self.scale * images.flatten(1).float())


def clusters(spread):
    """Features of six classes of 30 images around orthogonal centers."""
    labels = torch.arange(6).repeat_interleave(30)
    noise = torch.randn(180, 16, generator=torch.Generator().manual_seed(0))
    return torch.eye(6, 16)[labels] + spread * noise, labels


def test_features_come_in_order_and_the_mode_is_restored():
    images = torch.randint(256, (10, 1, 2, 3), dtype=torch.uint8)
    model = Pixels().train()
    assert torch.equal(extract_features(model, images, batch_size=4), images.flatten(1).float())
    assert model.training


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_separate_classes_are_told_apart_and_equal_ones_are_not(similarity):
    head = FineTuning(lr=0.1, similarity=similarity)
    for spread, low, high in ((0.05, 0.99, 1.0), (100.0, 0.1, 0.3)):
        features, labels = clusters(spread)
        episodes = sample_episodes(labels, 120, shot=5, generator=torch.Generator().manual_seed(1))
        accuracy = episode_accuracies(features, episodes, head=head)
        assert accuracy.shape == (120,)
        assert low <= accuracy.mean() <= high


def test_seed_decides_the_result_and_progress_is_reported():
    features, labels = clusters(1.0)
    episodes = sample_episodes(labels, 230, generator=torch.Generator().manual_seed(1))
    done = []
    head = FineTuning(steps=5)
    first = episode_accuracies(features, episodes, head=head, seed=3, on_progress=done.append)
    assert torch.equal(first, episode_accuracies(features, episodes, head=head, seed=3))
    assert not torch.equal(first, episode_accuracies(features, episodes, head=head, seed=4))
    assert done == sorted(done)
    assert done[-1] == 230


@pytest.mark.parametrize(("bytes_at_once", "counts"), [(1, list(range(1, 11))), (3 * 21 * 16 * 4, [3, 6, 9, 10])])
def test_memory_bounds_the_episodes_at_once_and_changes_nothing(bytes_at_once, counts, monkeypatch):
    features, labels = clusters(1.0)
    episodes = sample_episodes(labels, 10, way=3, shot=5, queries=2, generator=torch.Generator().manual_seed(1))
    whole = episode_accuracies(features, episodes, head=ProtoNet())
    monkeypatch.setattr("fewshot_ext.evaluation.protocol._FEATURE_BYTES_AT_ONCE", bytes_at_once)
    done = []
    assert torch.equal(episode_accuracies(features, episodes, head=ProtoNet(), on_progress=done.append), whole)
    assert done == counts


def test_features_that_are_not_finite_are_refused():
    features, labels = clusters(1.0)
    features[3, 0] = float("nan")
    episodes = sample_episodes(labels, 2, generator=torch.Generator().manual_seed(1))
    with pytest.raises(ValueError, match="features: expected finite entries"):
        episode_accuracies(features, episodes)


def test_features_of_a_model_without_parameters_and_progress():
    images = torch.randint(256, (10, 1, 2, 3), dtype=torch.uint8)
    done = []
    features = extract_features(nn.Flatten(), images, batch_size=4, on_progress=done.append)
    assert torch.equal(features, images.flatten(1).float())
    assert done == [4, 8, 10]


def test_interval_is_that_of_the_protocol():
    values = torch.tensor([0.2, 0.4, 0.9], dtype=torch.float64)
    mean, interval = mean_and_interval(values)
    assert mean == pytest.approx(0.5)
    sigma = math.sqrt(((0.3**2) + (0.1**2) + (0.4**2)) / 3)
    assert interval == pytest.approx(1.96 * sigma / math.sqrt(3))
    assert mean_and_interval(values[:1]) == (pytest.approx(0.2), 0.0)


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (ProtocolConfig, "episodes", 0),
        (ProtocolConfig, "way", 1),
        (ProtocolConfig, "queries", 0),
        (ProtocolConfig, "shots", ()),
        (ProtocolConfig, "shots", (1, 1)),
        (ProtocolConfig, "shots", (0,)),
        (FineTuningConfig, "scale", 0.0),
        (FineTuningConfig, "margin", float("inf")),
        (FineTuningConfig, "steps", 0),
        (FineTuningConfig, "batch_size", 0),
        (FineTuningConfig, "momentum", 1.0),
    ],
)
def test_bad_settings_are_named(config, field, value):
    with pytest.raises(ValueError, match=field):
        config(**{field: value})


def test_episodes_for_each_number_of_shots():
    assert ProtocolConfig(episodes=7, shots=(5, 1)).episodes_by_shot == {5: 7, 1: 7}
    assert ProtocolConfig(episodes=(600, 5000), shots=(5, 1)).episodes_by_shot == {5: 600, 1: 5000}
    with pytest.raises(
        ValueError, match=r"episodes: expected one number, or one for each of \[1, 5\] shots, got \[3\]"
    ):
        ProtocolConfig(episodes=(3,))
    with pytest.raises(ValueError, match="episodes: expected at least 1"):
        ProtocolConfig(episodes=(3, 0))
