"""Softmax losses with a margin of either sign, fused forward and backward.

Operator contract: the value does not depend on whether gradients were asked for; gradients reach features and weight;
second and forward-mode derivatives raise. ``features_grad`` and ``weight_grad`` are hints: with a scalar loss they let
the forward pass, which has the logits at hand, leave the gradients behind (6NDC operations in all); without them the
backward pass computes the logits again (8NDC).
"""

import torch
from torch import Tensor

from fewshot_ext._precision import accumulate_dtype
from fewshot_ext._validation import (
    check_between,
    check_choice,
    check_device,
    check_flag,
    check_floating,
    check_integer,
    check_integers,
    check_labels,
    check_number,
    check_positive,
    check_tensor,
)
from fewshot_ext.ops._autograd import differentiable
from fewshot_ext.ops.scale_gradients import scaled

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}  # the codes of csrc/margin_softmax/problem.h
DEFAULTS = {"cosine": (-0.3, 30.0), "dot": (-1.0, 5.0)}  # margin and scale by similarity, as the papers have them
ALL_CLASSES = 0  # as total_classes: the weight is not a shard

_forward_op = torch.ops.fewshot_ext.margin_softmax.default
_backward_op = torch.ops.fewshot_ext.margin_softmax_backward.default


@torch.library.register_fake("fewshot_ext::margin_softmax")
def _(
    features,
    weight,
    target,
    margin,
    scale,
    label_smoothing,
    ignore_index,
    cosine,
    total_classes,
    reduction,
    features_grad,
    weight_grad,
    return_prediction,
    allow_tf32=False,
):
    samples = features.shape[0]
    accumulate = accumulate_dtype(features.dtype)
    return (
        features.new_empty([samples] if reduction == REDUCTIONS["none"] else [], dtype=accumulate),
        target.new_empty([samples if return_prediction else 0]),
        features.new_empty([4, samples], dtype=accumulate),
        features.new_empty(features.shape if features_grad else [0]),
        weight.new_empty(weight.shape if weight_grad else [0]),
    )


@torch.library.register_fake("fewshot_ext::margin_softmax_backward")
def _(
    grad_loss,
    features,
    weight,
    target,
    row_statistics,
    margin,
    scale,
    label_smoothing,
    ignore_index,
    cosine,
    total_classes,
    features_grad,
    weight_grad,
    allow_tf32=False,
):
    return (
        features.new_empty(features.shape if features_grad else [0]),
        weight.new_empty(weight.shape if weight_grad else [0]),
    )


def _refuse_second_derivative(*unused) -> None:
    raise RuntimeError(
        "fewshot_ext.margin_softmax offers first derivatives only. For second derivatives use "
        "fewshot_ext.reference.margin_cosine_loss or margin_softmax_loss."
    )


def _save_for_backward(ctx, inputs, output) -> None:
    features, weight, target, *settings = inputs
    *ctx.settings, reduction, features_grad, weight_grad, _, ctx.allow_tf32 = settings
    _, prediction, row_statistics, grad_features, grad_weight = output
    ctx.mark_non_differentiable(prediction, row_statistics, grad_features, grad_weight)
    ctx.set_materialize_grads(False)
    ctx.reduction = reduction
    # What the forward pass left behind serves only if it covers every gradient that autograd will ask for.
    needs_features, needs_weight, *_ = ctx.needs_input_grad
    ctx.has_gradients = (features_grad or not needs_features) and (weight_grad or not needs_weight)
    ctx.save_for_backward(features, weight, target, row_statistics, grad_features, grad_weight)


def _backward(ctx, grad_loss, *unused_grads):
    needs_features, needs_weight, *rest = ctx.needs_input_grad
    no_grads = [None] * len(rest)
    if grad_loss is None:
        return None, None, *no_grads
    features, weight, target, row_statistics, grad_features, grad_weight = ctx.saved_tensors
    # A graph of the backward pass is wanted where grad mode is on here. The gradients of the forward pass are constants
    # to autograd and would give silent zeros there; the backward operator refuses by name.
    if ctx.has_gradients and not torch.is_grad_enabled():
        wanted = (grad_features if needs_features else None, grad_weight if needs_weight else None)
        return *scaled(*wanted, grad_loss), *no_grads
    if ctx.reduction == REDUCTIONS["mean"]:
        ignore_index = ctx.settings[3]
        grad_loss = grad_loss / (target != ignore_index).sum()
    grad_features, grad_weight = _call_backward(
        grad_loss.expand(target.shape),
        features,
        weight,
        target,
        row_statistics,
        *ctx.settings,
        needs_features,
        needs_weight,
        ctx.allow_tf32,
    )
    return grad_features if needs_features else None, grad_weight if needs_weight else None, *no_grads


