"""The certificate of a solution of the transportation problem, whoever found it.

The value is judged against the optimum itself: duals that no cost contradicts bound it from below, however they came
about. Those of the result do where their rounding is small beside the value. Elsewhere better ones are looked for, from
them: first in float64, then, where one cost dwarfs another, in integers.
"""

import math
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

_UNIT = 2.0**-52


class Certificate(NamedTuple):
    """What proves a solution, in float64, one number a problem; all vanish where the solution is exact.

    Points without mass, and arcs of infinite cost, have no part in it.
    """

    marginal_residual: Tensor  # the largest |F 1 - supply| or |F^T 1 - demand|, relative to all mass
    min_flow: Tensor  # the least F, likewise
    min_reduced_cost: Tensor  # the least C_ij - u_i - v_j, relative to the largest cost or dual
    # Between the value and <C, F>, or <u, supply> + <v, demand>, relative to the sum of the sizes of their terms
    gap: Tensor
    error: Tensor  # what the value may differ from the optimum by at most, relative to the optimum

    def holds(self, tolerance: float) -> Tensor:
        """Whether each problem is solved up to ``tolerance``; a NaN is no solution."""
        feasible = (self.marginal_residual <= tolerance) & (self.min_flow >= -tolerance)
        proved = (self.min_reduced_cost >= -tolerance) & (self.gap <= tolerance)
        return feasible & proved & (self.error <= tolerance)


def certificate(
    cost: Tensor,
    supply: Tensor,
    demand: Tensor,
    result: tuple[Tensor, ...],
    tolerance: float = 1e-12,
    *,
    partial: bool = False,
) -> Certificate:
    """Judges ``result``, (value, flow, supply_dual, demand_dual), as a solution of the problems ``[..., n, m]``.

    ``tolerance``: of the error; one that is known to be smaller is not pursued further. ``partial``: the last point of
    each side is a dummy that takes what the other side has more. What that is exactly, no number that is given for the
    dummy's mass can say; so the error is that of the difference of the others' sums.
    """
    batch, (n, m) = cost.shape[:-2], cost.shape[-2:]
    sizes = ((n, m), (n,), (m,), (), (n, m), (n,), (m,))
    tensors = (tensor.detach().double() for tensor in (cost, supply, demand, *result))
    flat = [tensor.expand((*batch, *size)).reshape((-1, *size)) for tensor, size in zip(tensors, sizes, strict=True)]
    return Certificate(*(part.reshape(batch) for part in _judged(*flat, tolerance, partial)))


def _judged(
    cost: Tensor,
    supply: Tensor,
    demand: Tensor,
    value: Tensor,
    flow: Tensor,
    u: Tensor,
    v: Tensor,
    tolerance: float,
    partial: bool,
) -> Certificate:
    given = cost, supply, demand, value
    # Relative to more than all mass, because sums can be beyond the type.
    largest = torch.maximum(supply.amax(-1), demand.amax(-1))
    largest = largest.where(largest > 0, 1)
    points = sum(cost.shape[1:])
    supply, demand = (mass / largest[:, None] / points for mass in (supply, demand))
    flow, value = flow / largest[:, None, None] / points, value / points / largest
    mass = supply.sum(-1)
    demand = demand * (mass / demand.sum(-1)).unsqueeze(-1)
    rows = (flow.sum(-1) - supply).abs().amax(-1)
    columns = (flow.sum(-2) - demand).abs().amax(-1)

    # Costs between points that have mass; infinity elsewhere, which no dual contradicts.
    real = torch.where((supply[:, :, None] > 0) & (demand[:, None] > 0), cost, math.inf)
    u, v = u.where(supply > 0, 0), v.where(demand > 0, 0)
    finite = torch.where(real.isfinite(), real, 0)
    scaled = torch.stack([finite.abs().amax((-2, -1)), u.abs().amax(-1), v.abs().amax(-1)]).amax(0)[:, None, None]
    scaled = scaled.where(scaled > 0, 1)
    reduced = finite / scaled - u[:, :, None] / scaled - v[:, None] / scaled
    reduced = reduced.where(real.isfinite(), math.inf)

    carried = torch.where(flow == 0, 0, cost * flow)
    terms = u * supply, v * demand
    dual = terms[0].sum(-1) + terms[1].sum(-1)
    size = torch.maximum(carried.abs().sum((-2, -1)), terms[0].abs().sum(-1) + terms[1].abs().sum(-1))
    gap = torch.maximum((carried.sum((-2, -1)) - value).abs(), (dual - value).abs())
    gap = torch.where(gap == 0, 0, gap / size)
    least = reduced.amin((-2, -1))
    error = _error(real, supply, demand, value, flow > 0, u, v, tolerance, partial)
    for index in (error > tolerance).nonzero().flatten().tolist():
        error[index] = _exact_error(*(part[index] for part in (*given, flow, u)), partial)
    return Certificate(
        torch.maximum(rows, columns) / mass,
        flow.amin((-2, -1)) / mass,
        torch.where(least == math.inf, 0, least),
        gap,
        error,
    )


