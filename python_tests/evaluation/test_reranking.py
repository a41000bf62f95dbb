"""Candidates in the order of the matching, against one pair at a time."""

import pytest
import torch

from fewshot_ext.evaluation import rerank, reranking
from fewshot_ext.models import emd_logits

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
        ({"query_maps": None}, TypeError, "query_maps must be a floating-point tensor, got NoneType"),
        ({"query_maps": torch.zeros(5, 8)}, ValueError, r"query_maps must be \[images, N, C\], .* got \[5, 8\]"),
        ({"gallery_maps": torch.zeros(20, 0, 8)}, ValueError, r"gallery_maps must be \[images, N, C\], N and C at"),
        ({"gallery_maps": torch.zeros(20, 6, 7)}, ValueError, "gallery_maps must have the 8 channels .* got 7"),
        ({"gallery_maps": torch.zeros(20, 6, 8)}, TypeError, "gallery_maps must have the dtype of query_maps"),
        ({"candidates": [[0]]}, TypeError, "candidates must be an int64 tensor, got list"),
        ({"candidates": torch.zeros(5, 2)}, TypeError, "candidates must be an int64 tensor, got torch.float32"),
        (
            {"candidates": torch.zeros(4, 2, dtype=torch.int64)},
            ValueError,
            r"candidates must be \[5, K\], got \[4, 2\]",
        ),
        ({"candidates": torch.full((5, 2), 20)}, ValueError, r"candidates must lie in \[0, 20\), got 20 to 20"),
        ({"candidates": torch.full((5, 2), -1)}, ValueError, r"candidates must lie in \[0, 20\), got -1 to -1"),
        ({"candidates": torch.zeros(5, 2, dtype=torch.int64, device="meta")}, ValueError, "candidates must be on the"),
        ({"weighting": "norm"}, ValueError, "weighting must be 'cross_reference' or 'uniform'"),
        ({"bytes_at_once": 0}, ValueError, "bytes_at_once must be above 0"),
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
    with pytest.raises(ValueError, match=f"{name} must be finite"):
        rerank(**arguments, candidates=candidates)
