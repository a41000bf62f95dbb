"""Earth Mover's Distance on the CPU, against POT, torchmatch, OpenCV, SciPy, HiGHS and a quadratic-program layer.

    python benchmarks/bench_emd.py

A batch is one episode, 375 problems in float32, as networks make them. The others get them in float64. The first values
of every contender are compared with those of HiGHS, and an error stands beside the time where it is no rounding:
Sinkhorn's iterations approach the optimum, and some versions of OpenCV end after 500 pivots, optimal or not. Contenders
take turns; where one is slow a call of it solves fewer problems. Figures are microseconds a problem; pivots are those
of fewshot_ext, on average. Equal masses are a problem of assignment, which SciPy solves; of partial problems, whose
masses differ, POT has a solver of its own. A second table has batches from 1 to 100,000, and a plot the growth of the
times with the number of points.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import emd_peers
import harness
import torch
from emd_problems import EPISODE, float32_batch
from torch import Tensor

import fewshot_ext
from fewshot_ext._extras import is_installed, require

POINTS = (9, 25, 49, 100, 196)
BATCHES = (1, 10, 100, 1000, 10_000, 100_000)
BATCH_POINTS = 25
JUDGED = 5  # problems of a batch that are compared with HiGHS
WRONG = 1e-4  # relative error of a value beyond which it is told
LAYER_POINTS = 25  # beyond, a call of the quadratic layer takes seconds


@dataclass(frozen=True)
class Peer:
    module: str
    solve: Callable
    batched: bool = False


POT, SINKHORN, LAYER = "POT", "POT solve_batch", "QP layer, forward + backward"
GENERAL = {
    POT: Peer("ot", emd_peers.pot),
    SINKHORN: Peer("ot", emd_peers.pot_batch, batched=True),
    "torchmatch": Peer("torchmatch", emd_peers.torchmatch_batch, batched=True),
    "OpenCV": Peer("cv2", emd_peers.opencv),
    "HiGHS": Peer("scipy", emd_peers.highs),
}
KINDS = {
    "deepemd": GENERAL,
    "uniform": GENERAL,
    "assignment": {**GENERAL, "SciPy assignment": Peer("scipy", emd_peers.scipy_assignment)},
    "partial": {POT: Peer("ot", emd_peers.pot_partial), "HiGHS": Peer("scipy", emd_peers.highs_partial)},
}
PEERS = list(dict.fromkeys(name for peers in KINDS.values() for name in peers))


def ours(threads: int, backward: bool = False) -> str:
    return f"fewshot_ext{', forward + backward' if backward else ''}, {threads} thread{'s' if threads > 1 else ''}"


@dataclass(frozen=True)
class Contender:
    problems: int  # of a call
    call: Callable[[], Sequence[float]]  # returns their values


class Batch:
    def __init__(self, kind: str, points: int, problems: int) -> None:
        self.points, self.problems = points, problems
        self.peers, self.partial = KINDS[kind], kind == "partial"
        self.tensors = float32_batch(kind, points, problems)
        first = (tensor[:EPISODE].double().numpy() for tensor in self.tensors)
        self.arrays = list(zip(*first, strict=True))

    def ours(self, threads: int, backward: bool = False) -> Contender:
        def call() -> Tensor:
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            leaves = [tensor.detach().requires_grad_(backward) for tensor in self.tensors]
            value = fewshot_ext.emd(*leaves, partial=self.partial).value
            if backward:
                value.sum().backward()
            return value.detach()

        return Contender(self.problems, call)

    def pivots(self) -> float:
        """How often the solver of fewshot_ext changes its basis, on average."""
        *_, pivots = torch.ops.fewshot_ext.emd(*(tensor[:EPISODE] for tensor in self.tensors), self.partial)
        return pivots.double().mean().item()

    def exact(self) -> Tensor:
        solve = self.peers["HiGHS"].solve
        return torch.tensor([solve(*one) for one in self.arrays[:JUDGED]], dtype=torch.float64)

    def peer(self, peer: Peer, threads: int, seconds: float) -> Contender:
        if not peer.batched:
            problems = affordable(partial(peer.solve, *self.arrays[0]), len(self.arrays), seconds)
            return Contender(problems, lambda: [peer.solve(*one) for one in self.arrays[:problems]])

        def call(problems: int) -> Tensor:
            torch.set_num_threads(1)
            try:
                return peer.solve(cost[:problems], *(side[:problems] for side in shares)) * mass[:problems]
            finally:
                torch.set_num_threads(threads)

        cost, *sides = (tensor.double() for tensor in self.tensors)
        mass, shares = sides[0].sum(-1), [side / side.sum(-1, keepdim=True) for side in sides]
        problems = affordable(partial(call, 1), self.problems, seconds)
        return Contender(problems, partial(call, problems))

    def layer(self, seconds: float) -> Contender:
        layer = emd_peers.quadratic_layer(self.points, self.points)

        def step(index: int) -> float:
            cost, *marginals = (tensor[index].double().requires_grad_() for tensor in self.tensors)
            value = (layer(cost, *marginals) * cost).sum()
            value.backward()
            return value.item()

        problems = affordable(partial(step, 0), self.problems, seconds)
        return Contender(problems, lambda: [step(index) for index in range(problems)])


def affordable(call: Callable[[], object], most: int, seconds: float) -> int:
    """How many of such calls take about so long."""
    call()
    begin = time.perf_counter()
    call()
    return max(1, min(most, int(seconds / (time.perf_counter() - begin))))


def relative_error(values: Sequence[float], exact: Tensor) -> float:
    found = torch.as_tensor(values, dtype=torch.float64)[: len(exact)]
    return float(((found - exact[: len(found)]).abs() / exact[: len(found)].abs()).max())


def contenders(batch: Batch, threads: int, seconds: float) -> dict[str, Contender]:
    named = {ours(count): batch.ours(count) for count in sorted({1, threads})}
    named[ours(1, backward=True)] = batch.ours(1, backward=True)
    for name, peer in batch.peers.items():
        if is_installed(peer.module):
            named[name] = batch.peer(peer, threads, seconds)
    if is_installed("cvxpylayers") and batch.points <= LAYER_POINTS and not batch.partial:
        named[LAYER] = batch.layer(seconds)
    return named


@dataclass(frozen=True)
class Found:
    timing: harness.Timing  # microseconds a problem
    error: float

    def __str__(self) -> str:
        error = f" (off by {100 * self.error:.2g} %)" if self.error > WRONG else ""
        return harness.significant(self.timing.p50) + error


def measure(batch: Batch, named: dict[str, Contender], seconds: float) -> dict[str, Found]:
    exact = batch.exact()
    errors = {name: relative_error(contender.call(), exact) for name, contender in named.items()}
    timings = harness.interleaved({name: contender.call for name, contender in named.items()}, seconds=seconds)
    found = {}
    for name, timing in timings.items():
        each = [1e3 * part / named[name].problems for part in (timing.p20, timing.p50, timing.p80)]
        found[name] = Found(harness.Timing(*each, timing.turns), errors[name])
        if name.startswith("fewshot_ext") and errors[name] > WRONG:
            raise SystemExit(f"{name} is wrong by {errors[name]:.1e} at n = {batch.points}")
    return found


def plot(path: Path, rows: list[dict[str, object]]) -> None:
    """Microseconds a problem over the number of points, both on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 9), sharex=True, sharey=True, layout="constrained")
    color = {name: f"C{index}" for index, name in enumerate(dict.fromkeys(row["contender"] for row in rows))}
    for axis, kind in zip(axes.flat, KINDS, strict=True):
        mine = [row for row in rows if row["kind"] == kind and row["problems"] == EPISODE]
        for name in dict.fromkeys(row["contender"] for row in mine):
            points, p20, p50, p80 = zip(
                *(
                    (row["points"], *(float(row[f"{quantile}_us"]) for quantile in ("p20", "p50", "p80")))
                    for row in mine
                    if row["contender"] == name
                ),
                strict=True,
            )
            axis.plot(points, p50, marker="o", markersize=4, color=color[name], label=name)
            axis.fill_between(points, p20, p80, color=color[name], alpha=0.2)
        axis.set(xscale="log", yscale="log", title=f"{kind} data", xlabel="points on each side")
        axis.set_xticks(POINTS, POINTS)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.supylabel("microseconds a problem")
    # The third kind has every contender.
    figure.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def cells(found: dict[str, Found], names: Sequence[str]) -> list[str]:
    return [str(found.get(name, "")) for name in names]


