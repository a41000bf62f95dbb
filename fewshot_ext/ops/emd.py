"""The Earth Mover's Distance of weighted sets: exact, batched and differentiable.

Operator contract: every problem of a batch is solved to a proven optimum, or the call raises and returns nothing. The
native operator takes problems [B, n, m] and scales each demand to the mass of its supply. Derivatives come from the
optimal basis, a spanning tree of n + m - 1 arcs: with it the flow is linear in the marginals, and the duals in the
cost. The value's gradients are the flow and the duals themselves; those of flow and duals take one more sweep over the
tree, and forward-mode and higher derivatives are made of the same parts.
"""

import math
import re
from typing import NamedTuple

import torch
from torch import Tensor

from fewshot_ext._precision import accumulate_dtype
from fewshot_ext._validation import (
    check_device,
    check_flag,
    check_floating,
    check_tensor,
    float32_under_autocast,
    is_traced,
)
from fewshot_ext.ops._autograd import differentiable
from fewshot_ext.ops.emd_certificate import certificate

MOST_POINTS_ON_CUDA = 1024  # of csrc/emd: suppliers, and consumers, that its CUDA kernels take
MASS_TOLERANCE = 1e-4  # of csrc/emd: by how much, relatively, the masses of supply and demand may differ
# By how much a certificate may miss the exact conditions, relatively: some roundings of the results in float32, and in
# float64 the solver's own, which grow with the number of points, for the largest problems that it takes.
CERTIFICATE_TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-10}
_NO_SOLUTION = re.compile(r"(?P<what>cost: [^;]*); problem (?P<position>\d+) of the batch")  # in csrc/emd/cpu.cpp
# What `pivots` has in place of a number where a GPU found no solution: less an EmdFault of csrc/emd.
_FAULTS = {
    -6: "cost: no flow avoids the forbidden arcs",
    -7: "cost: expected a value and duals within the range of the results' dtype",
}
_REPORT = (
    "To report it, save the inputs: torch.save({'cost': cost, 'supply': supply, 'demand': demand}, 'emd_problem.pt')"
)

_emd_op = torch.ops.fewshot_ext.emd.default
_flow_backward_op = torch.ops.fewshot_ext.emd_flow_backward.default


class EMD(NamedTuple):
    """What :func:`emd` returns: the distances, the flows that attain them, and the duals that prove it.

    Example:
        >>> import torch, fewshot_ext
        >>> value, flow, supply_dual, demand_dual = fewshot_ext.emd(torch.tensor([[1.0, 3.0], [2.0, 8.0]]))
        >>> value, flow
        (tensor(2.5000), tensor([[0.0000, 0.5000],
                [0.5000, 0.0000]]))
    """

    value: Tensor  # [...]
    flow: Tensor  # [..., n, m]
    supply_dual: Tensor  # [..., n]
    demand_dual: Tensor  # [..., m]


torch.serialization.add_safe_globals([EMD])  # so that torch.load reads a saved one


@torch.library.register_fake("fewshot_ext::emd")
def _(cost, supply, demand, partial=False):
    *batch, n, m = cost.shape
    accumulate = accumulate_dtype(cost.dtype)
    return (
        cost.new_empty(batch, dtype=accumulate),
        cost.new_empty([*batch, n, m], dtype=accumulate),
        cost.new_empty([*batch, n], dtype=accumulate),
        cost.new_empty([*batch, m], dtype=accumulate),
        cost.new_empty([*batch, n + m - 1], dtype=torch.int32),
        cost.new_empty(batch, dtype=torch.int32),
    )


@torch.library.register_fake("fewshot_ext::emd_flow_backward")
def _(grad_flow, basis):
    batch, n, m = grad_flow.shape
    return grad_flow.new_empty([batch, n]), grad_flow.new_empty([batch, m])


