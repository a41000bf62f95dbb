"""Timing on a GPU, contenders of one problem, and what is found as rows, tables and goals.

Two times tell different things. "graph" is the time of the device: the calls are captured into one CUDA graph, and what
the host takes to launch them is gone. "stream" is what a plain call costs between idle and idle, the host included.
"""

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import harness
import torch
from harness import Timing
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
MOST_CALLS_A_TURN = 32  # on a stream


class CaptureError(Exception):
    """Leaves torch's allocator and its current stream in the middle of a capture: the process must not go on."""


class Cuda:
    name = "cuda"
    kinds = ("graph", "stream")

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.properties = torch.cuda.get_device_properties(self.device)
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
        self.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def cache_bytes(self) -> int:
        return getattr(self.properties, "L2_cache_size", 0) or 64 << 20

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def is_healthy(self) -> bool:
        try:
            return float(torch.ones(2, device=self.device).sum()) == 2.0
        except Exception:
            return False

    def release_memory(self) -> None:
        torch.cuda.empty_cache()


class RehearsalOnCpu:
    """Enough of a device to run the report where there is none."""

    name = "cpu"
    kinds = ("stream",)
    device = torch.device("cpu")
    elapsed = staticmethod(harness.wall_clock)

    def peak_memory(self, call: Call) -> None:
        call()

    def cache_bytes(self) -> int:
        return 1 << 20

    def synchronize(self) -> None:
        pass

    def is_healthy(self) -> bool:
        return True

    def release_memory(self) -> None:
        pass


DEVICES = {"cuda": Cuda, "cpu": RehearsalOnCpu}


@contextlib.contextmanager
def precision(name: str) -> Iterator[None]:
    """Of float32 products, for a name of DTYPES."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(DTYPES[name][1])
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def generator(device) -> torch.Generator:
    """One of the benchmark's own: a capture takes hold of torch's default generator."""
    return torch.Generator(device.device).manual_seed(0)


def input_sets(device, bytes_of_one: int) -> int:
    """How many sets of inputs to go through in rotation, so that none is in the cache when its turn comes."""
    return min(max(2, math.ceil(2 * device.cache_bytes() / bytes_of_one)), MOST_INPUT_SETS)


def time_calls(device, contenders: dict[str, Sequence[Call]], *, seconds: float, turns: int) -> dict[str, Timing]:
    """Plain calls on the stream, a batch a turn, in rotation over each contender's calls."""
    batches = {name: _Batch(calls) for name, calls in contenders.items()}
    timings = harness.interleaved(batches, seconds=seconds, turns=turns, measure=device.elapsed)
    return {name: timing.divided_by(batches[name].size) for name, timing in timings.items()}


class _Batch:
    def __init__(self, calls: Sequence[Call]) -> None:
        self.size = min(len(calls), MOST_CALLS_A_TURN)
        self.calls = itertools.cycle(calls)

    def __call__(self) -> None:
        for call in itertools.islice(self.calls, self.size):
            call()


def time_graphs(device, graphs: dict[str, Call], calls: int, *, seconds: float, turns: int) -> dict[str, Timing]:
    """Replays of graphs that make that many calls each."""
    timings = harness.interleaved(graphs, seconds=seconds, turns=turns, measure=device.elapsed)
    return {name: timing.divided_by(calls) for name, timing in timings.items()}


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
    calls: list[Call] = field(default_factory=list)
    graph: Call | None = None
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

    def time(self, outcomes: list[Outcome], others: dict[str, list[Call]]) -> dict[str, harness.Timing]:
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
            found["graph"] = time_graphs(self.device, graphs, len(self.sets), **settings)
        else:
            calls.update(others)
        self.bench.begin("stream timing", patience=60 + 10 * self.bench.seconds)
        found["stream"] = time_calls(self.device, calls, **settings)
        for outcome in outcomes:
            name = outcome.name
            outcome.timings = {kind: timings[name] for kind, timings in found.items() if name in timings}
        return {name: next(iter(found.values()))[name] for name in others}