def against(found: dict[str, Found], peer: str, name: str) -> str:
    return f"{found[peer].timing.p50 / found[name].timing.p50:.1f}" if peer in found and name in found else ""


def main() -> None:
    options = harness.parser(__doc__.splitlines()[0], results="emd_cpu").parse_args()
    require("bench", "scipy", "matplotlib")
    modules = {name: peer.module for peers in KINDS.values() for name, peer in peers.items()}
    for name, module in {**modules, LAYER: "cvxpylayers"}.items():
        if not is_installed(module):
            print(f"{name} is not installed: left out")
    threads = options.threads
    torch.set_num_threads(threads)
    machine = harness.machine("POT", "torchmatch", "opencv-python-headless", "scipy", "cvxpylayers")
    rows: list[dict[str, object]] = []

    def run(
        kind: str, points: int, problems: int, named: Callable[[Batch], dict[str, Contender]]
    ) -> tuple[dict[str, Found], float]:
        batch = Batch(kind, points, problems)
        found = measure(batch, named(batch), options.seconds)
        for name, one in found.items():
            row = {"kind": kind, "points": points, "problems": problems, "contender": name}
            row.update({f"{part}_us": f"{getattr(one.timing, part):.4f}" for part in ("p20", "p50", "p80")})
            row["pivots"] = f"{batch.pivots():.1f}" if name.startswith("fewshot_ext") else ""
            row.update(turns=one.timing.turns, relative_error=f"{one.error:.1e}", **machine)
            # Peers use one thread.
            row["threads"] = threads if name == ours(threads) else 1
            rows.append(row)
        return found, batch.pivots()

    one, several, backward = ours(1), ours(threads), ours(1, backward=True)
    columns = list(dict.fromkeys((*PEERS, one, several)))
    header = [
        "data",
        "n = m",
        "pivots",
        *columns,
        "faster than POT, 1 thread",
        backward,
        LAYER,
        "faster than the layer",
    ]
    table = []
    for kind in KINDS:
        for points in POINTS:
            found, pivots = run(kind, points, EPISODE, lambda batch: contenders(batch, threads, options.seconds / 40))
            table.append([kind, points, harness.significant(pivots), *cells(found, columns), against(found, POT, one)])
            table[-1] += [*cells(found, (backward, LAYER)), against(found, LAYER, backward)]
            print(harness.markdown_table(header, table[-1:]), flush=True)

    batch_kind = next(iter(KINDS))
    batch_columns = list(dict.fromkeys((POT, "torchmatch", one, several)))
    batch_header = ["batch", *batch_columns, f"faster than POT, {threads} threads"]
    batch_table = []
    for problems in BATCHES:

        def of_batch(batch: Batch) -> dict[str, Contender]:
            named = contenders(batch, threads, options.seconds / 40)
            return {name: named[name] for name in batch_columns if name in named}

        found, _ = run(batch_kind, BATCH_POINTS, problems, of_batch)
        batch_table.append([f"{problems:,}", *cells(found, batch_columns), against(found, POT, several)])
        print(harness.markdown_table(batch_header, batch_table[-1:]), flush=True)

    peers = ", ".join(
        f"{package} {machine[package]}" for package in ("POT", "torchmatch", "opencv-python-headless", "scipy")
    )
    text = (
        f"`{harness.command()}` on {machine['device']}, torch {machine['torch']}, {peers}; float32, "
        f"{EPISODE} problems, median in microseconds a problem. An error above {100 * WRONG:g} % of the value stands "
        "beside the time.\n\n"
        f"{harness.markdown_table(header, table)}\n"
        f"Batches of {batch_kind} data with n = m = {BATCH_POINTS}:\n\n"
        f"{harness.markdown_table(batch_header, batch_table)}"
    )
    harness.report(text, rows, options.save)
    if options.save is not None:
        plot(options.save.with_suffix(".png"), rows)


if __name__ == "__main__":
    main()
