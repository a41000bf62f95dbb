"""Every head for maps against a loop in numpy over episodes, queries, classes and local features."""

import numpy as np
import pytest
import torch

from fewshot_ext.data import Split, load_digits, sample_episodes
from fewshot_ext.evaluation import episode_accuracies, extract_features
from fewshot_ext.heads import (
    HEADS,
    MAP_HEADS,
    DeepEMDHead,
    FineTuning,
    LocalNearestNeighbors,
    MatchingNet,
    Pooled,
    PredictionFusion,
    ProtoNet,
    SimpleShot,
    find_map_head,
)
from fewshot_ext.heads import maps as map_heads
from fewshot_ext.models import FCN, Grid, StructuredClassifierConfig, emd_logits, fit_prototypes, load_network

pytestmark = pytest.mark.usefixtures("one_thread")

EPISODES, WAY, NODES, CHANNELS, QUERIES = 3, 3, 4, 6, 5
UNEVEN = [0, 2, 1, 0, 0, 2, 0]


def episodes(dtype=torch.float64, target=UNEVEN):
    generator = torch.Generator().manual_seed(0)
    support, query = (
        torch.randn(EPISODES, n, NODES, CHANNELS, generator=generator, dtype=torch.float64)
        for n in (len(target), QUERIES)
    )
    order = torch.rand(EPISODES, len(target), generator=generator).argsort(-1)
    return support.to(dtype), torch.tensor(target)[order], query.to(dtype)


def one_by_one(score_of_class, support, target, query):
    """Scores by three loops; ``score_of_class(query map, maps of each class, index of the class)``."""
    support, target, query = support.double().numpy(), target.numpy(), query.double().numpy()
    scores = np.empty((len(query), query.shape[1], WAY))
    for e in range(len(query)):
        classes = [support[e][target[e] == k] for k in range(WAY)]
        for q in range(query.shape[1]):
            scores[e, q] = [score_of_class(query[e, q], classes, k) for k in range(WAY)]
    return torch.from_numpy(scores)


def cosine(a, b):
    return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


def nearest(neighbors):
    def score(query, classes, k):
        pool = classes[k].reshape(-1, CHANNELS)
        return sum(sum(sorted(cosine(u, v) for v in pool)[-neighbors:]) for u in query)

    return score


def fusion(scale):
    def score(query, classes, k):
        means = [maps.mean((0, 1)) for maps in classes]
        shares = []
        for u in query:
            exponentials = np.exp([scale * cosine(u, mean) for mean in means])
            shares.append(exponentials[k] / exponentials.sum())
        return np.log(np.mean(shares))

    return score


@pytest.mark.parametrize(
    ("head", "score"),
    [
        (LocalNearestNeighbors(), nearest(3)),
        (LocalNearestNeighbors(neighbors=1), nearest(1)),
        (LocalNearestNeighbors(neighbors=NODES), nearest(NODES)),
        (PredictionFusion(), fusion(10.0)),
        (PredictionFusion(local_scale=2.0), fusion(2.0)),
    ],
)
def test_head_equals_the_loops(head, score):
    support, target, query = episodes()
    expected = one_by_one(score, support, target, query)
    torch.testing.assert_close(head(support, target, query, WAY), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("protonet", ProtoNet()),
        ("protonet_cosine", ProtoNet("cosine", scale=10.0)),
        ("matchingnet", MatchingNet()),
        ("fc_dot", FineTuning(similarity="dot")),
        ("fc_cosine", FineTuning(similarity="cosine")),
    ],
)
def test_pooled_heads_are_those_of_the_mean_feature(name, head):
    support, target, query = episodes()
    pooled = find_map_head(name)
    seeds = [torch.Generator().manual_seed(3) for _ in range(2)]
    scores = pooled(support, target, query, WAY, generator=seeds[0])
    expected = head(support.mean(2), target, query.mean(2), WAY, generator=seeds[1])
    assert torch.equal(scores, expected)
    assert torch.equal(pooled.probabilities(scores), head.probabilities(scores))


