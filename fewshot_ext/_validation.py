"""Checks of arguments and settings. Each error names the argument, what is expected and what came."""

import math
import warnings
from dataclasses import fields
from numbers import Integral, Real

import numpy as np
import torch
from torch import Tensor

from fewshot_ext import _library

FLOATING_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIMILARITIES = ("cosine", "dot")
_NOT_DENSE = ("DTensor", "MaskedTensor")  # subclasses that look dense, but that no kernel can read
_FLOATING_NAMES = "float32, float64, bfloat16 or float16"


def is_traced(tensor: Tensor) -> bool:
    """Whether the tensor stands for others: while compiling or exporting, under vmap, as another type."""
    return (
        type(tensor) not in (Tensor, torch.nn.Parameter)
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
    )


def float32_under_autocast(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What autocast makes of them for an operator that needs float32, as torch's losses do; float64 stays as it is. The
    device is that of the first."""
    device = next(iter(tensors.values())).device.type
    if (
        device == "meta"
        or not torch.is_autocast_enabled(device)
        or any(tensor.dtype == torch.float64 for tensor in tensors.values())
    ):
        return tensors
    return {name: tensor.float() for name, tensor in tensors.items()}


def check_tensor(name: str, value: object, shape: str, dimensions: int, *, batched: bool = False) -> None:
    """A dense tensor of so many dimensions, behind any number of others where ``batched``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested or type(value).__name__ in _NOT_DENSE:
        kind = "nested tensor" if value.is_nested else type(value).__name__ if value.layout is torch.strided else None
        raise TypeError(f"{name}: expected a dense tensor {shape}, got a {kind or f'tensor of layout {value.layout}'}")
    if value.dim() < dimensions or (value.dim() > dimensions and not batched):
        raise ValueError(f"{name}: expected shape {shape}, got {list(value.shape)}")


def check_floating(name: str, value: Tensor) -> None:
    if value.dtype not in FLOATING_DTYPES:
        raise TypeError(f"{name}: expected dtype {_FLOATING_NAMES}, got {value.dtype}")


def check_integers(name: str, value: object, shape: str, dimensions: int) -> None:
    """A dense int64 tensor of so many dimensions."""
    check_tensor(name, value, shape, dimensions)
    if value.dtype != torch.int64:
        raise TypeError(f"{name}: expected dtype torch.int64, got {value.dtype}")


def check_like(first_name: str, first: Tensor, name: str, value: Tensor, *, any_dtype: bool = False) -> None:
    """The dtype, unless it may be any, and the device of ``first``."""
    if value.dtype != first.dtype and not any_dtype:
        raise TypeError(f"{name}: expected dtype {first.dtype} as {first_name} has, got {value.dtype}")
    if value.device != first.device:
        raise ValueError(f"{name}: expected device {first.device} as {first_name} is on, got {value.device}")


def check_device(first_name: str, first: Tensor, **others: Tensor) -> None:
    """All on the device of ``first``, and one that has kernels."""
    on_cpu = first.is_cpu
    for name, value in others.items():
        if not (on_cpu and value.is_cpu):  # comparing devices takes ten times as long
            check_like(first_name, first, name, value, any_dtype=True)
    if on_cpu or first.is_meta:
        return
    if not first.is_cuda:
        raise ValueError(f"{first_name}: expected a CPU or CUDA tensor, got one on {first.device}")
    _library.require_cuda(first.device)


def check_number(name: str, value: object) -> float:
    """A finite number."""
    # Testing for float first: the abstract base class Real costs ten times as much.
    if type(value) is not float and (
        isinstance(value, bool) or not isinstance(value, (Real, torch.SymFloat, torch.SymInt))
    ):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not -math.inf < value < math.inf:  # what math.isfinite says, in words that torch.compile can trace
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return float(value)


def check_positive(name: str, value: object) -> float:
    number = check_number(name, value)
    if not number > 0:
        raise ValueError(f"{name}: expected a number above 0, got {value}")
    return number


def check_at_least(name: str, value: object, least: float) -> float:
    number = check_number(name, value)
    if number < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    return number


def check_between(name: str, value: object, least: float, most: float) -> float:
    number = check_number(name, value)
    if not least <= number <= most:
        raise ValueError(f"{name}: expected a number in [{least}, {most}], got {value}")
    return number


def check_fraction(name: str, value: object) -> float:
    number = check_number(name, value)
    if not 0 <= number < 1:
        raise ValueError(f"{name}: expected a number in [0, 1), got {value}")
    return number


def check_integer(name: str, value: object) -> int:
    """An integer of at most 64 bits, numpy's too, and no bool."""
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, (Integral, torch.SymInt))):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: expected an integer of 64 bits, got {value}")
    return int(value)


def check_counts(name: str, values: object, least: int) -> None:
    """A sequence of integers."""
    if not isinstance(values, (tuple, list)):
        raise TypeError(f"{name}: expected a tuple of integers, got {type(values).__name__}")
    for value in values:
        check_count(name, value, least)


def check_count(name: str, value: object, least: int) -> int:
    value = check_integer(name, value)
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    return value


def plain_numbers(settings: object) -> None:
    """Makes numpy's numbers among the fields of a frozen dataclass those of Python: files hold no others."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        plain = tuple(map(_plain, value)) if type(value) is tuple else _plain(value)
        object.__setattr__(settings, field.name, plain)


def _plain(value: object) -> object:
    return value.item() if isinstance(value, np.generic) else value


def check_choice(name: str, value: object, *choices: str) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected one of {', '.join(choices)}, got {type(value).__name__}")
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def check_similarity(value: object) -> str:
    """The similarity, "cosine" or "dot"; version 0.1 called the latter "softmax"."""
    if isinstance(value, str) and value == "softmax":
        warnings.warn("similarity: expected cosine or dot, got 'softmax', which means dot", DeprecationWarning, 3)
        return "dot"
    check_choice("similarity", value, *SIMILARITIES)
    return value


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")


def check_labels(name: str, value: Tensor, classes: int, ignore_index: int) -> None:
    """Every label in [0, classes) or equal to ``ignore_index``; waits for the device. Looks at nothing while
    tracing."""
    if value.numel() == 0 or value.is_meta or is_traced(value):
        return
    lowest, highest = torch.aminmax(value)
    if lowest.item() >= 0 and highest.item() < classes:
        return
    outside = ((value < 0) | (value >= classes)) & (value != ignore_index)
    if outside.any():
        index = int(outside.nonzero()[0, 0])
        raise ValueError(
            f"{name}: expected labels in [0, {classes}) or ignore_index = {ignore_index}, "
            f"got {int(value[index])} at index {index}"
        )
