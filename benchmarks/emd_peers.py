"""Other solvers of the transportation problem, one problem a call. Each imports its package when it is first called."""

import functools
from collections.abc import Callable

import numpy as np
from numpy import ndarray
from torch import Tensor


def pot(cost: ndarray, supply: ndarray, demand: ndarray) -> float:
    import ot

    _, log = ot.emd(supply, demand, cost, check_marginals=False, log=True)
    return float(log["cost"])


def pot_flow(cost: ndarray, supply: ndarray, demand: ndarray) -> ndarray:
    """With the demand scaled to the mass of the supply, for rounded masses differ and POT would lose the difference."""
    import ot

    return ot.emd(supply, demand * (supply.sum() / demand.sum()), cost)


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


def quadratic_layer(n: int, m: int, regularisation: float = 1e-3) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A differentiable layer: cost, supply and demand -> the flow [n, m] that also makes ``regularisation`` / 2 |F|^2
    small, as the solver of DeepEMD does."""
    import cvxpy
    from cvxpylayers.torch import CvxpyLayer

    flow = cvxpy.Variable((n, m), nonneg=True)
    cost, supply, demand = cvxpy.Parameter((n, m)), cvxpy.Parameter(n), cvxpy.Parameter(m)
    total = cvxpy.sum(cvxpy.multiply(cost, flow)) + regularisation / 2 * cvxpy.sum_squares(flow)
    constraints = [cvxpy.sum(flow, axis=1) == supply, cvxpy.sum(flow, axis=0) == demand]
    layer = CvxpyLayer(cvxpy.Problem(cvxpy.Minimize(total), constraints), [cost, supply, demand], [flow])
    return lambda *arguments: layer(*arguments)[0]
