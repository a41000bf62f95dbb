"""The transportation problem in rational arithmetic, by successive shortest paths: slow, and right at any range."""

from fractions import Fraction

INFINITE = float("inf")


def optimum(
    cost: list[list[float]], supply: list[float], demand: list[float], *, partial: bool = False
) -> Fraction | None:
    """The least cost of the numbers as they are given, with the demand scaled to the supply's mass unless ``partial``:
    then the smaller of the two masses is moved. None where no flow avoids the infinite costs."""
    arcs = {(i, j): Fraction(c) for i, row in enumerate(cost) for j, c in enumerate(row) if c != INFINITE}
    left, wanted = [Fraction(x) for x in supply], [Fraction(x) for x in demand]
    total = sum(left)
    if not partial:
        factor = total / sum(wanted)
        wanted = [x * factor for x in wanted]
    to_move = min(total, sum(wanted))
    flow = dict.fromkeys(arcs, Fraction(0))
    while to_move > 0:
        length, before = _shortest_paths(arcs, flow, left, len(wanted))
        ends = [j for j, x in enumerate(wanted) if x > 0 and length[1][j] is not None]
        if not ends:
            return None
        end = min(ends, key=lambda j: length[1][j])
        path, node = [], (1, end)
        while before[node] is not None:
            path.append((before[node], node))
            node = before[node]
        returned = [flow[to[1], origin[1]] for origin, to in path if origin[0] == 1]
        moved = min(left[node[1]], wanted[end], *returned)
        for origin, to in path:
            if origin[0] == 0:
                flow[origin[1], to[1]] += moved
            else:
                flow[to[1], origin[1]] -= moved
        left[node[1]] -= moved
        wanted[end] -= moved
        to_move -= moved
    return sum((flow[arc] * arcs[arc] for arc in arcs), Fraction(0))


def _shortest_paths(arcs, flow, left, columns):
    """From all rows with mass left, through the arcs and back along those that carry a flow."""
    length = [[Fraction(0) if x > 0 else None for x in left], [None] * columns]
    before = {(side, k): None for side in (0, 1) for k in range(len(length[side]))}

    def reach(origin, to, along):
        here, there = length[origin[0]][origin[1]], length[to[0]][to[1]]
        if here is None or (there is not None and there <= here + along):
            return False
        length[to[0]][to[1]] = here + along
        before[to] = origin
        return True

    changed = True
    while changed:
        changed = False
        for (i, j), c in arcs.items():
            changed |= reach((0, i), (1, j), c)
            if flow[i, j] > 0:
                changed |= reach((1, j), (0, i), -c)
    return length, before
