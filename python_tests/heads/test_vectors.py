"""Every head against a loop in numpy over episodes, queries and support images."""

import numpy as np
import pytest
import torch

from fewshot_ext import finetune_episodes
from fewshot_ext.heads import (
    HEADS,
    FineTuning,
    FineTuningConfig,
    MatchingNet,
    NearestNeighbor,
    ProtoNet,
    SimpleShot,
    find_head,
)

pytestmark = pytest.mark.usefixtures("one_thread")

EPISODES, WAY, DIMENSION, QUERIES = 4, 3, 7, 6
UNEVEN = [0, 2, 1, 0, 0, 2, 0]


def episodes(dtype=torch.float64, offset=0.0):
    """Support with one to four images a class, in another order in every episode, and queries."""
    generator = torch.Generator().manual_seed(0)
    support, query = (
        torch.randn(EPISODES, n, DIMENSION, generator=generator, dtype=torch.float64) + offset
        for n in (len(UNEVEN), QUERIES)
    )
    order = torch.rand(EPISODES, len(UNEVEN), generator=generator).argsort(-1)
    return support.to(dtype), torch.tensor(UNEVEN)[order], query.to(dtype)


def one_by_one(score_of_class, support, target, query):
    """Scores by three loops; ``score_of_class(q, rows of the class, all rows, which are of the class)``."""
    support, target, query = support.double().numpy(), target.numpy(), query.double().numpy()
    scores = np.empty((len(query), query.shape[1], WAY))
    for e in range(len(query)):
        for q in range(query.shape[1]):
            for k in range(WAY):
                member = target[e] == k
                scores[e, q, k] = score_of_class(query[e, q], support[e][member], support[e], member)
    return torch.from_numpy(scores)


def cosine(a, b):
    return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


def distance(a, b):
    return ((a - b) ** 2).sum()


def unit(a):
    return a / np.linalg.norm(a, axis=-1, keepdims=True)


def attention_share(scale):
    def share(query, of_class, rows, member):
        exponentials = np.exp([scale * cosine(query, row) for row in rows])
        return np.log(exponentials[member].sum() / exponentials.sum())

    return share


BASE_MEAN = torch.linspace(-1, 1, DIMENSION, dtype=torch.float64)
CASES = {
    "protonet": (ProtoNet(), lambda q, c, *_: -distance(q, c.mean(0))),
    "protonet_cosine": (ProtoNet("cosine"), lambda q, c, *_: cosine(q, c.mean(0))),
    "matchingnet": (MatchingNet(), attention_share(1.0)),
    "matchingnet scaled": (MatchingNet(attention_scale=7.0), attention_share(7.0)),
    "nearest_neighbor": (NearestNeighbor(), lambda q, c, *_: max(cosine(q, x) for x in c)),
    "nearest_neighbor_euclidean": (
        NearestNeighbor("euclidean"),
        lambda q, c, *_: max(-distance(q, x) for x in c),
    ),
    "simpleshot": (
        SimpleShot(),
        lambda q, c, *_: -distance(unit(q - BASE_MEAN.numpy()), unit(c - BASE_MEAN.numpy()).mean(0)),
    ),
    "simpleshot_l2n": (SimpleShot("l2n"), lambda q, c, *_: -distance(unit(q), unit(c).mean(0))),
    "simpleshot un": (SimpleShot("un"), lambda q, c, *_: -distance(q, c.mean(0))),
}


