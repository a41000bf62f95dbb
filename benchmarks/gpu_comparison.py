"""What the operators of the GPU report share: devices, timing, the contenders of one problem, rows, tables and goals.

"graph" is the device's time: calls are captured into one CUDA graph, and what the host takes to launch them is gone.
"stream" is what a plain call costs between idle and idle, the host included. "host" is the part of it after which the
call returns, while the device may still be at work: as fast as a training loop can go whose kernels are small.
"""

import importlib
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, NamedTuple
from unittest import mock

import harness
import torch
from harness import Timing, significant
from torch import Tensor

Call = Callable[[], object]

# Names of the report -> dtype of the tensors, precision of float32 products.
DTYPES = {
    "float32": (torch.float32, "highest"),
    "bfloat16": (torch.bfloat16, "highest"),
    "tf32": (torch.float32, "high"),
    "float16": (torch.float16, "highest"),
}
MOST_INPUT_SETS = 256
MOST_CALLS_A_TURN, MOST_MS_A_TURN = 32, 100.0  # on a stream
PATIENCE = 120.0  # seconds for one call, of which those that compile take longest
FIRST_COMPILE_SECONDS = 45.0  # what compiling may take until it has shown what it takes


class CaptureError(Exception):
    """Leaves torch's allocator and its current stream in the middle of a capture: the process must not go on."""


