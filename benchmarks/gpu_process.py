"""Child processes that may hang or crash and the time that they may take: workers, pytest, compute-sanitizer.

A kernel that hangs or faults takes its process with it, signal handlers included. The GPU report therefore touches the
GPU in children alone: it reads their output with a deadline and ends them from outside.
"""

import contextlib
import json
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# An interrupt typed at the terminal then goes to the report alone, which ends its children. A session of its own, all
# that Python 3.10 has, would also keep them alive where a whole session is ended.
OWN_GROUP = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}
START_PATIENCE = 120.0  # seconds for a worker to import torch and to create a CUDA context, from a cold disk
AT_START = {"job": "", "contender": "", "phase": "start"}


class Overdue(Exception):
    """The deadline has passed."""


class Silent(Exception):
    """The child has said nothing for as long as it may."""


class Child:
    """A process whose output is read in lines. Leaving the context ends it and all that it started."""

    def __init__(self, command: list[str], **popen_arguments) -> None:
        self.command, self.popen_arguments = command, popen_arguments
        self.patience = float("inf")  # seconds that it may be silent
        self.unfinished_line = b""  # such as the name of the test that runs

    def __enter__(self) -> "Child":
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, **OWN_GROUP, **self.popen_arguments
        )
        return self

    def __exit__(self, *exception) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def lines(self, deadline: float) -> Iterator[str]:
        """Lines as they come, until the process ends; raises Overdue or Silent."""
        heard = time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while True:
                now = time.monotonic()
                if now >= deadline:
                    raise Overdue
                if now >= heard + self.patience:
                    raise Silent
                # What a dead process started may hold the pipe open, so its end does not show on the pipe alone.
                if not selector.select(min(0.2, deadline - now, heard + self.patience - now)):
                    if self.process.poll() is not None:
                        return
                    continue
                data = os.read(self.process.stdout.fileno(), 1 << 16)
                if not data:
                    self.process.wait()
                    return
                heard = time.monotonic()
                *lines, self.unfinished_line = (self.unfinished_line + data).split(b"\n")
                for line in lines:
                    yield line.decode(errors="replace")


def supervise(command: list[str], settings: dict, jobs: list[str], deadline: float) -> Iterator[dict]:
    """Has workers do the jobs and yields their events, see gpu_worker.py; raises Overdue.

    A worker that dies or hangs is followed by another that leaves out what the first was at: the contender, or the
    whole job where it was no single contender. Each of them yields an event "failure" with a reason.
    """
    jobs, failures = list(jobs), []
    while jobs:
        at, reason, open_jobs = AT_START, None, len(jobs)
        # Wall-clock time, because the worker has another monotonic clock.
        until = time.time() + deadline - time.monotonic()
        orders = json.dumps({**settings, "jobs": jobs, "left_out": failures, "until": until})
        with tempfile.TemporaryFile() as errors, Child([*command, orders], stderr=errors) as worker:
            worker.patience = START_PATIENCE
            try:
                for line in worker.lines(deadline):
                    event = json.loads(line)
                    if event["event"] == "begin":
                        at = {key: event[key] for key in AT_START}
                        worker.patience = event["patience"]
                    elif event["event"] == "done":
                        jobs.remove(event["job"])
                        at = {**AT_START, "phase": f"the end of {event['job']}"}
                    elif event["event"] == "fault":
                        reason = event["reason"]
                        continue
                    yield event
            except Silent:
                reason = f"no sign of life for {worker.patience:g} s"
            else:
                if not jobs:
                    return
                reason = reason or death(worker.process.returncode)
            errors.seek(0)
            output = errors.read().decode(errors="replace")
        yield {"event": "failure", **at, "reason": reason, "output": output[-4000:]}
        if not at["job"]:
            if len(jobs) == open_jobs:
                return
            continue
        again = any(failure.items() >= at.items() for failure in failures)  # although it was told to leave that out
        if not again:
            failures.append({**at, "reason": reason})
        if again or not at["contender"]:
            jobs.remove(at["job"])


def death(returncode: int) -> str:
    if returncode < 0:
        return f"the process died of {signal.Signals(-returncode).name}"
    return f"the process ended with exit code {returncode}"


# The CUDA half of the test suite, by itself or under compute-sanitizer.

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "python_tests" / "ops"  # what runs kernels; the rest wants packages that a GPU machine may not have
SELECTED = {"cuda": "cuda", "cpu": "cpu-baseline and empty_input"}  # backends name their tests
# Each path of the operators once, on the smallest problems there are: under a sanitizer everything takes long.
SANITIZED = (
    "cuda and (empty_input or each_gradient_by_itself or value_does_not_depend_on_gradients or inputs_are_not_modified)"
)
PATIENCE = 150.0  # seconds for one test, of which those that compile take longest
GRACE = 10.0  # seconds for pytest to say what failed before it is killed

OUTCOME = re.compile(r"(?P<test>\S*::.*) (?P<outcome>PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b.*\[ *\d+%\]$")
SELECTION = re.compile(r"collected (\d+) items?(?:.* (\d+) selected)?")
FAILURE = re.compile(r"(?:FAILED|ERROR) (\S+\.py\b.*)")
SUMMARY = re.compile(r"========= (?:ERROR|RACECHECK) SUMMARY: (.*)")
CLEAN = re.compile(r"0 (?:errors|hazards displayed \(0 errors, 0 warnings\))$")

