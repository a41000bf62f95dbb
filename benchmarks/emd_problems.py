"""Families of transportation problems, ordinary and adversarial, for the tests, the stress test and the benchmark.

Each family is a function of the number of problems, n, m and a generator, and gives cost [B, n, m], supply [B, n] and
demand [B, m] in float64.
"""

from collections.abc import Callable

import torch
from torch import Generator, Tensor

Instances = tuple[Tensor, Tensor, Tensor]
Family = Callable[[int, int, int, Generator], Instances]


def _uniform(*shape: int, generator: Generator) -> Tensor:
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def _integers(high: int, *shape: int, generator: Generator) -> Tensor:
    return torch.randint(high, shape, generator=generator).double()


def _balanced(cost: Tensor, supply: Tensor, demand: Tensor) -> Instances:
    return cost, supply, demand * (supply.sum(-1) / demand.sum(-1)).unsqueeze(-1)


def _integer_marginals(problems: int, n: int, m: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Units that come from random suppliers and go to random consumers: few, so that ties and zeros abound."""
    units = 2 * max(n, m)
    sides = []
    for points in (n, m):
        where = torch.randint(points, (problems, units), generator=generator)
        sides.append(
            torch.zeros(problems, points, dtype=torch.float64).scatter_add_(
                1, where, torch.ones_like(where, dtype=torch.float64)
            )
        )
    return sides[0], sides[1]


def uniform(problems: int, n: int, m: int, generator: Generator) -> Instances:
    cost = _uniform(problems, n, m, generator=generator)
    supply, demand = (_uniform(problems, points, generator=generator) + 1e-3 for points in (n, m))
    return _balanced(cost, supply, demand)


def deepemd(problems: int, n: int, m: int, generator: Generator) -> Instances:
    """Local features of two images, as DeepEMD compares them: one minus their cosine, and weights by the relevance to
    the other image's mean, which are 1e-3 at least and 1 on average."""
    shared = torch.randn(problems, 1, 64, generator=generator, dtype=torch.float64)
    features = [
        (torch.randn(problems, points, 64, generator=generator, dtype=torch.float64) + 0.7 * shared).relu()
        for points in (n, m)
    ]
    features = [rows - rows.mean(-1, keepdim=True) for rows in features]
    first, second = (torch.nn.functional.normalize(rows, dim=-1) for rows in features)
    weights = [
        (rows @ others.mean(1, keepdim=True).mT).squeeze(-1).relu() + 1e-3
        for rows, others in (features, features[::-1])
    ]
    supply, demand = (weight / weight.mean(-1, keepdim=True) for weight in weights)
    return _balanced(1 - first @ second.mT, supply, demand)


def integer(problems: int, n: int, m: int, generator: Generator) -> Instances:
    """The optimal value is an integer."""
    cost = _integers(101, problems, n, m, generator=generator) - 50
    return cost, *_integer_marginals(problems, n, m, generator)


def tied(problems: int, n: int, m: int, generator: Generator) -> Instances:
    return _integers(3, problems, n, m, generator=generator), *_integer_marginals(problems, n, m, generator)


def assignment(problems: int, n: int, m: int, generator: Generator) -> Instances:
    """Equal masses: nearly all basic flows of a vertex are zero."""
    cost = _uniform(problems, n, m, generator=generator)
    return cost, *(cost.new_full((problems, points), 1 / points) for points in (n, m))


def constant_cost(problems: int, n: int, m: int, generator: Generator) -> Instances:
    _, supply, demand = uniform(problems, n, m, generator)
    return _integers(3, problems, 1, 1, generator=generator).expand(problems, n, m) - 1, supply, demand


def potential_cost(problems: int, n: int, m: int, generator: Generator) -> Instances:
    """Costs u_i + v_j, at which every flow is optimal, up to a noise that decides in the last digits."""
    cost, supply, demand = uniform(problems, n, m, generator)
    potentials = _uniform(problems, n, 1, generator=generator) + _uniform(problems, 1, m, generator=generator)
    return potentials + 1e-9 * cost, supply, demand


def negative_cost(problems: int, n: int, m: int, generator: Generator) -> Instances:
    cost, supply, demand = uniform(problems, n, m, generator)
    return -cost, supply, demand


def tiny_cost(problems: int, n: int, m: int, generator: Generator) -> Instances:
    cost, supply, demand = uniform(problems, n, m, generator)
    return 1e-6 * cost, supply, demand


def huge_cost(problems: int, n: int, m: int, generator: Generator) -> Instances:
    cost, supply, demand = uniform(problems, n, m, generator)
    return 1e6 * (cost - 0.5), supply, demand


def spread_cost(problems: int, n: int, m: int, generator: Generator) -> Instances:
    """Costs over 8 orders of magnitude."""
    cost, supply, demand = uniform(problems, n, m, generator)
    return 10 ** (8 * cost - 8), supply, demand


def spread_marginals(problems: int, n: int, m: int, generator: Generator) -> Instances:
    """Masses over 8 orders of magnitude."""
    cost = _uniform(problems, n, m, generator=generator)
    return _balanced(cost, *(10 ** (8 * _uniform(problems, points, generator=generator) - 8) for points in (n, m)))


def zero_mass(problems: int, n: int, m: int, generator: Generator) -> Instances:
    """Every second point has no mass, as in padded sets; one on each side has."""
    cost, supply, demand = uniform(problems, n, m, generator)
    for marginal in (supply, demand):
        empty = torch.rand(marginal.shape, generator=generator) < 0.5
        empty[:, -1] = False
        marginal[empty] = 0
    return _balanced(cost, supply, demand)


def plane(problems: int, n: int, m: int, generator: Generator) -> Instances:
    """Distances between points of a grid: a metric with many ties."""
    points = [_integers(6, problems, points, 2, generator=generator) for points in (n, m)]
    return torch.cdist(*points), *_integer_marginals(problems, n, m, generator)


FAMILIES: dict[str, Family] = {
    family.__name__: family
    for family in (
        uniform,
        deepemd,
        integer,
        tied,
        assignment,
        constant_cost,
        potential_cost,
        negative_cost,
        tiny_cost,
        huge_cost,
        spread_cost,
        spread_marginals,
        zero_mass,
        plane,
    )
}

# Where one number dwarfs another, or no number will do: for what is exact at any range.


def any_spread(problems: int, n: int, m: int, generator: Generator) -> Instances:
    """Costs of either sign over up to 300 orders of magnitude within a problem."""
    cost, supply, demand = uniform(problems, n, m, generator)
    spread = 10 ** (2.48 * _uniform(problems, 1, 1, generator=generator))
    sign = 1 - 2 * _integers(2, problems, 1, 1, generator=generator) * _integers(2, problems, n, m, generator=generator)
    return sign * 10 ** (spread * (cost - 0.5)), supply, demand


def outliers(problems: int, n: int, m: int, generator: Generator) -> Instances:
    """Some costs of up to 1e300 among those of [0, 1], for equal masses."""
    cost, supply, demand = assignment(problems, n, m, generator)
    size = 10 ** (300 * _uniform(problems, 1, 1, generator=generator))
    return torch.where(_uniform(problems, n, m, generator=generator) < 0.1, size, cost), supply, demand


def huge_padding(problems: int, n: int, m: int, generator: Generator) -> Instances:
    """Points without mass, at costs of up to 1e300 from all others."""
    cost, supply, demand = zero_mass(problems, n, m, generator)
    size = 10 ** (300 * _uniform(problems, 1, 1, generator=generator))
    return torch.where((supply[:, :, None] > 0) & (demand[:, None] > 0), cost, size), supply, demand


def large_integers(problems: int, n: int, m: int, generator: Generator) -> Instances:
    cost = torch.randint(2**53, (problems, n, m), generator=generator).double()
    return cost, *_integer_marginals(problems, n, m, generator)


def spread_everywhere(problems: int, n: int, m: int, generator: Generator) -> Instances:
    """Costs over 30 and masses over 15 orders of magnitude."""
    cost, _, _ = uniform(problems, n, m, generator)
    masses = (10 ** (15 * _uniform(problems, points, generator=generator) - 15) for points in (n, m))
    return _balanced(10 ** (30 * cost - 15), *masses)


def forbidden(problems: int, n: int, m: int, generator: Generator) -> Instances:
    """All arcs are forbidden but a part, and those of one flow."""
    cost, _, _ = uniform(problems, n, m, generator)
    flow = torch.zeros(problems, n, m, dtype=torch.float64)
    for _ in range(max(n, m)):
        arcs = torch.randint(n * m, (problems, 1), generator=generator)
        units = _integers(8, problems, 1, generator=generator) + 1
        flow.flatten(1).scatter_add_(1, arcs, units)
    density = _uniform(problems, 1, 1, generator=generator)
    allowed = (flow > 0) | (_uniform(problems, n, m, generator=generator) > density)
    return cost.where(allowed, torch.inf), flow.sum(2), flow.sum(1)


def infeasible(problems: int, n: int, m: int, generator: Generator) -> Instances:
    """One supplier has no arc that is allowed."""
    cost, supply, demand = uniform(problems, n, m, generator)
    rows = torch.randint(n, (problems, 1, 1), generator=generator)
    return cost.scatter(1, rows.expand(problems, 1, m), torch.inf), supply, demand


def partial(problems: int, n: int, m: int, generator: Generator) -> Instances:
    """Masses that differ."""
    cost, supply, demand = uniform(problems, n, m, generator)
    return cost - 0.2, supply, demand * 10 ** (2 * _uniform(problems, 1, generator=generator) - 1)


EXTREME_FAMILIES: dict[str, Family] = {
    family.__name__: family
    for family in (
        any_spread,
        outliers,
        huge_padding,
        large_integers,
        spread_everywhere,
        forbidden,
        infeasible,
        partial,
    )
}

EPISODE = 375  # problems of a 5-way episode with 15 queries a class
_DRAWN = 1000


def float32_batch(kind: str, points: int, problems: int, seed: int = 0) -> list[Tensor]:
    """Problems of a family as networks make them, in float32; long batches repeat the first 1000."""
    drawn = {**FAMILIES, **EXTREME_FAMILIES}[kind](
        min(problems, _DRAWN), points, points, torch.Generator().manual_seed(seed)
    )
    copies = -(-problems // _DRAWN)
    return [tensor.float().repeat(copies, *[1] * (tensor.dim() - 1))[:problems] for tensor in drawn]
