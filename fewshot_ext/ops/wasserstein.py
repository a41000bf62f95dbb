"""The Wasserstein distance of weighted point sets: the Earth Mover's Distance over powers of Euclidean distances."""

import torch
from torch import Tensor

from fewshot_ext._precision import accumulate_dtype
from fewshot_ext._validation import (
    check_device,
    check_floating,
    check_number,
    check_tensor,
    float32_under_autocast,
    is_traced,
)
from fewshot_ext.ops.emd import emd


def _checked(x: object, y: object, x_weight: object, y_weight: object) -> dict[str, Tensor]:
    """The tensors that there are, in one dtype that needs no half type to hold sums."""
    check_tensor("x", x, "[..., n, d]", 2, batched=True)
    check_tensor("y", y, "[..., m, d]", 2, batched=True)
    given = {"x": x, "y": y}
    for name, weight, shape in (("x_weight", x_weight, "[..., n]"), ("y_weight", y_weight, "[..., m]")):
        if weight is not None:
            check_tensor(name, weight, shape, 1, batched=True)
            given[name] = weight
    for name, tensor in given.items():
        check_floating(name, tensor)
    check_device("x", **{"first" if name == "x" else name: tensor for name, tensor in given.items()})
    tensors = float32_under_autocast(given)
    dtype = tensors["x"].dtype
    for name, tensor in tensors.items():
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: expected dtype {dtype} as x has, got {tensor.dtype}")
    points, dimensions = x.shape[-2:]
    if points == 0 or dimensions == 0:
        raise ValueError(f"x: expected at least one point and one dimension, got shape {list(x.shape)}")
    if y.shape[-2] == 0 or y.shape[-1] != dimensions:
        raise ValueError(f"y: expected shape [..., m, {dimensions}] with at least one point, got {list(y.shape)}")
    for name, points in (("x_weight", x), ("y_weight", y)):
        if name in tensors and tensors[name].shape[-1] != points.shape[-2]:
            size = points.shape[-2]
            raise ValueError(f"{name}: expected shape [..., {size}], one a point, got {list(tensors[name].shape)}")
    try:
        torch.broadcast_shapes(
            *(t.shape[:-1] if name.endswith("weight") else t.shape[:-2] for name, t in given.items())
        )
    except RuntimeError:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in given.items())
        raise ValueError(f"x: expected batch dimensions that broadcast to one shape, got {shapes}") from None
    return {name: tensor.to(accumulate_dtype(dtype)) for name, tensor in tensors.items()}


def _refuse_values(x: Tensor, y: Tensor, error: ValueError) -> None:
    """Raises what :func:`fewshot_ext.emd` found, in the words of the points and their weights."""
    for name, points in (("x", x), ("y", y)):
        if not is_traced(points) and not points.isfinite().all():
            index = (~points.isfinite()).nonzero()[0].tolist()
            raise ValueError(f"{name}: expected finite entries, got {points[tuple(index)].item()} at {index}") from None
    said = str(error).replace("supply", "x_weight").replace("demand", "y_weight")
    if said.startswith(("cost: expected finite entries", "cost: no flow avoids")):
        said = f"x: expected distances to y within the range of {x.dtype}, got one beyond"
    raise ValueError(said.replace("cost:", "x:", 1)) from None


def wasserstein_distance(
    x: Tensor, y: Tensor, x_weight: Tensor | None = None, y_weight: Tensor | None = None, p: float = 1
) -> Tensor:
    r"""Wasserstein distance of order p between weighted point sets, exact and differentiable.

    .. math::
        W_p = \Big( \min_F \sum_{ij} F_{ij} \lVert x_i - y_j \rVert_2^p \Big)^{1/p} \quad \text{subject to} \quad
        \sum_j F_{ij} = \frac{a_i}{\sum_k a_k}, \quad \sum_i F_{ij} = \frac{b_j}{\sum_k b_k}, \quad F_{ij} \ge 0

    for weights a of x and b of y: the p-th root of :func:`fewshot_ext.emd` between distributions of mass 1. Distances
    are sums of squared differences, never taken from a matrix product, so that a set lies at distance 0 from itself.
    With p = 1 it equals ``scipy.stats.wasserstein_distance`` (d = 1) and ``wasserstein_distance_nd``.

    Args:
        x: ``[..., n, d]``, n points of d coordinates, n and d at least 1; float32, float64, bfloat16 or float16. Half
            types are computed in float32.
        y: ``[..., m, d]``, m at least 1, in the dtype and on the device of ``x``. Under autocast dtypes may differ.
        x_weight: ``[..., n]``, at least 0, in the dtype of ``x``; scaled to sum 1, and uniform where None. Weights of 0
            are legal, and pad sets of fewer points.
        y_weight: ``[..., m]``, likewise.
        p: a finite real number of at least 1. Orders above 2 are solved in float64, where powers of distances that
            differ a lot have room.

    The batch dimensions ``...`` are any and broadcast against each other.

    Returns:
        ``[...]``, in units of the coordinates; float64 for float64 points and float32 otherwise.

    Gradients reach points and weights, those of the weights along directions that keep each sum alone, because weights
    are scaled. They are those of the optimal flow; where several flows are optimal, of the one found. Where points
    coincide their distance has the subgradient 0, and so has a W_p of 0 with p > 1. Second and forward-mode derivatives
    need those of :func:`torch.cdist`, and raise its RuntimeError where torch has them not.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: shapes that do not fit, no points or no dimensions, entries that are not finite, weights that are
            negative or all zero, p below 1 or not finite, tensors on different devices. On a GPU, where a look at the
            values would make the host wait, the result of a set with bad values is NaN instead.
        RuntimeError: CUDA tensors where the package has no kernels for the GPU.

    Example:
        >>> import torch, fewshot_ext
        >>> x = torch.tensor([[0.0, 0.0], [4.0, 1.0]], requires_grad=True)
        >>> y = torch.tensor([[3.0, 4.0], [4.0, 3.0], [7.0, 5.0]])
        >>> distance = fewshot_ext.wasserstein_distance(x, y, y_weight=torch.tensor([2.0, 1.0, 1.0]))
        >>> distance.item()
        4.25
        >>> distance.backward()
        >>> x.grad
        tensor([[-0.3000, -0.4000],
                [-0.1500, -0.4500]])
        >>> fewshot_ext.wasserstein_distance(x, x, p=2).item()
        0.0
    """
    p = check_number("p", p)
    if p < 1:
        raise ValueError(f"p: expected a number of at least 1, got {p:g}")
    tensors = _checked(x, y, x_weight, y_weight)
    points, others = tensors["x"], tensors["y"]
    weights = [tensors.get(name) for name in ("x_weight", "y_weight")]
    distance = torch.cdist(points, others, compute_mode="donot_use_mm_for_euclid_dist")
    if p == 1:
        scale, cost = None, distance
    else:
        # Powers of distances in units of the largest stay within range; the unit cancels in the gradient too.
        largest = distance.detach().amax((-2, -1), keepdim=True)
        scale = torch.where(largest > 0, largest, 1)
        cost = distance / scale
        if p > 2:
            cost, weights = cost.double(), [weight if weight is None else weight.double() for weight in weights]
        cost = cost**p
    try:
        value = emd(cost, *weights, normalize=True).value
    except ValueError as error:
        _refuse_values(x, y, error)
    if scale is None:
        return value
    # The root has no slope at 0: there it is left out.
    positive = value > 0
    root = torch.where(positive, value, 1) ** (1 / p)
    return (torch.where(positive, root, 0) * scale.squeeze((-2, -1))).to(distance.dtype)