def _error(
    cost: Tensor,
    supply: Tensor,
    demand: Tensor,
    value: Tensor,
    used: Tensor,
    u: Tensor,
    v: Tensor,
    tolerance: float,
    partial: bool,
) -> Tensor:
    """A bound of |value - optimum| / |optimum|, from duals that are improved until it is good or they stay.

    The optimum lies between the dual objective and, for a plan that is feasible, the value.
    """
    bound = torch.full_like(value, math.inf)
    for _ in range(sum(cost.shape[1:])):
        v = _lowest(cost - u[:, :, None], 1, demand)
        slack = (cost - u[:, :, None] - v[:, None]).nan_to_num(posinf=math.inf)
        size = torch.where(cost.isfinite(), cost, 0).abs() + u.abs()[:, :, None] + v.abs()[:, None]
        violation = (3 * _UNIT * size - slack).where(cost.isfinite(), 0).amax((-2, -1)).clamp(min=0)
        terms = u * supply, v * demand
        dual = terms[0].sum(-1) + terms[1].sum(-1)
        sizes = sum(part.abs().sum(-1) for part in terms)
        if partial:  # the dummy's mass is a difference of sums
            sizes = sizes + torch.maximum(u[:, -1].abs(), v[:, -1].abs()) * supply.sum(-1)
        rounding = sizes * (24 * _UNIT)  # torch sums in cascades
        difference = (value - dual).abs() + rounding + violation * supply.sum(-1)
        found = torch.where(difference == 0, 0, difference / value.abs())
        bound = torch.minimum(bound, found.nan_to_num(nan=math.inf))
        improved = torch.maximum(u, _highest((cost - v[:, None]).where(used, -math.inf), 2, u))
        if bool((bound <= tolerance).all()) or torch.equal(improved, u):
            break
        u = improved
    return bound


def _lowest(values: Tensor, dim: int, mass: Tensor) -> Tensor:
    return values.amin(dim).where(mass > 0, 0)


def _highest(values: Tensor, dim: int, other: Tensor) -> Tensor:
    highest = values.amax(dim)
    return highest.where(highest.isfinite(), other)


def _exact_error(
    cost: Tensor, supply: Tensor, demand: Tensor, value: Tensor, flow: Tensor, u: Tensor, partial: bool
) -> float:
    """The same without rounding, of one problem: exact wherever its plan is optimal.

    Potentials come from the shortest paths that forbid a flow to be improved: their lengths settle within as many
    rounds as there are points, unless a cycle is negative.
    """
    if not (value.isfinite() and u.isfinite().all()):
        return math.inf
    masses = [[Fraction(x) for x in mass.tolist()] for mass in (supply, demand)]
    if partial:
        more = sum(masses[0][:-1]) - sum(masses[1][:-1])
        masses[0][-1], masses[1][-1] = max(-more, Fraction(0)), max(more, Fraction(0))
    rows, columns = ([k for k, mass in enumerate(side) if mass > 0] for side in masses)
    exact_costs = [[Fraction(x) if x < math.inf else None for x in cost[row, columns].tolist()] for row in rows]
    exact_u = [Fraction(x) for x in u[rows].tolist()]
    # Integers are faster than fractions; all denominators are powers of 2.
    unit = max(x.denominator for part in (*exact_costs, exact_u) for x in part if x is not None)
    costs = [[None if x is None else int(x * unit) for x in part] for part in exact_costs]
    high = [int(x * unit) for x in exact_u]
    used = [(flow[row, columns] > 0).nonzero().flatten().tolist() for row in rows]
    low = _allowed(costs, high)
    for _ in range(len(rows) + len(columns)):
        risen = [
            max([h, *(c[j] - low[j] for j in support if c[j] is not None)])
            for c, h, support in zip(costs, high, used, strict=True)
        ]
        if risen == high:
            break
        high, low = risen, _allowed(costs, risen)
    of_rows, of_columns = (
        sum(dual * side[k] for dual, k in zip(duals, points, strict=True))
        for duals, side, points in zip((high, low), masses, (rows, columns), strict=True)
    )
    optimum = (of_rows + of_columns * sum(masses[0]) / sum(masses[1])) / unit
    difference = abs(Fraction(value.item()) - optimum)
    if difference == 0:
        return 0.0
    return math.inf if optimum == 0 else float(min(difference / abs(optimum), 10**300))


def _allowed(costs: list[list[int | None]], high: list[int]) -> list[int]:
    """The highest duals of the columns that no cost contradicts beside those of the rows."""
    return [
        min((c[j] - h for c, h in zip(costs, high, strict=True) if c[j] is not None), default=0)
        for j in range(len(costs[0]))
    ]
