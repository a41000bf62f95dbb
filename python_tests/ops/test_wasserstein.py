"""The Wasserstein distance of point sets: scipy and enumeration as oracles, gradients, coincident points, errors."""

import itertools
import math
import re

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from emd_peers import highs
from hypothesis import given
from hypothesis import strategies as st

from fewshot_ext import reference, wasserstein_distance

ORDERS = (1, 1.5, 2, 3, 7)


def points(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def weights(*shape, seed=0, dtype=torch.float64):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1).to(dtype)


def distances(x, y):
    """By numpy, in float64."""
    return np.sqrt(((x.double().numpy()[:, None] - y.double().numpy()[None]) ** 2).sum(-1))


@given(n=st.integers(1, 9), m=st.integers(1, 9), seed=st.integers(0, 2**32), weighted=st.booleans())
def test_equals_scipy_on_the_line(n, m, seed, weighted):
    x, y = points(n, 1, seed=seed), points(m, 1, seed=seed + 1)
    given = (weights(n, seed=seed), weights(m, seed=seed + 1)) if weighted else (None, None)
    expected = scipy.stats.wasserstein_distance(*(t if t is None else t.flatten().numpy() for t in (x, y, *given)))
    found = wasserstein_distance(x, y, *given)
    assert found.shape == () and abs(found.item() - expected) <= 1e-13 * (1 + expected)


