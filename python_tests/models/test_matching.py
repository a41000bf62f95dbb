"""Logits of optimal matching against a plain transcription: loops over pairs, and HiGHS for each linear program."""

import numpy as np
import pytest
import torch
from emd_peers import quadratic_layer

from fewshot_ext.models import cross_reference_weights, emd_logits, match_flows, matching

pytestmark = pytest.mark.usefixtures("one_thread")


def maps(episodes=2, queries=3, way=2, nodes=4, others=None, channels=6, seed=0, dtype=torch.float64):
    """Features as a ReLU leaves them: a shared part makes the regions relevant to each other."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(episodes, 1, 1, channels, generator=generator, dtype=torch.float64)
    return tuple(
        (torch.randn(episodes, images, n, channels, generator=generator, dtype=torch.float64) + shared)
        .clamp_min(-0.5)
        .to(dtype)
        for images, n in ((queries, nodes), (way, others or nodes))
    )


def official_pair(query, support, temperature, weighting):
    """The formulas of one pair: flow by HiGHS, logit by the sum over flow and similarity."""
    optimize = pytest.importorskip("scipy.optimize")
    nodes, others = len(query), len(support)
    if weighting == "uniform":
        supply, demand = np.ones(nodes), np.ones(others)
    else:
        supply = np.array([max(u @ support.mean(0), 0) + 1e-3 for u in query])
        demand = np.array([max(v @ query.mean(0), 0) + 1e-3 for v in support])
    supply, demand = supply * nodes / supply.sum(), demand * nodes / demand.sum()
    query, support = (rows - rows.mean(1, keepdims=True) for rows in (query, support))
    similarity = np.array([[u @ v / np.linalg.norm(u) / np.linalg.norm(v) for v in support] for u in query])
    leaves = np.kron(np.eye(nodes), np.ones(others))
    arrives = np.kron(np.ones(nodes), np.eye(others))
    found = optimize.linprog(
        (1 - similarity).ravel(),
        A_eq=np.concatenate([leaves, arrives])[:-1],  # the last follows from the others, up to rounding
        b_eq=np.concatenate([supply, demand])[:-1],
        method="highs-ds",
    )
    flow = found.x.reshape(nodes, others)
    return temperature / nodes * (flow * similarity).sum(), flow, supply, demand


def official(query, support, temperature=12.5, weighting="cross_reference"):
    query, support = query.detach().numpy(), support.detach().numpy()
    rows = [
        [[official_pair(image, other, temperature, weighting)[0] for other in support[e]] for image in query[e]]
        for e in range(len(query))
    ]
    return torch.tensor(np.array(rows))


@pytest.mark.parametrize("weighting", ["cross_reference", "uniform"])
@pytest.mark.parametrize(("nodes", "others"), [(4, 4), (1, 1), (5, 3), (25, 25)])
def test_logits_equal_the_official_formulas(weighting, nodes, others):
    query, support = maps(nodes=nodes, others=others)
    expected = official(query, support, 7.0, weighting)
    actual = emd_logits(query, support, temperature=7.0, weighting=weighting)
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-7)


def test_weights_have_a_floor_and_the_mass_of_the_query():
    """Regions opposite to the other image keep the floor alone; both sides sum to N although M differs."""
    query = torch.tensor([[[[1.0, 0.0], [-5.0, 0.0], [0.0, 1.0]]]], dtype=torch.float64)
    support = torch.tensor([[[[4.0, 0.0], [2.0, 2.0]]]], dtype=torch.float64)
    relevance = torch.tensor([3.001, 0.001, 1.001]), torch.tensor([0.001, 0.001])  # query's mean is (-4/3, 1/3)
    for weight, expected in zip(cross_reference_weights(query, support), relevance, strict=True):
        torch.testing.assert_close(weight.flatten(), (3 * expected / expected.sum()).double())


@pytest.mark.parametrize("detach_weights", [False, True])
@pytest.mark.parametrize("weighting", ["cross_reference", "uniform"])
def test_gradients_equal_finite_differences(detach_weights, weighting):
    """Of the transcription; where weights are detached, of a transcription whose weights stay behind."""
    query, support = maps(1, 1, 1, nodes=3, others=4)
    if detach_weights:
        weights = [weight[0, 0, 0].numpy() for weight in cross_reference_weights(query, support)]
    leaves = (query.requires_grad_(), support.requires_grad_())
    logits = emd_logits(*leaves, weighting=weighting, detach_weights=detach_weights)
    gradients = torch.autograd.grad(logits.sum(), leaves)

    def logit(*pair):
        if not detach_weights or weighting == "uniform":
            return official(*pair, weighting=weighting).item()
        # Any features with these weights would do; the flow comes from a problem with given marginals.
        return given_weights(*pair, *weights)

    step = 1e-5
    for position, gradient in enumerate(gradients):
        for entry in np.ndindex(*gradient.shape[2:]):
            around = []
            for sign in (1, -1):
                moved = [leaf.detach().clone() for leaf in leaves]
                moved[position][0, 0][entry] += sign * step
                around.append(logit(*moved))
            assert gradient[0, 0][entry].item() == pytest.approx((around[0] - around[1]) / (2 * step), abs=2e-4)


def given_weights(query, support, supply, demand):
    from fewshot_ext.reference import emd

    units = [torch.nn.functional.normalize(x[0, 0] - x[0, 0].mean(-1, keepdim=True), dim=-1) for x in (query, support)]
    value, *_ = emd(1 - units[0] @ units[1].mT, torch.from_numpy(supply), torch.from_numpy(demand))
    return 12.5 * (1 - value.item() / len(supply))


def test_gradcheck():
    query, support = maps(2, 2, 2, nodes=3, others=4)
    assert torch.autograd.gradcheck(emd_logits, (query.requires_grad_(), support.requires_grad_()))


def test_gradients_equal_a_quadratic_layer():
    """What the official solver differentiates: a quadratic program with so little regularization that the vertex
    stays."""
    pytest.importorskip("cvxpylayers")
    query, support = maps(1, 2, 2, nodes=3, others=3)
    leaves = (query.requires_grad_(), support.requires_grad_())
    program = quadratic_layer(3, 3, regularization=3e-4)
    logits = []
    weights = cross_reference_weights(*leaves)
    for q in range(2):
        for p in range(2):
            units = [
                torch.nn.functional.normalize(x - x.mean(-1, keepdim=True), dim=-1)
                for x in (leaves[0][0, q], leaves[1][0, p])
            ]
            similarity = units[0] @ units[1].mT
            flow = program(1 - similarity, weights[0][0, q, p], weights[1][0, q, p])
            logits.append(12.5 / 3 * (flow * similarity).sum())
    upstream = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    expected = torch.autograd.grad((torch.stack(logits) * upstream).sum(), leaves)
    actual = torch.autograd.grad((emd_logits(*leaves).flatten() * upstream).sum(), leaves)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_detached_weights_change_the_gradient_and_not_the_logits():
    query, support = (x.requires_grad_() for x in maps())
    through, stopped = (emd_logits(query, support, detach_weights=detach) for detach in (False, True))
    assert torch.equal(through, stopped)
    gradients = [torch.autograd.grad(logits.sum(), query)[0] for logits in (through, stopped)]
    assert (gradients[0] - gradients[1]).abs().max() > 1e-2


@pytest.mark.parametrize("bytes_at_once", [1, 2000, 5000, 10**9])
def test_chunks_change_nothing(bytes_at_once):
    query, support = (x.requires_grad_() for x in maps(episodes=5, queries=4))
    whole = emd_logits(query, support)
    parts = emd_logits(query, support, bytes_at_once=bytes_at_once)
    torch.testing.assert_close(parts, whole)
    for expected, actual in zip(*(torch.autograd.grad(x.sum(), (query, support)) for x in (whole, parts)), strict=True):
        torch.testing.assert_close(actual, expected)


def test_one_call_of_the_operator_for_all_pairs(monkeypatch):
    calls = []
    monkeypatch.setattr(
        matching, "emd", lambda *inputs, emd=matching.emd: calls.append(inputs[0].shape) or emd(*inputs)
    )
    emd_logits(*maps(episodes=5, queries=4))
    assert calls == [(5, 4, 2, 4, 4)]
    calls.clear()
    emd_logits(*maps(episodes=5, queries=4), bytes_at_once=4 * 8 * 2 * 16 * 8)  # eight queries: two episodes
    assert [shape[:2] for shape in calls] == [(2, 4), (2, 4), (1, 4)]


def test_a_common_factor_and_a_common_shift_of_the_channels():
    """A factor changes nothing but the floor's share; a shift over the channels changes the weights alone."""
    query, support = maps()
    uniform = emd_logits(query, support, weighting="uniform")
    torch.testing.assert_close(emd_logits(3 * query + 5, 0.1 * support - 2, weighting="uniform"), uniform)
    torch.testing.assert_close(emd_logits(1e6 * query, 1e6 * support), emd_logits(1e7 * query, 1e7 * support))
    assert (emd_logits(query + 5, support) - emd_logits(query, support)).abs().max() > 1e-3


