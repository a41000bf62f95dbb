"""What is asked of CUDA, of which a fake stands in for torch's; checking, capturing and timing of contenders."""

import os
import types
from contextlib import contextmanager

import gpu_comparison
import gpu_worker
import pytest
import torch
from gpu_comparison import Comparison, Contender


class FakeCuda:
    """Records what is called on it. Its clock advances by a millisecond with every event that is recorded."""

    def __init__(self):
        self.calls = []
        self.time = 0.0
        self.allocated = self.peak = 0

    def __getattr__(self, name):
        return lambda *arguments, **settings: self.calls.append(name)

    def current_device(self):
        return 0

    def get_device_properties(self, device):
        return types.SimpleNamespace(L2_cache_size=1000, total_memory=1 << 30)

    def Event(self, enable_timing):
        fake = self

        class Event:
            def record(self):
                fake.calls.append("record")
                fake.time += 1.0
                self.at = fake.time

            def synchronize(self):
                fake.calls.append("wait for event")

            def elapsed_time(self, end):
                return end.at - self.at

        return Event()

    def Stream(self):
        return types.SimpleNamespace(wait_stream=lambda other: self.calls.append("side waits"))

    def current_stream(self):
        return types.SimpleNamespace(wait_stream=lambda other: self.calls.append("main waits"))

    @contextmanager
    def stream(self, stream):
        self.calls.append("side {")
        yield
        self.calls.append("}")

    def CUDAGraph(self):
        return types.SimpleNamespace(replay=lambda: self.calls.append("replay"))

    @contextmanager
    def graph(self, graph):
        self.calls.append("capture {")
        yield
        self.calls.append("}")

    def memory_allocated(self):
        return self.allocated

    def reset_peak_memory_stats(self):
        self.peak = self.allocated

    def max_memory_allocated(self):
        return self.peak


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(torch, "cuda", fake)
    return fake


def test_a_timed_region_starts_from_idle_and_waits_for_its_own_end_alone(cuda):
    device = gpu_comparison.Cuda()
    assert device.elapsed(lambda: cuda.calls.append("call")) == 1.0
    assert cuda.calls == ["synchronize", "record", "call", "record", "wait for event"]


def test_a_capture_is_warmed_up_on_another_stream(cuda):
    device = gpu_comparison.Cuda()
    replay = device.capture([lambda index=index: cuda.calls.append(index) for index in range(3)])
    replay()
    assert cuda.calls == ["side waits", "side {", 0, 1, "}", "main waits", "capture {", 0, 1, 2, "}", "replay"]


def test_a_capture_that_fails_has_a_name_of_its_own(cuda, monkeypatch):
    device = gpu_comparison.Cuda()

    def synchronizes():
        if cuda.calls[-1] == "capture {":
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(gpu_comparison.CaptureError, match="cannot be captured: operation not permitted"):
        device.capture([synchronizes])


def test_peak_memory_is_what_a_call_adds(cuda):
    def call():
        cuda.peak = cuda.allocated + 30

    cuda.allocated = 70
    cuda.peak = 500
    assert gpu_comparison.Cuda().peak_memory(call) == 30


def test_a_device_that_answers_nonsense_is_not_healthy(cuda, monkeypatch):
    device = gpu_comparison.Cuda()

    def ones(*arguments, **settings):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "ones", ones)
    assert not device.is_healthy()


@pytest.mark.parametrize("bytes_of_one, sets", ((10**6, 2), (1000, 2), (100, 20), (150, 14), (1, 256)))
def test_inputs_rotate_until_the_cache_has_forgotten_them(cuda, bytes_of_one, sets):
    assert gpu_comparison.input_sets(gpu_comparison.Cuda(), bytes_of_one) == sets


def counting(log, name, count):
    return [lambda index=index: log.append((name, index)) for index in range(count)]


def test_plain_calls_go_through_all_inputs_in_turn():
    log = []
    device = types.SimpleNamespace(elapsed=lambda call: 1.0)
    a, b = (gpu_comparison.Batch(device, counting(log, name, count)) for name, count in (("a", 3), ("b", 40)))
    for _ in range(3):
        a(), b()
    assert (a.size, b.size) == (3, gpu_comparison.MOST_CALLS_A_TURN)
    assert [index for name, index in log if name == "a"] == [0, 1, 2] * 3
    assert [index for name, index in log if name == "b"][:80] == [*range(40), *range(40)]
    assert [name for name, _ in log][:36] == ["a"] * 3 + ["b"] * 32 + ["a"]
    assert len(a.host) == 3 and min(a.host) > 0


@pytest.mark.parametrize("milliseconds, size", ((3.0, 32), (30.0, 3), (3000.0, 1)))
def test_a_turn_of_what_is_slow_has_fewer_calls(milliseconds, size):
    device = types.SimpleNamespace(elapsed=lambda call: milliseconds)
    assert gpu_comparison.Batch(device, counting([], "a", 40)).size == size


