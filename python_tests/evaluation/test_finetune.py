import pytest
import torch
import torch.nn.functional as F

from fewshot_ext.evaluation import finetune_episodes

pytestmark = pytest.mark.usefixtures("one_thread")


def one_episode_by_sgd(support, target, query, weight, order, *, similarity, scale, margin, batch_size, sgd):
    """The loop that every framework runs: one classifier, ``torch.optim.SGD``, autograd."""
    weight = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.SGD([weight], **sgd)

    def scores(features):
        if similarity == "cosine":
            return F.linear(F.normalize(features, dim=-1), F.normalize(weight, dim=-1))
        return F.linear(features, weight)

    for permutation in order:
        for batch in permutation.split(batch_size):
            truth = F.one_hot(target[batch], len(weight)).to(weight.dtype)
            logits = scale * (scores(support[batch]) - margin * truth)
            optimizer.zero_grad()
            F.cross_entropy(logits, target[batch]).backward()
            optimizer.step()
    return scores(query).detach()


@pytest.mark.parametrize("similarity", ["cosine", "softmax"])
@pytest.mark.parametrize("margin", [0.0, -0.3, 0.2])
@pytest.mark.parametrize(
    ("shot", "batch_size", "sgd"),
    [
        (5, 4, {"lr": 0.01, "momentum": 0.9, "dampening": 0.9, "weight_decay": 1e-3}),
        (1, 4, {"lr": 0.5, "momentum": 0.9, "dampening": 0.9, "weight_decay": 0.1}),
        (2, 10, {"lr": 0.1, "momentum": 0.5, "dampening": 0.0, "weight_decay": 0.0}),
        (3, 1, {"lr": 0.1, "momentum": 0.0, "dampening": 0.0, "weight_decay": 1e-2}),
    ],
)
def test_equals_the_loop_of_torch_sgd(similarity, margin, shot, batch_size, sgd):
    generator = torch.Generator().manual_seed(0)
    episodes, way, queries, dimension, steps = 3, 5, 7, 12, 10
    support = torch.randn(episodes, way * shot, dimension, generator=generator, dtype=torch.float64)
    query = torch.randn(episodes, queries, dimension, generator=generator, dtype=torch.float64)
    weight = torch.randn(episodes, way, dimension, generator=generator, dtype=torch.float64) / 4
    order = torch.rand(episodes, steps, way * shot, generator=generator).argsort(-1)
    target = torch.arange(way).repeat_interleave(shot).expand(episodes, -1)
    before = weight.clone()
    settings = {"similarity": similarity, "scale": 5.0, "margin": margin, "batch_size": batch_size}
    ours = finetune_episodes(support, target, query, steps=steps, weight=weight, order=order, **settings, **sgd)
    for e in range(episodes):
        expected = one_episode_by_sgd(support[e], target[e], query[e], weight[e], order[e], sgd=sgd, **settings)
        torch.testing.assert_close(ours[e], expected, rtol=1e-9, atol=1e-10)
    assert torch.equal(weight, before)


def test_float32_agrees_with_float64_over_the_whole_protocol():
    generator = torch.Generator().manual_seed(1)
    support, query = (
        torch.randn(20, 25, 64, generator=generator),
        torch.randn(20, 80, 64, generator=generator),
    )
    weight = (torch.rand(20, 5, 64, generator=generator) - 0.5) / 4
    order = torch.rand(20, 100, 25, generator=generator).argsort(-1)
    target = torch.arange(5).repeat_interleave(5).expand(20, -1)
    single, double = (
        finetune_episodes(support.to(t), target, query.to(t), weight=weight.to(t), order=order)
        for t in (torch.float32, torch.float64)
    )
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-5)


def test_generator_decides_weight_and_order():
    support, query = torch.randn(4, 10, 6), torch.randn(4, 3, 6)
    target = torch.arange(5).repeat_interleave(2).expand(4, -1)
    first, again, other = (
        finetune_episodes(support, target, query, steps=3, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (4, 3, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"similarity": "dot"}, "similarity must be"),
        ({"support": torch.zeros(4, 6)}, r"support must be \[E, S, D\]"),
        ({"support_target": torch.zeros(4, 9, dtype=torch.int64)}, r"support_target must be \[4, 10\]"),
        ({"query": torch.zeros(4, 3, 7)}, r"query must be \[4, Q, 6\]"),
        ({"weight": torch.zeros(4, 5, 7)}, r"weight must be \[4, 5, 6\]"),
        ({"order": torch.zeros(4, 2, 10, dtype=torch.int64)}, r"order must be \[4, 3, 10\]"),
    ],
)
def test_shapes_that_do_not_fit_are_named(changes, message):
    arguments = {
        "support": torch.zeros(4, 10, 6),
        "support_target": torch.arange(5).repeat_interleave(2).expand(4, -1),
        "query": torch.zeros(4, 3, 6),
        "steps": 3,
    }
    with pytest.raises(ValueError, match=message):
        finetune_episodes(**{**arguments, **changes})