@torch.library.custom_op("fewshot_ext::emd_tree_flow", mutates_args=())
def _tree_flow_op(supply: Tensor, demand: Tensor, basis: Tensor) -> Tensor:
    """The flow [B, n, m] on the arcs of each basis that moves supply [B, n] to demand [B, m], once what their sums
    differ by is spread evenly, one half over each side's points with mass: the adjoint of emd_flow_backward."""
    (batch, n), m = supply.shape, demand.shape[1]
    supplied, demanded = supply.double(), demand.double()
    carries = basis >= 0  # the arc of a point without mass is -1 less its cell
    arcs = torch.where(carries, basis, -1 - basis).long()
    row, column = arcs // m, n + arcs % m
    position = torch.arange(n + m - 1, device=arcs.device).expand_as(arcs)
    joined_at = position.new_full((batch, n + m), n + m)
    joined_at.scatter_reduce_(1, torch.cat([row, column], 1), torch.cat([position, position], 1), "amin")
    joined_at[:, 0] = -1  # the root
    row_joins = joined_at.gather(1, row) == position
    joined = torch.where(row_joins, row, column)
    # Of the first arc's ends it is the root that may be without mass.
    has_mass = torch.ones_like(joined_at, dtype=torch.bool).scatter_(1, joined[:, 1:], carries[:, 1:])
    has_mass[:, 0] = carries[:, 0]
    excess = (supplied.sum(-1, keepdim=True) - demanded.sum(-1, keepdim=True)) / 2
    rows, columns = (part / part.sum(-1, keepdim=True) for part in has_mass.double().split((n, m), -1))
    # Below each node hang the nodes that arcs later in the basis joined to it, and what all of them supply, less what
    # they demand, leaves through the arc that joined the node itself. Sums double their reach at every step. The last
    # node stands above the root.
    leaving = torch.cat([supplied - excess * rows, -demanded - excess * columns, excess.new_zeros(batch, 1)], -1)
    above = position.new_full((batch, n + m + 1), n + m)
    above.scatter_(1, joined, torch.where(row_joins, column, row))
    for _ in range((n + m).bit_length()):
        leaving = leaving.scatter_add(1, above, leaving)
        leaving[:, -1] = 0
        above = above.gather(1, above)
    flow = torch.where(row_joins, leaving.gather(1, row), -leaving.gather(1, column))
    return supply.new_zeros(batch, n * m).scatter_(1, arcs, flow.to(supply.dtype)).view(batch, n, m)


@_tree_flow_op.register_fake
def _(supply, demand, basis):
    return supply.new_empty([supply.shape[0], supply.shape[1], demand.shape[1]])


def _save_for_backward(ctx, inputs, output) -> None:
    _, flow, supply_dual, demand_dual, basis, pivots = output
    ctx.mark_non_differentiable(basis, pivots)
    ctx.set_materialize_grads(False)
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(flow, supply_dual, demand_dual, basis)
    ctx.save_for_forward(flow, supply_dual, demand_dual, basis)