def test_the_host_is_timed_until_calls_return():
    class Asynchronous(Device):
        def elapsed(self, call):
            call()
            return 1e6  # the device takes much longer

    (outcome,) = compare(Bench(Asynchronous()), Contender("ours", double, variant=2))
    assert 0 < outcome.timings["host"].p50 < 1e3 < outcome.timings["stream"].p50
    assert outcome.timings["host"].turns == outcome.timings["stream"].turns == 3


def test_what_is_inexact_by_nature_is_timed_with_its_error():
    (outcome,) = compare(Bench(), Contender("blurred", lambda x: 2.2 * x, variant=2, inexact=True))
    assert outcome.error == pytest.approx(0.1, rel=1e-3) and outcome.timings and not outcome.notes
    (outcome,) = compare(Bench(), Contender("blurred", lambda x: x * torch.nan, variant=2, inexact=True))
    assert not outcome.timings


def test_what_compiles_for_too_long_leaves_time_to_do_without_it():
    bench = Bench(remaining=100.0)
    bench.begin = lambda phase, contender="", patience=60.0: bench.phases.append((phase, patience))
    compare(bench, Contender("compiled", double, variant=2, compiles=True), Contender("ours", double, variant=2))
    assert [patience for phase, patience in bench.phases if phase == "check"] == [50.0, gpu_comparison.PATIENCE]


@pytest.mark.parametrize("kind", ("graph", "stream"))
def test_a_time_is_that_of_one_call(kind):
    class Clock(Device):
        def elapsed(self, call):
            call()
            return 12.0

    (outcome,) = compare(Bench(Clock()), Contender("ours", double, variant=2))
    assert outcome.timings[kind].p50 == 12.0 / 3  # three sets of inputs
    assert outcome.timings[kind].turns == 3


class FaultError(BaseException):
    """The worker would have ended here."""


class Device(gpu_comparison.RehearsalOnCpu):
    """Graphs that make their calls again, and memory that is asked for in fakes."""

    has_graphs = True
    healthy = True

    def capture(self, calls):
        def replay():
            for call in calls:
                call()

        replay()
        return replay

    def peak_memory(self, call):
        call()
        return 100

    def is_healthy(self):
        return self.healthy


class Inputs:
    """Doubles a vector; results lie in fixed memory, as they do where a graph is replayed."""

    def __init__(self, seed):
        self.values = torch.randn(4, generator=torch.Generator().manual_seed(seed))
        self.result = torch.empty(4)

    def run(self, function):
        return (self.result.copy_(function(self.values)),)

    def exact(self, variant):
        return (variant * self.values.double(),)


class Bench:
    quick, seconds = True, 0.0

    def __init__(self, device=None, left_out=(), remaining=1000.0):
        self.device = device or Device()
        self.phases = []
        self._left_out, self._remaining = left_out, remaining

    def begin(self, phase, contender="", patience=60.0):
        self.phases.append((phase, contender))

    def left_out(self, contender, phase):
        return "it hung" if (contender, phase) in self._left_out else None

    def remaining(self):
        return self._remaining

    def emit(self, event, reason):
        raise FaultError(reason)

    survive = gpu_worker.Bench.survive


def double(values):
    return 2 * values


def compare(bench, *contenders):
    comparison = Comparison(bench, [Inputs(0), Inputs(1), Inputs(2)], tolerance=1e-4)
    outcomes = [comparison.prepare(contender) for contender in contenders]
    others = comparison.time(outcomes, {"product": [lambda: None] * 3})
    assert list(others) == ["product"]
    return outcomes


def test_what_is_right_is_measured_captured_and_timed():
    bench = Bench()
    (outcome,) = compare(bench, Contender("ours", double, variant=2))
    assert outcome.notes == []
    assert outcome.error < 1e-6
    assert outcome.memory == 100 - 16  # less the result
    assert outcome.timings.keys() == {"graph", "stream", "host"}
    assert bench.phases == [
        ("check", "ours"),
        ("capture", "ours"),
        ("graph timing", ""),
        ("stream timing", ""),
    ]


def test_each_variant_is_compared_with_its_own_reference():
    outcomes = compare(Bench(), Contender("a", double, variant=2), Contender("b", lambda values: 3 * values, variant=3))
    assert all(outcome.timings for outcome in outcomes)


@pytest.mark.parametrize("function", (lambda x: 2.01 * x, lambda x: x * torch.nan), ids=("off", "nan"))
def test_what_is_wrong_is_said_and_not_timed(function):
    (outcome,) = compare(Bench(), Contender("wrong", function, variant=2))
    assert outcome.notes == ["wrong, not timed: allowed is 1e-04"]
    assert not outcome.error <= 1e-4
    assert not outcome.timings