HEADER = [
    "contender",
    "graph, us",
    "p20 - p80",
    "times the floor",
    "stream, us",
    "p20 - p80",
    "memory, MiB",
    "error",
    "",
]
KINDS_TEXT = (
    '"graph": in a CUDA graph, the device\'s time alone; "stream": plain calls from idle to idle, the host included.'
)


def of_outcomes(
    outcomes: Sequence[Outcome], ours: str, common: Mapping[str, object], floors: Mapping[str, float]
) -> list[dict]:
    """One row for each contender and kind of timing, and one without times for a contender that was not timed.

    Args:
        ours: the contender that the others are compared with.
        common: columns of the case.
        floors: milliseconds, ``floor_ms`` among them.
    """
    reference = next(outcome.timings for outcome in outcomes if outcome.name == ours)
    return [{**common, **row} for outcome in outcomes for row in _of_outcome(outcome, floors, reference)]


def _of_outcome(outcome: Outcome, floors: Mapping[str, float], ours: Mapping[str, harness.Timing]) -> Iterator[dict]:
    for kind in outcome.timings or [""]:
        timing = outcome.timings.get(kind)
        times = dict.fromkeys(("p20_ms", "p50_ms", "p80_ms", "turns", "times_floor", "times_fewshot_ext"), "")
        if timing is not None:
            times.update({f"{name}_ms": f"{getattr(timing, name):.5f}" for name in ("p20", "p50", "p80")})
            times["turns"] = timing.turns
            if floors["floor_ms"]:
                times["times_floor"] = f"{timing.p50 / floors['floor_ms']:.3f}"
            times["times_fewshot_ext"] = f"{timing.p50 / ours[kind].p50:.3f}" if kind in ours else ""
        yield {
            "contender": outcome.name,
            "variant": outcome.contender.variant,
            "timing": kind,
            **times,
            **{name: f"{value:.5f}" for name, value in floors.items()},
            "extra_memory_mib": "" if outcome.memory is None else f"{outcome.memory / 2**20:.1f}",
            "relative_error": "" if outcome.error is None else f"{outcome.error:.1e}",
            "note": "; ".join(outcome.notes),
        }


def by_case(rows: Iterable[dict]) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(row["case"], []).append(row)
    return found


def case_table(rows: Sequence[dict], caption: str) -> str:
    """A line for each contender of a case, the kinds of timing side by side."""
    by_contender: dict[str, dict[str, dict]] = {}
    for row in rows:
        by_contender.setdefault(row["contender"], {})[row["timing"]] = row
    lines = []
    for contender, kinds in by_contender.items():
        anyhow, graph, stream = next(iter(kinds.values())), kinds.get("graph", {}), kinds.get("stream", {})
        lines.append(
            [
                contender,
                microseconds(graph, "p50_ms"),
                spread(graph),
                graph.get("times_floor", ""),
                microseconds(stream, "p50_ms"),
                spread(stream),
                anyhow["extra_memory_mib"],
                anyhow["relative_error"],
                anyhow["note"],
            ]
        )
    return f"### {rows[0]['case']}\n\n{caption}\n\n{table(HEADER, lines)}"


def microseconds(row: Mapping[str, str], column: str) -> str:
    return harness.significant(1e3 * float(row[column])) if row.get(column) else ""


def spread(row: Mapping[str, str]) -> str:
    return f"{microseconds(row, 'p20_ms')} - {microseconds(row, 'p80_ms')}" if row.get("p20_ms") else ""


class Numbers:
    """Looks up what rows say of a case, a contender and a kind of timing; None where it was not measured."""

    def __init__(self, rows: Iterable[dict]) -> None:
        self._rows = {(row["case"], row["contender"], row["timing"]): row for row in rows}

    def __call__(self, case: str, contender: str, timing: str, column: str) -> float | None:
        text = self._rows.get((case, contender, timing), {}).get(column)
        return float(text) if text else None


@dataclass(frozen=True)
class Goal:
    operator: str
    goal: str
    measured: str
    met: bool | None  # None where it was not measured


def table(header: list[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table of cells with anything in them."""
    return harness.markdown_table(header, ([_cell(value) for value in row] for row in rows))


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]
