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

    second_derivative = torch.func.jacrev(torch.func.grad(scalar))
    if case.no_second_derivative is None:
        torch.testing.assert_close(second_derivative(*inputs), torch.autograd.functional.hessian(scalar, inputs[0]))
        return
    with pytest.raises(RuntimeError, match=case.no_second_derivative):
        second_derivative(*inputs)


@each_differentiable(DEVICES)
def test_forward_mode_is_refused(case, backend):
    function, inputs = problem_function(case, case.examples[0].to(device=backend.device))
    inputs = tuple(tensor.detach() for tensor in inputs)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)forward.mode"):
        torch.func.jvp(lambda *tensors: floating(function(*tensors))[0].sum(), inputs, inputs)