def _or_zeros(tensor: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if tensor is None else tensor.to(like.dtype)


def _backward(ctx, grad_value, grad_flow, grad_supply_dual, grad_demand_dual, *unused_grads):
    """Made of saved results, which autograd knows as such: the gradients have gradients of every order."""
    flow, supply_dual, demand_dual, basis = ctx.saved_tensors
    needs_cost, needs_supply, needs_demand = ctx.needs_input_grad[:3]
    # A vertex stays where it is while the cost moves a little, and so do the duals while the marginals do.
    if grad_value is None:
        gradients = [torch.zeros_like(part) for part in (flow, supply_dual, demand_dual)]
    else:
        of_row = grad_value.unsqueeze(-1) if grad_value.dim() else grad_value  # a number is as good without
        gradients = [
            (of_row.unsqueeze(-1) if grad_value.dim() else of_row) * flow if needs_cost else None,
            of_row * supply_dual if needs_supply else None,
            of_row * demand_dual if needs_demand else None,
        ]
    if needs_cost and (grad_supply_dual is not None or grad_demand_dual is not None):
        through_duals = (_or_zeros(grad_supply_dual, supply_dual), _or_zeros(grad_demand_dual, demand_dual))
        gradients[0] = gradients[0] + _call_tree_flow(*through_duals, basis)
    if grad_flow is not None and (needs_supply or needs_demand):
        through_flow = _call_flow_backward(grad_flow, basis)
        gradients[1:] = (None if to is None else to + by for to, by in zip(gradients[1:], through_flow, strict=True))
    dtype = ctx.dtype
    return *(part if part is None or part.dtype == dtype else part.to(dtype) for part in gradients), None


def _jvp(ctx, cost, supply, demand, _):
    flow, supply_dual, demand_dual, basis = ctx.saved_tensors
    cost, supply, demand = _or_zeros(cost, flow), _or_zeros(supply, supply_dual), _or_zeros(demand, demand_dual)
    value = (flow * cost).sum((-2, -1)) + (supply_dual * supply).sum(-1) + (demand_dual * demand).sum(-1)
    return value, _call_tree_flow(supply, demand, basis), *_call_flow_backward(cost, basis), None, None


def _save_basis(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[-1])
    ctx.save_for_forward(inputs[-1])


def _flow_backward_backward(ctx, grad_supply, grad_demand):
    return _call_tree_flow(grad_supply, grad_demand, *ctx.saved_tensors), None


def _tree_flow_backward(ctx, grad_flow):
    return *_call_flow_backward(grad_flow, *ctx.saved_tensors), None


_call_emd = differentiable(_emd_op, _save_for_backward, _backward, _jvp, dimensions=2, takes_one=True)
# Both are linear and each other's adjoints.
_call_flow_backward = differentiable(
    _flow_backward_op,
    _save_basis,
    _flow_backward_backward,
    lambda ctx, grad_flow, _: _call_flow_backward(grad_flow, *ctx.saved_tensors),
    dimensions=2,
)
_call_tree_flow = differentiable(
    torch.ops.fewshot_ext.emd_tree_flow.default,
    _save_basis,
    _tree_flow_backward,
    lambda ctx, supply, demand, _: _call_tree_flow(supply, demand, *ctx.saved_tensors),
    dimensions=1,
)


def _batch_index(bad: Tensor, batch: torch.Size) -> tuple[int, tuple[int, ...]]:
    """The first bad problem: its position among all, and its index into the batch shape."""
    position = bad.nonzero()[0, 0].cpu()
    return int(position), tuple(int(part) for part in torch.unravel_index(position, batch))


def _check_values(cost: Tensor, supply: Tensor, demand: Tensor, batch: torch.Size, any_mass: bool) -> None:
    """Raises for the first problem of the flat batch whose values are not those of a transportation problem, where
    ``any_mass`` of one whose masses may differ; waits for the device. Looks at nothing while tracing."""
    tensors = {"cost": cost.detach(), "supply": supply.detach(), "demand": demand.detach()}
    if cost.is_meta or any(is_traced(tensor) for tensor in tensors.values()):
        return
    illegal = {"cost": ~(tensors["cost"] > -math.inf)}
    illegal.update({name: ~(tensors[name].isfinite() & (tensors[name] >= 0)) for name in ("supply", "demand")})
    marginals = {name: tensors[name].double() for name in ("supply", "demand")}
    masses = {name: marginal.sum(-1) for name, marginal in marginals.items()}
    # Compared in parts of the largest entry: sums can be beyond the dtype.
    largest = torch.maximum(*(marginal.amax(-1) for marginal in marginals.values())).unsqueeze(-1)
    parts = [(marginal / largest.where(largest > 0, 1)).sum(-1) for marginal in marginals.values()]
    unbalanced = (parts[0] - parts[1]).abs() > MASS_TOLERANCE * torch.maximum(*parts)
    bad = (parts[0] == 0) | (parts[1] == 0) | (unbalanced & (not any_mass))
    for entries in illegal.values():
        bad = bad | entries.flatten(1).any(-1)
    if not bad.any():
        return

    position, index = _batch_index(bad, batch)
    mass = {name: float(total[position]) for name, total in masses.items()}
    where = f"at batch index {index} (total mass of supply {mass['supply']:.9g}, of demand {mass['demand']:.9g})"
    for name, entries in illegal.items():
        for place in entries[position].nonzero()[:1].tolist():
            entry = tensors[name][position][tuple(place)].item()
            taken = "finite entries or inf" if name == "cost" else "finite entries of at least 0"
            raise ValueError(f"{name}: expected {taken}, got {entry} at {place} {where}")
    for name in masses:
        if mass[name] == 0:
            raise ValueError(f"{name}: expected a total mass above 0, got 0 {where}")
    raise ValueError(
        f"demand: expected the total mass of supply up to {MASS_TOLERANCE:g} of it, got another {where}; "
        "normalize=True scales both to 1, partial=True moves the smaller one"
    )


def _name_problem(error: RuntimeError, batch: torch.Size) -> None:
    """Raises what the CPU kernel says of costs that have no solution, with the problem's index into the batch shape."""
    said = _NO_SOLUTION.search(str(error))
    if said:
        index = tuple(int(part) for part in torch.unravel_index(torch.tensor(int(said["position"])), batch))
        raise ValueError(f"{said['what']}, at batch index {index}") from None


def _check_faults(pivots: Tensor, batch: torch.Size) -> None:
    """Raises for the first problem without a solution that a GPU could not tell; waits for the device. Looks at nothing
    while tracing."""
    if pivots.is_meta or is_traced(pivots):
        return
    codes = pivots.flatten()
    if (codes < 0).any():
        position, index = _batch_index(codes < 0, batch)
        what = _FAULTS.get(int(codes[position]))
        if what:
            raise ValueError(f"{what}, at batch index {index}")


def _check_certificate(
    cost: Tensor, supply: Tensor, demand: Tensor, result: EMD, batch: torch.Size, partial: bool
) -> None:
    """Raises for the first solution of the flat batch that is none; waits for the device. Looks at nothing while
    tracing."""
    if cost.is_meta or any(is_traced(tensor) for tensor in (cost, supply, demand)):
        return
    tolerance = CERTIFICATE_TOLERANCE[result.value.dtype]
    found = certificate(cost, supply, demand, result, tolerance, partial=partial)
    failed = ~found.holds(tolerance)
    if failed.any():
        position, index = _batch_index(failed, batch)
        figures = ", ".join(f"{name} {float(part[position]):.3g}" for name, part in found._asdict().items())
        n, m = cost.shape[1:]
        raise RuntimeError(
            f"emd: the solution at batch index {index}, n = {n}, m = {m}, is not optimal up to {tolerance:g}: "
            f"{figures}. {_REPORT}"
        )


def _checked(cost: object, supply: object, demand: object, partial: bool) -> dict[str, Tensor]:
    """The tensors of the problems, in one dtype, but that masses which are made here are not rounded to half types."""
    check_tensor("cost", cost, "[..., n, m]", 2, batched=True)
    check_floating("cost", cost)
    given = {name: marginal for name, marginal in (("supply", supply), ("demand", demand)) if marginal is not None}
    for name, marginal in given.items():
        check_tensor(name, marginal, "[..., n]" if name == "supply" else "[..., m]", 1, batched=True)
        check_floating(name, marginal)
    check_device("cost", cost, **given)
    # Masses that are rounded further no longer agree.
    tensors = float32_under_autocast({"cost": cost, **given})
    cost = tensors["cost"]
    n, m = cost.shape[-2:]
    if n == 0 or m == 0:
        raise ValueError(f"cost: expected at least one point on each side, got shape {list(cost.shape)}")
    most = MOST_POINTS_ON_CUDA - partial
    if cost.is_cuda and max(n, m) > most:
        raise ValueError(
            f"cost: expected n and m of at most {most} on CUDA devices, got shape {list(cost.shape)}; "
            "the CPU takes larger problems"
        )
    uniform = None  # of both sides where n = m: at few-shot sizes each call to torch shows
    for name, size in (("supply", n), ("demand", m)):
        marginal = tensors.get(name)
        if marginal is None:
            if uniform is None or n != m:
                uniform = torch.full((size,), 1 / size, dtype=accumulate_dtype(cost.dtype), device=cost.device)
            tensors[name] = uniform
        elif marginal.dtype != cost.dtype:
            raise TypeError(f"{name}: expected dtype {cost.dtype} as cost has, got {marginal.dtype}")
        elif marginal.shape[-1] != size:
            raise ValueError(f"{name}: expected shape [..., {size}] to fit cost, got {list(marginal.shape)}")
    return tensors


def _of_one_batch(cost: Tensor, supply: Tensor, demand: Tensor) -> tuple[dict[str, Tensor], torch.Size]:
    """The tensors with the batch dimensions that all of them broadcast to, and these."""
    tensors = {"cost": cost, "supply": supply, "demand": demand}
    batches = [cost.shape[:-2], supply.shape[:-1], demand.shape[:-1]]
    batch = batches[0]
    if batches == [batch] * 3:
        return tensors, batch
    try:
        batch = torch.broadcast_shapes(*batches)
    except RuntimeError:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"cost: expected batch dimensions that broadcast to one shape, got {shapes}") from None
    sizes = (tensor.shape[len(own) :] for tensor, own in zip(tensors.values(), batches, strict=True))
    return {
        name: tensor.expand(batch + size) for (name, tensor), size in zip(tensors.items(), sizes, strict=True)
    }, batch


