"""Autograd and vmap rules that the operators share, for eager calls and for the compiler."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead
from torch.autograd import forward_ad

from fewshot_ext._native_errors import explained


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


def leading_dimension(op: Callable) -> Callable:
    """vmap as one call, for an operator that takes any batch dimensions."""

    def rule(info, in_dims, *args):
        def moved(arg, dim):
            if not isinstance(arg, Tensor):
                return arg
            return arg.expand(info.batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)

        results = op(*(moved(arg, dim) for arg, dim in zip(args, in_dims, strict=True)))
        return results, 0 if isinstance(results, Tensor) else (0,) * len(results)

    return rule


def any_batch(op: Callable, dimensions: int, takes_one: bool) -> Callable:
    """``op``, whose tensors begin with one batch dimension, or with none where it ``takes_one``, for any number of
    them: as many as the first tensor has before its last ``dimensions``."""

    def call(*args):
        more = args[0].dim() - dimensions - 1  # batch dimensions than one
        if more == 0 or (takes_one and more < 0):
            return op(*args)
        batch = args[0].shape[: more + 1]
        if batch:
            args = [arg.flatten(0, more) if isinstance(arg, Tensor) else arg for arg in args]
        else:
            args = [arg.unsqueeze(0) if isinstance(arg, Tensor) else arg for arg in args]
        try:
            results = op(*args)
        except RuntimeError as error:
            if batch:
                error.args = (f"{error} (of the batch {list(batch)} in one row)",)
            raise
        parts = (results,) if isinstance(results, Tensor) else results
        if torch.compiler.is_compiling():
            parts = [part.unflatten(0, batch) if batch else part.squeeze(0) for part in parts]
            return parts[0] if isinstance(results, Tensor) else tuple(parts)
        for part in parts:  # in place: nobody else has them yet, and a view would be one for ever
            part.resize_(batch + part.shape[1:]) if batch else part.squeeze_(0)
        return results

    return call


def differentiable(
    op: torch._ops.OpOverload,
    setup_context: Callable,
    backward: Callable,
    jvp: Callable | None = None,
    dimensions: int | None = None,
    takes_one: bool = False,
) -> Callable:
    """``op`` with its autograd rule on both roads: as a registered operator for the compiler, and as an
    autograd.Function for eager calls. The function costs a third of the registered rule's overhead, which shows at
    few-shot sizes, and torch.func.grad, vjp and jacrev, which refuse the registered rule, see through it.

    Args:
        jvp: without it forward-mode derivatives raise.
        dimensions: of the first tensor of one problem, for an operator that takes a batch of them; what is returned
            then takes any batch dimensions, and the rules must too. Where None, vmap calls ``op`` once for each index.
        takes_one: whether the operator takes a problem without a batch dimension as it is, which at few-shot sizes is
            cheaper than to give it one and to take it from all results.
    """
    native = op if dimensions is None else any_batch(op, dimensions, takes_one)
    tensors = sum(isinstance(argument.type, torch.TensorType) for argument in op._schema.arguments)  # the first ones

    def call(*args):
        if torch.compiler.is_compiling():
            return native(*args)
        if torch._C._are_functorch_transforms_active():
            return function.apply(*args)
        given = [unwrap_if_dead(tensor) for tensor in args[:tensors]]
        recorded = forward_ad._current_level >= 0
        if torch.is_grad_enabled():
            for tensor in given:  # any() of a generator takes four times as long
                recorded = recorded or tensor.requires_grad
        return (apply if recorded else forward)(*given, *args[tensors:])

    def forward(*args):
        try:
            with torch._C._AutoDispatchBelowAutograd():  # past the registered rule
                return native(*args)
        except RuntimeError as error:
            raise explained(error) from None

    def forward_mode(ctx, *tangents):
        if jvp is None:
            raise RuntimeError(f"fewshot_ext.{op._opname} offers no forward-mode derivatives.")
        # Without this the tangents would be constants to a forward mode around this one.
        with forward_ad._set_fwd_grad_enabled(True):
            return jvp(ctx, *tangents)

    # Where a derivative surrounds the vmap, it is what the rule calls that torch.func differentiates.
    rule = (one_by_one if dimensions is None else leading_dimension)(call)
    torch.library.register_autograd(op, backward, setup_context=setup_context)
    torch.library.register_vmap(op, rule)
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
    # What Function.apply comes down to outside torch.func, once it has bound the arguments to a signature, which costs
    # more than the rest.
    apply = super(torch.autograd.Function, function).apply

    return call
