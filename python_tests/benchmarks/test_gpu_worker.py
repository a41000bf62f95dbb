"""What a worker of the GPU report says, and what it does not let through."""

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import gpu_comparison
import gpu_worker
import pytest


def orders(**more):
    standard = {"device": "cpu", "quick": True, "seconds": 0.1, "rates": {}, "left_out": [], "jobs": ["a", "b"]}
    return {**standard, "until": time.time() + 100, **more}


@pytest.fixture
def bench():
    def make(**more):
        made = gpu_worker.Bench(orders(**more), io.StringIO())
        made.said = lambda: [json.loads(line) for line in made._events.getvalue().splitlines()]
        return made

    return make


def events(said):
    return [event["event"] for event in said]


def test_a_job_is_announced_and_its_result_sent(bench):
    worker = bench()
    worker.do(lambda job, bench: [job, bench.quick], "a")
    assert events(worker.said()) == ["begin", "result", "done"]
    assert worker.said()[1]["result"] == ["a", True]
    assert all(event["job"] == "a" for event in worker.said())


def fail(job, bench):
    raise ValueError("no memory\nand more")


def test_a_job_that_fails_says_why_and_the_next_one_goes_on(bench):
    worker = bench()
    worker.do(fail, "a")
    assert events(worker.said()) == ["begin", "error", "done"]
    assert worker.said()[1]["reason"] == "ValueError: no memory"


class Exited(BaseException):
    pass


@pytest.fixture
def exits(monkeypatch):
    def leave(code):
        raise Exited(code)

    monkeypatch.setattr(gpu_worker.os, "_exit", leave)


def test_a_job_that_breaks_the_device_ends_the_process(bench, exits, monkeypatch):
    worker = bench()
    monkeypatch.setattr(worker.device, "is_healthy", lambda: False)
    with pytest.raises(Exited):
        worker.do(fail, "a")
    assert events(worker.said()) == ["begin", "fault"]


def test_a_failed_capture_ends_the_process_although_the_device_seems_healthy(bench, exits):
    worker = bench()
    with pytest.raises(Exited):
        worker.survive(gpu_comparison.CaptureError("cannot be captured: it synchronizes"))
    assert worker.said()[0]["reason"] == "CaptureError: cannot be captured: it synchronizes"
    worker.survive(ValueError("of no consequence"))


def test_what_killed_a_worker_is_left_out_there_and_after_two_deaths_everywhere(bench):
    death = {"contender": "ours", "phase": "check", "reason": "it hung"}
    for deaths, elsewhere in (([{**death, "job": "a"}], None), ([{**death, "job": "a"}, {**death, "job": "c"}], "a")):
        worker = bench(left_out=deaths)
        worker._job = "a"
        assert worker.left_out("ours", "check") == "it hung (check)"
        assert worker.left_out("ours", "capture") is None
        worker._job = "b"
        assert worker.left_out("ours", "check") == (elsewhere and f"it hung (check) at {elsewhere}")
        assert worker.left_out("peer", "check") is None


def test_time_is_told_to_the_second(bench):
    assert 99 < bench().remaining() <= 100


def run_worker(tmp_path, source, **more):
    (tmp_path / "operator_of_test.py").write_text(source)
    path = Path(gpu_worker.__file__)
    command = [sys.executable, str(path), json.dumps(orders(module="operator_of_test", **more))]
    environment = {**gpu_worker.os.environ, "PYTHONPATH": ":".join([str(tmp_path), *sys.path])}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


def test_what_libraries_print_does_not_mix_with_events(tmp_path):
    done = run_worker(
        tmp_path,
        "import os\n"
        "print('at import')\n"
        "def measure(job, bench):\n"
        "    print('by Python')\n"
        "    os.system('echo by a process')\n"
        "    return job\n",
    )
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["result"] for event in said if event["event"] == "result"] == ["a", "b"]
    for text in ("at import", "by Python", "by a process"):
        assert text in done.stderr


def test_a_module_that_cannot_be_imported_is_a_fault(tmp_path):
    done = run_worker(tmp_path, "import no_such_module")
    assert done.returncode == 1
    (fault,) = (json.loads(line) for line in done.stdout.splitlines())
    assert fault == {"event": "fault", "reason": "ModuleNotFoundError: No module named 'no_such_module'"}