def _in_one_row(batch: torch.Size, **tensors: Tensor) -> dict[str, Tensor]:
    """The tensors with one batch dimension."""
    return {name: tensor.reshape(math.prod(batch), *tensor.shape[len(batch) :]) for name, tensor in tensors.items()}


def _normalized(marginal: Tensor) -> Tensor:
    marginal = marginal.to(accumulate_dtype(marginal.dtype))
    # By the largest first, because a sum of large masses can be beyond the dtype.
    marginal = marginal / marginal.detach().abs().amax(-1, keepdim=True)
    # Divided by a negative mass, negative entries would look legal.
    return marginal / marginal.sum(-1, keepdim=True).abs()


def _with_dummies(cost: Tensor, supply: Tensor, demand: Tensor) -> dict[str, Tensor]:
    """The balanced problem that a partial one is: a dummy on each side, of which one takes, at no cost, what the other
    side has more. The kernels work out its mass themselves; this one is what gradients go through."""
    more = supply.sum(-1, keepdim=True) - demand.sum(-1, keepdim=True)
    zero = torch.zeros_like(more)
    return {
        "cost": torch.nn.functional.pad(cost, (0, 1, 0, 1)),
        "supply": torch.cat([supply, torch.where(more < 0, -more, zero)], -1),
        "demand": torch.cat([demand, torch.where(more < 0, zero, more)], -1),
    }


