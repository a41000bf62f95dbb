"""The Earth Mover's Distance as the linear program reads, through cvxpy.

Same arguments and results as :func:`fewshot_ext.emd`, except that supply and demand have the batch shape of the cost
and that nothing is checked: call it in float64 for an oracle. The solver is exact to about 1e-7 of costs and masses
near 1; scale others before. Where a partial problem's masses are equal its duals are those of either side.
"""

import torch
from torch import Tensor

from fewshot_ext._extras import require

_SUPPORT = 1e-9  # of the mass: a flow above it is on an arc of the vertex


def emd(
    cost: Tensor,
    supply: Tensor | None = None,
    demand: Tensor | None = None,
    *,
    normalize: bool = False,
    partial: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The value, the flow, and the duals of supply and demand."""
    *batch, n, m = cost.shape
    supply = cost.new_full((*batch, n), 1 / n) if supply is None else supply
    demand = cost.new_full((*batch, m), 1 / m) if demand is None else demand
    if normalize:
        supply, demand = (masses / masses.sum(-1, keepdim=True) for masses in (supply, demand))
    if partial:
        return _partial(cost, supply, demand)
    # The optimum exists for equal masses alone. Spreading a difference evenly, half on each side, is what equal means
    # of the duals stand for.
    excess = (supply.sum(-1, keepdim=True) - demand.sum(-1, keepdim=True)) / 2
    supply, demand = supply - excess / n, demand + excess / m

    optimum, supply_dual, demand_dual = _solve(cost.detach(), supply.detach(), demand.detach())
    value = _value(cost, supply, demand, optimum, *_of_equal_means(supply_dual, demand_dual))
    used = optimum > _SUPPORT * supply.detach().sum(-1)[..., None, None]  # the arcs of the vertex
    flow, *duals = _of_vertex(used, cost, supply, demand)
    return value, flow, *_of_equal_means(*duals)


def _value(
    cost: Tensor, supply: Tensor, demand: Tensor, optimum: Tensor, supply_dual: Tensor, demand_dual: Tensor
) -> Tensor:
    """The envelope theorem: gradients of the value are those of the Lagrangian with its solution held fixed."""
    missing_supply, missing_demand = supply - optimum.sum(-1), demand - optimum.sum(-2)
    value = torch.where(optimum == 0, 0, cost * optimum).sum((-2, -1))
    return value + (supply_dual * missing_supply).sum(-1) + (demand_dual * missing_demand).sum(-1)


def _partial(cost: Tensor, supply: Tensor, demand: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One problem after another, for the side with upper bounds is not the same in all. Bounds that are not reached
    have no part in the value or the flow."""
    batch = cost.shape[:-2]
    results = []
    for one in (
        zip(cost.flatten(0, -3), supply.flatten(0, -2), demand.flatten(0, -2), strict=True)
        if batch
        else [(cost, supply, demand)]
    ):
        supply_bounds = bool(one[1].sum() > one[2].sum())
        duals = _solve(*(part.detach() for part in one), bounds=(supply_bounds, not supply_bounds))
        optimum, *_ = duals
        value = _value(*one, *duals)
        missing = (one[1] - optimum.sum(-1), one[2] - optimum.sum(-2))
        moved = optimum.sum()
        reached = torch.cat([part.detach().abs() <= _SUPPORT * moved for part in missing])
        flow, *_ = _of_vertex(optimum > _SUPPORT * moved, *one, reached)
        results.append((value, flow, *duals[1:]))
    return tuple(torch.stack(part).unflatten(0, batch) if batch else part[0] for part in zip(*results, strict=True))


def _solve(
    cost: Tensor, supply: Tensor, demand: Tensor, bounds: tuple[bool, bool] = (False, False)
) -> tuple[Tensor, Tensor, Tensor]:
    """Optimal flow and duals; ``bounds``: whether supply, and demand, are what flows at most."""
    require("test", "cvxpy")
    import cvxpy

    if cost.numel() == 0:
        return torch.zeros_like(cost), torch.zeros_like(supply), torch.zeros_like(demand)
    flow = cvxpy.Variable(cost.shape, nonneg=True)
    axis = cost.dim() - 1
    leaves, arrives = (
        sums <= mass.numpy(force=True) if bound else sums == mass.numpy(force=True)
        for sums, mass, bound in zip(
            (cvxpy.sum(flow, axis=axis), cvxpy.sum(flow, axis=axis - 1)), (supply, demand), bounds, strict=True
        )
    )
    forbidden = cost.isinf()
    constraints = [leaves, arrives]
    if forbidden.any():
        constraints.append(cvxpy.multiply(forbidden.double().numpy(force=True), flow) == 0)
    total_cost = cvxpy.sum(cvxpy.multiply(cost.where(~forbidden, 0).numpy(force=True), flow))
    # The simplex method of HiGHS ends at a vertex.
    cvxpy.Problem(cvxpy.Minimize(total_cost), constraints).solve(
        solver=cvxpy.SCIPY, scipy_options={"method": "highs-ds"}, canon_backend=cvxpy.SCIPY_CANON_BACKEND
    )
    # cvxpy adds its multipliers to the objective; ours are prices.
    optimum, supply_dual, demand_dual = (
        torch.as_tensor(found).to(cost) for found in (flow.value, -leaves.dual_value, -arrives.dual_value)
    )
    return optimum, supply_dual, demand_dual


def _of_vertex(
    used: Tensor, cost: Tensor, supply: Tensor, demand: Tensor, reached: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The flow on the arcs that are ``used``, as a linear function of the marginals that are ``reached``, and the
    duals, as one of the cost."""
    n, m = used.shape[-2:]
    leaves = torch.eye(n).repeat_interleave(m, dim=1)  # [n, n m]: the arcs of each supply
    arrives = torch.eye(m).repeat(1, n)  # [m, n m]: the arcs of each demand
    incidence = torch.cat([leaves, arrives]).to(cost) * used.flatten(-2).unsqueeze(-2)
    if reached is not None:
        incidence = incidence * reached.unsqueeze(-1)
    inverse = torch.linalg.pinv(incidence)
    flow = inverse @ torch.cat([supply, demand], dim=-1).unsqueeze(-1)
    duals = inverse.mT @ torch.where(used, cost, 0).flatten(-2).unsqueeze(-1)
    return flow.squeeze(-1).unflatten(-1, (n, m)), *duals.squeeze(-1).split((n, m), dim=-1)


def _of_equal_means(supply_dual: Tensor, demand_dual: Tensor) -> tuple[Tensor, Tensor]:
    difference = (demand_dual.mean(-1, keepdim=True) - supply_dual.mean(-1, keepdim=True)) / 2
    return supply_dual + difference, demand_dual - difference
