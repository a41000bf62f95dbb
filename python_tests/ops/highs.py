"""The transportation problem by scipy's HiGHS, with nothing of this package in between."""

import numpy as np
from scipy import sparse
from scipy.optimize import linprog
from torch import Tensor


def optimal_value(cost: Tensor, supply: Tensor, demand: Tensor) -> float:
    """The least cost of one problem, exact to about 1e-7 of the largest cost times the mass.

    HiGHS knows absolute tolerances alone: it gets costs and masses near 1.
    """
    n, m = cost.shape
    c, a, b = (tensor.double().numpy() for tensor in (cost, supply, demand))
    cost_scale, mass = np.abs(c).max() or 1.0, a.sum()
    rows = sparse.kron(sparse.eye(n), np.ones((1, m)))
    columns = sparse.kron(np.ones((1, n)), sparse.eye(m))
    found = linprog(
        c.ravel() / cost_scale,
        A_eq=sparse.vstack([rows, columns]),
        b_eq=np.concatenate([a / mass, b / b.sum()]),
        method="highs",
        options={"presolve": False},  # presolving takes masses that differ by a rounding for infeasible
    )
    assert found.success, found.message
    return float(found.fun * cost_scale * mass)