@pytest.mark.parametrize("weighting", ["cross_reference", "uniform"])
def test_deepemd_of_one_shot_matches_the_support_maps(weighting):
    support, target, query = episodes(target=[2, 0, 1])
    ordered = torch.stack([maps[labels.argsort()] for maps, labels in zip(support, target, strict=True)])
    head = DeepEMDHead(temperature=3.0, weighting=weighting)
    expected = emd_logits(query, ordered, temperature=3.0, weighting=weighting)
    torch.testing.assert_close(head(support, target, query, WAY), expected)


def test_deepemd_of_more_shots_fits_prototypes():
    support, target, query = episodes()
    classifier = StructuredClassifierConfig(passes=2, lr=0.3)
    head = DeepEMDHead(temperature=3.0, classifier=classifier)
    seeds = [torch.Generator().manual_seed(3) for _ in range(2)]
    prototypes = fit_prototypes(support, target, WAY, config=classifier, temperature=3.0, generator=seeds[0])
    expected = emd_logits(query, prototypes, temperature=3.0)
    torch.testing.assert_close(head(support, target, query, WAY, generator=seeds[1]), expected)


def test_chunks_change_nothing(monkeypatch):
    support, target, query = episodes()
    whole = LocalNearestNeighbors()(support, target, query, WAY)
    monkeypatch.setattr(map_heads, "_BYTES_AT_ONCE", 1)
    torch.testing.assert_close(LocalNearestNeighbors()(support, target, query, WAY), whole)


@pytest.mark.parametrize("name", MAP_HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_types_are_computed_in_float32(name, dtype):
    support, target, query = episodes(dtype, target=[2, 0, 1])
    scores, wide = (
        MAP_HEADS[name](s, target, q, WAY, generator=torch.Generator().manual_seed(0))
        for s, q in ((support, query), (support.double(), query.double()))
    )
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), wide, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", MAP_HEADS)
def test_probabilities_are_shares_in_the_order_of_the_scores(name):
    head = MAP_HEADS[name]
    scores = head(*episodes(target=[2, 0, 1]), WAY, generator=torch.Generator().manual_seed(0))
    shares = head.probabilities(scores)
    torch.testing.assert_close(shares.sum(-1), torch.ones(EPISODES, QUERIES, dtype=torch.float64))
    assert torch.equal(shares.argsort(-1), scores.argsort(-1))


@pytest.mark.parametrize("name", [name for name in MAP_HEADS if not name.startswith("fc_")])
def test_gradients_reach_the_features(name):
    support, target, query = episodes(target=[2, 0, 1])
    inputs = (support[:1].requires_grad_(), query[:1].requires_grad_())
    assert torch.autograd.gradcheck(lambda s, q: MAP_HEADS[name](s, target[:1], q, WAY), inputs)


@pytest.mark.parametrize("name", [name for name in MAP_HEADS if not name.startswith("fc_")])
def test_no_episodes(name):
    support, target, query = (x[:0] for x in episodes())
    assert MAP_HEADS[name](support, target, query, WAY).shape == (0, QUERIES, WAY)


