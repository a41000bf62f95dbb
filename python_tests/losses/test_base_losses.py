"""The base losses of the Anti-Collapse paper against transcriptions of their formulas, in every dtype and context."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from fewshot_ext.losses import base_loss

CLASSES, DIMENSIONS = 7, 12


def needs_metric_learning():
    pytest.importorskip("pytorch_metric_learning", reason="needs the extra metric")


def batch(dtype=torch.float64, labels=(5, 5, 0, 0, 3, 3, 6, 6)):
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(len(labels), DIMENSIONS, generator=generator, dtype=torch.float64)
    return embeddings.to(dtype).requires_grad_(), torch.tensor(labels)


def official_proxy_loss(embeddings, proxies, labels, dim, scale=64.0, delta=0.1):
    """The official Anti-Collapse code, one logarithm at a time: ``dim`` 0 is its ProxyAnchor and 1 its ProxyNCA."""
    cosines = F.normalize(embeddings, dim=1) @ F.normalize(proxies, dim=1).mT
    n, classes = len(labels), len(proxies)
    pull = [
        [torch.exp(-scale * (cosines[i, labels[j]] - delta)) * (labels[i] == labels[j]) for j in range(n)]
        for i in range(n)
    ]
    push = [[torch.exp(scale * (cosines[i, c] + delta)) * (labels[i] != c) for c in range(classes)] for i in range(n)]
    return sum(torch.log1p(torch.stack([torch.stack(row) for row in terms]).sum(dim)).mean() for terms in (pull, push))


def assert_same_with_gradients(loss, expected, inputs):
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name, dim", (("proxy_anchor", 0), ("proxy_nca", 1)))
def test_proxy_losses_are_those_of_the_official_code(name, dim):
    base = base_loss(name, CLASSES, DIMENSIONS).double()
    embeddings, labels = batch()
    inputs = (embeddings, base.proxies)
    assert_same_with_gradients(base(embeddings, labels), official_proxy_loss(*inputs, labels, dim), inputs)


def test_proxy_nca_counts_a_proxy_once_for_every_image_of_its_class():
    base = base_loss("proxy_nca", CLASSES, DIMENSIONS).double()
    embeddings, labels = batch(labels=(2, 2, 2, 4, 1))
    inputs = (embeddings, base.proxies)
    assert_same_with_gradients(base(embeddings, labels), official_proxy_loss(*inputs, labels, 1), inputs)


def test_proxy_anchor_takes_the_mean_over_the_classes_in_the_batch():
    needs_metric_learning()
    from pytorch_metric_learning import losses

    base = base_loss("proxy_anchor", CLASSES, DIMENSIONS)
    peer = losses.ProxyAnchorLoss(CLASSES, DIMENSIONS, margin=0.1, alpha=64)
    peer.proxies = base.proxies
    embeddings, labels = batch(torch.float32, labels=(2, 2, 2, 4, 1))
    assert_same_with_gradients(base(embeddings, labels), peer(embeddings, labels), (embeddings, base.proxies))


@pytest.mark.parametrize("name, dim", (("proxy_anchor", 0), ("proxy_nca", 1)))
def test_1_no_row_is_lost_where_its_probability_underflows(name, dim):
    """Each embedding lies opposite to one proxy; a softmax of both gives it the probability e^-128."""
    base = base_loss(name, 2, 2)
    with torch.no_grad():
        base.proxies.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    embeddings = torch.tensor([[-1.0, 0.01], [1.0, 0.01]], requires_grad=True)
    labels = torch.tensor([0, 0])
    loss = base(embeddings, labels)
    exact = [tensor.detach().double().requires_grad_() for tensor in (embeddings, base.proxies)]
    expected = official_proxy_loss(*exact, labels, dim)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    gradients = torch.autograd.grad(loss, (embeddings, base.proxies))
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, exact), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
    alone = base(embeddings[:1], labels[:1])
    assert alone.item() == pytest.approx(official_proxy_loss(exact[0][:1], exact[1], labels[:1], dim).item(), rel=1e-6)


@pytest.mark.parametrize("name", ("proxy_anchor", "proxy_nca", "contrastive", "triplet"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("autocast", (False, True), ids=("plain", "autocast"))
def test_2_half_types_are_computed_in_float32_and_leave_the_proxies_alone(name, dtype, autocast):
    if not name.startswith("proxy"):
        needs_metric_learning()
    base = base_loss(name, CLASSES, DIMENSIONS)
    embeddings, labels = batch(dtype)
    torch.manual_seed(1)
    expected = base(embeddings.detach().float(), labels)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = base(embeddings, labels)
    assert torch.equal(loss, expected)
    assert loss.dtype == torch.float32
    loss.backward()
    assert embeddings.grad.dtype == dtype
    for parameter in base.parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32


def test_2_small_steps_under_autocast_move_every_proxy():
    base = base_loss("proxy_nca", CLASSES, DIMENSIONS)
    before = base.proxies.detach().clone()
    optimizer = torch.optim.SGD(base.parameters(), lr=1e-4)
    embeddings, labels = batch(torch.bfloat16)
    for _ in range(50):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            base(embeddings.detach(), labels).backward()
        optimizer.step()
    assert (base.proxies != before).any(1).all()


def test_base_losses_have_the_official_settings():
    needs_metric_learning()
    assert base_loss("proxy_nca", 1000, DIMENSIONS).proxies.std().item() == pytest.approx(1 / 8, rel=0.05)
    contrastive = base_loss("contrastive", CLASSES, DIMENSIONS)
    assert (contrastive.loss.pos_margin, contrastive.loss.neg_margin) == (0, 1)
    assert contrastive.miner.name == "distance"
    assert base_loss("triplet", CLASSES, DIMENSIONS).loss.margin == 0.2


BASES = ("proxy_anchor", "proxy_nca", "contrastive", "triplet")
PROXY, PAIR = BASES[:2], BASES[2:]


@pytest.mark.parametrize(
    "names, change, error, message",
    (
        (BASES, {"embeddings": [[0.0]]}, TypeError, "embeddings: expected a tensor [n, D], got list"),
        (BASES, {"embeddings": torch.zeros(3)}, ValueError, "embeddings: expected shape [n, D], got [3]"),
        (BASES, {"embeddings": torch.zeros(8, 3).long()}, TypeError, "embeddings: expected dtype float32"),
        (BASES, {"labels": torch.zeros(8).int()}, TypeError, "labels: expected dtype torch.int64, got torch.int32"),
        (BASES, {"labels": torch.arange(5)}, ValueError, "labels: expected shape [8] to fit embeddings, got [5]"),
        (
            BASES,
            {"embeddings": torch.zeros(0, DIMENSIONS), "labels": torch.zeros(0).long()},
            ValueError,
            "embeddings: expected at least one sample, got none",
        ),
        (PROXY, {"embeddings": torch.ones(8, 3)}, ValueError, "embeddings: expected shape [n, 12] to fit the proxies"),
        (PROXY, {"labels": torch.arange(8)}, ValueError, "labels: expected labels in [0, 7), the number of proxies"),
        (PROXY, {"labels": torch.arange(8) - 1}, ValueError, "got -1 to 6"),
        (PAIR, {"labels": torch.full((8,), 3)}, ValueError, "labels: expected at least two classes, got one for all 8"),
        (PAIR, {"labels": torch.arange(8)}, ValueError, "expected a class with at least two samples, got 8 classes"),
        (
            PAIR,
            {"embeddings": torch.full((8, DIMENSIONS), math.nan)},
            ValueError,
            "embeddings: expected finite entries, got others in row 0",
        ),
    ),
)
def test_bad_batches_of_base_losses(names, change, error, message):
    needs_metric_learning()
    embeddings, labels = batch(torch.float32)
    for name in names:
        for loss in (base_loss(name, CLASSES, DIMENSIONS), copy.deepcopy(base_loss(name, CLASSES, DIMENSIONS))):
            arguments = {"embeddings": embeddings, "labels": labels, **change}
            for call in (lambda: loss(**arguments), lambda: loss(*arguments.values())):  # noqa: B023
                with pytest.raises(error) as raised:
                    call()
                assert message in str(raised.value)


def test_contrastive_is_the_mean_over_the_pairs_of_the_triplets():
    needs_metric_learning()
    base = base_loss("contrastive", CLASSES, DIMENSIONS, "random")
    embeddings, labels = batch(torch.float64)
    torch.manual_seed(3)
    loss = base(embeddings, labels)
    torch.manual_seed(3)
    anchors, positives, negatives = base.miner(F.normalize(embeddings), labels)
    unit = F.normalize(embeddings)
    near, far = ((unit[anchors] - unit[others]).norm(dim=1) for others in (positives, negatives))
    torch.testing.assert_close(loss, near.mean() + (1 - far).relu().mean())


def test_names_of_parameters():
    assert list(base_loss("proxy_anchor", CLASSES, DIMENSIONS).state_dict()) == ["proxies"]
    assert not base_loss("triplet", CLASSES, DIMENSIONS).state_dict()


@pytest.mark.parametrize(
    "arguments, error, message",
    (
        (("arcface", 5, 8), ValueError, "name: expected one of proxy_anchor, proxy_nca, contrastive, triplet"),
        (("triplet", 1, 8), ValueError, "num_classes: expected at least 2, got 1"),
        (("triplet", 5, 0), ValueError, "embedding_size: expected at least 1, got 0"),
        (("triplet", 5, 8, "hard"), ValueError, "miner: expected one of distance, random, semihard, softhard"),
        (("triplet", 5.0, 8), TypeError, "num_classes: expected an integer, got float"),
    ),
)
def test_bad_base_losses(arguments, error, message):
    with pytest.raises(error) as raised:
        base_loss(*arguments)
    assert message in str(raised.value)


def test_missing_metric_learning_is_named(monkeypatch):
    monkeypatch.setattr("fewshot_ext._extras.is_installed", lambda module: False)
    with pytest.raises(ImportError, match=r"'pytorch_metric_learning' is missing; pip install 'fewshot_ext\[metric\]'"):
        base_loss("triplet", 5, 8)