@pytest.mark.parametrize("dimensions", (2, 5))
def test_equals_scipy_in_space(dimensions):
    x, y, a, b = points(6, dimensions), points(8, dimensions, seed=1), weights(6), weights(8, seed=1)
    expected = scipy.stats.wasserstein_distance_nd(*(t.numpy() for t in (x, y, a, b)))
    torch.testing.assert_close(wasserstein_distance(x, y, a, b).item(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("p", ORDERS)
def test_equals_the_linear_program(p):
    x, y, a, b = points(5, 3), points(7, 3, seed=1), weights(5), weights(7, seed=1)
    expected = highs(distances(x, y) ** p, (a / a.sum()).numpy(), (b / b.sum()).numpy()) ** (1 / p)
    torch.testing.assert_close(wasserstein_distance(x, y, a, b, p=p).item(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("p", ORDERS)
def test_gradients_equal_the_references(p):
    inputs = [points(3, 5, 2), points(3, 4, 2, seed=1), weights(3, 5), weights(3, 4, seed=1)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    found, expected = (f(*inputs, p=p) for f in (wasserstein_distance, reference.wasserstein_distance))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value.sum(), inputs) for value in (found, expected)))


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("p", (*ORDERS, 40, 300))
def test_equals_the_best_assignment(p, dtype):
    """Of sets of one size without weights; also where powers of the distances are beyond the dtype, at either end."""
    for unit in (1.0, 2.0**-10, 2.0**10):
        x, y = (unit * points(5, 2, seed=seed, dtype=dtype) for seed in (0, 1))
        logs = np.log(distances(x, y))
        orders = [logs[range(5), list(order)] for order in itertools.permutations(range(5))]
        expected = min(np.exp(scipy.special.logsumexp(p * chosen - math.log(5)) / p) for chosen in orders)
        found = wasserstein_distance(x, y, p=p)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        accuracy = 1e-12 if dtype == torch.float64 else 1e-5
        assert abs(found.item() - expected) <= accuracy * expected


def test_small_distances_beside_a_large_one():
    """The pair far off moves nothing; the power of the others, in units of it, is below the range of float32."""
    x = torch.tensor([[0.0], [1.0], [1e4]])
    y = torch.tensor([[1e-2], [1.0], [1e4]])
    assert abs(wasserstein_distance(x, y, p=10).item() / (1e-2 * (1 / 3) ** 0.1) - 1) < 1e-5


@pytest.mark.parametrize("p", ORDERS)
def test_gradcheck(p):
    inputs = [points(2, 4, 3), points(5, 3, seed=1), weights(4), weights(2, 5, seed=1)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(lambda *tensors: wasserstein_distance(*tensors, p=p), inputs)
    line = [points(4, 1).requires_grad_(), points(6, 1, seed=1).requires_grad_()]
    assert torch.autograd.gradcheck(lambda *tensors: wasserstein_distance(*tensors, p=p), line)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize("p", ORDERS)
def test_coincident_points(p, dtype):
    """A set against itself is at distance 0 to the last bit, far from the origin too, and rests there."""
    x = (1e3 + points(60, 3, dtype=dtype)).requires_grad_()
    a = weights(60, dtype=dtype).requires_grad_()
    found = wasserstein_distance(x, x.detach().clone(), a, a.detach().clone(), p=p)
    assert found.item() == 0
    for gradient in torch.autograd.grad(found, (x, a)):
        assert gradient.isfinite().all()
        assert p == 1 or (gradient == 0).all()
    # One point moves away from all others, which stay where they are and pull at nothing.
    moved = x.detach().clone()
    moved[0] += 1e-3
    moved.requires_grad_()
    (gradient,) = torch.autograd.grad(wasserstein_distance(moved, x.detach(), p=p), moved)
    assert gradient.isfinite().all() and (gradient[1:] == 0).all() and gradient[0].norm() > 0


def test_weights_are_scaled_and_may_be_zero():
    x, y, a, b = points(4, 2), points(5, 2, seed=1), weights(4), weights(5, seed=1)
    expected = wasserstein_distance(x, y, a, b)
    torch.testing.assert_close(wasserstein_distance(x, y, 7 * a, b / 3), expected)
    padded = [torch.nn.functional.pad(t, pad, value=9.0) for t, pad in ((x, (0, 0, 0, 2)), (y, (0, 0, 0, 1)))]
    padded += [torch.nn.functional.pad(a, (0, 2)), torch.nn.functional.pad(b, (0, 1))]
    torch.testing.assert_close(wasserstein_distance(*padded), expected)
    torch.testing.assert_close(wasserstein_distance(x, y, torch.ones_like(a)), wasserstein_distance(x, y))


@pytest.mark.parametrize("p", (1, 3))
def test_batches_broadcast(p):
    x, y, a, b = points(2, 1, 4, 3), points(3, 5, 3, seed=1), weights(4), weights(2, 3, 5, seed=1)
    found = wasserstein_distance(x, y, a, b, p=p)
    assert found.shape == (2, 3)
    for i, j in itertools.product(range(2), range(3)):
        torch.testing.assert_close(found[i, j], wasserstein_distance(x[i, 0], y[j], a, b[i, j], p=p))
    assert wasserstein_distance(points(0, 4, 3), y[0], p=p).shape == (0,)


@pytest.mark.parametrize("p", (1, 2.5))
def test_transforms_and_compiled_code(p):
    x, y, b = points(3, 4, 2), points(3, 5, 2, seed=1), weights(3, 5)

    def distance(x, y, b):
        return wasserstein_distance(x, y, None, b, p=p)

    expected = distance(x, y, b)
    torch.testing.assert_close(torch.func.vmap(distance)(x, y, b), expected)
    gradients = torch.func.vmap(torch.func.grad(distance, argnums=(0, 1, 2)))(x, y, b)
    mapped = torch.func.vmap(distance)
    torch.testing.assert_close(
        torch.func.grad(lambda *tensors: mapped(*tensors).sum(), argnums=(0, 1, 2))(x, y, b), gradients
    )
    leaves = [tensor.clone().requires_grad_() for tensor in (x, y, b)]
    compiled = torch.compile(distance, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(torch.autograd.grad(compiled.sum(), leaves), gradients)


@pytest.mark.parametrize("derivative", ["reverse over reverse", "forward over reverse", "forward"])
def test_second_and_forward_mode_derivatives_are_right_or_refused(derivative):
    # torch.cdist has them or not, by the version of torch.
    x, y, direction = points(3, 2), points(4, 2, seed=1), points(3, 2, seed=2)
    step = 1e-6 * direction

    def value(x):
        return wasserstein_distance(x, y)

    slope = torch.func.grad(value)
    try:
        if derivative == "forward":
            found = torch.func.jvp(value, (x,), (direction,))[1]
        elif derivative == "forward over reverse":
            found = torch.func.jvp(slope, (x,), (direction,))[1]
        else:
            found = torch.func.vjp(slope, x)[1](direction)[0]
    except RuntimeError as error:
        assert re.search(r"not (been )?implemented", str(error)), error
        return
    function = value if derivative == "forward" else slope
    torch.testing.assert_close(found, (function(x + step) - function(x - step)) / 2e-6, rtol=1e-5, atol=1e-6)


def test_half_types_and_autocast():
    x, y = points(4, 3, dtype=torch.bfloat16), points(5, 3, seed=1, dtype=torch.bfloat16)
    expected = wasserstein_distance(x.float(), y.float())
    assert torch.equal(wasserstein_distance(x, y), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(wasserstein_distance(x, y.float()), expected)


ALONE = {"x": points(4, 3), "y": points(5, 3, seed=1), "x_weight": weights(4), "y_weight": weights(5)}


def changed(name, index, value):
    tensor = ALONE[name].clone()
    tensor[index] = value
    return {name: tensor}


@pytest.mark.parametrize(
    "change, error, message",
    (
        ({"x": [1.0]}, TypeError, "x: expected a tensor [..., n, d], got list"),
        ({"y_weight": 1.0}, TypeError, "y_weight: expected a tensor [..., m], got float"),
        ({"y": ALONE["y"].to_sparse()}, TypeError, "y: expected a dense tensor [..., m, d], got a tensor of layout"),
        ({"x": ALONE["x"][0]}, ValueError, "x: expected shape [..., n, d], got [3]"),
        ({"x": ALONE["x"].long()}, TypeError, "x: expected dtype float32, float64, bfloat16 or float16, got"),
        ({"y": ALONE["y"].float()}, TypeError, "y: expected dtype torch.float64 as x has, got torch.float32"),
        ({"x_weight": ALONE["x_weight"].half()}, TypeError, "x_weight: expected dtype torch.float64 as x has"),
        ({"y": ALONE["y"].to("meta")}, ValueError, "y: expected device cpu as x is on, got meta"),
        ({"y": ALONE["y"][:, :2]}, ValueError, "y: expected shape [..., m, 3] with at least one point, got [5, 2]"),
        ({"x": ALONE["x"][:0]}, ValueError, "x: expected at least one point and one dimension, got shape [0, 3]"),
        ({"x": ALONE["x"][:, :0]}, ValueError, "x: expected at least one point and one dimension, got shape [4, 0]"),
        ({"y": ALONE["y"][:0]}, ValueError, "y: expected shape [..., m, 3] with at least one point, got [0, 3]"),
        ({"x_weight": ALONE["y_weight"]}, ValueError, "x_weight: expected shape [..., 4], one a point, got [5]"),
        (
            {"x": points(2, 4, 3), "y": points(3, 5, 3)},
            ValueError,
            "x: expected batch dimensions that broadcast to one shape, got x [2, 4, 3], y [3, 5, 3], x_weight [4]",
        ),
        ({"p": 0.5}, ValueError, "p: expected a number of at least 1, got 0.5"),
        ({"p": math.inf}, ValueError, "p: expected a finite number, got inf"),
        ({"p": 1j}, TypeError, "p: expected a number, got complex"),
        (changed("x", (2, 1), math.nan), ValueError, "x: expected finite entries, got nan at [2, 1]"),
        (changed("y", (0, 1), -math.inf), ValueError, "y: expected finite entries, got -inf at [0, 1]"),
        (changed("x", (0, 1), 1e200), ValueError, "x: expected distances to y within the range of torch.float64"),
        (changed("x_weight", 1, -0.5), ValueError, "x_weight: expected finite entries of at least 0, got -0.5 at [1]"),
        ({"y_weight": torch.zeros(5).double()}, ValueError, "y_weight: expected a total mass above 0, got 0"),
    ),
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("p", (1, 2))
def test_bad_input(change, error, message, p):
    with pytest.raises(error) as raised:
        wasserstein_distance(**{**ALONE, "p": p, **change})
    assert message in str(raised.value)