def _without_dummies(result: EMD, problem: dict[str, Tensor]) -> EMD:
    value, flow, supply_dual, demand_dual = result
    # The constant that gives mass which stays where it is the dual 0.
    supply_is_less = problem["supply"][..., -1:] > 0
    constant = torch.where(supply_is_less, -supply_dual[..., -1:], demand_dual[..., -1:])
    return EMD(value, flow[..., :-1, :-1], supply_dual[..., :-1] + constant, demand_dual[..., :-1] - constant)


def emd(
    cost: Tensor,
    supply: Tensor | None = None,
    demand: Tensor | None = None,
    *,
    normalize: bool = False,
    partial: bool = False,
    check: bool = False,
) -> EMD:
    r"""Earth Mover's Distance: the least cost of moving the masses of one weighted set onto those of another.

    .. math::
        \min_F \sum_{ij} C_{ij} F_{ij} \quad \text{subject to} \quad
        \sum_j F_{ij} = a_i, \quad \sum_i F_{ij} = b_j, \quad F_{ij} \ge 0

    Equation 1 of Zhang et al., "DeepEMD: Few-Shot Image Classification with Differentiable Earth Mover's Distance and
    Structured Classifiers", CVPR 2020, with costs C, supply a and demand b. Every problem is solved exactly, by the
    transportation simplex method, to an optimal vertex and the duals u, v that prove it: :math:`C_{ij} \ge u_i + v_j`,
    with equality wherever the vertex lets mass flow. The costs take any sign and need not be a metric. The
    value is that of the optimum of the numbers as they are given, to 1e-12 of itself (in float32 to its rounding), over
    the whole range of the dtype: a problem whose costs or masses differ too much for arithmetic in float64 is finished
    in integers. On a GPU that takes far longer than the rest, and so do problems of more than 256 points on a side.

    A cost of ``inf`` forbids its arc: no mass flows there. Where the masses on both sides of what is allowed miss each
    other by no more than roundings of the inputs do, that much stays where it is.

    Args:
        cost: ``[..., n, m]``, n and m at least 1; float32, float64, bfloat16 or float16. Half types are solved as
            float32.
        supply: ``[..., n]``, at least 0, in the dtype and on the device of ``cost``; uniform with sum 1 where None.
            Zeros are legal, and pad sets of fewer points, whose costs then have no part in any result of the others.
            Under autocast dtypes may differ.
        demand: ``[..., m]``, likewise. Its sum equals that of the supply up to 1e-4, relatively, and is scaled to it.
        normalize: scale supply and demand to sum 1 first, which is differentiated too.
        partial: let the sums differ, by as much as they may, and move the smaller one at the least cost: the masses of
            the other side are then upper bounds.
        check: look at the values on every device, and judge every solution by its certificate in float64. Bad values,
            and problems without a solution, raise on the CPU anyway; on a GPU, where a look would make the host wait,
            all results of such a problem are NaN unless this is set. Compiled code and vmap ignore it.

    The batch dimensions ``...`` are any and broadcast against each other. On the CPU each thread keeps a copy of one
    problem's costs, and beside it what grows with n + m, and 2 (n + m)^2 bits where those are at most 64 MiB.
    Ctrl-C ends a solve of any size within a second. A GPU takes up to 64 MiB beside the results, and no Ctrl-C.

    Returns:
        A named tuple of ``value`` ``[...]``, in units of cost times mass, ``flow`` ``[..., n, m]``, in units of mass,
        and ``supply_dual`` ``[..., n]`` and ``demand_dual`` ``[..., m]``, in units of cost; float64 for float64 inputs
        and float32 otherwise. Duals are defined up to a constant, which is chosen so that both have the same mean over
        the points that have mass; with ``partial``, so that mass which is not moved has the dual 0, and none on the
        side of the larger mass has a dual above 0.

    Gradients are those of the optimal basis, with no approximation. Of the value: the flow to ``cost``, the duals to
    ``supply`` and ``demand``. Of the flow: 0 to ``cost``, and the solution y, z of :math:`y_i + z_j = G_{ij}` on the
    arcs of the basis for the upstream gradient G to ``supply`` and ``demand``, with means as those of the duals. Of the
    duals: 0 to the marginals, and to ``cost`` the flow on the basis that has the upstream gradients as its marginals. A
    gradient to a marginal means something along directions that keep the masses equal alone. Where the optimum is
    degenerate (some basic flow is 0, as with equal or zero masses) the duals are one choice of many and give a
    subgradient; where several flows are optimal the one returned is a subgradient to ``cost``. All results have
    forward-mode derivatives and derivatives of every order too, of the same basis: ``torch.func.jvp``, ``jacfwd`` and
    ``hessian`` work. Compiled code has first derivatives in reverse mode.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: shapes that do not fit, no points, entries of a marginal that are negative, entries that are not
            finite but for costs of ``inf``, masses that differ or are zero, forbidden arcs that no flow avoids, a value
            or a dual beyond the range of the dtype, tensors on different devices. The first problem at fault is named,
            and nothing is returned for the others.
        RuntimeError: a solution that could not be proved optimal, or is not (see ``check``); CUDA tensors where the
            package has no kernels for the GPU.

    Example:
        >>> import torch, fewshot_ext
        >>> x = torch.tensor([[0.0, 0.0], [4.0, 1.0]], requires_grad=True)
        >>> y = torch.tensor([[3.0, 4.0], [4.0, 3.0], [7.0, 5.0]])
        >>> distance = fewshot_ext.emd((x[:, None] - y).norm(dim=-1), demand=torch.tensor([0.5, 0.25, 0.25]))
        >>> distance.value.item()
        4.25
        >>> distance.flow.tolist()
        [[0.5, 0.0, 0.0], [0.0, 0.25, 0.25]]
        >>> distance.value.backward()
        >>> x.grad
        tensor([[-0.3000, -0.4000],
                [-0.1500, -0.4500]])
    """
    check_flag("normalize", normalize)
    check_flag("partial", partial)
    check_flag("check", check)
    if normalize and partial:
        raise ValueError("partial: expected False with normalize=True, which leaves no masses that differ, got True")
    given, batch = _of_one_batch(**_checked(cost, supply, demand, partial))
    if check:
        _check_values(**_in_one_row(batch, **given), batch=batch, any_mass=normalize or partial)
    problem = dict(given)
    if normalize:
        problem.update({name: _normalized(given[name]) for name in ("supply", "demand")})
    # In half types masses that were made or normalized here would be rounded apart.
    dtypes = {tensor.dtype for tensor in problem.values()}
    if len(dtypes) > 1:
        problem = {name: tensor.to(accumulate_dtype(tensor.dtype)) for name, tensor in problem.items()}
    if partial:
        problem = _with_dummies(**problem)
    try:
        value, flow, supply_dual, demand_dual, _, pivots = _call_emd(*problem.values(), partial)
    except RuntimeError as error:
        # On the CPU the kernel looks at every value before it does anything: a look from here first costs more.
        if cost.device.type == "cpu":
            _check_values(**_in_one_row(batch, **given), batch=batch, any_mass=normalize or partial)
            _name_problem(error, batch)
        raise
    result = EMD(value, flow, supply_dual, demand_dual)
    if check:
        _check_faults(pivots, batch)
        solution = EMD(**_in_one_row(batch, **result._asdict()))
        _check_certificate(**_in_one_row(batch, **problem), result=solution, batch=batch, partial=partial)
    return _without_dummies(result, problem) if partial else result
