"""Earth Mover's Distance on a GPU, against its host, POT and torch-linear-assignment; run by gpu_report.py.

No other package solves a batch of these problems exactly on a GPU: POT has an approximate solver there, and
torch-linear-assignment one for equal masses. Peers on the host get their problems from the GPU's memory and bring their
results back there, as a training step would need it.
"""

from collections.abc import Callable

import gpu_comparison
import torch
from emd_peers import SINKHORN_REG, pot_batch_flow, pot_flow, torch_linear_assignment_flow
from emd_problems import EPISODE, float32_batch
from gpu_comparison import Comparison, Contender, Goal, copy_ms, floor_text, number, peer, within
from torch import Tensor

import fewshot_ext

OURS, FORWARD = "fewshot_ext", "fewshot_ext, forward alone"
HOST, POT = "fewshot_ext on the host", "POT on the host, forward alone"
POT_BATCH = f"POT solve_batch, reg={SINKHORN_REG:g}, forward alone"
ASSIGNMENT = "torch-linear-assignment, forward alone"
TOLERANCE = 1e-5  # largest relative error, in norm, of values and flows
MOST_FOR_POT = 1000  # problems, beyond which a call takes seconds
MOST_ON_CPU = 10_000  # costs, beyond which a call of solve_batch takes seconds there

# Data, problems, points on each side.
EPISODE_OF_25, BATCH_OF_25 = f"deepemd,{EPISODE},25", "deepemd,100000,25"
JOBS = (
    EPISODE_OF_25,
    BATCH_OF_25,
    *(f"deepemd,{EPISODE},{points}" for points in (9, 49, 100, 196)),
    *(f"{kind},{EPISODE},{points}" for kind in ("assignment", "uniform") for points in (25, 100)),
)
Solver = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def jobs(quick: bool) -> list[str]:
    return [EPISODE_OF_25, f"uniform,{EPISODE},9", f"deepemd,{EPISODE},49", "assignment,9,9"] if quick else list(JOBS)


def parse(job: str) -> tuple[str, int, int]:
    kind, problems, points = job.split(",")
    return kind, int(problems), int(points)


def title(job: str) -> str:
    kind, problems, points = parse(job)
    return f"{problems:,} problems of {points} x {points}, {kind} data"


class Inputs:
    def __init__(self, job: str, device: torch.device, seed: int) -> None:
        kind, problems, points = parse(job)
        self.problem = [tensor.to(device) for tensor in float32_batch(kind, points, problems, seed)]

    def run(self, solver: Solver) -> tuple[Tensor, Tensor]:
        return solver(*self.problem)

    def exact(self, variant: object) -> tuple[Tensor, Tensor]:
        """Values and flows, proved to be optimal by their certificates."""
        result = fewshot_ext.emd(*(tensor.cpu().double() for tensor in self.problem), check=True)
        return tuple(part.to(self.problem[0].device) for part in result[:2])


