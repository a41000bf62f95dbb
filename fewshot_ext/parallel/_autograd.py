"""The margin softmax of all classes, computed where they lie.

A rank sees the features of all ranks and its own classes. Of each row it finds the log-sum-exp over its classes, the
target's left out, and, where the target is its own, the target's logit. Over all ranks these add up to what the row's
loss takes, and with the sums in hand the backward pass of the operator gives the gradients of the whole problem: all
of the shard's, and a term of the features'.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fewshot_ext._native_errors import explaining
from fewshot_ext.ops.margin_softmax import REDUCTIONS, allows_tf32
from fewshot_ext.parallel._collectives import Batches

IGNORED = -1  # the label of ignored rows, whatever the caller's ignore_index

_call_forward = explaining(torch.ops.fewshot_ext.margin_softmax.default)
_call_backward = explaining(torch.ops.fewshot_ext.margin_softmax_backward.default)


@dataclass(frozen=True)
class Problem:
    """What a step knows beside features, weight and labels.

    Args:
        batches: of all ranks.
        margin, scale, label_smoothing, reduction: as in :func:`fewshot_ext.margin_cosine_loss`.
        cosine: cosine similarity; the inner product otherwise.
        total_classes: of all shards together, as the softmax is over them.
        features_factor: what the features' gradient is multiplied by.
        class_numbers: ``[K]``, of the shard's rows; None where nobody wants predictions.
    """

    batches: Batches
    margin: float
    scale: float
    label_smoothing: float
    reduction: str
    cosine: bool
    total_classes: int
    features_factor: float
    class_numbers: Tensor | None

    @property
    def settings(self) -> tuple:
        """In the order of the operators."""
        return self.margin, self.scale, self.label_smoothing, IGNORED, self.cosine, self.total_classes


class ClassParallelMarginSoftmax(torch.autograd.Function):
    """features ``[N_r, D]``, weight ``[K, D]``, target ``[N]`` -> loss ``[]`` or ``[N_r]``, prediction ``[N_r]``.

    ``target`` holds the rows of all ranks: the number of the class within the shard, anything from K to
    ``total_classes`` where it lies in another, ``IGNORED``.
    """

    @staticmethod
    def forward(ctx, features: Tensor, weight: Tensor, target: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
        batches = problem.batches
        features = batches.gather(features)
        ctx.allow_tf32 = allows_tf32(features)
        statistics, prediction = _shard_statistics(features, weight, target, problem, ctx.allow_tf32)
        if problem.class_numbers is not None:
            prediction = _best_of_all(statistics[3], prediction, problem)
        sum_logits = _join(statistics, (target >= 0) & (target < len(weight)), batches.group)

        others, at_target = statistics[:2]
        gap = others - at_target
        loss = torch.logaddexp(gap, torch.zeros_like(gap))  # softplus to the last digit
        if problem.label_smoothing:
            mean_logit = (sum_logits - problem.scale * problem.margin) / problem.total_classes
            loss += problem.label_smoothing * (at_target - mean_logit)
        counted = target != IGNORED
        loss.masked_fill_(~counted, 0)
        ctx.counted = counted.sum()
        if problem.reduction == "none":
            loss = loss[batches.own].clone()
        else:
            loss = loss.sum() / ctx.counted if problem.reduction == "mean" else loss.sum()

        ctx.problem = problem
        ctx.save_for_backward(features, weight, target, statistics)
        ctx.mark_non_differentiable(prediction)
        return loss, prediction

    @staticmethod
    def backward(ctx, grad_loss: Tensor, _) -> tuple[Tensor | None, Tensor | None, None, None]:
        if torch.is_grad_enabled():  # create_graph: what follows would be constants to autograd, and silent zeros
            raise RuntimeError(
                "ClassParallelMarginLoss offers first derivatives only. For second derivatives use "
                "fewshot_ext.reference.margin_cosine_loss or margin_softmax_loss in one process."
            )
        problem, batches = ctx.problem, ctx.problem.batches
        features, weight, target, statistics = ctx.saved_tensors
        needs_features, needs_weight, *_ = ctx.needs_input_grad
        if problem.reduction == "none":
            grad_rows = batches.gather(grad_loss)
        else:
            # One number on all ranks, or the shards would disagree about what they differentiate.
            grad_loss = grad_loss / dist.get_world_size(batches.group)
            dist.all_reduce(grad_loss, group=batches.group)
            grad_rows = (grad_loss / ctx.counted if problem.reduction == "mean" else grad_loss).expand(target.shape)
        if len(weight):
            wanted = needs_features, needs_weight
            grad_features, grad_weight = _call_backward(
                grad_rows, features, weight, target, statistics, *problem.settings, *wanted, ctx.allow_tf32
            )
        else:
            grad_features, grad_weight = torch.zeros_like(features), torch.zeros_like(weight)
        if needs_features:
            # In the dtype of the statistics: half types would round at every rank on the way.
            grad_features = batches.scatter_sum(grad_features.to(statistics.dtype))
            grad_features = grad_features.mul_(problem.features_factor).to(features.dtype)
        return grad_features if needs_features else None, grad_weight if needs_weight else None, None, None


def _shard_statistics(
    features: Tensor, weight: Tensor, target: Tensor, problem: Problem, allow_tf32: bool
) -> tuple[Tensor, Tensor]:
    """The operator's row statistics ``[4, N]`` over the shard, and its best class of each row, ``[N]`` or empty."""
    wants_prediction = problem.class_numbers is not None
    if len(weight):
        _, prediction, statistics, *_ = _call_forward(
            features, weight, target, *problem.settings, REDUCTIONS["none"], False, False, wants_prediction, allow_tf32
        )
        return statistics, prediction
    statistics = features.new_zeros(
        4, len(features), dtype=torch.float64 if features.dtype == torch.float64 else torch.float32
    )
    statistics[0] = statistics[3] = -torch.inf
    return statistics, target.new_zeros(len(features) if wants_prediction else 0)


def _join(statistics: Tensor, owned: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The first two statistics, ``[N]`` each, become those of all shards; returns the sum of the logits."""
    others, at_target, sum_logits, _ = statistics
    largest = others.clone()
    # Finite, for of two classes or more one is not the target, whatever a shard has.
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    sums = torch.stack([(others - largest).exp(), at_target.where(owned, 0), sum_logits])
    dist.all_reduce(sums, group=group)
    torch.add(largest, sums[0].log(), out=others)
    at_target.copy_(sums[1])
    return sums[2]


def _best_of_all(score: Tensor, prediction: Tensor, problem: Problem) -> Tensor:
    """The class of the highest score over all shards, the first where several tie, of the rank's own rows."""
    batches, numbers = problem.batches, problem.class_numbers
    best = score.clone()
    dist.all_reduce(best, dist.ReduceOp.MAX, group=batches.group)
    nobody = torch.iinfo(torch.int64).max
    candidate = numbers[prediction].masked_fill(score != best, nobody) if len(numbers) else prediction.fill_(nobody)
    dist.all_reduce(candidate, dist.ReduceOp.MIN, group=batches.group)
    return candidate[batches.own].clone()
