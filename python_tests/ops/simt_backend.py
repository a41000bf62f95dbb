"""The operators on the emulator: CPU tensors go through the CUDA kernels, compiled by g++."""

import functools
import itertools
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ..simt import build

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # the codes of csrc/common/dtype.h
HERE = Path(__file__).resolve().parent
_sums = itertools.count()
_one_at_a_time = threading.Lock()  # autograd may run a backward pass on another thread


@functools.cache
def _build():
    try:
        return build.load("simt_kernels_of_fewshot_ext", *sorted(HERE.glob("simt_*.cpp")), includes=(HERE,)), None
    except RuntimeError as error:  # kept, or every test would compile again to fail
        return None, error


def kernels():
    """The compiled module."""
    module, error = _build()
    if error is not None:
        raise error
    return module


@contextmanager
def emulated(
    kernel: str,
    *,
    blocks: int = 3,
    chunk_samples: int = 48,
    chunk_products: int = 1 << 12,
    row_bytes: int = 1 << 14,
    sums: int | None = None,
) -> Iterator[None]:
    """Operators on CPU tensors run on the emulator, margin softmax by ``kernel`` ("one_launch", "one_pass" or
    "chunked"), with ``row_bytes`` for the complete rows of one pass.

    ``sums`` draws how matrix instructions add: in one way throughout, as on one GPU, and each time in another one.

    Sizes are far below those of a GPU, so that small problems have several blocks and chunks too.
    """
    plan = (kernel, blocks, chunk_samples, chunk_products, row_bytes)
    sums = next(_sums) if sums is None else sums
    operators = {
        "margin_softmax": functools.partial(_margin_softmax, (sums, plan)),
        "margin_softmax_backward": functools.partial(_margin_softmax_backward, (sums, plan)),
        "scale_gradients_": _scale_gradients,
        "emd": emd,
        "emd_flow_backward": emd_flow_backward,
        "finetune_episodes": _finetune_episodes,
        "draw_episodes": _draw_episodes,
    }
    with torch.library._scoped_library("fewshot_ext", "IMPL") as library:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
            for name, function in operators.items():
                library.impl(name, function, "CPU", allow_override=True)
        yield


def _address(tensor: Tensor | None) -> int:
    return tensor.data_ptr() if tensor is not None and tensor.numel() else 0


def _run(
    plan, features, weight, target, margin, scale, label_smoothing, ignore_index, cosine, total_classes, **others
) -> None:
    """``others``: the reduction's code, whether tf32 is allowed, and tensors or None by the names of
    MarginSoftmaxProblem."""
    features, weight = (x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous() for x in (features, weight))
    target = target.contiguous()
    fields = {
        "samples": features.shape[0],
        "classes": weight.shape[0],
        "total_classes": total_classes or weight.shape[0],
        "dimensions": features.shape[1],
        "dtype": DTYPES.index(features.dtype),
        "features": _address(features),
        "features_stride": features.stride(0),
        "weight": _address(weight),
        "weight_stride": weight.stride(0),
        "target": _address(target),
        "margin": margin,
        "scale": scale,
        "label_smoothing": label_smoothing,
        "ignore_index": ignore_index,
        "cosine": cosine,
        "reduction": others.pop("reduction", 0),
        "allow_tf32": others.pop("allow_tf32"),
        **{name: _address(tensor) for name, tensor in others.items()},
    }
    sums, plan = plan
    with _one_at_a_time:
        kernels().fix_sums(sums)
        kernels().margin_softmax(fields, *plan)