def ours(cost: Tensor, supply: Tensor, demand: Tensor) -> tuple[Tensor, Tensor]:
    """Values, and the gradients of their sum to the costs, which are the flows. All inputs require gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in (cost, supply, demand)]
    value = fewshot_ext.emd(*leaves).value
    value.sum().backward()
    return value.detach(), leaves[0].grad


def forward(cost: Tensor, supply: Tensor, demand: Tensor) -> tuple[Tensor, Tensor]:
    return fewshot_ext.emd(cost, supply, demand)[:2]


def on_host(cost: Tensor, supply: Tensor, demand: Tensor) -> tuple[Tensor, Tensor]:
    results = ours(*(tensor.cpu() for tensor in (cost, supply, demand)))
    return tuple(result.to(cost.device) for result in results)


def pot(cost: Tensor, supply: Tensor, demand: Tensor) -> tuple[Tensor, Tensor]:
    arrays = (tensor.cpu().double().numpy() for tensor in (cost, supply, demand))
    flow = torch.stack([torch.from_numpy(pot_flow(*one)) for one in zip(*arrays, strict=True)])
    return with_values(cost, flow.to(cost.device, cost.dtype))


def with_values(cost: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    return (cost * flow).sum((1, 2)), flow


def pot_batch(cost: Tensor, supply: Tensor, demand: Tensor) -> tuple[Tensor, Tensor]:
    mass = supply.sum(1, keepdim=True)
    return with_values(cost, pot_batch_flow(cost, supply / mass, demand / mass) * mass.unsqueeze(2))


def assignment(cost: Tensor, supply: Tensor, demand: Tensor) -> tuple[Tensor, Tensor]:
    return with_values(cost, torch_linear_assignment_flow(cost, supply, demand))


def contenders(job: str, device: str) -> list[Contender]:
    """The operator's own kernels first: if one hangs, the report has the reason before the time is spent."""
    kind, problems, points = parse(job)
    found = [Contender(OURS, ours), Contender(FORWARD, forward)]
    waits = "it brings the problems to the host"
    if device == "cuda":
        found.append(Contender(HOST, on_host, waits=waits))
    slow = "" if problems <= MOST_FOR_POT else f"one call takes seconds beyond {MOST_FOR_POT} problems"
    found.append(peer(POT, "ot", lambda module: pot, unless=slow, waits=waits))
    if device == "cpu" and problems * points**2 > MOST_ON_CPU:
        slow = f"one call takes seconds beyond {MOST_ON_CPU} costs on a CPU"
    waits = "it looks at its error on the host"
    found.append(peer(POT_BATCH, "ot", lambda module: pot_batch, unless=slow, waits=waits, inexact=True))
    unless = "" if kind == "assignment" else "it takes equal masses alone"
    waits = "it checks its problems and results on the host"
    found.append(peer(ASSIGNMENT, "torch_linear_assignment", lambda module: assignment, unless=unless, waits=waits))
    return found


def bytes_moved(job: str) -> int:
    """Least traffic of the forward pass: problems read once, values, flows, duals, trees and pivots written once."""
    _, problems, points = parse(job)
    read = points * points + 2 * points
    written = 1 + points * points + 2 * points + (2 * points - 1) + 1
    return 4 * problems * (read + written)


def measure(job: str, bench) -> list[dict]:
    kind, problems, points = parse(job)
    count = gpu_comparison.input_sets(bench.device, bytes_moved(job))
    sets = [Inputs(job, bench.device.device, seed) for seed in range(count)]
    comparison = Comparison(bench, sets, TOLERANCE)
    outcomes = [comparison.prepare(contender) for contender in contenders(job, bench.device.name)]
    comparison.time(outcomes, {})
    *_, pivots = torch.ops.fewshot_ext.emd(*sets[0].problem)
    common = {
        "case": title(job),
        "data": kind,
        "problems": problems,
        "points": points,
        "pivots": f"{pivots.double().mean().item():.1f}",
        "input_sets": count,
    }
    return list(gpu_comparison.rows_of(outcomes, OURS, common, {"floor_ms": copy_ms(bytes_moved(job), bench.rates)}))


TEXT = f"""Cost, supply and demand in float32; medians of one forward + backward pass of all values, unless the
line says otherwise. {gpu_comparison.KINDS_TEXT}
The floor is the least traffic of the forward pass. Memory is the peak beyond inputs and results; the error is the
larger of values and flows, in norm, against solutions in float64 that were proved optimal.

"""


def caption(rows: list[dict]) -> str:
    row = rows[0]
    text = f"{row['pivots']} pivots a problem; floor {floor_text(row)}."
    rate = rate_of(rows, row["case"], int(row["problems"]))
    return text if rate is None else f"{text} {rate / 1e6:.2f} million problems a second, forward alone."


def rate_of(rows: list[dict], case: str, problems: int) -> float | None:
    """Problems a second of the forward pass, on the device's time."""
    time = number(rows, case, FORWARD, "graph")
    return None if time is None else 1e3 * problems / time


def goals(rows: list[dict]) -> list[Goal]:
    """For an H100."""
    episode, batch = title(EPISODE_OF_25), title(BATCH_OF_25)
    rate = rate_of(rows, batch, parse(BATCH_OF_25)[1])
    goal = f"{batch}: forward of 5 million problems a second in a CUDA graph"
    return [
        *(within(rows, episode, FORWARD, limit, "us", "forward in at most") for limit in (60, 35)),
        Goal(goal, "", None) if rate is None else Goal(goal, f"{rate / 1e6:.2f} million a second", rate >= 5e6),
    ]