_call_forward = differentiable(_forward_op, _save_for_backward, _backward)
_call_backward = differentiable(_backward_op, lambda ctx, inputs, output: None, _refuse_second_derivative)


def _autocast(features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """One dtype for both under autocast: its own on CUDA, where it buys speed, the wider of the two on the CPU, where
    the kernels compute in float32 whatever comes."""
    if not torch._C._is_any_autocast_enabled():
        return features, weight
    device = features.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or torch.float64 in (features.dtype, weight.dtype):
        return features, weight
    if device == "cuda":
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = torch.promote_types(features.dtype, weight.dtype)
    return features.to(dtype), weight.to(dtype)


def _cuda_allows_tf32() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


# It cannot be traced. A change of the setting has everything compiled again. torch.compiler.assume_constant_result does
# no more than this, but imports the compiler first.
_cuda_allows_tf32._dynamo_marked_constant = True


def allows_tf32(features: Tensor) -> bool:
    """Whether products of ``features`` may be in TF32: where torch's own may, float32 on CUDA."""
    return features.dtype == torch.float32 and features.device.type == "cuda" and _cuda_allows_tf32()


def check_tensors(features: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Everything about them but the number of classes and the labels. Returns features and weight in one dtype."""
    check_tensor("features", features, "[N, D]", 2)
    check_tensor("weight", weight, "[C, D]", 2)
    check_floating("features", features)
    check_floating("weight", weight)
    if isinstance(target, Tensor) and target.dim() == 2 and target.is_floating_point():
        raise TypeError(
            f"target: expected [N] int64 labels, got {target.dtype} of shape {list(target.shape)}: soft targets are "
            "not offered; label_smoothing spreads a share of each target over all classes"
        )
    check_integers("target", target, "[N]", 1)
    check_device("features", features, weight=weight, target=target)
    features, weight = _autocast(features, weight)
    if weight.dtype != features.dtype:
        raise TypeError(f"weight: expected dtype {features.dtype} as features has, got {weight.dtype}")
    samples, dimensions = features.shape
    if weight.shape[1] != dimensions:
        raise ValueError(f"weight: expected shape [C, {dimensions}] to fit features, got {list(weight.shape)}")
    if dimensions == 0:
        raise ValueError(f"features: expected at least one dimension, got shape {list(features.shape)}")
    if target.shape[0] != samples:
        raise ValueError(f"target: expected shape [{samples}] to fit features, got {list(target.shape)}")
    return features, weight


def check_settings(
    margin: float, scale: float, label_smoothing: float, ignore_index: int, reduction: str
) -> tuple[float, float, float, int]:
    """Margin, scale, label smoothing and ignore_index in the order and types that the operators take."""
    check_choice("reduction", reduction, *REDUCTIONS)
    return (
        check_number("margin", margin),
        check_positive("scale", scale),
        check_between("label_smoothing", label_smoothing, 0, 1),
        check_integer("ignore_index", ignore_index),
    )


def _margin_loss(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    margin: float,
    scale: float,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    return_prediction: bool,
    check: bool,
    cosine: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    features, weight = check_tensors(features, weight, target)
    if weight.shape[0] < 2:
        raise ValueError(f"weight: expected at least 2 classes, got shape {list(weight.shape)}")
    settings = check_settings(margin, scale, label_smoothing, ignore_index, reduction)
    check_flag("return_prediction", return_prediction)
    check_flag("check", check)
    if reduction == "mean" and features.shape[0] == 0:
        raise ValueError("features: got no samples (N = 0), which have no mean; use reduction='sum' or 'none'")

    if check:
        check_labels("target", target, weight.shape[0], ignore_index)

    # In float16, small gradients must meet a loss scale before they are rounded: they wait for the backward pass.
    with_gradients = reduction != "none" and features.dtype != torch.float16 and torch.is_grad_enabled()
    arguments = (
        features,
        weight,
        target,
        *settings,
        cosine,
        ALL_CLASSES,
        REDUCTIONS[reduction],
        with_gradients and features.requires_grad,
        with_gradients and weight.requires_grad,
        return_prediction,
        allows_tf32(features),
    )
    try:
        loss, prediction, *_ = _call_forward(*arguments)
    except RuntimeError:
        # On the CPU the kernel looks at every label before it does anything: a look from here first would cost more
        # than all other checks together.
        if target.device.type == "cpu":
            check_labels("target", target, weight.shape[0], ignore_index)
        raise
    return (loss, prediction) if return_prediction else loss


def margin_cosine_loss(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    margin: float = -0.3,
    scale: float = 30.0,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    return_prediction: bool = False,
    check: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Cosine softmax loss with a margin of either sign (Neg-Cosine; CosFace where the margin is positive).

    .. math::
        L_i = -\log \frac{e^{\beta (\cos(z_i, W_{y_i}) - m)}}
                         {e^{\beta (\cos(z_i, W_{y_i}) - m)} + \sum_{j \ne y_i} e^{\beta \cos(z_i, W_j)}}

    Equation 8 of Liu et al., "Negative Margin Matters: Understanding Margin in Few-shot Classification", ECCV 2020.
    The N x C logits are never stored whole. A vector of norm below 1e-12 is divided by 1e-12 instead, as
    :func:`torch.nn.functional.normalize` does. On the CPU vectors may be as long as the dtype takes; where one is
    longer than 1e6 (1e77 in float64) the forward pass begins a second time, with a copy of that matrix. On a GPU a
    vector longer than 1e12 (1e120 in float64) makes what depends on it NaN.

    Args:
        features: ``[N, D]``; float32, float64, bfloat16 or float16. Half types are accumulated in float32. On CUDA
            devices float32 is rounded to TF32 on the way into products where torch allows that for its own
            (:func:`torch.set_float32_matmul_precision`).
        weight: ``[C, D]``, C >= 2, one row a class; dtype and device of ``features``. Under autocast the dtypes may
            differ.
        target: ``[N]`` int64, labels in [0, C) or ``ignore_index``.
        margin: m, in units of cosine. Negative values relax the base classes for better transfer to novel ones.
        scale: :math:`\beta` > 0, the inverse temperature.
        reduction: "mean" over the rows that are not ignored (NaN where all are), "sum", or "none".
        ignore_index: label of rows that count for nothing: loss 0, no gradient, not in the mean.
        label_smoothing: in [0, 1]; as in :func:`torch.nn.functional.cross_entropy`, on the logits with margin.
        return_prediction: also return the arg-max class of the plain cosines, for the training accuracy.
        check: look at the labels on every device. A label out of range raises on the CPU anyway; on a GPU, where a look
            would make the host wait, the loss and the gradients of its row are NaN unless this is set.

    Returns:
        The loss, ``[]`` or ``[N]`` (reduction "none"), float64 for float64 features and float32 otherwise; with
        ``return_prediction`` a pair of it and the predictions, ``[N]`` int64, the first class where several tie.

    Gradients reach ``features`` and ``weight``; second and forward-mode derivatives raise a RuntimeError.

    Raises:
        TypeError: a wrong type or dtype, soft targets.
        ValueError: shapes that do not fit, fewer than 2 classes, labels out of range (see ``check``), a margin or scale
            that is not finite, an unknown reduction, no samples with reduction "mean", tensors on different devices.
        RuntimeError: CUDA tensors where the package has no kernels for the GPU.

    Example:
        >>> import torch, fewshot_ext
        >>> features = torch.randn(8, 64, requires_grad=True)
        >>> weight = torch.randn(5, 64, requires_grad=True)
        >>> target = torch.randint(5, (8,))
        >>> loss = fewshot_ext.margin_cosine_loss(features, weight, target, margin=-0.3, scale=30.0)
        >>> loss.backward()
        >>> weight.grad.shape
        torch.Size([5, 64])
    """
    return _margin_loss(
        features,
        weight,
        target,
        margin,
        scale,
        reduction,
        ignore_index,
        label_smoothing,
        return_prediction,
        check,
        cosine=True,
    )


def margin_softmax_loss(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    margin: float = -1.0,
    scale: float = 5.0,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    return_prediction: bool = False,
    check: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Inner-product softmax loss with a margin of either sign (Neg-Softmax).

    .. math::
        L_i = -\log \frac{e^{\beta (W_{y_i}^T z_i - m)}}
                         {e^{\beta (W_{y_i}^T z_i - m)} + \sum_{j \ne y_i} e^{\beta W_j^T z_i}}

    Equation 7 of Liu et al., "Negative Margin Matters: Understanding Margin in Few-shot Classification", ECCV 2020.
    Arguments, results, gradients and errors are those of :func:`margin_cosine_loss`; the margin is in units of the
    inner product.

    Example:
        >>> import torch, fewshot_ext
        >>> features, weight = torch.randn(8, 64), torch.randn(5, 64)
        >>> loss, prediction = fewshot_ext.margin_softmax_loss(
        ...     features, weight, torch.randint(5, (8,)), margin=-1.0, scale=5.0, return_prediction=True
        ... )
        >>> prediction.shape
        torch.Size([8])
    """
    return _margin_loss(
        features,
        weight,
        target,
        margin,
        scale,
        reduction,
        ignore_index,
        label_smoothing,
        return_prediction,
        check,
        cosine=False,
    )
