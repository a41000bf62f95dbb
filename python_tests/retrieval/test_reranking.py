"""Candidates in the order of the matching, against one pair at a time."""

import pytest
import torch
from torch import nn

from fewshot_ext.data import Split, load_digits
from fewshot_ext.evaluation import FrozenBackbone
from fewshot_ext.models import LocalFeaturesConfig, conv4, emd_logits
from fewshot_ext.retrieval import rerank, reranking, retrieval_metrics, retrieve_and_rerank

pytestmark = pytest.mark.usefixtures("one_thread")


def drawn(queries=5, gallery=20, kept=7):
    generator = torch.Generator().manual_seed(0)
    query, other = (torch.randn(n, 6, 8, generator=generator, dtype=torch.float64) for n in (queries, gallery))
    candidates = torch.rand(queries, gallery, generator=generator).argsort(-1)[:, :kept]
    return query, other, candidates


@pytest.mark.parametrize("weighting", ["cross_reference", "uniform"])
@pytest.mark.parametrize("bytes_at_once", [1, 6000, 2**28])
def test_order_is_that_of_the_distances_pair_by_pair(weighting, bytes_at_once):
    query, gallery, candidates = drawn()
    order = rerank(query, gallery, candidates, weighting=weighting, bytes_at_once=bytes_at_once)
    for q in range(len(query)):
        logits = {
            index: emd_logits(query[None, q : q + 1], gallery[None, index : index + 1], weighting=weighting).item()
            for index in candidates[q].tolist()
        }
        assert order[q].tolist() == sorted(logits, key=logits.get, reverse=True)


def test_the_image_itself_comes_first_and_maps_may_have_other_sizes():
    query, gallery, candidates = drawn()
    gallery[3], gallery[17] = query[0], query[1]
    candidates[0], candidates[1] = torch.arange(7), torch.arange(13, 20)
    order = rerank(query, gallery, candidates)
    assert order[0, 0] == 3 and order[1, 0] == 17
    assert rerank(query[:, :4], gallery, candidates).shape == (5, 7)


def test_ties_stay_in_the_order_of_the_candidates(monkeypatch):
    """Of many, which a sort that is not stable would mix. Products of equal features may differ by a rounding, so the
    tie is made here."""
    query, gallery, candidates = drawn(gallery=200, kept=200)
    monkeypatch.setattr(reranking, "emd_logits", lambda *maps, **options: torch.zeros(5, 1, 200))
    assert torch.equal(rerank(query, gallery, candidates), candidates)


@pytest.mark.parametrize(("queries", "kept"), [(0, 7), (5, 0)])
def test_nothing_to_order(queries, kept):
    assert rerank(*drawn(queries, kept=kept)).shape == (queries, kept)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query_maps": None}, TypeError, "query_maps: expected a floating-point tensor, got NoneType"),
        (
            {"query_maps": torch.zeros(5, 8)},
            ValueError,
            r"query_maps: expected shape \[images, N, C\], .* got \[5, 8\]",
        ),
        (
            {"gallery_maps": torch.zeros(20, 0, 8)},
            ValueError,
            r"gallery_maps: expected shape \[images, N, C\], N and C at",
        ),
        ({"gallery_maps": torch.zeros(20, 6, 7)}, ValueError, "gallery_maps: expected the 8 channels .* got 7"),
        (
            {"gallery_maps": torch.zeros(20, 6, 8)},
            TypeError,
            "gallery_maps: expected dtype torch.float64 as",
        ),
        ({"candidates": [[0]]}, TypeError, "candidates: expected a tensor .*, got list"),
        ({"candidates": torch.zeros(5, 2)}, TypeError, "candidates: expected dtype torch.int64, got torch.float32"),
        (
            {"candidates": torch.zeros(4, 2, dtype=torch.int64)},
            ValueError,
            r"candidates: expected shape \[5, K\], got \[4, 2\]",
        ),
        (
            {"candidates": torch.full((5, 2), 20)},
            ValueError,
            r"candidates: expected numbers in \[0, 20\), got 20 to 20",
        ),
        (
            {"candidates": torch.full((5, 2), -1)},
            ValueError,
            r"candidates: expected numbers in \[0, 20\), got -1 to -1",
        ),
        (
            {"candidates": torch.zeros(5, 2, dtype=torch.int64, device="meta")},
            ValueError,
            "candidates: expected device",
        ),
        ({"weighting": "norm"}, ValueError, "weighting: expected one of cross_reference, uniform"),
        ({"bytes_at_once": 0}, ValueError, "bytes_at_once: expected at least 1"),
    ],
)
def test_bad_input_is_named(changes, error, message):
    query, gallery, candidates = drawn()
    arguments = {"query_maps": query, "gallery_maps": gallery, "candidates": candidates, **changes}
    with pytest.raises(error, match=message):
        rerank(**arguments)


