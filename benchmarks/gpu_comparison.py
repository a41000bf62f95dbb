"""One problem, several contenders: each is checked against float64, measured and captured, then all are timed."""

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import gpu_timing
import harness
from gpu_worker import one_line
from torch import Tensor

FIRST_COMPILE_SECONDS = 45.0  # what torch.compile may take until it has shown what it takes


class Inputs(Protocol):
    """Inputs of one call, of which a comparison has several sets with different values."""

    def run(self, function: Callable) -> tuple[Tensor, ...]:
        """Forward + backward; results and gradients in fresh memory."""

    def exact(self, variant: object) -> tuple[Tensor, ...]:
        """The same in float64."""


@dataclass(frozen=True)
class Contender:
    name: str
    function: Callable | None = None
    missing: str = ""  # why there is no function
    variant: object = None  # which problem it solves, for Inputs.exact
    kernel: str = ""  # what fails where it fails, see gpu_worker.Bench.begin
    environment: Mapping[str, str] = field(default_factory=dict)
    waits: str = ""  # why no CUDA graph can hold it
    compiles: bool = False

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        before = {name: os.environ.get(name) for name in self.environment}
        os.environ.update(self.environment)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


@dataclass
class Outcome:
    """What is known of a contender."""

    contender: Contender
    notes: list[str] = field(default_factory=list)
    error: float | None = None
    memory: int | None = None  # bytes at the peak of a call, beyond its inputs and results
    calls: list[gpu_timing.Call] = field(default_factory=list)
    graph: gpu_timing.Call | None = None
    timings: dict[str, harness.Timing] = field(default_factory=dict)  # by kind, see gpu_timing

    @property
    def name(self) -> str:
        return self.contender.name


class Comparison:
    """
    Args:
        bench: of gpu_worker.
        sets: inputs to rotate over; the last one is checked.
        tolerance: largest relative error of any result, in norm.
    """

    longest_compile = 0.0

    def __init__(self, bench, sets: Sequence[Inputs], tolerance: float) -> None:
        self.bench, self.device = bench, bench.device
        self.sets, self.checked, self.tolerance = sets, sets[-1], tolerance
        self.exact: dict[object, tuple[Tensor, ...]] = {}

    def prepare(self, contender: Contender) -> Outcome:
        """Only what is right will be timed."""
        outcome = Outcome(contender)
        reason = contender.missing or self.bench.left_out(contender.name, "check", contender.kernel)
        if not reason and contender.compiles and not self.time_to_compile():
            reason = "not compiled: no time left"
        if reason:
            outcome.notes.append(reason)
            return outcome
        if contender.variant not in self.exact:
            self.exact[contender.variant] = self.checked.exact(contender.variant)
        self.begin("check", contender)
        try:
            with contender.active():
                self.check(outcome)
        except Exception as error:
            self.bench.survive(error)
            outcome.notes.append(one_line(error))
        return outcome

    def time_to_compile(self) -> bool:
        return self.bench.remaining() > 30 + (Comparison.longest_compile or FIRST_COMPILE_SECONDS)

    def begin(self, phase: str, contender: Contender) -> None:
        patience = 120.0 if contender.compiles else 60.0 if contender.kernel else 90.0  # Triton compiles too
        self.bench.begin(phase, contender.name, contender.kernel or contender.name, patience)

    def check(self, outcome: Outcome) -> None:
        contender, run = outcome.contender, partial(self.checked.run, outcome.contender.function)
        before = self.bench.remaining()
        results = run()
        self.device.synchronize()
        if contender.compiles:
            Comparison.longest_compile = max(Comparison.longest_compile, before - self.bench.remaining())
        for result in results:
            result.fill_(math.nan)
        del result, results
        results = run()  # most likely into the same memory, where what is not written shows now
        outcome.error = self.largest_error(contender, results)
        if not outcome.error <= self.tolerance:
            outcome.notes.append(f"wrong, not timed: allowed is {self.tolerance:.0e}")
            return
        returned = sum(result.nbytes for result in results)
        del results
        peak = self.device.peak_memory(run)
        if peak is not None:
            outcome.memory = max(peak - returned, 0)
        if "graph" in self.device.kinds:
            self.capture(outcome)
        if not contender.environment:  # to set it would take as long as a part of the call
            outcome.calls = [partial(inputs.run, contender.function) for inputs in self.sets]

    def largest_error(self, contender: Contender, results: tuple[Tensor, ...]) -> float:
        errors = [
            float((result.double() - exact).norm() / exact.norm())
            for result, exact in zip(results, self.exact[contender.variant], strict=True)
        ]
        return math.nan if any(map(math.isnan, errors)) else max(errors)

    def capture(self, outcome: Outcome) -> None:
        contender = outcome.contender
        reason = contender.waits or self.bench.left_out(contender.name, "capture", contender.kernel)
        if reason:
            outcome.notes.append(f"no graph: {reason}")
            return
        self.begin("capture", contender)
        results: tuple[Tensor, ...] = ()

        def call(inputs: Inputs) -> None:
            nonlocal results
            results = ()  # before the next call, which then gets the same memory as in training
            results = inputs.run(contender.function)

        graph = self.device.capture([partial(call, inputs) for inputs in self.sets])
        for result in results:
            result.fill_(math.nan)
        graph()
        self.device.synchronize()
        error = self.largest_error(contender, results)
        if error <= self.tolerance:
            outcome.graph = graph
        else:
            outcome.notes.append(f"no graph: its replay is wrong by {error:.1e}")

    def time(self, outcomes: list[Outcome], others: dict[str, list[gpu_timing.Call]]) -> dict[str, harness.Timing]:
        """Fills in the outcomes' timings; returns those of ``others``, which take part in the turns.

        Each of the others makes one call for each set, and is timed on a graph where there are graphs.
        """
        settings = {"seconds": self.bench.seconds, "turns": 3 if self.bench.quick else 9}
        calls = {outcome.name: outcome.calls for outcome in outcomes if outcome.calls}
        found = {}
        if "graph" in self.device.kinds:
            self.bench.begin("graph timing", patience=60 + 10 * self.bench.seconds)
            graphs = {outcome.name: outcome.graph for outcome in outcomes if outcome.graph}
            graphs.update({name: self.device.capture(others[name]) for name in others})
            found["graph"] = gpu_timing.time_graphs(self.device, graphs, len(self.sets), **settings)
        else:
            calls.update(others)
        self.bench.begin("stream timing", patience=60 + 10 * self.bench.seconds)
        found["stream"] = gpu_timing.time_calls(self.device, calls, **settings)
        for outcome in outcomes:
            name = outcome.name
            outcome.timings = {kind: timings[name] for kind, timings in found.items() if name in timings}
        return {name: next(iter(found.values()))[name] for name in others}