def _poison(shape, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What a kernel forgets to write shows."""
    dtype = dtype or like.dtype
    return torch.full(shape, float("nan") if dtype.is_floating_point else -(2**40), dtype=dtype)


def _margin_softmax(
    plan,
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
    accumulate = torch.float64 if features.dtype == torch.float64 else torch.float32
    loss = _poison([samples] if reduction == 0 else [], features, accumulate)
    prediction = _poison([samples if return_prediction else 0], target)
    statistics = _poison([4, samples], features, accumulate)
    grad_features = _poison(features.shape if features_grad else [0], features)
    grad_weight = _poison(weight.shape if weight_grad else [0], weight)
    if samples == 0:
        return loss.zero_(), prediction, statistics, grad_features, grad_weight.zero_()
    _run(
        plan,
        features,
        weight,
        target,
        margin,
        scale,
        label_smoothing,
        ignore_index,
        cosine,
        total_classes,
        reduction=reduction,
        allow_tf32=allow_tf32,
        loss=loss,
        prediction=prediction,
        row_statistics=statistics,
        grad_features=grad_features,
        grad_weight=grad_weight,
        grad_loss=None,
    )
    return loss, prediction, statistics, grad_features, grad_weight


def _margin_softmax_backward(
    plan,
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
    grad_features = _poison(features.shape if features_grad else [0], features)
    grad_weight = _poison(weight.shape if weight_grad else [0], weight)
    if features.shape[0] == 0:
        return grad_features, grad_weight.zero_()
    _run(
        plan,
        features,
        weight,
        target,
        margin,
        scale,
        label_smoothing,
        ignore_index,
        cosine,
        total_classes,
        allow_tf32=allow_tf32,
        loss=None,
        prediction=None,
        row_statistics=row_statistics.contiguous(),
        grad_features=grad_features,
        grad_weight=grad_weight,
        grad_loss=grad_loss.contiguous(),
    )
    return grad_features, grad_weight


def _scale_gradients(first, second, factor):
    gradients = [(_address(gradient), gradient.numel()) for gradient in (first, second)]
    with _one_at_a_time:
        kernels().scale_gradients(DTYPES.index(first.dtype), gradients, _address(factor))


def emd(
    cost: Tensor, supply: Tensor, demand: Tensor, partial: bool = False, *, exact: bool = True
) -> tuple[Tensor, ...]:
    """The operator of this name; value, flow, supply_dual, demand_dual, basis, pivots.

    Not ``exact``: without the kernel for what the first one has not proved, which leaves negative pivots.
    """
    if cost.dim() == 2:
        results = emd(cost[None], supply[None], demand[None], partial, exact=exact)
        return tuple(result[0] for result in results)
    batch, suppliers, consumers = cost.shape
    accumulate = torch.float64 if cost.dtype == torch.float64 else torch.float32
    results = {
        "value": _poison([batch], cost, accumulate),
        "flow": _poison([batch, suppliers, consumers], cost, accumulate),
        "supply_dual": _poison([batch, suppliers], cost, accumulate),
        "demand_dual": _poison([batch, consumers], cost, accumulate),
        "basis": torch.full([batch, suppliers + consumers - 1], -(2**30), dtype=torch.int32),
        "pivots": torch.full([batch], -1, dtype=torch.int32),
    }
    inputs = {"cost": cost, "supply": supply, "demand": demand}
    if batch:
        with _one_at_a_time:
            fields = _sizes(cost) | {"partial": partial, "exact": exact} | _described(inputs) | _described(results)
            kernels().emd(DTYPES.index(cost.dtype), fields)
    return tuple(results.values())


def emd_flow_backward(grad_flow: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """The operator of this name; grad_supply, grad_demand."""
    batch, suppliers, consumers = grad_flow.shape
    results = {
        "grad_supply": _poison([batch, suppliers], grad_flow),
        "grad_demand": _poison([batch, consumers], grad_flow),
    }
    inputs = {"grad_flow": grad_flow, "basis": basis.contiguous()}
    if batch:
        with _one_at_a_time:
            fields = _sizes(grad_flow) | _described(inputs) | _described(results)
            kernels().emd_flow_backward(DTYPES.index(grad_flow.dtype), fields)
    return tuple(results.values())


def _finetune_episodes(support, support_target, query, weight, order, *settings):
    names = ("cosine", "scale", "margin", "batch_size", "lr", "momentum", "dampening", "weight_decay")
    accumulate = torch.float64 if support.dtype == torch.float64 else torch.float32
    scores = _poison([*query.shape[:2], weight.shape[1]], support, accumulate)
    # Rows that are not dense and integers that lie scattered are copied by the binding.
    support, query = (x if x.shape[2] <= 1 or x.stride(2) == 1 else x.contiguous() for x in (support, query))
    dense = {"target": support_target.contiguous(), "weight": weight.contiguous(), "order": order.contiguous()}
    fields = {
        **dict(zip(("episodes", "support_size", "dimensions"), support.shape, strict=True)),
        "query_size": query.shape[1],
        "way": weight.shape[1],
        "passes": order.shape[1],
        **dict(zip(names, settings, strict=True)),
        **_described({"support": support, "query": query}),
        **{name: _address(tensor) for name, tensor in {**dense, "scores": scores}.items()},
    }
    form = ("", "span", "direct").index(os.environ.get("FEWSHOT_EXT_EPISODE_FINETUNE_FORM", ""))
    if len(support):
        with _one_at_a_time:
            kernels().finetune_episodes(DTYPES.index(support.dtype), fields, form)
    return scores


def _draw_episodes(support, seed, way, steps):
    episodes, size, dimensions = support.shape
    accumulate = torch.float64 if support.dtype == torch.float64 else torch.float32
    weight = _poison([episodes, way, dimensions], support, accumulate)
    order = _poison([episodes, steps, size], support, torch.int64)
    fields = {
        "seed": seed.item(),
        "episodes": episodes,
        "way": way,
        "dimensions": dimensions,
        "passes": steps,
        "support_size": size,
        "weight": _address(weight),
        "order": _address(order),
    }
    with _one_at_a_time:
        kernels().draw_episodes(DTYPES.index(support.dtype), fields)
    return weight, order


def _sizes(matrices: Tensor) -> dict[str, int]:
    return dict(zip(("batch", "suppliers", "consumers"), matrices.shape, strict=True))


def _described(tensors: dict[str, Tensor]) -> dict[str, int | tuple[int, ...]]:
    addresses = {name: _address(tensor) for name, tensor in tensors.items()}
    return addresses | {f"{name}_strides": tensor.stride() for name, tensor in tensors.items()}
