"""Other solvers of the transportation problem. Each imports its package when it is first called.

They take one problem as arrays, or tensors [B, ...] with masses of 1 where their name ends in ``_batch``, and return
values.
"""

import functools
from collections.abc import Callable

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

SINKHORN_REG = 0.01  # of costs near 1: smaller values take more steps than POT's thousand


def pot(cost: ndarray, supply: ndarray, demand: ndarray) -> float:
    import ot

    _, log = ot.emd(supply, demand, cost, check_marginals=False, log=True)
    return float(log["cost"])


def pot_flow(cost: ndarray, supply: ndarray, demand: ndarray) -> ndarray:
    """With the demand scaled to the mass of the supply, for rounded masses differ and POT would lose the difference."""
    import ot

    return ot.emd(supply, demand * (supply.sum() / demand.sum()), cost)


def pot_partial(cost: ndarray, supply: ndarray, demand: ndarray) -> float:
    import ot

    _, log = ot.partial.partial_wasserstein(supply, demand, cost, m=min(supply.sum(), demand.sum()), log=True)
    return float(log["cost"])


def pot_batch(cost: Tensor, supply: Tensor, demand: Tensor) -> Tensor:
    """By Sinkhorn's iterations, which blur the flow. Without ``reg`` POT approaches the exact flow by proximal steps,
    and is further from it after its thousand."""
    return _pot_batch(cost, supply, demand).value_linear


def pot_batch_flow(cost: Tensor, supply: Tensor, demand: Tensor) -> Tensor:
    return _pot_batch(cost, supply, demand).plan


def _pot_batch(cost: Tensor, supply: Tensor, demand: Tensor):
    import ot

    return ot.solve_batch(cost, a=supply, b=demand, reg=SINKHORN_REG)


def torchmatch_batch(cost: Tensor, supply: Tensor, demand: Tensor) -> Tensor:
    """In float64: float32 masses, which never have quite the same sum, make it raise."""
    from torchmatch.transport import matrix

    return (matrix.solve(cost, a=supply, b=demand, backend="exact_emd") * cost).sum((-2, -1))


def torch_linear_assignment_flow(cost: Tensor, supply: Tensor, demand: Tensor) -> Tensor:
    """For equal masses alone, of any sum."""
    from torch_linear_assignment import batch_linear_assignment

    column = batch_linear_assignment(cost).unsqueeze(2)
    return torch.zeros_like(cost).scatter_(2, column, supply.unsqueeze(2))


def scipy_assignment(cost: ndarray, supply: ndarray, demand: ndarray) -> float:
    """For equal masses alone."""
    from scipy.optimize import linear_sum_assignment

    return float(cost[linear_sum_assignment(cost)].sum() * supply[0])


def opencv(cost: ndarray, supply: ndarray, demand: ndarray) -> float:
    """In float32, all that it takes. It returns the cost of a unit of mass."""
    return _opencv(cost, supply, demand)[0] * supply.sum()


def opencv_flow(cost: ndarray, supply: ndarray, demand: ndarray) -> ndarray:
    return _opencv(cost, supply, demand)[2]


def _opencv(cost: ndarray, supply: ndarray, demand: ndarray):
    import cv2

    signatures = (np.float32(masses[:, None]) for masses in (supply, demand))
    return cv2.EMD(*signatures, cv2.DIST_USER, cost=np.float32(cost))


@functools.cache
def _incidence(n: int, m: int):
    from scipy import sparse

    leaves = sparse.kron(sparse.eye(n), np.ones((1, m)))
    arrives = sparse.kron(np.ones((1, n)), sparse.eye(m))
    return sparse.vstack([leaves, arrives]).tocsr()


def highs(cost: ndarray, supply: ndarray, demand: ndarray) -> float:
    """Exact to about 1e-7 of the largest cost times the mass.

    HiGHS knows absolute tolerances alone: it gets costs and masses near 1.
    """
    from scipy.optimize import linprog

    scale, mass = np.abs(cost).max() or 1.0, supply.sum()
    found = linprog(
        cost.ravel() / scale,
        A_eq=_incidence(*cost.shape),
        b_eq=np.concatenate([supply / mass, demand / demand.sum()]),
        method="highs",
        options={"presolve": False},  # presolving takes masses that differ by a rounding for infeasible
    )
    if not found.success:
        raise RuntimeError(found.message)
    return float(found.fun * scale * mass)


def highs_partial(cost: ndarray, supply: ndarray, demand: ndarray) -> float:
    """Of two masses that differ the smaller is moved: a point that costs nothing takes what is left of the larger."""
    more = supply.sum() - demand.sum()
    if more > 0:
        return highs(np.pad(cost, ((0, 0), (0, 1))), supply, np.append(demand, more))
    return highs(np.pad(cost, ((0, 1), (0, 0))), np.append(supply, -more), demand)


def quadratic_layer(n: int, m: int, regularization: float = 1e-3) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A differentiable layer: cost, supply and demand -> the flow [n, m] that also makes ``regularization`` / 2 |F|^2
    small, as the solver of DeepEMD does."""
    import cvxpy
    from cvxpylayers.torch import CvxpyLayer

    flow = cvxpy.Variable((n, m), nonneg=True)
    cost, supply, demand = cvxpy.Parameter((n, m)), cvxpy.Parameter(n), cvxpy.Parameter(m)
    total = cvxpy.sum(cvxpy.multiply(cost, flow)) + regularization / 2 * cvxpy.sum_squares(flow)
    constraints = [cvxpy.sum(flow, axis=1) == supply, cvxpy.sum(flow, axis=0) == demand]
    layer = CvxpyLayer(cvxpy.Problem(cvxpy.Minimize(total), constraints), [cost, supply, demand], [flow])
    return lambda *arguments: layer(*arguments)[0]
