"""The process in which the GPU report measures: does jobs and prints an event a line, in JSON.

    begin     what comes next (job, contender, phase, kernel) and for how many seconds it may be silent (patience)
    result    what a job has found
    error     why a job has found nothing; the next one goes on
    done      the job is finished
    fault     why this process cannot go on

gpu_process.supervise runs it, and says in the command line's JSON what to do and what to leave out.
"""

import importlib
import json
import os
import sys
import time
from typing import NoReturn

import gpu_timing


class Bench:
    """What a job gets: the device, the time, and a way to say what it is at."""

    def __init__(self, orders: dict, events) -> None:
        self.device = gpu_timing.DEVICES[orders["device"]]()
        self.quick: bool = orders["quick"]
        self.seconds: float = orders["seconds"]  # to spend on the turns of one job, about
        self.rates: dict[str, float] = orders["rates"]
        self._until: float = orders["until"]
        self._left_out: list[dict] = orders["left_out"]
        self._events = events
        self._job = ""

    def emit(self, event: str, **facts) -> None:
        print(json.dumps({"event": event, "job": self._job, **facts}), file=self._events, flush=True)

    def begin(self, phase: str, contender: str = "", kernel: str = "", patience: float = 60.0) -> None:
        """``kernel`` names what fails where this fails, so that it need not fail for every job and contender."""
        self.emit("begin", phase=phase, contender=contender, kernel=kernel, patience=patience)

    def left_out(self, contender: str, phase: str, kernel: str = "") -> str | None:
        """Why this is not to be done, where an earlier process died of it."""
        for failure in self._left_out:
            here = (failure["job"], failure["contender"], failure["phase"]) == (self._job, contender, phase)
            if here or (failure["everywhere"] and (failure["kernel"], failure["phase"]) == (kernel, phase)):
                return f"{failure['reason']} ({failure['phase']})" + ("" if here else f" at {failure['job']}")
        return None

    def remaining(self) -> float:
        return self._until - time.time()

    def fault(self, reason: str) -> NoReturn:
        """Ends the process without destructors, which would talk to a CUDA context that is beyond repair."""
        self.emit("fault", reason=reason)
        os._exit(3)

    def survive(self, error: Exception) -> None:
        """Ends the process where the device has not survived the error."""
        if isinstance(error, gpu_timing.CaptureError) or not self.device.is_healthy():
            self.fault(one_line(error))

    def do(self, module, job: str) -> None:
        self._job = job
        self.begin("preparation")
        try:
            result = module.measure(job, self)
        except Exception as error:
            self.survive(error)
            self.emit("error", reason=one_line(error))
        else:
            self.emit("result", result=result)
        self.device.release_memory()
        self.emit("done")


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def main() -> None:
    # Libraries print to standard output as they like: events have a descriptor of their own, theirs goes to the log.
    events = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    orders = json.loads(sys.argv[1])
    try:
        bench = Bench(orders, events)
        module = importlib.import_module(orders["module"])
    except Exception as error:
        print(json.dumps({"event": "fault", "reason": one_line(error)}), file=events, flush=True)
        raise
    for job in orders["jobs"]:
        bench.do(module, job)


if __name__ == "__main__":
    main()