def test_the_order_of_regions_does_not_matter():
    query, support = maps(nodes=6, others=5)
    expected = emd_logits(query, support)
    torch.testing.assert_close(emd_logits(query.flip(2), support.roll(2, 2)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32(dtype):
    query, support = maps(nodes=5, dtype=dtype)
    logits = emd_logits(query, support)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), emd_logits(query.double(), support.double()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("function", [emd_logits, match_flows, cross_reference_weights])
def test_autocast_leaves_the_precision_alone(function):
    query, support = maps(queries=2, nodes=5, dtype=torch.float32)
    expected = function(query, support)
    with torch.autocast("cpu", torch.bfloat16):
        for actual, exact in zip(function(query, support), expected, strict=True):
            assert torch.equal(actual, exact)


def test_regions_without_features_match_nothing():
    """Zero vectors have similarity 0 to everything, and a gradient that is finite."""
    query, support = (torch.zeros_like(x).requires_grad_() for x in maps())
    logits = emd_logits(query, support)
    assert torch.equal(logits, torch.zeros_like(logits))
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(logits.sum(), (query, support)))


@pytest.mark.parametrize(("episodes", "queries"), [(0, 3), (2, 0)])
def test_nothing_to_score(episodes, queries):
    query, support = maps(episodes=episodes, queries=queries)
    assert emd_logits(query, support).shape == (episodes, queries, 2)


@pytest.mark.parametrize("weighting", ["cross_reference", "uniform"])
def test_flows_are_the_ones_behind_the_logits(weighting):
    query, support = maps(nodes=5, others=3)
    pairs = torch.broadcast_tensors(query.unsqueeze(2), support.unsqueeze(1)[..., :1, :])[0], support.unsqueeze(1)
    match = match_flows(pairs[0], pairs[1].expand(-1, 3, -1, -1, -1), weighting=weighting)
    assert match.flow.shape == (2, 3, 2, 5, 3)
    torch.testing.assert_close(match.flow.sum(-1), match.query_weight)
    torch.testing.assert_close(match.flow.sum(-2), match.support_weight)
    torch.testing.assert_close(match.query_weight.sum(-1), torch.full((2, 3, 2), 5.0, dtype=torch.float64))
    _, flow, supply, demand = official_pair(query[1, 2].numpy(), support[1, 0].numpy(), 1.0, weighting)
    for found, expected in zip(match, (flow, supply, demand), strict=True):
        torch.testing.assert_close(found[1, 2, 0], torch.from_numpy(expected), rtol=1e-7, atol=1e-7)


def test_flow_of_a_single_pair():
    query, support = (x[0, 0] for x in maps(nodes=5))
    match = match_flows(query.requires_grad_(), support)
    assert [part.shape for part in match] == [(5, 5), (5,), (5,)]
    assert not match.flow.requires_grad


GOOD = torch.zeros(2, 3, 4, 6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": [1.0]}, TypeError, "query: expected a floating-point tensor, got list"),
        ({"support": GOOD.long()}, TypeError, "support: expected a floating-point tensor, got torch.int64"),
        ({"support": GOOD.double()}, TypeError, "support: expected dtype torch.float32 as query has"),
        ({"query": GOOD[0]}, ValueError, r"query: expected shape \[E, images, N, C\], got \[3, 4, 6\]"),
        ({"support": GOOD[..., :5]}, ValueError, "support: expected the 6 channels of query, got 5"),
        ({"support": GOOD[:1]}, ValueError, "support: expected the 2 episodes of query, got 1"),
        ({"query": GOOD[:, :, :0]}, ValueError, r"query: expected at least one region .*\[2, 3, 0, 6\]"),
        ({"support": GOOD[..., :0]}, ValueError, "support: expected at least one region and one channel"),
        ({"support": GOOD.to("meta")}, ValueError, "support: expected device cpu as query is on, got meta"),
        ({"query": GOOD + float("nan")}, ValueError, "query: expected finite entries, got NaN or infinity"),
        ({"support": GOOD - float("inf")}, ValueError, "support: expected finite entries, got NaN or infinity"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a number above 0"),
        ({"temperature": "1"}, TypeError, "temperature: expected a number, got str"),
        ({"bytes_at_once": 0}, ValueError, "bytes_at_once: expected at least 1"),
        (
            {"weighting": "attention"},
            ValueError,
            "weighting: expected one of cross_reference, uniform, got 'attention'",
        ),
    ],
)
def test_bad_input_is_named(changes, error, message):
    with pytest.raises(error, match=message):
        emd_logits(**{"query": GOOD, "support": GOOD, **changes})


@pytest.mark.parametrize(
    ("query", "support", "error", "message"),
    [
        (None, GOOD, TypeError, "query: expected a floating-point tensor, got NoneType"),
        (GOOD[0, 0, 0], GOOD[0, 0], ValueError, r"query: expected shape \[..., N, C\], got \[6\]"),
        (
            GOOD,
            GOOD[:1],
            ValueError,
            r"support: expected shape \[..., M, C\] with the batch \[2, 3\] of query, got \[1, 3",
        ),
        (GOOD, GOOD[..., :3], ValueError, "support: expected the 6 channels of query, got 3"),
        (GOOD + float("nan"), GOOD, ValueError, "query: expected finite entries"),
    ],
)
def test_bad_pairs_are_named(query, support, error, message):
    with pytest.raises(error, match=message):
        match_flows(query, support)


def test_overflow_of_finite_features_is_named():
    message = r"query and support: expected inner products that torch\.float32 holds, got entries of up to 1e\+30"
    with pytest.raises(ValueError, match=message):
        emd_logits(GOOD + 1e30, GOOD + 1e30)


def test_other_errors_of_the_operator_stay_what_they_are(monkeypatch):
    def refuses(*_):
        raise ValueError("cost: expected at most 256 points")

    monkeypatch.setattr(matching, "emd", refuses)
    with pytest.raises(ValueError, match="cost: expected at most 256 points"):
        emd_logits(GOOD, GOOD)
