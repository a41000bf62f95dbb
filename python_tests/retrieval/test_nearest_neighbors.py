"""Nearest neighbors as retrieval orders them, and what retrieval refuses before there are embeddings."""

import math

import pytest
import torch

from fewshot_ext.retrieval import check_retrieval, nearest_neighbors, retrieval_metrics
from fewshot_ext.retrieval import measures as retrieval

pytestmark = pytest.mark.usefixtures("one_thread")


def corners(count, seed):
    """Corners of a square of four dimensions: cosines are exact and most of them tie."""
    return 2.0 * torch.randint(2, (count, 4), generator=torch.Generator().manual_seed(seed)) - 1


@pytest.mark.parametrize("apart", [False, True])
def test_they_come_by_cosine_and_then_by_index(apart, monkeypatch):
    # A few queries at a time, so that the seams are met.
    monkeypatch.setattr(retrieval, "SCORES_AT_ONCE", 100)
    queries, gallery = corners(23, 0), corners(17, 1)
    found = nearest_neighbors(queries, gallery if apart else None, k=9)
    searched = gallery if apart else queries
    for query in range(len(queries)):
        others = (other for other in range(len(searched)) if apart or other != query)
        near = sorted((-(queries[query] @ searched[other]).item(), other) for other in others)
        assert found[query].tolist() == [other for _, other in near[:9]]


def test_they_come_by_euclidean_distance_where_that_is_asked_for():
    generator = torch.Generator().manual_seed(0)
    queries, gallery = (torch.randn(count, 3, dtype=torch.float64, generator=generator) for count in (20, 30))
    assert torch.equal(
        nearest_neighbors(queries, gallery, k=30, distance="euclidean"), torch.cdist(queries, gallery).argsort(1)
    )


def test_some_queries_alone():
    points = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    asked = torch.tensor([7, 3, 30])
    found = nearest_neighbors(points[asked], points, k=6, query_index=asked)
    assert torch.equal(found, nearest_neighbors(points, k=6)[asked])


def test_the_nearest_decides_recall_at_1():
    points, labels = torch.randn(50, 3, generator=torch.Generator().manual_seed(1)), torch.arange(50) % 5
    nearest = nearest_neighbors(points, k=1)[:, 0]
    assert retrieval_metrics(points, labels, ks=(1,)).recall[1] == (labels[nearest] == labels).double().mean().item()


def of_gallery(query_index):
    return {"k": 1, "gallery": torch.ones(6, 2), "query_index": query_index}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k": 4}, ValueError, r"k: expected K in \[1, 3\]"),
        ({"k": 0}, ValueError, "k: expected K in"),
        ({"k": 1.0}, TypeError, "k: expected an integer, got float"),
        ({"k": 1, "distance": "l1"}, ValueError, "distance: expected one of cosine, euclidean"),
        ({"k": 1, "gallery": torch.ones(2, 3)}, ValueError, "gallery: expected shape"),
        ({"k": 1, "gallery": torch.ones(2, 2).double()}, TypeError, "gallery: expected dtype"),
        ({"k": 1, "gallery": [1]}, TypeError, "gallery: expected a tensor"),
        ({"k": 1, "query_index": torch.arange(4)}, ValueError, "query_index: expected with gallery"),
        (of_gallery([0]), TypeError, r"query_index: expected a tensor \[Q\], got list"),
        (of_gallery(torch.tensor([[0]])), ValueError, r"query_index: expected shape \[Q\], got \[1, 1\]"),
        (of_gallery(torch.zeros(4)), TypeError, "query_index: expected dtype torch.int64, got torch.float32"),
        (of_gallery(torch.arange(3)), ValueError, r"query_index: expected shape \[4\] to fit embeddings, got \[3\]"),
        (of_gallery(torch.arange(4) + 3), ValueError, r"query_index: expected rows in \[0, 6\), got 3 to 6"),
        (of_gallery(torch.arange(4) - 1), ValueError, r"query_index: expected rows in \[0, 6\), got -1 to 2"),
        (of_gallery(torch.arange(4).to("meta")), ValueError, "query_index: expected device cpu"),
        ({"k": 1, "embeddings": torch.ones(4, 2).long()}, TypeError, "embeddings: expected a floating dtype"),
        ({"k": 1, "embeddings": torch.full((4, 2), math.nan)}, ValueError, "embeddings: expected finite entries"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        nearest_neighbors(**{"embeddings": torch.ones(4, 2), **arguments})


def test_what_retrieval_would_refuse_is_refused_before():
    check_retrieval(torch.tensor([0, 0, 1, 1]), ks=(1, 3))
    check_retrieval(torch.tensor([0, 2]), torch.tensor([0]), ks=(1,), lone_queries="miss")
    for arguments, message in (
        (((torch.tensor([0, 0, 1]),), {"ks": (1,)}), "got none for 1 queries, the first of class 1 at index 2"),
        (((torch.tensor([0, 0]),), {"ks": (2,)}), r"ks: expected K in \[1, 1\]"),
        (((torch.tensor([0]), torch.tensor([1])), {"ks": (1,), "lone_queries": "exclude"}), "got none"),
        (((torch.tensor([0, 0]),), {"ks": (1,), "lone_queries": "drop"}), "lone_queries: expected one of"),
    ):
        with pytest.raises(ValueError, match=message):
            check_retrieval(*arguments[0], **arguments[1])
