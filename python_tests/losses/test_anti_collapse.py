"""The Anti-Collapse loss against the authors' formulas, and on every kind of base loss."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fewshot_ext import AntiCollapseLoss, MarginCosineLoss, coding_rate
from fewshot_ext.losses import base_loss

CLASSES, DIMENSIONS = 7, 12
VARIANTS = pytest.mark.parametrize("variant", ("pair", "batch_proxy", "all_proxy"))
CONVENTIONS = pytest.mark.parametrize("convention", ("paper", "official"))


def needs_metric_learning():
    pytest.importorskip("pytorch_metric_learning", reason="needs the extra metric")


class Distances(nn.Module):
    """A base loss with proxies and nothing else of interest."""

    def __init__(self, classes=CLASSES, dimensions=DIMENSIONS, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.proxies = nn.Parameter(torch.randn(classes, dimensions, generator=generator, dtype=dtype))

    def forward(self, embeddings, labels):
        return (embeddings - self.proxies[labels]).square().mean()


def batch(dtype=torch.float64):
    """Two images of each of four classes: the batches of the official code."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(8, DIMENSIONS, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return embeddings, torch.tensor([5, 5, 0, 0, 3, 3, 6, 6])


def official_proxy_anchor(embeddings, proxies, labels, scale=64.0, delta=0.1):
    """For each sample the log-sum-exp over its class with the class's proxy, for each proxy that over other classes."""
    cosines = embeddings @ proxies.mT  # [n, C]

    def softplus(terms, mask):
        terms = torch.where(mask, terms, -math.inf)
        return torch.cat([terms, terms.new_zeros(1, terms.shape[1])]).logsumexp(0).mean()

    same = labels[:, None] == labels
    other = labels[:, None] != torch.arange(len(proxies))
    return softplus(-scale * (cosines[:, labels] - delta), same) + softplus(scale * (cosines + delta), other)


def official_loss(embeddings, proxies, labels, variant, *, eps, base_weight, weight, gamma1, gamma2):
    """Determinants as the authors write them: D x D for pairs, and one row and column a proxy for proxies."""
    embeddings, proxies = F.normalize(embeddings, dim=-1), F.normalize(proxies, dim=-1)
    count, dimensions = embeddings.shape
    if variant == "pair":
        product = gamma1 * dimensions / (count * eps) * embeddings.mT @ embeddings
    else:
        spread = proxies[labels.unique()] if variant == "batch_proxy" else proxies
        product = gamma1 * len(spread) / (dimensions * eps) * spread @ spread.mT
    rate = torch.logdet(torch.eye(len(product), dtype=product.dtype) + product) / 2
    return base_weight * official_proxy_anchor(embeddings, proxies, labels) + weight * torch.exp(-gamma2 * rate)


@VARIANTS
@pytest.mark.parametrize(
    "settings",
    (
        {"eps": 0.5, "base_weight": 0.01, "weight": 1.0, "gamma1": 1.0, "gamma2": 1.0},
        {"eps": 0.3, "base_weight": 0.5, "weight": 2.0, "gamma1": 0.7, "gamma2": 0.2},
    ),
)
def test_official_convention_is_the_authors_formula(variant, settings):
    needs_metric_learning()
    base = base_loss("proxy_anchor", CLASSES, DIMENSIONS).double()
    loss = AntiCollapseLoss(base, variant, convention="official", **settings)
    embeddings, labels = batch()
    found = loss(embeddings, labels)
    expected = official_loss(embeddings, base.proxies, labels, variant, **settings)
    torch.testing.assert_close(found, expected)
    inputs = (embeddings, base.proxies)
    torch.testing.assert_close(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs))


@VARIANTS
def test_paper_convention_is_minus_the_rate(variant):
    base = Distances()
    loss = AntiCollapseLoss(base, variant, eps=0.4, base_weight=0.3, weight=2.0, gamma1=0.5, gamma2=0.25)
    embeddings, labels = batch()
    vectors = {"pair": embeddings, "batch_proxy": base.proxies[[0, 3, 5, 6]], "all_proxy": base.proxies}[variant]
    rate = coding_rate(F.normalize(vectors, dim=-1), alpha=0.5 * DIMENSIONS / (len(vectors) * 0.4**2))
    expected = 0.3 * base(embeddings, labels) - 2.0 * 0.25 * rate
    found = loss(embeddings, labels)
    torch.testing.assert_close(found, expected)
    inputs = (embeddings, base.proxies)
    torch.testing.assert_close(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs))