@pytest.mark.parametrize("name", CASES)
def test_head_equals_the_loop_over_episodes(name):
    head, score_of_class = CASES[name]
    support, target, query = episodes()
    expected = one_by_one(score_of_class, support, target, query)
    actual = head(support, target, query, WAY, base_mean=BASE_MEAN)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def test_every_head_of_the_registry_has_an_oracle():
    assert set(HEADS) - {"finetune"} <= set(CASES)
    assert all(
        type(HEADS[name]) is type(CASES[name][0])
        and HEADS[name].__dict__ | {"scale": 1} == head.__dict__ | {"scale": 1}
        for name, (head, _) in CASES.items()
        if name in HEADS
    )


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_fine_tuning_is_the_protocols_with_the_settings_of_the_head(similarity):
    support, target, query = episodes()
    config = FineTuningConfig(steps=3, lr=0.3, margin=-0.2, scale=4.0, momentum=0.5, dampening=0.1, weight_decay=0.01)
    head = FineTuning.from_config(config, similarity)
    seed = torch.Generator().manual_seed(3)
    actual = head(support, target, query, WAY, generator=torch.Generator().manual_seed(3))
    expected = finetune_episodes(
        support,
        target,
        query,
        similarity=similarity,
        steps=3,
        lr=0.3,
        margin=-0.2,
        scale=4.0,
        momentum=0.5,
        dampening=0.1,
        weight_decay=0.01,
        generator=seed,
    )
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32(name, dtype):
    support, target, query = episodes(dtype)
    scores = HEADS[name](support, target, query, WAY, base_mean=BASE_MEAN, generator=torch.Generator().manual_seed(0))
    assert scores.dtype == torch.float32
    assert scores.shape == (EPISODES, QUERIES, WAY)
    wide = HEADS[name](
        support.double(), target, query.double(), WAY, base_mean=BASE_MEAN, generator=torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(scores.double(), wide, rtol=1e-4, atol=1e-4)


def test_distances_far_from_the_origin_keep_their_digits():
    support, target, query = episodes(torch.float32, offset=1000.0)
    expected = one_by_one(CASES["protonet"][1], support, target, query)
    torch.testing.assert_close(ProtoNet()(support, target, query, WAY).double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", HEADS)
def test_probabilities_are_shares_in_the_order_of_the_scores(name):
    support, target, query = episodes()
    scores = HEADS[name](support, target, query, WAY, base_mean=BASE_MEAN, generator=torch.Generator().manual_seed(0))
    shares = HEADS[name].probabilities(scores)
    torch.testing.assert_close(shares.sum(-1), torch.ones(EPISODES, QUERIES, dtype=torch.float64))
    assert torch.equal(shares.argsort(-1), scores.argsort(-1))


def test_probabilities_are_those_of_the_papers():
    support, target, query = episodes()
    attention = MatchingNet()
    shares = attention.probabilities(attention(support, target, query, WAY))
    torch.testing.assert_close(shares, one_by_one(attention_share(1.0), support, target, query).exp())
    fine_tuning = FineTuning(scale=5.0)
    torch.testing.assert_close(fine_tuning.probabilities(torch.tensor([0.2, 0.0])), torch.tensor([1.0, 0.0]).softmax(0))


def test_attention_on_one_image_alone_leaves_finite_scores():
    support, target = torch.eye(2).unsqueeze(0), torch.tensor([[0, 1]])
    assert MatchingNet(attention_scale=1e4)(support, target, support, 2).isfinite().all()


@pytest.mark.parametrize("name", [name for name in HEADS if name != "finetune"])
def test_gradients_reach_the_features(name):
    support, target, query = episodes()
    inputs = (support.requires_grad_(), query.requires_grad_())
    assert torch.autograd.gradcheck(lambda s, q: HEADS[name](s, target, q, WAY, base_mean=BASE_MEAN), inputs)


def test_fine_tuning_carries_no_gradient():
    support, target, query = episodes()
    assert not FineTuning(steps=1)(support.requires_grad_(), target, query, WAY).requires_grad


@pytest.mark.parametrize("name", CASES)
def test_no_episodes(name):
    support, target, query = (x[:0] for x in episodes())
    assert CASES[name][0](support, target, query, WAY, base_mean=BASE_MEAN).shape == (0, QUERIES, WAY)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"support": [[[1.0]]]}, TypeError, "support: expected a floating-point tensor, got list"),
        ({"query": torch.zeros(2, 4, 5, dtype=torch.int64)}, TypeError, "query: expected a floating-point"),
        (
            {"query": torch.zeros(2, 4, 5, dtype=torch.float64)},
            TypeError,
            "query: expected dtype torch.float32 as",
        ),
        (
            {"support_target": torch.zeros(2, 3)},
            TypeError,
            "support_target: expected dtype torch.int64, got",
        ),
        ({"support": torch.zeros(3, 5)}, ValueError, r"support: expected shape \[E, S, D\], got \[3, 5\]"),
        (
            {"support_target": torch.zeros(2, 4, dtype=torch.int64)},
            ValueError,
            r"support_target: expected shape \[2, 3\]",
        ),
        ({"query": torch.zeros(2, 4, 6)}, ValueError, r"query: expected shape \[2, Q, 5\], got \[2, 4, 6\]"),
        ({"query": torch.zeros(1, 4, 5)}, ValueError, r"query: expected shape \[2, Q, 5\]"),
        ({"query": torch.zeros(2, 4, 5, device="meta")}, ValueError, "query: expected device cpu as support is on"),
        ({"way": 1}, ValueError, "way: expected at least 2, got 1"),
        ({"support_target": torch.tensor([[0, 2, 1]] * 2)}, ValueError, r"expected numbers in \[0, 2\), got 0 to 2"),
        (
            {"support_target": torch.tensor([[0, -1, 1]] * 2)},
            ValueError,
            r"support_target: expected numbers in \[0, 2\)",
        ),
        ({"support_target": torch.tensor([[0, 1, 1], [0, 0, 0]])}, ValueError, "class 1 of episode 1 has no image"),
    ],
)
def test_episodes_that_do_not_fit_are_named(changes, error, message):
    arguments = {
        "support": torch.zeros(2, 3, 5),
        "support_target": torch.tensor([[0, 1, 1], [0, 0, 1]]),
        "query": torch.zeros(2, 4, 5),
        "way": 2,
    }
    with pytest.raises(error, match=message):
        ProtoNet()(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("base_mean", "message"),
    [
        (None, "base_mean: expected a value, got none: SimpleShot subtracts it"),
        (torch.zeros(6), r"base_mean: expected shape \[7\], got \[6\]"),
    ],
)
def test_simpleshot_needs_the_mean_of_the_base_classes(base_mean, message):
    support, target, query = episodes()
    assert SimpleShot().needs_base_mean
    with pytest.raises(ValueError, match=message):
        SimpleShot()(support, target, query, WAY, base_mean=base_mean)


@pytest.mark.parametrize(
    ("head", "settings", "message"),
    [
        (FineTuning, {"similarity": "euclidean"}, "similarity: expected one of cosine, dot, got 'euclidean'"),
        (FineTuning, {"lr": 0.0}, "lr: expected a number above 0"),
        (ProtoNet, {"metric": "manhattan"}, "metric: expected one of euclidean, cosine"),
        (ProtoNet, {"scale": 0.0}, "scale: expected a number above 0"),
        (MatchingNet, {"attention_scale": -1.0}, "attention_scale: expected a number above 0"),
        (NearestNeighbor, {"metric": "manhattan"}, "metric: expected one of cosine, euclidean"),
        (NearestNeighbor, {"scale": -1.0}, "scale: expected a number above 0"),
        (SimpleShot, {"transform": "pca"}, "transform: expected one of cl2n, l2n, un"),
        (SimpleShot, {"scale": float("nan")}, "scale: expected a finite number"),
    ],
)
def test_bad_settings_are_named(head, settings, message):
    with pytest.raises(ValueError, match=message):
        head(**settings)


def test_an_unknown_head_is_told_which_there_are():
    with pytest.raises(ValueError, match=r"head: expected one of finetune, protonet, .*, got 'svm'"):
        find_head("svm")