@pytest.mark.parametrize("name", ["query_maps", "gallery_maps"])
def test_features_that_are_not_finite_are_named(name):
    query, gallery, candidates = drawn()
    arguments = {"query_maps": query, "gallery_maps": gallery}
    arguments[name][2, 1, 0] = float("nan")
    with pytest.raises(ValueError, match=f"{name}: expected finite entries"):
        rerank(**arguments, candidates=candidates)


class Blocks(nn.Module):
    """A backbone of pixels: its feature map has one channel for each pixel of a 2 x 2 block."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor, self.images_seen = factor, 0

    def feature_map(self, images):
        self.images_seen += len(images)
        return self.factor * nn.functional.pixel_unshuffle(images, 2)

    def forward(self, images):
        return self.feature_map(images).mean((2, 3))


def digits(count=60):
    novel = load_digits().subset(Split.NOVEL)
    return novel.images[:count], novel.labels[:count]


def test_recall_before_is_that_of_the_retrieval_and_after_that_of_the_matching():
    images, labels = digits()
    stages = []
    found = retrieve_and_rerank(
        images, labels, FrozenBackbone.open(Blocks()), candidates=20, on_progress=lambda *told: stages.append(told)
    )
    vectors = Blocks()(images / 255)
    assert found.before == pytest.approx(retrieval_metrics(vectors, labels).recall)
    maps = Blocks().feature_map(images / 255).flatten(2).mT
    assert torch.equal(found.reranked, rerank(maps, maps, found.candidates))
    hits = labels[found.reranked] == labels[:, None]
    assert found.after == pytest.approx({k: hits[:, :k].any(1).double().mean().item() for k in (1, 2, 4, 8)})
    # Means of pixels tell little, regions much.
    assert found.after[1] > found.before[1] + 0.2
    assert not (found.candidates == torch.arange(60)[:, None]).any()
    assert found.queries == 60
    assert [name for name, done, total in stages if done == total] == ["features", "maps", "matching"]


def test_places_are_those_of_the_first_stage():
    images, labels = digits()
    found = retrieve_and_rerank(images, labels, FrozenBackbone.open(Blocks()), candidates=20)
    expected = [
        [1 + before.index(index) for index in after[:7]]
        for before, after in zip(found.candidates.tolist(), found.reranked.tolist(), strict=True)
    ]
    assert found.places(7).tolist() == expected


def test_queries_and_gallery_may_be_two_sets_and_embeddings_given():
    images, labels = digits(90)
    query, gallery = (images[:30], labels[:30]), (images[30:], labels[30:])
    module = Blocks()
    backbone, options = FrozenBackbone.open(module), {"candidates": 9, "ks": (1, 3), "map_dtype": torch.float16}
    found = retrieve_and_rerank(*query, backbone, *gallery, **options)
    seen = module.images_seen
    vectors = [Blocks()(x / 255) for x, _ in (query, gallery)]
    expected = retrieval_metrics(vectors[0], query[1], vectors[1], gallery[1], ks=(1, 3))
    assert found.before == pytest.approx(expected.recall)
    again = retrieve_and_rerank(
        *query, backbone, *gallery, **options, embeddings=vectors[0], gallery_embeddings=vectors[1]
    )
    assert torch.equal(again.reranked, found.reranked)
    assert module.images_seen - seen == 91  # maps, and the image that is tried first
    grid = LocalFeaturesConfig("grid")
    assert retrieve_and_rerank(*query, backbone, *gallery, **options, local_features=grid).queries == 30


@pytest.mark.parametrize(("lone", "queries", "share"), [("exclude", 40, 1.0), ("miss", 41, 40 / 41)])
def test_lone_queries_are_left_out_or_missed(lone, queries, share):
    images, labels = digits(40)
    labels = torch.cat([labels, torch.tensor([99])])
    images = torch.cat([images, images[:1]])
    backbone = FrozenBackbone.open(Blocks())
    found = retrieve_and_rerank(images, labels, backbone, candidates=40, ks=(1, 40), lone_queries=lone)
    assert found.queries == queries
    assert found.after[40] == pytest.approx(found.before[40]) == pytest.approx(share)
    with pytest.raises(ValueError, match="another sample of each query's class"):
        retrieve_and_rerank(images, labels, backbone, candidates=40)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"images": torch.zeros(30, 1, 8, 8)}, TypeError, "images: expected a uint8 tensor, got torch.float32"),
        (
            {"images": torch.zeros(30, 8, 8, dtype=torch.uint8)},
            ValueError,
            r"images: expected shape \[images, C, H, W\]",
        ),
        ({"labels": [1]}, TypeError, "labels: expected a tensor .*, got list"),
        (
            {"labels": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            r"labels: expected shape \[30\] for images, got \[3\]",
        ),
        ({"gallery_labels": torch.zeros(3, dtype=torch.int64)}, ValueError, "expected both or neither"),
        ({"gallery_embeddings": torch.zeros(3, 4)}, ValueError, "gallery_embeddings: expected none"),
        ({"candidates": 7}, ValueError, r"candidates: expected numbers in \[8, 29\], .*, got 7"),
        ({"candidates": 10.0}, TypeError, "candidates: expected an integer, got float"),
        (
            {"embeddings": torch.zeros(3, 4)},
            ValueError,
            r"embeddings: expected shape \[30, D\], a row an image, got \[3, 4\]",
        ),
        (
            {"backbone": FrozenBackbone.open(conv4())},
            ValueError,
            r"images: expected what backbone Conv\w* takes, got \[30, 1, 8, 8\]: .*to have 3 channels",
        ),
        ({"candidates": 30}, ValueError, r"candidates: expected numbers in \[8, 29\], .*, got 30"),
        ({"ks": (1, 1)}, ValueError, "ks: expected at least one K, and none twice"),
        ({"ks": (40,)}, ValueError, r"ks: expected K in \[1, 29\]"),
        ({"distance": "manhattan"}, ValueError, "distance: expected one of cosine, euclidean"),
        ({"weighting": "norm"}, ValueError, "weighting: expected one of cross_reference, uniform"),
        ({"lone_queries": "drop"}, ValueError, "lone_queries: expected one of"),
        ({"batch_size": 0}, ValueError, "batch_size: expected at least 1"),
        ({"map_dtype": torch.bfloat16}, ValueError, "map_dtype: expected torch.float32 or torch.float16"),
        ({"map_memory": 1e-6}, ValueError, r"map_memory: expected at least 0\.01 GiB for re-ranking, .* got 1e-06; "),
        ({"local_features": LocalFeaturesConfig(pyramid=(5,))}, ValueError, "pyramid: expected sides of at most 4"),
        ({"backbone": FrozenBackbone.open(nn.Flatten())}, TypeError, "Flatten has no method feature_map"),
    ],
)
def test_what_cannot_be_retrieved_is_found_before_any_work(changes, error, message):
    images, labels = digits(30)
    module = Blocks()
    arguments = {"images": images, "labels": labels, "backbone": FrozenBackbone.open(module), "candidates": 10}
    with pytest.raises(error, match=message):
        retrieve_and_rerank(**{**arguments, **changes})
    assert module.images_seen <= 1


def test_embeddings_of_one_side_alone_are_refused():
    images, labels = digits(30)
    with pytest.raises(ValueError, match="embeddings and gallery_embeddings: expected both or neither"):
        retrieve_and_rerank(
            images, labels, FrozenBackbone.open(Blocks()), images, labels, embeddings=torch.zeros(30, 4)
        )


def test_diverged_features_are_named():
    images, labels = digits(30)
    backbone = FrozenBackbone.open(Blocks(float("nan")))
    with pytest.raises(ValueError, match="embeddings: expected finite entries"):
        retrieve_and_rerank(images, labels, backbone, candidates=10)
    with pytest.raises(ValueError, match="maps: expected finite entries"):
        retrieve_and_rerank(images, labels, backbone, candidates=10, embeddings=torch.rand(30, 4))
