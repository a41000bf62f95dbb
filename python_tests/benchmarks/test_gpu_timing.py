"""What the GPU report asks of CUDA, in which order; a fake stands in for torch.cuda."""

import types
from contextlib import contextmanager

import gpu_timing
import pytest
import torch


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
        return types.SimpleNamespace(L2_cache_size=1000)

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
    device = gpu_timing.Cuda()
    assert device.elapsed(lambda: cuda.calls.append("call")) == 1.0
    assert cuda.calls == ["synchronize", "record", "call", "record", "wait for event"]


def test_a_capture_is_warmed_up_on_another_stream(cuda):
    device = gpu_timing.Cuda()
    replay = device.capture([lambda index=index: cuda.calls.append(index) for index in range(3)])
    replay()
    assert cuda.calls == ["side waits", "side {", 0, 1, "}", "main waits", "capture {", 0, 1, 2, "}", "replay"]


def test_a_capture_that_fails_has_a_name_of_its_own(cuda, monkeypatch):
    device = gpu_timing.Cuda()

    def synchronizes():
        if cuda.calls[-1] == "capture {":
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(gpu_timing.CaptureError, match="cannot be captured: operation not permitted"):
        device.capture([synchronizes])


def test_peak_memory_is_what_a_call_adds(cuda):
    def call():
        cuda.peak = cuda.allocated + 30

    cuda.allocated = 70
    cuda.peak = 500
    assert gpu_timing.Cuda().peak_memory(call) == 30


def test_a_device_that_answers_nonsense_is_not_healthy(cuda, monkeypatch):
    device = gpu_timing.Cuda()

    def ones(*arguments, **settings):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "ones", ones)
    assert not device.is_healthy()


@pytest.mark.parametrize("bytes_of_one, sets", ((10**6, 2), (1000, 2), (100, 20), (150, 14), (1, 256)))
def test_inputs_rotate_until_the_cache_has_forgotten_them(cuda, bytes_of_one, sets):
    assert gpu_timing.input_sets(gpu_timing.Cuda(), bytes_of_one) == sets


def test_precision_is_restored():
    before = torch.get_float32_matmul_precision()
    with pytest.raises(KeyError), gpu_timing.precision("tf32"):
        assert torch.get_float32_matmul_precision() == "high"
        raise KeyError
    assert torch.get_float32_matmul_precision() == before


def counting(log, name, count):
    return [lambda index=index: log.append((name, index)) for index in range(count)]


def test_plain_calls_go_through_all_inputs_in_turn():
    log = []
    device = types.SimpleNamespace(elapsed=lambda call: (call(), 12.0)[1])
    calls = {"a": counting(log, "a", 3), "b": counting(log, "b", 40)}
    timings = gpu_timing.time_calls(device, calls, seconds=0, turns=4)
    assert timings["a"].p50 == 12.0 / 3  # three calls a turn, one for each input
    assert timings["b"].p50 == 12.0 / gpu_timing.MOST_CALLS_A_TURN
    assert timings["a"].turns == 4
    assert [index for name, index in log if name == "a"] == [0, 1, 2] * 6
    assert [index for name, index in log if name == "b"][:80] == [*range(40), *range(40)]
    assert [name for name, _ in log][:36] == ["a"] * 3 + ["b"] * 32 + ["a"]


def test_graphs_are_timed_a_call():
    device = types.SimpleNamespace(elapsed=lambda call: call())
    timings = gpu_timing.time_graphs(device, {"a": lambda: 8.0, "b": lambda: 20.0}, 4, seconds=0, turns=3)
    assert (timings["a"].p50, timings["b"].p50) == (2.0, 5.0)
