import pytest
import torch

from fewshot_ext.heads import HEADS, MAP_HEADS, FineTuning, MatchingNet, NearestNeighbor, ProtoNet, leave_one_out
from fewshot_ext.heads.conformal import check_coverage, check_reject

pytestmark = pytest.mark.usefixtures("one_thread")

# Those in which nothing is random: a definition by hand would have to draw the same classifiers.
PLAIN = [name for name in HEADS if name != "finetune"]


def drawn(seed, counts=(3, 2, 4), queries=5, regions=()):
    """Classes around different means, and queries of which some lie far away."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    means = 2 * torch.randn(len(counts), *regions, 6, generator=generator)
    support = means[target] + torch.randn(len(target), *regions, 6, generator=generator)
    query = 3 * torch.randn(queries, *regions, 6, generator=generator)
    return support, target, query


def by_hand(head, support, target, query, way, base_mean, temperature):
    """The definition, one head and one image at a time."""
    known, labels = torch.ones(len(query)).double(), torch.ones(len(query), way).double()
    for left_out in range(len(support)):
        rest = [index for index in range(len(support)) if index != left_out]
        scores = [
            head(support[rest][None], target[rest][None], image[None, None], way, base_mean=base_mean)[0, 0].double()
            for image in (support[left_out], *query)
        ]
        if head.sums_images:
            means = [score.exp() / target[rest].bincount() for score in scores]
            scores = [(mean / mean.sum()).log() for mean in means]
        logarithms = [(head.scale * score / temperature).log_softmax(0) for score in scores]
        for number in range(len(query)):
            known[number] += scores[1 + number].max() >= scores[0].max()
            labels[number] += logarithms[1 + number] >= logarithms[0][target[left_out]]
    return known / (len(support) + 1), labels / (len(support) + 1)


@pytest.mark.parametrize("at_once", [2**27, 1])
@pytest.mark.parametrize("name", PLAIN)
def test_vectors_have_the_ranks_of_the_definition(name, at_once, monkeypatch):
    support, target, query = drawn(1)
    mean = torch.full((6,), 0.1)
    monkeypatch.setattr("fewshot_ext.heads.conformal._BYTES_AT_ONCE", at_once)
    found = leave_one_out(HEADS[name], support, target, query, 3, base_mean=mean, temperature=2.0)
    known, labels = by_hand(HEADS[name], support, target, query, 3, mean, 2.0)
    torch.testing.assert_close(found.known, known)
    torch.testing.assert_close(found.labels, labels)


@pytest.mark.parametrize("name", [name for name in MAP_HEADS if not name.startswith("fc_")])
def test_maps_have_the_ranks_of_the_definition(name):
    head = MAP_HEADS[name]
    support, target, query = drawn(2, counts=(2, 3), queries=3, regions=(4,))
    found = leave_one_out(head, support, target, head.condense_queries(query), 2)
    if name == "deepemd":  # its prototypes start from random ones
        assert found.known.shape == (3,)
        return
    known, labels = by_hand(head, support, target, query, 2, None, 1.0)
    torch.testing.assert_close(found.known, known)
    torch.testing.assert_close(found.labels, labels)


@pytest.mark.parametrize("head", [FineTuning(), MAP_HEADS["fc_cosine"], MAP_HEADS["deepemd"]], ids=repr)
def test_heads_that_draw_at_random_do_it_by_the_seed(head, monkeypatch):
    regions = (4,) if head.takes_maps else ()
    support, target, query = drawn(3, counts=(2, 2), queries=4, regions=regions)
    query = head.condense_queries(query) if head.takes_maps else query
    whole = leave_one_out(head, support, target, query, 2, seed=5)
    alone = leave_one_out(head, support, target, query[2:3], 2, seed=5)
    assert torch.equal(alone.known, whole.known[2:3])
    assert torch.equal(alone.labels, whole.labels[2:3])


def test_fine_tuning_of_all_heads_is_one_call(monkeypatch):
    calls, score = [], FineTuning._scores

    def counted(head, support, *others):
        calls.append(tuple(support.shape))
        return score(head, support, *others)

    monkeypatch.setattr(FineTuning, "_scores", counted)
    support, target, query = drawn(4, counts=(5,) * 5, queries=100)
    leave_one_out(FineTuning(), support, target, query, 5)
    assert calls == [(25, 24, 6)]


@pytest.mark.parametrize("head", [ProtoNet(), NearestNeighbor(), MatchingNet(), FineTuning()], ids=repr)
@pytest.mark.parametrize("alpha", [0.1, 0.25])
def test_images_drawn_alike_are_covered(head, alpha):
    """Classes and features of support and queries are independent draws: that is what the guarantee asks for."""
    generator = torch.Generator().manual_seed(0)
    inside, accepted, total = 0, 0, 0
    for _ in range(60):
        way, means = 3, torch.randn(3, 4, generator=generator)
        target = torch.randint(way, (40,), generator=generator)
        features = means[target] + 0.8 * torch.randn(40, 4, generator=generator)
        if target[:20].bincount(minlength=way).min() < 2:
            continue
        found = leave_one_out(head, features[:20], target[:20], features[20:], way)
        inside += found.sets(1 - alpha)[torch.arange(20), target[20:]].sum().item()
        accepted += (~found.rejected(alpha)).sum().item()
        total += 20
    assert total > 900
    # Promised are 1 - 2 alpha; that it is near 1 - alpha is what makes it useful. 60 supports leave a few points open.
    for share in (inside / total, accepted / total):
        assert share > 1 - alpha - 0.04
        # Classifiers that start at random ones differ by that as well, which makes the method careful.
        assert head.fits or share < 1 - alpha + 0.08


def test_far_images_are_of_no_class():
    support, target, _ = drawn(5, counts=(6, 6))
    found = leave_one_out(ProtoNet(), support, target, torch.cat([support + 0.01, support + 100]), 2)
    assert found.rejected(1 / 13).tolist() == [False] * 12 + [True] * 12


def test_a_class_with_one_image():
    support, target, query = drawn(6, counts=(3, 1))
    with pytest.raises(ValueError, match="each is left out in turn, got 1 of 1"):
        leave_one_out(ProtoNet(), support, target, query, 2)


@pytest.mark.parametrize("level", [0, 1, -0.1, float("nan"), float("inf"), 0.05])
def test_levels_that_are_none(level):
    with pytest.raises(ValueError, match="reject: expected a"):
        check_reject(level, 9)
    with pytest.raises(ValueError, match="level: expected a"):
        check_coverage(1 - level, 9)


def test_the_finest_levels_are_levels():
    for images in range(1, 200):
        assert check_reject(1 / (images + 1), images) == 1 / (images + 1)
        assert check_coverage(1 - 1 / (images + 1), images) == 1 - 1 / (images + 1)
    with pytest.raises(TypeError, match="reject: expected a number, got str"):
        check_reject("0.1", 9)
