"""Errors of native calls as their callers know them: in torch's words and, where memory ran out, in torch's type."""

import re
from collections.abc import Callable
from typing import Any

import torch

_SOURCE_LINE = re.compile(r"^\w+, [^\n]*:\d+, ")  # of the native code, which torch puts before what that says
_ALLOCATION = re.compile(r"allocation of (?P<bytes>\d+) bytes on (?P<device>\S+) failed")  # csrc/common/torch_calls.h
# By torch's allocator, and by the one of CUDA where PYTORCH_CUDA_ALLOC_CONF names it.
_OUT_OF_MEMORY = re.compile(r"^CUDA out of memory\.|would exceed allowed memory")


def explained(error: RuntimeError) -> RuntimeError:
    """What a native call raised, as torch would have raised it.

    The stable ABI hands down neither the type of an error nor, before torch 2.13, its text. An allocation that failed
    is therefore tried once more from here: it fails again, in torch's own words, or there was too little memory then.
    """
    text = _SOURCE_LINE.sub("", str(error))
    asked = _ALLOCATION.search(text)
    if asked:
        try:
            torch.empty(int(asked["bytes"]), dtype=torch.uint8, device=asked["device"])
        except RuntimeError as refused:
            return refused
        if asked["device"] != "cpu":
            text = f"CUDA out of memory. Tried to allocate {asked['bytes']} bytes on {asked['device']}."
    if _OUT_OF_MEMORY.search(text):
        return torch.OutOfMemoryError(text)
    error.args = (text,)
    return error


def explaining(op: Callable[..., Any]) -> Callable[..., Any]:
    """``op``, whose errors are :func:`explained` where Python calls it; what a compiler makes of it raises them as they
    are."""

    def call(*args):
        if torch.compiler.is_compiling():
            return op(*args)
        try:
            return op(*args)
        except RuntimeError as error:
            raise explained(error) from None

    return call
