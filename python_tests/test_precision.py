"""Vectors of length 1, and measures that no autocast rounds."""

import math

import pytest
import torch
import torch.nn.functional as F

from fewshot_ext import AntiCollapseLoss, MarginCosineLoss, heads, retrieval
from fewshot_ext._precision import normalize
from fewshot_ext.experiments import measures as paper_measures

DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16), ids=str)


@DTYPES
def test_4_rows_of_any_length(dtype):
    directions = torch.randn(5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lengths = torch.tensor(
        [0.0, torch.finfo(dtype).tiny * 1e3, 1.0, 1e3, torch.finfo(dtype).max / 4], dtype=torch.float64
    )[:, None]
    rows = (F.normalize(directions, dim=1) * lengths).to(dtype).requires_grad_()
    unit = normalize(rows)
    assert unit.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for row, found in zip(rows.detach().double(), unit.double(), strict=True):
        length = math.hypot(*row.tolist())
        torch.testing.assert_close(found, row / max(length, 1e-12), rtol=1e-6, atol=1e-7)
    unit.square().sum().backward()
    assert rows.grad.isfinite().all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_4_ordinary_rows_are_those_of_torch_to_the_last_bit(dtype):
    rows = torch.randn(20, 7, generator=torch.Generator().manual_seed(1), dtype=dtype)
    assert torch.equal(normalize(rows), F.normalize(rows, dim=-1))
    assert normalize(rows[:0]).shape == (0, 7)


@pytest.mark.parametrize("variant", ("batch_proxy", "all_proxy"))
def test_4_half_proxies_with_zero_and_long_rows(variant):
    head = torch.nn.Linear(8, 4, bias=False, dtype=torch.float16)
    head.forward = lambda embeddings, labels: embeddings.sum()
    with torch.no_grad():
        head.weight[1] = 0
        head.weight[2] = 4e4  # longer than any float16
    loss = AntiCollapseLoss(head, variant, proxies="weight", base_weight=0.0)
    labels = torch.arange(4)
    embeddings = torch.randn(4, 8, dtype=torch.float16)
    rate = loss.terms(embeddings, labels).rate
    unit = F.normalize(head.weight.detach().double(), dim=1)
    expected = 0.5 * torch.logdet(torch.eye(4) + 8 / (4 * 0.25) * unit @ unit.mT)
    assert rate.item() == pytest.approx(expected.item(), rel=1e-6)


def measures():
    """A call of every measure and head that multiplies matrices, on float32 features."""
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(60, 16, generator=generator), torch.arange(60) % 6
    support, query = torch.randn(2, 6, 16, generator=generator), torch.randn(2, 9, 16, generator=generator)
    target = torch.arange(6).expand(2, 6) % 3
    maps = [torch.randn(2, count, 4, 16, generator=generator) for count in (6, 9)]
    found = retrieval.nearest_neighbors(features, k=5)
    map_set = torch.randn(60, 4, 16, generator=generator)
    calls = {
        "nearest_neighbors": lambda: retrieval.nearest_neighbors(features, k=59),
        "retrieval_metrics": lambda: torch.tensor(list(retrieval.retrieval_metrics(features, labels).row().values())),
        "rerank": lambda: retrieval.rerank(map_set, map_set, found),
        "singular_spectrum": lambda: retrieval.singular_spectrum(features),
        "measure_spread": lambda: torch.tensor(retrieval.measure_spread(features).coding_rate),
        "class_centers": lambda: paper_measures.class_centers(features, labels),
        "inter_class_variance": lambda: paper_measures.inter_class_variance(features, labels),
        "intra_class_variance": lambda: paper_measures.intra_class_variance(features, labels),
        "discriminative_function": lambda: paper_measures.discriminative_function(features, labels),
        "base_class_probabilities": lambda: paper_measures.base_class_probabilities(features, labels, 3.0),
        "scores": lambda: MarginCosineLoss(16, 5, dtype=torch.float32).scores(features),
    }
    for name, head in heads.HEADS.items():
        base_mean = features.mean(0) if head.needs_base_mean else None
        calls[name] = lambda head=head, base_mean=base_mean: head(
            support, target, query, 3, base_mean=base_mean, generator=torch.Generator().manual_seed(0)
        )
    for name, head in heads.MAP_HEADS.items():
        calls[f"maps {name}"] = lambda head=head: head(
            maps[0], target, maps[1], 3, generator=torch.Generator().manual_seed(0)
        )
    return calls


@pytest.mark.parametrize("name", measures())
def test_3_measures_do_not_depend_on_autocast(name):
    def result():
        torch.manual_seed(0)
        return measures()[name]()

    expected = result()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = result()
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