def test_without_gammas_the_alpha_of_the_paper_is_that_of_the_rate():
    embeddings, labels = batch()
    terms = AntiCollapseLoss(Distances(), "pair").terms(embeddings, labels)
    torch.testing.assert_close(terms.rate, coding_rate(F.normalize(embeddings, dim=-1)))


@VARIANTS
@CONVENTIONS
def test_terms_add_up_to_the_loss(variant, convention):
    base = Distances()
    loss = AntiCollapseLoss(base, variant, convention=convention, base_weight=0.3, weight=2.0, gamma2=0.1)
    terms = loss.terms(*batch())
    torch.testing.assert_close(terms.loss, 0.3 * terms.base + 2.0 * terms.penalty)
    torch.testing.assert_close(terms.base, base(*batch()))
    expected = torch.exp(-0.1 * terms.rate) if convention == "official" else -0.1 * terms.rate
    torch.testing.assert_close(terms.penalty, expected)
    assert torch.equal(loss(*batch()), terms.loss)


def test_the_exponential_ends_the_penalty_and_the_paper_goes_on():
    torch.manual_seed(0)
    embeddings = torch.randn(90, 512, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(90) // 2
    steps = {}
    for convention in ("paper", "official"):
        loss = AntiCollapseLoss(Distances(45, 512), "pair", convention=convention, base_weight=0.0)
        (steps[convention],) = torch.autograd.grad(loss(embeddings, labels), embeddings)
    assert 0 < steps["official"].norm() < 1e-40 * steps["paper"].norm()


@VARIANTS
@CONVENTIONS
def test_collapsed_vectors_spread(variant, convention):
    torch.manual_seed(0)
    base = Distances(dtype=torch.float32)
    with torch.no_grad():
        base.proxies.copy_(torch.randn(DIMENSIONS) + 0.05 * torch.randn(CLASSES, DIMENSIONS))
    embeddings = nn.Parameter(torch.randn(DIMENSIONS) + 0.05 * torch.randn(8, DIMENSIONS))
    _, labels = batch()
    loss = AntiCollapseLoss(base, variant, convention=convention, base_weight=0.0)
    optimizer = torch.optim.Adam([embeddings, base.proxies], lr=0.05)
    rates = []
    for _ in range(60):
        terms = loss.terms(embeddings, labels)
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()
        rates.append(terms.rate.item())
    assert rates[-1] > 1.5 * rates[0]


def test_all_proxies_of_a_large_set_take_the_small_matrix():
    """Stanford Online Products has 11,318 classes: a square of them takes 512 MB in float32."""
    base = Distances(11_318, 64, torch.float32)
    loss = AntiCollapseLoss(base, "all_proxy", base_weight=0.0)
    embeddings = torch.randn(4, 64, requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        loss(embeddings, torch.arange(4)).backward()
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
    assert allocated < 20 * base.proxies.nbytes
    assert base.proxies.grad.norm() > 0


@pytest.mark.parametrize("name", ("proxy_anchor", "proxy_nca", "contrastive", "triplet"))
def test_base_losses_train(name):
    needs_metric_learning()
    torch.manual_seed(0)
    _, labels = batch()
    base = base_loss(name, CLASSES, DIMENSIONS)
    variant = "batch_proxy" if name.startswith("proxy") else "pair"
    loss = AntiCollapseLoss(base, variant)
    embeddings = nn.Parameter(torch.randn(8, DIMENSIONS))
    optimizer = torch.optim.Adam([embeddings, *loss.parameters()], lr=0.02)
    values = []
    for _ in range(40):
        terms = loss.terms(embeddings, labels)
        assert terms.base.shape == ()
        optimizer.zero_grad()
        terms.loss.backward()
        assert embeddings.grad.isfinite().all()
        optimizer.step()
        values.append(terms.loss.item())
    assert values[-1] < values[0]


@VARIANTS
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_embeddings_leave_the_proxies_in_float32(variant, dtype):
    needs_metric_learning()
    base = base_loss("proxy_anchor", CLASSES, DIMENSIONS)
    loss = AntiCollapseLoss(base, variant)
    embeddings, labels = batch(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(embeddings, labels)
    value.backward()
    assert value.dtype == base.proxies.dtype == base.proxies.grad.dtype == torch.float32
    assert embeddings.grad.dtype == dtype


def test_heads_of_this_package_and_dotted_names():
    head = MarginCosineLoss(DIMENSIONS, CLASSES).double()
    wrapped = nn.Sequential(head)
    wrapped.forward = head.forward
    embeddings, labels = batch()
    plain = AntiCollapseLoss(head, "all_proxy", proxies="weight")(embeddings, labels)
    assert torch.equal(AntiCollapseLoss(wrapped, "all_proxy", proxies="0.weight")(embeddings, labels), plain)


def test_state_and_repr():
    loss = AntiCollapseLoss(Distances(), "all_proxy", convention="official", eps=0.25)
    assert list(loss.state_dict()) == ["base.proxies"]
    assert "variant='all_proxy', convention='official', eps=0.25, base_weight=0.01" in repr(loss)
    twin = copy.deepcopy(loss)
    with torch.no_grad():
        twin.base.proxies.zero_()
    assert loss.base.proxies.abs().min() > 0


@pytest.mark.parametrize(
    "change, error, message",
    (
        ({"base": len}, TypeError, "base: expected a torch.nn.Module, got builtin_function_or_method"),
        ({"variant": "proxy"}, ValueError, "variant: expected one of pair, batch_proxy, all_proxy, got 'proxy'"),
        ({"convention": 1}, TypeError, "convention: expected one of paper, official, got int"),
        ({"eps": 0}, ValueError, "eps: expected a number above 0, got 0"),
        ({"gamma1": -1.0}, ValueError, "gamma1: expected a number above 0, got -1.0"),
        ({"gamma2": -1.0}, ValueError, "gamma2: expected at least 0, got -1.0"),
        ({"weight": math.nan}, ValueError, "weight: expected a finite number, got nan"),
        ({"base_weight": "1"}, TypeError, "base_weight: expected a number, got str"),
        ({"proxies": None}, TypeError, "proxies: expected the name of a parameter of base, got NoneType"),
        ({"proxies": "weight"}, ValueError, "base: expected a parameter 'weight' with the class proxies"),
        (
            {"base": nn.Linear(2, 3), "proxies": "bias"},
            ValueError,
            "base: expected proxies [C, D] in 'bias', got shape",
        ),
    ),
)
def test_bad_settings(change, error, message):
    with pytest.raises(error) as raised:
        AntiCollapseLoss(**{"base": Distances(), **change})
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "change, error, message",
    (
        ({"embeddings": torch.zeros(3)}, ValueError, "embeddings: expected shape [n, D], got [3]"),
        ({"embeddings": torch.zeros(8, 3).long()}, TypeError, "embeddings: expected dtype float32"),
        ({"embeddings": torch.zeros(0, DIMENSIONS)}, ValueError, "embeddings: expected at least one sample"),
        ({"labels": torch.zeros(8)}, TypeError, "labels: expected dtype torch.int64, got torch.float32"),
        ({"labels": torch.zeros(5).long()}, ValueError, "labels: expected shape [8] to fit embeddings, got [5]"),
        ({"labels": [0] * 8}, TypeError, "labels: expected a tensor [n], got list"),
        (
            {"labels": torch.arange(8)},
            ValueError,
            "labels: expected labels in [0, 7), the number of proxies, got 0 to 7",
        ),
        ({"labels": torch.arange(8) - 2}, ValueError, "got -2 to 5"),
        ({"labels": torch.full((8,), 3)}, ValueError, "labels: expected at least two classes, got one"),
    ),
)
def test_bad_batches(change, error, message):
    embeddings, labels = batch()
    with pytest.raises(error) as raised:
        AntiCollapseLoss(Distances())(**{"embeddings": embeddings, "labels": labels, **change})
    assert message in str(raised.value)


def test_the_rate_of_one_embedding_is_refused():
    with pytest.raises(ValueError, match="embeddings: expected at least two samples, got one"):
        AntiCollapseLoss(Distances(), "pair")(torch.ones(1, DIMENSIONS), torch.tensor([3]))