# Error reports of the API calls that torch makes say nothing of the kernels; what the kernels' own calls return is
# checked where they are made. Writes by kernels that are filtered out would look like no writes to initcheck.
OURS_ALONE = ["--kernel-name", "kernel_substring=fewshot_ext"]
TOOLS = {
    "memcheck": [*OURS_ALONE, "--report-api-errors", "no"],
    "racecheck": OURS_ALONE,
    "synccheck": OURS_ALONE,
    "initcheck": [],
}
# Torch's caching allocator would hand out parts of one allocation, and hide what is read or written beyond them.
SANITIZER_ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
SANITIZER_FAILED = 86  # the exit code to tell errors that it found from tests that failed


@dataclass
class SuiteRun:
    counts: Counter = field(default_factory=Counter)
    selected: int = 0
    failures: list[str] = field(default_factory=list)
    cut: str = ""  # why it did not come to its end
    out_of_time: bool = False  # and that is all that is known against it
    returncode: int | None = None
    seconds: float = 0.0
    log: list[str] = field(default_factory=list)

    @property
    def ran(self) -> int:
        return sum(self.counts.values())

    @property
    def passed(self) -> bool:
        return self.returncode == 0 and not self.cut

    def verdict(self) -> str:
        counts = ", ".join(f"{count} {outcome.lower()}" for outcome, count in sorted(self.counts.items()))
        text = f"{self.ran} of {self.selected} selected tests ran in {self.seconds:.0f} s: {counts or 'none'}"
        if self.cut:
            return f"{text}; cut: {self.cut}"
        return text if self.passed else f"{text}; pytest's exit code {self.returncode}"

    def read(self, line: str) -> None:
        self.log.append(line)
        if match := OUTCOME.match(line):
            self.counts[match["outcome"]] += 1
            if match["outcome"] in ("FAILED", "ERROR"):
                print(f"  {match['outcome']} {match['test']}", flush=True)
            elif self.ran % 50 == 0:
                print(f"  {self.ran} of {self.selected} tests", flush=True)
        elif match := FAILURE.match(line):
            self.failures.append(match[1])
        elif match := SELECTION.search(line):
            self.selected = int(match[2] or match[1])


def pytest_command(selected: str) -> list[str]:
    options = ["-v", "--color=no", "--tb=short", "-rfE", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    return [sys.executable, "-m", "pytest", str(TESTS), "-k", selected, *options, "-o", "faulthandler_timeout=60"]


def environment(**more: str) -> dict[str, str]:
    """Of children: a relative PYTHONPATH keeps its meaning, and the checkout does not get in front of the package."""
    paths = [str(Path(path).resolve()) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    own = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}
    return {**os.environ, **own, **more}


def run(found: SuiteRun, command: list[str], deadline: float, **variables: str) -> None:
    """Fills ``found`` as the tests go on, so that it holds what there is whoever stops this."""
    begin = time.monotonic()
    # Standard error too: it has what a crash leaves behind.
    with Child(command, stderr=subprocess.STDOUT, cwd=ROOT, env=environment(**variables)) as child:
        child.patience = PATIENCE
        found.cut = "stopped"
        try:
            for line in child.lines(deadline - GRACE):
                found.read(line)
                found.seconds = time.monotonic() - begin
            found.cut = ""
        except (Overdue, Silent) as stop:
            test = child.unfinished_line.decode(errors="replace").strip()
            found.out_of_time = isinstance(stop, Overdue)
            found.cut = "out of time" if found.out_of_time else f"no sign of life for {PATIENCE:g} s"
            found.cut += f" in {test}" if "::" in test else ""
            child.signal(signal.SIGINT)  # pytest then says what failed
            child.patience = GRACE
            with contextlib.suppress(Overdue, Silent):
                for line in child.lines(time.monotonic() + GRACE):
                    found.read(line)
            found.out_of_time &= not (found.counts["FAILED"] or found.counts["ERROR"])
        found.returncode = child.process.poll()
    found.seconds = time.monotonic() - begin


def find_sanitizer() -> str | None:
    places = [os.environ.get("CUDA_HOME", ""), os.environ.get("CUDA_PATH", ""), "/usr/local/cuda"]
    path = os.pathsep.join([os.environ.get("PATH", ""), *(str(Path(place) / "bin") for place in places if place)])
    return shutil.which("compute-sanitizer", path=path)


def sanitizer_command(sanitizer: str, tool: str) -> list[str]:
    # Torch takes longer to import than the sanitizer would wait for the first CUDA call.
    general = ["--launch-timeout", "0", "--target-processes", "application-only", "--print-limit", "20"]
    exit_code = ["--error-exitcode", str(SANITIZER_FAILED)]
    return [sanitizer, "--tool", tool, *general, *exit_code, *TOOLS[tool], *pytest_command(SANITIZED)]


def sanitizer_verdict(found: SuiteRun) -> tuple[bool, str]:
    """Whether all was well, and the summary of the sanitizer."""
    summaries = [match[1] for line in found.log if (match := SUMMARY.match(line))]
    if not summaries:
        return False, found.cut or f"no summary, exit code {found.returncode}"
    clean = all(CLEAN.match(summary) for summary in summaries)
    return clean and found.passed and found.counts["PASSED"] > 0, "; ".join(summaries)
