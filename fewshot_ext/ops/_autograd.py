"""What the operators share above their kernels: autograd rules for eager calls and for the compiler, and vmap rules."""

import inspect
import re
from collections.abc import Callable

import torch
from torch import Tensor

_SOURCE_LINE = re.compile(r"^\w+, [^\n]*:\d+, ")  # of the native code, which torch puts before what that says


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that kernels accumulate and return losses in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def one_by_one(op: Callable) -> Callable:
    """vmap as a loop, for an operator whose every problem fills the machine by itself."""

    def rule(info, in_dims, *args):
        def item(arg, dim, index):
            if dim is None:
                return arg
            return arg.select(dim, index) if info.batch_size else arg.new_zeros(arg.movedim(dim, 0).shape[1:])

        results = []
        try:
            for index in range(max(info.batch_size, 1)):  # of no problems there is one of zeros made, for its shapes
                results.append(op(*(item(arg, dim, index) for arg, dim in zip(args, in_dims, strict=True))))
        except RuntimeError as error:
            error.args = (f"{error} (index {len(results)} of what vmap maps over)",)
            raise
        stacked = tuple(torch.stack(parts)[: info.batch_size] for parts in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    return rule


def merged_batch(op: Callable) -> Callable:
    """vmap as one call, for an operator whose tensors all begin with its own batch dimension."""

    def rule(info, in_dims, *args):
        def merged(arg, dim):
            if not isinstance(arg, Tensor):
                return arg
            arg = arg.expand(info.batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)
            return arg.flatten(0, 1)

        batch = args[0].shape[0 if in_dims[0] != 0 else 1]
        try:
            results = op(*(merged(arg, dim) for arg, dim in zip(args, in_dims, strict=True)))
        except RuntimeError as error:
            if batch != 1:
                error.args = (f"{error} (vmap makes one batch of {info.batch_size} of {batch})",)
            raise
        if isinstance(results, Tensor):
            return results.unflatten(0, (info.batch_size, batch)), 0
        return tuple(result.unflatten(0, (info.batch_size, batch)) for result in results), (0,) * len(results)

    return rule


def differentiable(
    op: torch._ops.OpOverload,
    setup_context: Callable,
    backward: Callable,
    vmap: Callable,
    jvp: Callable | None = None,
) -> Callable:
    """``op`` with its autograd rule on both roads: as a registered operator for the compiler, and as an
    autograd.Function for eager calls. The function costs a third of the registered rule's overhead, which shows at
    few-shot sizes, and torch.func.grad, vjp and jacrev, which refuse the registered rule, see through it.

    ``vmap`` makes the rule from what it shall call: :func:`one_by_one` or :func:`merged_batch`. Without ``jvp``
    forward-mode derivatives raise.
    """

    def forward_mode(ctx, *tangents):
        if jvp is None:
            raise RuntimeError(f"fewshot_ext.{op._opname} offers no forward-mode derivatives.")
        # Without this the tangents would be constants to a forward mode around this one.
        with torch.autograd.forward_ad._set_fwd_grad_enabled(True):
            return jvp(ctx, *tangents)

    def call(*args):
        return op(*args) if torch.compiler.is_compiling() else function.apply(*args)

    # Where a derivative surrounds the vmap, it is what the rule calls that torch.func differentiates.
    rule = vmap(call)
    torch.library.register_autograd(op, backward, setup_context=setup_context)
    torch.library.register_vmap(op, rule)

    def forward(*args):
        try:
            with torch._C._AutoDispatchBelowAutograd():  # past the registered rule
                return op(*args)
        except RuntimeError as error:
            error.args = (_SOURCE_LINE.sub("", str(error)),)
            raise

    # Function.apply asks for it at every call, and working it out costs as much as the rest of its overhead.
    forward.__signature__ = inspect.signature(forward)
    function = type(
        op._opname,
        (torch.autograd.Function,),
        {
            "forward": staticmethod(forward),
            "setup_context": staticmethod(setup_context),
            "backward": staticmethod(backward),
            "jvp": staticmethod(forward_mode),
            "vmap": staticmethod(rule),
        },
    )

    return call
