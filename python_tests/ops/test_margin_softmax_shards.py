"""The operators on shards of the classes: joined as their contract says, they give the loss of all classes."""

import pytest
import torch

from .contract import BACKENDS, DTYPES, assert_within, evaluate, on_backends
from .margin_softmax_case import REDUCTIONS, draw, logit_error, margin_cosine, margin_softmax

LOSSES = pytest.mark.parametrize("case", (margin_cosine, margin_softmax), ids=lambda case: case.name)
IGNORED = -1
operators = torch.ops.fewshot_ext


class Shard:
    """The classes from ``first`` on, and the calls of a shard."""

    def __init__(self, problem, cosine, first, count):
        self.features, weight, target = problem.tensors.values()
        self.weight, self.classes = weight[first : first + count], slice(first, first + count)
        total = len(weight)
        local = target - first
        # Elsewhere is anything from the shard's size on; here the largest number that there is.
        self.target = local.where((local >= 0) & (local < count), torch.tensor(total - 1, device=local.device))
        self.target[target == problem.options["ignore_index"]] = IGNORED
        self.owned = (self.target >= 0) & (self.target < count)
        margin, scale, smoothing = (problem.options[name] for name in ("margin", "scale", "label_smoothing"))
        self.settings = (margin, scale, smoothing, IGNORED, cosine, total)

    def statistics(self):
        arguments = (self.features, self.weight, self.target, *self.settings, REDUCTIONS["none"], False, False, True)
        _, prediction, statistics, *_ = operators.margin_softmax(*arguments)
        return statistics, prediction + self.classes.start

    def gradients(self, upstream, statistics):
        return operators.margin_softmax_backward(
            upstream, self.features, self.weight, self.target, statistics, *self.settings, True, True
        )


def joined(statistics, owned):
    """Log-sum-exp over all other classes, the target's logit, the sum of the logits, the largest: float64."""
    others, at_target, sums, best = torch.stack(statistics).double().unbind(1)
    return torch.stack(
        (others.logsumexp(0), at_target.where(torch.stack(owned), 0.0).sum(0), sums.sum(0), best.amax(0))
    )


@LOSSES
@on_backends(BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", ((2, 3), (1, 40, 23), (1, 1)), ids=str)
def test_shards_together_equal_the_whole(case, backend, sizes, dtype):
    options = {"margin": 0.3, "scale": 5.0, "label_smoothing": 0.1, "ignore_index": 1, "reduction": "none"}
    whole = draw(70, sum(sizes), 33, dtype=dtype, **options)
    upstream = torch.linspace(-1, 1, 70, dtype=torch.float64)
    (expected,), gradients = evaluate(case.reference, whole.to(torch.float64), ("features", "weight"), [upstream])
    bounds = case.bounds(whole, [upstream], backend.operand_errors.get(dtype, 0.0))

    problem = whole.to(device=backend.device)
    firsts = [sum(sizes[:shard]) for shard in range(len(sizes))]
    shards = [Shard(problem, case is margin_cosine, first, count) for first, count in zip(firsts, sizes, strict=True)]
    with backend.activate():
        found = [shard.statistics() for shard in shards]
        of_all = joined([statistics for statistics, _ in found], [shard.owned for shard in shards])
        accumulate = found[0][0].dtype
        terms, parts = zip(
            *(shard.gradients(upstream.to(of_all.device, accumulate), of_all.to(accumulate)) for shard in shards),
            strict=True,
        )

    others, at_target, sums, best = of_all.cpu()
    gap = others - at_target
    loss = torch.logaddexp(gap, torch.zeros_like(gap)) + 0.1 * (at_target - (sums - 5.0 * 0.3) / sum(sizes))
    assert_within(loss.masked_fill(whole.tensors["target"] == 1, 0), expected, bounds.results[0], case.name)

    rounding = torch.finfo(dtype).eps
    weight = torch.cat(parts)
    assert weight.dtype == dtype
    assert_within(
        weight,
        gradients["weight"],
        bounds.gradients["weight"] + rounding * gradients["weight"].abs() + torch.finfo(dtype).smallest_normal,
        "weight",
    )
    rounded = sum(rounding * term.double().abs().cpu() + torch.finfo(dtype).smallest_normal for term in terms)
    # The projection of each term takes out what the terms of the others bring in: the terms err apart.
    features_bound = len(sizes) * bounds.gradients["features"] + rounded
    assert_within(sum(term.double() for term in terms), gradients["features"], features_bound, "features")

    predictions = torch.stack([prediction for _, prediction in found]).cpu()
    candidate = torch.stack([statistics[3] for statistics, _ in found]).cpu().double() == best
    predicted = predictions.masked_fill(~candidate, sum(sizes)).amin(0)
    case.check_discrete(whole.with_options(return_prediction=True), (loss, predicted))
    assert (best - best_logits(whole, case is margin_cosine)).abs().le(logit_error(whole, case is margin_cosine)).all()


def best_logits(problem, cosine):
    features, weight = (problem.tensors[name].double() for name in ("features", "weight"))
    if cosine:
        features, weight = (torch.nn.functional.normalize(rows, dim=1) for rows in (features, weight))
    return problem.options["scale"] * (features @ weight.t()).amax(dim=1)


@on_backends(BACKENDS)
def test_label_beyond_all_classes_is_none_of_another_shard(backend):
    problem = draw(6, 5, 4, dtype=torch.float32, margin=-0.3, scale=5.0, label_smoothing=0.0, ignore_index=-100)
    shard = Shard(problem.to(device=backend.device), True, 0, 3)
    shard.target[2] = 5
    with backend.activate():
        if not backend.name.startswith("cpu"):
            assert shard.statistics()[0].isnan().any(0).nonzero().tolist() == [[2]]
        else:
            with pytest.raises(RuntimeError, match=r"label 5 at index 2 is outside \[0, 5\)"):
                shard.statistics()


@pytest.mark.parametrize("total", (1, 4, -5, 2**31))
def test_refuses_totals_that_fit_no_shard(total):
    arguments = draw(6, 5, 4).tensors.values()
    with pytest.raises(RuntimeError, match="total_classes: expected 0 or a number in"):
        operators.margin_softmax(*arguments, -0.3, 5.0, 0.0, -100, True, total, 0, False, False, False)


def test_one_class_is_a_shard_but_no_problem():
    features, weight, target = draw(6, 5, 4).tensors.values()
    arguments = (features, weight[:1], torch.zeros_like(target), -0.3, 5.0, 0.0, -100, True)
    operators.margin_softmax(*arguments, 2, 0, False, False, False)
    with pytest.raises(RuntimeError, match="1 <= C for a shard"):
        operators.margin_softmax(*arguments, 0, 0, False, False, False)


def test_backward_takes_the_statistics_of_the_forward_pass_alone():
    features, weight, target = draw(6, 5, 4).tensors.values()
    with pytest.raises(RuntimeError, match=r"row_statistics: expected \[4, N\]"):
        operators.margin_softmax_backward(
            features.new_zeros(6),
            features,
            weight,
            target,
            features.new_zeros(2, 6),
            -0.3,
            5.0,
            0.0,
            -100,
            True,
            0,
            True,
            True,
        )