def test_the_protocol_takes_maps():
    """Classes far apart in every region: all heads find them."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(6).repeat_interleave(8)
    centers = 3 * torch.randn(6, 1, 5, generator=generator)
    maps = centers[labels] + 0.1 * torch.randn(48, NODES, 5, generator=generator)
    drawn = sample_episodes(labels, 4, way=3, shot=2, queries=5, generator=generator)
    for name, head in MAP_HEADS.items():
        if name == "deepemd_uniform":
            continue
        assert episode_accuracies(maps, drawn, head=head).mean() > 0.9, name


def test_from_a_checkpoint_to_accuracies(checkpoints):
    """The road of an evaluation: a pre-trained backbone, maps of all images once, then episodes."""
    archive = load_digits().subset(Split.NOVEL)
    extractor = load_network(checkpoints[0])
    features = FCN(extractor.backbone, preprocessing=extractor.preprocessing)
    maps = extract_features(features, archive.images)
    assert torch.equal(maps[:5], extractor.feature_map(archive.images[:5]).flatten(2).mT)
    grid = Grid(extractor.backbone, preprocessing=extractor.preprocessing)
    maps = extract_features(grid, archive.images)
    drawn = sample_episodes(archive.labels, 10, way=3, queries=5, generator=torch.Generator().manual_seed(0))
    predicted = emd_logits(maps[drawn.query.flatten(1)], maps[drawn.support.flatten(1)]).argmax(-1)
    expected = (predicted == torch.arange(3).repeat_interleave(5)).double().mean(1)
    assert torch.equal(episode_accuracies(maps, drawn, head=DeepEMDHead()), expected)


def test_only_heads_for_maps_say_so():
    assert all(head.takes_maps for head in MAP_HEADS.values())
    assert not any(head.takes_maps for head in HEADS.values())


@pytest.mark.parametrize("head", [SimpleShot(), DeepEMDHead(), "protonet"])
def test_pooling_takes_heads_for_single_features(head):
    with pytest.raises(TypeError, match="head: expected a head for single features that needs no mean"):
        Pooled(head)


@pytest.mark.parametrize("head", [DeepEMDHead(), LocalNearestNeighbors(neighbors=1), Pooled(ProtoNet())])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"support": torch.zeros(2, 3, 6)},
            ValueError,
            r"support: expected shape \[E, images, N, C\], got \[2, 3, 6\]",
        ),
        ({"query": torch.zeros(2, 4, 5, 7)}, ValueError, "query: expected the 6 channels of support, got 7"),
        ({"query": torch.zeros(2, 4, 0, 6)}, ValueError, "query: expected at least one region"),
        ({"query": None}, TypeError, "query: expected a floating-point tensor, got NoneType"),
        ({"support": torch.full((2, 3, 5, 6), float("nan"))}, ValueError, "support: expected finite entries, got NaN"),
        (
            {"query": torch.full((2, 4, 5, 6), float("inf"))},
            ValueError,
            "query: expected finite entries, got NaN or inf",
        ),
        ({"support_target": torch.tensor([[0, 1, 1], [0, 0, 0]])}, ValueError, "class 1 of episode 1 has no image"),
        ({"way": 4}, ValueError, "class 2 of episode 0 has no image"),
    ],
)
def test_maps_that_do_not_fit_are_named(head, changes, error, message):
    arguments = {
        "support": torch.zeros(2, 3, 5, 6),
        "support_target": torch.tensor([[0, 1, 1], [0, 0, 1]]),
        "query": torch.zeros(2, 4, 5, 6),
        "way": 2,
    }
    with pytest.raises(error, match=message):
        head(**{**arguments, **changes})


def test_more_neighbors_than_local_features_are_refused():
    support, target, query = episodes()
    with pytest.raises(ValueError, match=r"neighbors: expected at most 4, the local features of the class .* got 5"):
        LocalNearestNeighbors(neighbors=5)(support, target, query, WAY)


@pytest.mark.parametrize(
    ("head", "settings", "message"),
    [
        (DeepEMDHead, {"temperature": 0.0}, "temperature: expected a number above 0"),
        (DeepEMDHead, {"weighting": "norm"}, "weighting: expected one of cross_reference, uniform"),
        (LocalNearestNeighbors, {"neighbors": 0}, "neighbors: expected at least 1"),
        (LocalNearestNeighbors, {"scale": 0.0}, "scale: expected a number above 0"),
        (PredictionFusion, {"local_scale": -1.0}, "local_scale: expected a number above 0"),
    ],
)
def test_bad_settings_are_named(head, settings, message):
    with pytest.raises(ValueError, match=message):
        head(**settings)


def test_an_unknown_head_is_told_which_there_are():
    with pytest.raises(ValueError, match=r"head: expected one of deepemd, .*, fc_cosine, got 'finetune'"):
        find_map_head("finetune")