def test_unwritten_results_do_not_pass_for_right():
    class Lazy(Inputs):
        written = False

        def run(self, function):  # only the first call writes
            if not self.written:
                self.written = True
                return super().run(function)
            return (self.result,)

    comparison = Comparison(Bench(), [Lazy(0)], tolerance=1e-4)
    assert "wrong" in comparison.prepare(Contender("lazy", double, variant=2)).notes[0]


def test_a_graph_whose_replay_computes_nothing_is_not_timed():
    class Dead(Device):
        def capture(self, calls):
            for call in calls:
                call()
            return lambda: None

    comparison = Comparison(Bench(Dead()), [Inputs(0)], tolerance=1e-4)
    outcome = comparison.prepare(Contender("ours", double, variant=2))
    assert outcome.notes == ["no graph: its replay is wrong by nan"]
    assert outcome.graph is None and outcome.calls


def test_an_exception_is_a_note():
    def refuse(values):
        raise RuntimeError("one_launch does not take 512 samples\nand a backtrace")

    outcomes = compare(Bench(), Contender("forced", refuse, variant=2), Contender("ours", double, variant=2))
    assert outcomes[0].notes == ["RuntimeError: one_launch does not take 512 samples"]
    assert not outcomes[0].timings
    assert outcomes[1].timings


def test_an_exception_that_breaks_the_device_ends_the_worker():
    class Broken(Device):
        healthy = False

    def crash(values):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(FaultError, match="illegal memory access"):
        compare(Bench(Broken()), Contender("ours", crash, variant=2))


def test_a_capture_that_fails_ends_the_worker_and_the_next_one_does_without():
    class Uncapturable(Device):
        def capture(self, calls):
            raise gpu_comparison.CaptureError("cannot be captured: operation not permitted")

    contender = Contender("ours", double, variant=2)
    with pytest.raises(FaultError, match="CaptureError: cannot be captured: operation not permitted"):
        Comparison(Bench(Uncapturable()), [Inputs(0)], 1e-4).prepare(contender)
    (outcome,) = compare(Bench(left_out=[("ours", "capture")]), contender)
    assert outcome.notes == ["no graph: it hung"]
    assert outcome.timings.keys() == {"stream", "host"}


def test_what_waits_for_the_host_is_never_captured():
    (outcome,) = compare(Bench(), Contender("peer", double, variant=2, waits="it asks for a number"))
    assert outcome.notes == ["no graph: it asks for a number"]
    assert outcome.timings.keys() == {"stream", "host"}


def test_what_killed_an_earlier_worker_is_left_out():
    bench = Bench(left_out=[("ours", "check")])
    (outcome,) = compare(bench, Contender("ours", double, variant=2))
    assert outcome.notes == ["it hung"]
    assert ("check", "ours") not in bench.phases


def test_what_is_missing_is_listed():
    (outcome,) = compare(Bench(), Contender("peer", missing="ImportError: no module named peer"))
    assert outcome.notes == ["ImportError: no module named peer"]


def test_nothing_is_compiled_when_time_runs_out(monkeypatch):
    monkeypatch.setattr(Comparison, "longest_compile", {})
    contender = Contender("compiled", double, variant=2, compiles=True)
    for remaining, compiled in ((50.0, False), (500.0, True)):
        (outcome,) = compare(Bench(remaining=remaining), contender)
        assert bool(outcome.timings) is compiled
        assert (outcome.notes == ["not compiled: no time left"]) is not compiled


def test_a_forced_kernel_runs_in_its_environment_which_is_put_back(monkeypatch):
    monkeypatch.setenv("KERNEL", "before")
    monkeypatch.delenv("OTHER", raising=False)
    seen = []

    def spy(values):
        seen.append((os.environ["KERNEL"], os.environ["OTHER"]))
        return 2 * values

    forced = Contender("forced", spy, variant=2, environment={"KERNEL": "chunked", "OTHER": "1"})
    comparison = Comparison(Bench(), [Inputs(0)], 1e-4)
    outcome = comparison.prepare(forced)
    assert set(seen) == {("chunked", "1")}
    assert os.environ["KERNEL"] == "before" and "OTHER" not in os.environ
    assert outcome.graph and not outcome.calls


def test_a_device_without_graphs_times_the_others_on_the_stream():
    comparison = Comparison(Bench(gpu_comparison.RehearsalOnCpu()), [Inputs(0)], 1e-4)
    outcome = comparison.prepare(Contender("ours", double, variant=2))
    others = comparison.time([outcome], {"product": [lambda: None]})
    assert outcome.timings.keys() == {"stream", "host"} and outcome.memory is None
    assert isinstance(others["product"].p50, float)
