"""The op contract under torch.func: every operator of cases.py under vmap, gradients and both in every nesting."""

from functools import partial

import pytest
import torch

from .cases import each_differentiable, each_operator
from .contract import DEVICES, as_tuple, floating, problem_function


def stacked(tensors, names, count=3):
    """``count`` problems in one: the tensors in ``names`` get a leading dimension."""
    # Rolled rows: other problems with labels that are legal too.
    return {
        name: torch.stack([tensor.roll(shift, 0) for shift in range(count)]) if name in names else tensor
        for name, tensor in tensors.items()
    }


def batched_choices(case):
    """All batched tensors together, and each by itself."""
    return (case.batched, *((name,) for name in case.batched))


@each_operator(DEVICES)
def test_vmap(case, backend):
    if not case.batched:
        pytest.skip(f"{case.name} takes batches itself")
    for problem in case.examples:
        problem = problem.to(device=backend.device)
        for names in batched_choices(case):
            tensors = stacked(problem.tensors, names)

            def call(*arguments):
                return case.function(**dict(zip(tensors, arguments, strict=True)), **problem.options)  # noqa: B023

            dims = tuple(0 if name in names else None for name in tensors)
            results = as_tuple(torch.func.vmap(call, in_dims=dims)(*tensors.values()))
            for index in range(3):
                one = [tensors[name][index] if name in names else tensors[name] for name in tensors]
                torch.testing.assert_close(tuple(result[index] for result in results), as_tuple(call(*one)))
            none = [tensor[:0] if name in names else tensor for name, tensor in tensors.items()]
            empty = as_tuple(torch.func.vmap(call, in_dims=dims)(*none))
            torch.testing.assert_close(empty, tuple(result[:0] for result in results))


def looped(function, dims, *arguments):
    """What vmap of a function that returns several tensors shall equal."""
    count = next(t.shape[0] for t, dim in zip(arguments, dims, strict=True) if dim == 0)
    results = [
        function(*(t if dim is None else t[index] for t, dim in zip(arguments, dims, strict=True)))
        for index in range(count)
    ]
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True))


def gradients_by_autograd(function, positions, *arguments):
    leaves = [tensor.detach().requires_grad_(k in positions) for k, tensor in enumerate(arguments)]
    return torch.autograd.grad(function(*leaves), [leaves[k] for k in positions])


def gradients_by_vjp(function, positions, *arguments):
    def of_chosen(*chosen):
        given = dict(enumerate(arguments)) | dict(zip(positions, chosen, strict=True))
        return function(*given.values())

    output, pull_back = torch.func.vjp(of_chosen, *(arguments[position] for position in positions))
    return pull_back(torch.ones_like(output))


def gradients_by_jacrev(function, positions, *arguments):
    """The jacobian of a function that returns a number."""
    return torch.func.jacrev(function, argnums=positions)(*arguments)


def gradients_by_grad(function, positions, *arguments):
    return torch.func.grad(function, argnums=positions)(*arguments)


GRADIENTS = (gradients_by_autograd, gradients_by_grad, gradients_by_vjp, gradients_by_jacrev)


@pytest.mark.parametrize("depth", (1, 2))
@each_differentiable(DEVICES)
def test_every_nesting_of_vmap_and_gradients(case, backend, depth):
    for problem in case.examples:
        problem = problem.to(device=backend.device)
        positions = tuple(list(problem.tensors).index(name) for name in case.differentiable)
        for names in batched_choices(case):
            tensors = problem.tensors
            for count in (3, 2)[:depth]:
                tensors = stacked(tensors, names, count)
            dims = tuple(0 if name in names else None for name in tensors)

            def scalar(*arguments):
                result = case.function(**dict(zip(tensors, arguments, strict=True)), **problem.options)  # noqa: B023
                return sum(output.square().sum() for output in floating(result))

            mapped, expected = scalar, partial(gradients_by_autograd, scalar, positions)
            each_gradient = torch.func.grad(scalar, argnums=positions)
            for _ in range(depth):
                mapped = torch.func.vmap(mapped, in_dims=dims)
                each_gradient = torch.func.vmap(each_gradient, in_dims=dims)
                expected = partial(looped, expected, dims)
            expected = expected(*tensors.values())
            torch.testing.assert_close(each_gradient(*tensors.values()), expected)

            summed = tuple(  # what reaches a tensor that is not mapped over
                part if dims[k] == 0 else part.flatten(0, depth - 1).sum(0)
                for part, k in zip(expected, positions, strict=True)
            )
            for gradients in GRADIENTS:
                found = gradients(lambda *arguments: mapped(*arguments).sum(), positions, *tensors.values())  # noqa: B023
                torch.testing.assert_close(tuple(found), summed, msg=lambda text: f"{gradients.__name__}: {text}")  # noqa: B023
            # A jacobian with rows: the backward pass is mapped over.
            rows = torch.func.jacrev(mapped, argnums=positions)(*tensors.values())
            torch.testing.assert_close(tuple(row.flatten(0, depth - 1).sum(0) for row in rows), summed)


