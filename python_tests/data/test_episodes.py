import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewshot_ext.data import sample_episodes


@st.composite
def tasks(draw):
    """Labels of classes of unlike sizes, with gaps in the numbering, and counts that they can serve."""
    way, shot, queries = (draw(st.integers(1, 4)) for _ in range(3))
    sizes = draw(st.lists(st.integers(shot + queries, shot + queries + 5), min_size=way, max_size=way + 3))
    names = draw(st.permutations(range(0, 3 * len(sizes), 3)))
    labels = [name for name, size in zip(names, sizes, strict=True) for _ in range(size)]
    return torch.tensor(draw(st.permutations(labels))), draw(st.integers(1, 6)), way, shot, queries


@settings(deadline=None, max_examples=60)
@given(tasks(), st.integers(0, 2**32))
def test_episodes_hold_distinct_images_of_the_right_classes(task, seed):
    labels, count, way, shot, queries = task
    episodes = sample_episodes(
        labels, count, way=way, shot=shot, queries=queries, generator=torch.Generator().manual_seed(seed)
    )
    assert episodes.support.shape == (count, way, shot)
    assert episodes.query.shape == (count, way, queries)
    assert len(episodes) == count
    for images in (episodes.support, episodes.query):
        assert torch.equal(labels[images], episodes.classes.unsqueeze(-1).expand_as(images))
    for classes in episodes.classes.tolist():
        assert len(set(classes)) == way
    for drawn in torch.cat([episodes.support, episodes.query], -1).flatten(1).tolist():
        assert len(set(drawn)) == way * (shot + queries)


def test_the_seed_decides_the_episodes():
    labels = torch.arange(8).repeat_interleave(21)
    first, again, other = (
        sample_episodes(labels, 30, shot=5, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(first.support, again.support)
    assert torch.equal(first.query, again.query)
    assert not torch.equal(first.query, other.query)


def test_every_image_and_class_is_as_likely_as_any_other():
    labels = torch.arange(6).repeat_interleave(4)
    episodes = sample_episodes(labels, 6000, way=2, shot=1, queries=1, generator=torch.Generator().manual_seed(0))
    for images in (episodes.support, episodes.query):
        counts = images.flatten().bincount(minlength=24)
        # 12000 draws of 24 images: 500 each, with a deviation of about 22.
        assert counts.min() > 400
        assert counts.max() < 600


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"episodes": 0}, "episodes: expected at least 1, got 0"),
        ({"way": 0}, "way: expected at least 1"),
        ({"shot": -1}, "shot: expected at least 1"),
        ({"queries": 0}, "queries: expected at least 1"),
        ({"way": 4}, "way 4 asks for more classes than there are: 3"),
        ({"shot": 5}, "5 shots and 2 queries need 7 images a class, but class 9 holds 6"),
    ],
)
def test_impossible_requests_are_named(changes, message):
    labels = torch.tensor([3, 5, 9]).repeat_interleave(torch.tensor([8, 7, 6]))
    arguments = {"episodes": 2, "way": 3, "shot": 1, "queries": 2, **changes}
    with pytest.raises(ValueError, match=message):
        sample_episodes(labels, generator=torch.Generator(), **arguments)


def test_drawing_some_episodes_at_a_time_changes_nothing(monkeypatch):
    labels = torch.arange(6).repeat_interleave(torch.tensor([30, 40, 50, 60, 33, 44]))

    def draw():
        return sample_episodes(labels, 101, shot=5, generator=torch.Generator().manual_seed(3))

    whole = draw()
    monkeypatch.setattr("fewshot_ext.data.episodes._MOST_KEYS", 5 * 60 * 7)
    parts = draw()
    assert torch.equal(whole.support, parts.support)
    assert torch.equal(whole.query, parts.query)
    assert torch.equal(whole.classes, parts.classes)
