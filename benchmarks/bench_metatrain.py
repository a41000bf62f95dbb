"""Iterations of DeepEMD's meta-training on the CPU, with our matching against OpenCV and a QP layer.

    python benchmarks/bench_metatrain.py

One iteration is an episode, 5-way 1-shot with 15 queries a class: images of 84 x 84 through a Conv-4 to maps of 5 x 5,
375 transport problems of 25 x 25, cross-entropy, gradients, and a step of SGD. The contenders differ in what solves the
problems and what the gradient passes through; the network, the costs and the weights are the same. OpenCV solves one
pair a call, and its gradient is that of the official implementation: through the flows, but not through the weights.
The QP layer takes the problems of an iteration together; it is so slow that it gets fewer queries, and is compared with
ours on as many. "network alone" matches nothing: it compares the means of the maps.

Every contender has a process of its own, in which its loss and gradient are compared with float64 before anything is
timed. Memory is the rise of resident memory, at its highest, during one iteration.
"""

import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import emd_peers
import harness
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fewshot_ext._extras import require
from fewshot_ext.models import FCN, DeepEMD, conv4, cross_reference_weights
from fewshot_ext.models.matching import cosines

WAY, PIXELS = 5, 84
OURS, OPENCV, LAYER, FLOOR = "fewshot_ext", "OpenCV, pair by pair", "QP layer", "network alone"
# Largest relative difference, in norm, of loss and gradient from float64. The layer solves a problem with a quadratic
# term, and OpenCV stops where it is near the optimum in float32.
WRONG = {OURS: 1e-3, OPENCV: 1e-2, LAYER: 1e-1}


@dataclass(frozen=True)
class Case:
    contender: str
    queries: int  # a class


class OpenCVEMD(DeepEMD):
    """The official implementation where it solves with OpenCV: the flow of each pair is a constant."""

    def logits(self, query: Tensor, prototypes: Tensor) -> Tensor:
        similarity, weights = _problems(query, prototypes)
        cost, supply, demand = (x.detach().flatten(0, 2).numpy() for x in (1 - similarity, *weights))
        flows = [emd_peers.opencv_flow(*problem) for problem in zip(cost, supply, demand, strict=True)]
        flow = torch.from_numpy(np.stack(flows)).view_as(similarity)
        return self.temperature / query.shape[2] * (flow * similarity).sum((-2, -1))


class LayerEMD(DeepEMD):
    """The official implementation where it solves with a QP layer: the gradient passes through the flows."""

    def __init__(self, local_features: FCN, regions: int) -> None:
        super().__init__(local_features)
        self._layer = emd_peers.quadratic_layer(regions, regions)

    def logits(self, query: Tensor, prototypes: Tensor) -> Tensor:
        similarity, weights = _problems(query.double(), prototypes.double())
        problems = (x.flatten(0, 2) for x in (1 - similarity, *weights))
        flow = self._layer(*problems).view_as(similarity)
        return self.temperature / query.shape[2] * (flow * similarity).sum((-2, -1))


class MeanMaps(DeepEMD):
    """No matching at all: cosines of the means of the maps."""

    def logits(self, query: Tensor, prototypes: Tensor) -> Tensor:
        query, prototypes = (F.normalize(maps.mean(2), dim=-1) for maps in (query, prototypes))
        return self.temperature * query @ prototypes.mT