@each_differentiable(DEVICES)
def test_functional_second_derivatives_are_right_or_refused(case, backend):
    function, inputs = problem_function(case, case.examples[0].to(device=backend.device))
    inputs = tuple(tensor.detach() for tensor in inputs)

    def scalar(*tensors):
        return floating(function(*tensors))[0].sum()

    positions = tuple(range(len(inputs)))
    second_derivative = torch.func.jacrev(torch.func.grad(scalar, argnums=positions), argnums=positions)
    if case.no_second_derivative is None:
        torch.testing.assert_close(second_derivative(*inputs), torch.autograd.functional.hessian(scalar, inputs))
        return
    with pytest.raises(RuntimeError, match=case.no_second_derivative):
        second_derivative(*inputs)


def forward_over_reverse(function, *inputs):
    return torch.func.jvp(torch.func.grad(function), inputs, inputs)


def reverse_over_forward(function, *inputs):
    return torch.func.grad(lambda *tensors: torch.func.jvp(function, tensors, tensors)[1])(*inputs)


@each_differentiable(DEVICES)
def test_forward_mode_is_right_or_refused(case, backend):
    for problem in case.examples:
        function, inputs = problem_function(case, problem.to(device=backend.device))
        if case.no_forward_mode is None:
            outputs = lambda *tensors: floating(function(*tensors))  # noqa: B023, E731
            assert torch.autograd.gradcheck(
                outputs, inputs, fast_mode=True, check_forward_ad=True, check_batched_forward_grad=True
            )
            assert torch.autograd.gradgradcheck(outputs, inputs, fast_mode=True, check_fwd_over_rev=True)
            continue
        inputs = tuple(tensor.detach() for tensor in inputs)

        def scalar(*tensors):
            return floating(function(*tensors))[0].sum()  # noqa: B023

        for derivative in (forward_over_reverse, reverse_over_forward, lambda f, *x: torch.func.jvp(f, x, x)):
            with pytest.raises(RuntimeError, match=case.no_forward_mode):
                derivative(scalar, *inputs)
        with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match=case.no_forward_mode):
            scalar(*(torch.autograd.forward_ad.make_dual(tensor, tensor) for tensor in inputs))


@each_differentiable(DEVICES)
def test_every_nesting_of_vmap_and_forward_mode(case, backend):
    if case.no_forward_mode is not None:
        pytest.skip(f"{case.name}: {case.no_forward_mode}")
    for problem in case.examples:
        function, inputs = problem_function(case, problem.to(device=backend.device), case.batched)
        inputs = tuple(torch.stack([tensor.detach().roll(shift, 0) for shift in range(3)]) for tensor in inputs)
        tangents = tuple(torch.randn_like(tensor) for tensor in inputs)

        def jvp(*primals_and_tangents):
            half = len(primals_and_tangents) // 2
            primals, tangents = primals_and_tangents[:half], primals_and_tangents[half:]
            return torch.func.jvp(lambda *tensors: floating(function(*tensors)), primals, tangents)[1]  # noqa: B023

        expected = looped(jvp, [0] * (2 * len(inputs)), *inputs, *tangents)
        torch.testing.assert_close(torch.func.vmap(jvp)(*inputs, *tangents), expected)
        mapped = torch.func.vmap(lambda *tensors: floating(function(*tensors)))  # noqa: B023
        torch.testing.assert_close(torch.func.jvp(mapped, inputs, tangents)[1], expected)
        columns = torch.func.jacfwd(lambda factor: mapped(*(t + factor * s for t, s in zip(inputs, tangents))))  # noqa: B023, B905
        torch.testing.assert_close(columns(inputs[0].new_zeros(())), expected)
