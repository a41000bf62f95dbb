"""Timing on a GPU: calls on a stream, CUDA graphs, peak memory, rotating inputs, and the machine's rates.

Two times tell different things. "graph" is the time of the device: the calls are captured into one CUDA graph, and what
the host takes to launch them is gone. "stream" is what a plain call costs between idle and idle, the host included.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import harness
import torch
from harness import Timing

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
    elapsed = staticmethod(partial(harness.wall_clock, at_least=0))

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