def _problems(query: Tensor, prototypes: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    return cosines(query, prototypes), cross_reference_weights(query, prototypes)


class Iteration:
    """One iteration of a contender, in this process."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float32, detach_weights: bool = False) -> None:
        torch.manual_seed(0)
        features = FCN(conv4())
        kinds: dict[str, Callable[[], DeepEMD]] = {
            OURS: partial(DeepEMD, features, detach_weights=detach_weights),
            OPENCV: partial(OpenCVEMD, features),
            LAYER: partial(LayerEMD, features, (PIXELS // 16) ** 2),
            FLOOR: partial(MeanMaps, features),
        }
        self.model = kinds[case.contender]().to(dtype).train()
        label = torch.arange(WAY)
        self.support_target, self.target = label.unsqueeze(0), label.repeat_interleave(case.queries)
        # A pattern for each class, so that there is something to learn.
        pattern = torch.rand(1, WAY, 3, PIXELS, PIXELS)
        self.support = pattern + torch.rand(1, WAY, 3, PIXELS, PIXELS)
        self.query = pattern[:, self.target] + torch.rand(1, len(self.target), 3, PIXELS, PIXELS)
        self.support, self.query = self.support.to(dtype), self.query.to(dtype)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=5e-4, momentum=0.9, nesterov=True, weight_decay=5e-4
        )

    def loss(self) -> Tensor:
        self.optimizer.zero_grad()
        logits = self.model(self.support, self.support_target, self.query, WAY).squeeze(0)
        loss = F.cross_entropy(logits, self.target)
        loss.backward()
        return loss.detach()

    def __call__(self) -> None:
        self.loss()
        self.optimizer.step()

    def gradient(self) -> Tensor:
        return torch.cat([parameter.grad.flatten() for parameter in self.model.parameters()]).double()


def relative_error(case: Case) -> float:
    """The larger of the loss's and the gradient's, against ours in float64 with the same gradient."""
    exact = Iteration(replace(case, contender=OURS), torch.float64, detach_weights=case.contender == OPENCV)
    found = Iteration(case)
    losses = exact.loss(), found.loss()
    pairs = (losses, (exact.gradient(), found.gradient()))
    return max(float((got.double() - right).norm() / right.norm()) for right, got in pairs)


_iterations: dict[Case, Iteration] = {}  # of a contender's process


def _prepare(threads: int, case: Case) -> float:
    torch.set_num_threads(threads)
    error = 0.0 if case.contender == FLOOR else relative_error(case)
    _iterations[case] = Iteration(case)
    return error


def _run(case: Case) -> None:
    _iterations[case]()


@contextmanager
def processes(cases: list[Case]) -> Iterator[dict[Case, ProcessPoolExecutor]]:
    context = multiprocessing.get_context("spawn")
    started = {case: ProcessPoolExecutor(1, context) for case in cases}
    try:
        yield started
    finally:
        for process in started.values():
            process.shutdown()


HEADER = ["queries a class", "contender", "iterations a second", f"times {OURS}", "memory", "relative error"]


def main() -> None:
    options = harness.parser(__doc__.splitlines()[0], results="metatrain_cpu")
    options.add_argument("--queries", type=int, default=15, help="queries a class")
    options.add_argument("--layer_queries", type=int, default=1, help="queries a class for the QP layer; 0 for none")
    options = options.parse_args()
    for name, least in (("queries", 1), ("layer_queries", 0)):
        if getattr(options, name) < least:
            sys.exit(f"--{name}: expected at least {least}, got {getattr(options, name)}")
    require("bench", "cv2", "cvxpylayers")
    groups = [[Case(name, options.queries) for name in (OURS, OPENCV, FLOOR)]]
    if options.layer_queries:
        groups.append([Case(name, options.layer_queries) for name in (OURS, LAYER)])
    rows, table = [], []
    torch.set_num_threads(options.threads)
    machine = harness.machine("opencv-python-headless", "cvxpylayers")
    for cases in groups:
        with processes(cases) as started:
            errors = {case: started[case].submit(_prepare, options.threads, case).result() for case in cases}
            wrong = {case: error for case, error in errors.items() if not error <= WRONG.get(case.contender, 0)}
            if wrong:
                sys.exit(f"wrong, so that there is nothing to time: {wrong}")
            calls = {case: lambda case=case: started[case].submit(_run, case).result() for case in cases}
            timings = harness.interleaved(calls, seconds=options.seconds)
        ours = timings[cases[0]].p50
        for case in cases:
            timing, memory = timings[case], harness.peak_memory(Iteration, case)
            relation, peak = f"{timing.p50 / ours:.2f}", "" if memory is None else f"{memory / 2**20:.0f}"
            error = "" if case.contender == FLOOR else f"{errors[case]:.0e}"
            rows.append(
                {
                    "way": WAY,
                    "queries": case.queries,
                    "contender": case.contender,
                    **{f"{part}_ms": f"{getattr(timing, part):.3f}" for part in ("p20", "p50", "p80")},
                    "turns": timing.turns,
                    "iterations_per_second": f"{1e3 / timing.p50:.3f}",
                    "times_fewshot_ext": relation,
                    "memory_mib": peak,
                    "relative_error": error,
                    **machine,
                }
            )
            rate = harness.significant(1e3 / timing.p50)
            table.append([case.queries, case.contender, rate, relation, peak, error])
    text = (
        f"`{harness.command()}` on {machine['device']}, threads: {machine['threads']}, torch {machine['torch']}; "
        f"{WAY}-way 1-shot, Conv-4 at {PIXELS} x {PIXELS}, maps of 5 x 5, float32; median of the time an iteration, "
        "peak of its memory in MiB. The QP layer gets fewer queries, because it is slow; its line is to be read "
        "against the one above it.\n\n" + harness.markdown_table(HEADER, table)
    )
    harness.report(text, rows, options.save)


if __name__ == "__main__":
    main()
