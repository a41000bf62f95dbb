"""Child processes that may hang or crash, and the time that they may take.

A kernel that hangs or faults takes its process with it, signal handlers included. The GPU report therefore touches the
GPU in children alone: it reads their output with a deadline and ends them from outside.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

# An interrupt typed at the terminal then goes to the report alone, which ends its children. A session of its own, all
# that Python 3.10 has, would also keep them alive where a whole session is ended.
OWN_GROUP = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}
START_PATIENCE = 120.0  # seconds for a worker to import torch and to create a CUDA context, from a cold disk
SAME_KERNEL_FAILURES = 2  # so often the same kernel may fail before it is left out everywhere
AT_START = {"job": "", "contender": "", "phase": "start", "kernel": ""}


class Overdue(Exception):
    """The deadline has passed."""


class Silent(Exception):
    """The child has said nothing for as long as it may."""


class Budget:
    """Seconds for everything, from which sections take their shares."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def remaining(self) -> float:
        return self._end - time.monotonic()

    def deadline(self, share: float = float("inf")) -> float:
        """Of a section that may take ``share`` seconds where as much is left; a time of time.monotonic()."""
        return min(time.monotonic() + share, self._end)


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


class _Failures:
    """What workers have died of, and what later ones leave out for it."""

    def __init__(self) -> None:
        self.known: list[dict[str, str]] = []

    def add(self, failure: dict[str, str]) -> bool:
        """False if a worker has died of it before, although told to leave it out."""
        if any(all(known[key] == failure[key] for key in ("job", "contender", "phase")) for known in self.known):
            return False
        self.known.append(failure)
        return True

    def left_out(self) -> list[dict[str, str]]:
        kernels = [failure["kernel"] for failure in self.known]
        everywhere = {name for name in kernels if name and kernels.count(name) >= SAME_KERNEL_FAILURES}
        return [{**failure, "everywhere": failure["kernel"] in everywhere} for failure in self.known]


def supervise(command: list[str], settings: dict, jobs: list[str], deadline: float) -> Iterator[dict]:
    """Has workers do the jobs and yields their events, see gpu_worker.py; raises Overdue.

    A worker that dies or hangs is followed by another that leaves out what the first was at: the contender, or the
    whole job where it was no single contender. Each of them yields an event "failure" with a reason.
    """
    jobs, failures = list(jobs), _Failures()
    while jobs:
        at, reason, open_jobs = AT_START, None, len(jobs)
        # Wall-clock time, because the worker has another monotonic clock.
        until = time.time() + deadline - time.monotonic()
        orders = {**settings, "jobs": jobs, "left_out": failures.left_out(), "until": until}
        with tempfile.TemporaryFile() as errors, Child([*command, json.dumps(orders)], stderr=errors) as worker:
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
                reason = reason or _death(worker.process.returncode)
            errors.seek(0)
            output = errors.read().decode(errors="replace")
        yield {"event": "failure", **at, "reason": reason, "output": output[-4000:]}
        if not at["job"]:
            if len(jobs) == open_jobs:
                return
        elif not failures.add({**at, "reason": reason}) or not at["contender"]:
            jobs.remove(at["job"])


def _death(returncode: int) -> str:
    if returncode < 0:
        return f"the process died of {signal.Signals(-returncode).name}"
    return f"the process ended with exit code {returncode}"