class Cuda:
    name, has_graphs = "cuda", True

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.properties = torch.cuda.get_device_properties(self.device)
        self.memory = self.properties.total_memory
        self.cache_bytes = getattr(self.properties, "L2_cache_size", 0) or 64 << 20
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._side = torch.cuda.Stream()

    def elapsed(self, call: Call) -> float:
        """Milliseconds on the stream, from idle: work that is queued already would hide the host's."""
        torch.cuda.synchronize()
        self._begin.record()
        call()
        self._end.record()
        self._end.synchronize()
        return self._begin.elapsed_time(self._end)

    def capture(self, calls: Sequence[Call]) -> Call:
        """One launch that makes all the calls; raises CaptureError."""
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            for call in calls[:2]:
                call()
        torch.cuda.current_stream().wait_stream(self._side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for call in calls:
                    call()
        except Exception as error:
            raise CaptureError(f"cannot be captured: {error}") from error
        return graph.replay

    def peak_memory(self, call: Call) -> int:
        """Bytes by which allocated memory rises at its highest."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def is_healthy(self) -> bool:
        try:
            return float(torch.ones(2, device=self.device).sum()) == 2.0
        except Exception:
            return False


class RehearsalOnCpu:
    """Enough of a device to run the report where there is none."""

    name, has_graphs = "cpu", False
    device, memory, cache_bytes = torch.device("cpu"), math.inf, 1 << 20
    elapsed = staticmethod(partial(harness.wall_clock, at_least=0))

    def peak_memory(self, call: Call) -> None:
        call()

    def is_healthy(self) -> bool:
        return True


DEVICES = {"cuda": Cuda, "cpu": RehearsalOnCpu}


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def generator(device) -> torch.Generator:
    """One of the benchmark's own: a capture takes hold of torch's default generator."""
    return torch.Generator(device.device).manual_seed(0)


def input_sets(device, bytes_of_one: int) -> int:
    """How many sets of inputs to go through in rotation, so that none is in the cache when its turn comes."""
    return min(max(2, math.ceil(2 * device.cache_bytes / bytes_of_one)), MOST_INPUT_SETS)


def copy_ms(nbytes: int, rates: Mapping[str, float]) -> float:
    """At the rate of a large copy; 0 where it was not measured."""
    return nbytes / rates["copy_gb_per_s"] / 1e6 if rates else 0.0


class Batch:
    """Several plain calls a turn, in rotation, and for how many milliseconds each turn kept the host busy."""

    def __init__(self, device, calls: Sequence[Call]) -> None:
        fit = int(MOST_MS_A_TURN / max(device.elapsed(calls[0]), 1e-3))
        self.size = max(1, min(len(calls), MOST_CALLS_A_TURN, fit))
        self.host: list[float] = []
        self._calls = itertools.cycle(calls)

    def __call__(self) -> None:
        begin = time.perf_counter()
        for call in itertools.islice(self._calls, self.size):
            call()
        self.host.append(1e3 * (time.perf_counter() - begin))


@dataclass(frozen=True)
class Contender:
    name: str
    function: Callable | None = None
    missing: str = ""  # why there is no function
    variant: object = None  # which problem it solves
    environment: Mapping[str, str] = field(default_factory=dict)
    waits: str = ""  # why no CUDA graph can hold it
    compiles: bool = False
    inexact: bool = False  # timed whatever its error, which stands beside


def peer(name: str, package: str, function: Callable, *, unless: str = "", **facts) -> Contender:
    """The contender that ``function`` makes of the package, unless there is a reason not to ask it for this problem."""
    if unless:
        return Contender(name, missing=unless)
    try:
        return Contender(name, function(importlib.import_module(package)), **facts)
    except Exception as error:  # any there is, where a package does not fit the torch or the Triton it meets
        return Contender(name, missing=one_line(error))


@dataclass
class Outcome:
    """What is known of a contender."""

    contender: Contender
    notes: list[str] = field(default_factory=list)
    error: float | None = None
    memory: int | None = None  # bytes at the peak of a call, beyond its inputs and results
    calls: list[Call] = field(default_factory=list)
    graph: Call | None = None
    timings: dict[str, Timing] = field(default_factory=dict)  # by kind


class Comparison:
    """One problem, several contenders: each is checked against float64, measured and captured, then all are timed.

    Args:
        bench: of gpu_worker.
        sets: inputs with different values to rotate over; the last one is checked. ``run(function)`` gives results and
            gradients in fresh memory, ``exact(variant)`` the same in float64.
        tolerance: largest relative error of any result, in norm.
    """

    longest_compile: ClassVar[dict[str, float]] = {}

    def __init__(self, bench, sets: Sequence, tolerance: float) -> None:
        self.bench, self.device = bench, bench.device
        self.sets, self.checked, self.tolerance = sets, sets[-1], tolerance
        self.exact: dict[object, tuple[Tensor, ...]] = {}

    def prepare(self, contender: Contender) -> Outcome:
        """Only what is right will be timed."""
        outcome = Outcome(contender)
        reason = contender.missing or self.bench.left_out(contender.name, "check")
        needed = 30 + self.longest_compile.get(contender.name, FIRST_COMPILE_SECONDS)
        if not reason and contender.compiles and self.bench.remaining() <= needed:
            reason = "not compiled: no time left"
        if reason:
            outcome.notes.append(reason)
            return outcome
        if contender.variant not in self.exact:
            self.exact[contender.variant] = self.checked.exact(contender.variant)
        # One that compiles for too long leaves time for another worker to do without it.
        patience = min(PATIENCE, self.bench.remaining() / 2) if contender.compiles else PATIENCE
        self.bench.begin("check", contender.name, patience=patience)
        try:
            with mock.patch.dict(os.environ, contender.environment):
                self.check(outcome)
        except Exception as error:
            self.bench.survive(error)
            outcome.notes.append(one_line(error))
        return outcome

    def check(self, outcome: Outcome) -> None:
        contender, run = outcome.contender, partial(self.checked.run, outcome.contender.function)
        before = self.bench.remaining()
        results = run()
        if contender.compiles:
            longest = max(self.longest_compile.get(contender.name, 0.0), before - self.bench.remaining())
            self.longest_compile[contender.name] = longest
        for result in results:
            result.fill_(math.nan)
        del result, results
        results = run()  # most likely into the same memory, where what is not written shows now
        outcome.error = self.largest_error(contender, results)
        if not outcome.error <= self.allowed(contender):
            outcome.notes.append(f"wrong, not timed: allowed is {self.tolerance:.0e}")
            return
        returned = sum(result.nbytes for result in results)
        del results
        peak = self.device.peak_memory(run)
        if peak is not None:
            outcome.memory = max(peak - returned, 0)
        if self.device.has_graphs:
            self.capture(outcome)
        if not contender.environment:  # to set it would take as long as a part of the call
            outcome.calls = [partial(inputs.run, contender.function) for inputs in self.sets]

    def allowed(self, contender: Contender) -> float:
        return math.inf if contender.inexact else self.tolerance

    def largest_error(self, contender: Contender, results: tuple[Tensor, ...]) -> float:
        errors = [
            float((result.double() - exact).norm() / exact.norm())
            for result, exact in zip(results, self.exact[contender.variant], strict=True)
        ]
        return math.nan if any(map(math.isnan, errors)) else max(errors)

    def capture(self, outcome: Outcome) -> None:
        contender = outcome.contender
        reason = contender.waits or self.bench.left_out(contender.name, "capture")
        if reason:
            outcome.notes.append(f"no graph: {reason}")
            return
        self.bench.begin("capture", contender.name, patience=PATIENCE)
        results: tuple[Tensor, ...] = ()

        def call(inputs) -> None:
            nonlocal results
            results = ()  # before the next call, which then gets the same memory as in training
            results = inputs.run(contender.function)

        graph = self.device.capture([partial(call, inputs) for inputs in self.sets])
        for result in results:
            result.fill_(math.nan)
        graph()
        error = self.largest_error(contender, results)
        if error <= self.allowed(contender):
            outcome.graph = graph
        else:
            outcome.notes.append(f"no graph: its replay is wrong by {error:.1e}")

    def time(self, outcomes: Sequence[Outcome], others: Mapping[str, list[Call]]) -> dict[str, Timing]:
        """Fills in the outcomes' timings; returns those of ``others``, which take part in the turns.

        Each of the others makes one call for each set, and is timed on a graph where there are graphs.
        """
        found, plain = {}, {outcome.contender.name: outcome.calls for outcome in outcomes if outcome.calls}
        if self.device.has_graphs:
            graphs = {outcome.contender.name: outcome.graph for outcome in outcomes if outcome.graph}
            self.bench.begin("graph timing", patience=60 + 10 * self.bench.seconds)
            graphs.update({name: self.device.capture(others[name]) for name in others})
            timings = self.in_turns(graphs)
            found["graph"] = {name: timing.divided_by(len(self.sets)) for name, timing in timings.items()}
        else:
            plain.update(others)
        self.bench.begin("stream timing", patience=60 + 10 * self.bench.seconds)
        calls = {name: Batch(self.device, made) for name, made in plain.items()}
        timings = self.in_turns(calls)
        found["stream"] = {name: timing.divided_by(calls[name].size) for name, timing in timings.items()}
        # The first two turns are untimed.
        host = {name: harness.timing_of(batch.host[2:]).divided_by(batch.size) for name, batch in calls.items()}
        found["host"] = host
        for outcome in outcomes:
            name = outcome.contender.name
            outcome.timings = {kind: timings[name] for kind, timings in found.items() if name in timings}
        return {name: next(iter(found.values()))[name] for name in others}

    def in_turns(self, calls: dict[str, Call]) -> dict[str, Timing]:
        turns = 3 if self.bench.quick else 9
        return harness.interleaved(calls, seconds=self.bench.seconds, turns=turns, measure=self.device.elapsed)


def rows_of(
    outcomes: Sequence[Outcome], ours: str, common: Mapping[str, object], floors: Mapping[str, float]
) -> Iterator[dict]:
    """One row for each contender and kind of timing, and one without times for a contender that was not timed.

    Args:
        ours: the contender that the others are compared with.
        common: columns of the case.
        floors: milliseconds, ``floor_ms`` among them; 0 where it is not known.
    """
    reference = next((outcome.timings for outcome in outcomes if outcome.contender.name == ours), {})
    for outcome, kind in [(each, kind) for each in outcomes for kind in each.timings or [""]]:
        times = dict.fromkeys(("p20_ms", "p50_ms", "p80_ms", "turns", "times_floor", "times_fewshot_ext"), "")
        if timing := outcome.timings.get(kind):
            times.update({f"{name}_ms": f"{getattr(timing, name):.5f}" for name in ("p20", "p50", "p80")})
            times["turns"] = timing.turns
            if floors["floor_ms"]:
                times["times_floor"] = f"{timing.p50 / floors['floor_ms']:.3f}"
            if kind in reference:
                times["times_fewshot_ext"] = f"{timing.p50 / reference[kind].p50:.3f}"
        yield {
            **common,
            "contender": outcome.contender.name,
            "variant": outcome.contender.variant,
            "timing": kind,
            **times,
            **{name: f"{value:.5f}" for name, value in floors.items()},
            "extra_memory_mib": "" if outcome.memory is None else f"{outcome.memory / 2**20:.1f}",
            "relative_error": "" if outcome.error is None else f"{outcome.error:.1e}",
            "note": "; ".join(outcome.notes),
        }


KINDS_TEXT = (
    '"graph": in a CUDA graph, the device\'s time alone; "stream": plain calls from idle to idle, the host included; '
    '"host": until plain calls return.'
)
TIMES_HEADER = ["graph, us", "p20 - p80", "times the floor", "stream, us", "p20 - p80", "host, us"]


def tables(rows: Iterable[dict], caption: Callable[[list[dict]], str]) -> str:
    """A table for each case with a line for each contender, the kinds of timing side by side."""
    cases: dict[str, dict[str, dict[str, dict]]] = {}
    for row in rows:
        cases.setdefault(row["case"], {}).setdefault(row["contender"], {})[row["timing"]] = row
    header, parts = ["contender", *TIMES_HEADER, "memory, MiB", "error", ""], []
    for case, contenders in cases.items():
        lines = []
        for contender, kinds in contenders.items():
            graph, stream, host = (kinds.get(kind, {}) for kind in ("graph", "stream", "host"))
            graph_times = microseconds(graph), spread(graph), graph.get("times_floor", "")
            facts = [next(iter(kinds.values()))[name] for name in ("extra_memory_mib", "relative_error", "note")]
            lines.append([contender, *graph_times, microseconds(stream), spread(stream), microseconds(host), *facts])
        of_case = [row for kinds in contenders.values() for row in kinds.values()]
        parts.append(f"### {case}\n\n{caption(of_case)}\n\n{harness.markdown_table(header, lines)}")
    return "\n".join(parts)


def microseconds(row: Mapping[str, str], column: str = "p50_ms") -> str:
    return significant(1e3 * float(row[column])) if row.get(column) else ""


def spread(row: Mapping[str, str]) -> str:
    return f"{microseconds(row, 'p20_ms')} - {microseconds(row, 'p80_ms')}" if row.get("p20_ms") else ""


def floor_text(row: Mapping[str, str]) -> str:
    return f"{microseconds(row, 'floor_ms')} us" if float(row["floor_ms"]) else "not measured"


def number(rows: Iterable[dict], case: str, contender: str, timing: str, column: str = "p50_ms") -> float | None:
    """What rows say; None where it was not measured."""
    for row in rows:
        if (row["case"], row["contender"], row["timing"]) == (case, contender, timing) and row.get(column):
            return float(row[column])
    return None


class Goal(NamedTuple):
    goal: str
    measured: str
    met: bool | None  # None where it was not measured


UNITS = {"us": (1e-3, ".1f"), "ms": (1.0, ".2f")}
PLACES = {"graph": "in a CUDA graph", "stream": "in plain calls", "host": "of the host's time"}


def within(
    rows: Sequence[dict], case: str, ours: str, limit: float, unit: str, what: str = "at most", timing: str = "graph"
) -> Goal:
    time, (scale, form) = number(rows, case, ours, timing), UNITS[unit]
    goal = f"{case}: {what} {limit:g} {unit} {PLACES[timing]}"
    if time is None:
        return Goal(goal, "", None)
    return Goal(goal, f"{time / scale:{form}} {unit}", time <= limit * scale)


def ahead(
    rows: Sequence[dict], case: str, ours: str, peers: Iterable[str], unit: str, what: str, timing: str = "graph"
) -> Goal:
    """Of the fastest peer, of those that were measured."""
    time, (scale, form) = number(rows, case, ours, timing), UNITS[unit]
    known = [other for name in peers if (other := number(rows, case, name, timing)) is not None]
    goal = f"{case}: ahead of {what} {PLACES[timing]}"
    if time is None or not known:
        return Goal(goal, "", None)
    measured = f"{time / scale:{form}} {unit} against {min(known) / scale:{form}} {unit}"
    return Goal(goal, measured, time < min(known))
