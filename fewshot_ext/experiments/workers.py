"""Tasks spread over processes: a task that fails, or takes its process down with it, leaves the others alone."""

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import torch

from fewshot_ext._progress import progress_bar
from fewshot_ext._validation import check_count


class Task(Protocol):
    """A piece of work that can be sent to another process.

    Attributes:
        name: what messages call it.
        work: its length in units of its own choice, the same for all tasks of one call.
    """

    name: str
    work: int

    def __call__(self, report: Callable[[int, str], None]) -> Any:
        """Does the work and returns what it found; ``report`` takes the units done so far and a remark."""


@dataclass(frozen=True)
class Outcome:
    """What became of a task.

    Attributes:
        task: the task.
        value: what it returned, None where it failed.
        error: one line on why it failed, None where it did not.
        traceback: where it failed, empty where it did not or where its process died.
    """

    task: Task
    value: Any = None
    error: str | None = None
    traceback: str = ""


def run_tasks(
    tasks: Sequence[Task],
    *,
    jobs: int = 1,
    threads: int = 1,
    on_report: Callable[[Task, int, str], None] | None = None,
) -> Iterator[Outcome]:
    """Runs every task and yields their outcomes in the order in which they end.

    Args:
        tasks: what to do; with several jobs they are pickled.
        jobs: processes; with 1 the tasks run in this one.
        threads: CPU threads of each process.
        on_report: called in this process with what a task reports.

    Raises:
        KeyboardInterrupt: Ctrl-C; the processes are ended first.
        ValueError: fewer than one job or thread.

    Example:
        >>> class Square:
        ...     name, work = "square", 1
        ...
        ...     def __call__(self, report):
        ...         return 3**2
        >>> [outcome.value for outcome in run_tasks([Square()])]
        [9]
    """
    check_count("jobs", jobs, 1)
    check_count("threads", threads, 1)
    run = _run_here if jobs == 1 else _run_in_processes
    return run(tasks, jobs, threads, on_report or (lambda *_: None))


@contextmanager
def sweep_progress(title: str, tasks: Sequence[Task]) -> Iterator["SweepProgress"]:
    """One bar over all tasks on a terminal; elsewhere one line for each that ends, with the time left."""
    progress = SweepProgress(title, tasks)
    try:
        yield progress
    finally:
        progress.close()


class SweepProgress:
    """Counts the work of all tasks; see ``sweep_progress``."""

    def __init__(self, title: str, tasks: Sequence[Task]) -> None:
        # Kept, because what is left to do of a task changes while it is done.
        self._work = {task.name: task.work for task in tasks}
        self._done = dict.fromkeys(self._work, 0)
        self._total, self._ended, self._count = sum(self._work.values()), 0, len(tasks)
        self._started = time.perf_counter()
        self._title = title
        self._bar = progress_bar(
            total=self._total,
            desc=f"{title} 0/{len(tasks)}",
            bar_format="{desc} |{bar}| {percentage:3.0f}% {elapsed}<{remaining}{postfix}",
        )

    def report(self, task: Task, units: int, remark: str = "") -> None:
        """A task has done ``units`` of its work so far."""
        self._bar.set_postfix_str(f"{task.name}: {remark}" if remark else task.name, refresh=False)
        self._bar.update(units - self._done[task.name])
        self._done[task.name] = units
        self._bar.refresh()

    def end(self, task: Task, line: str) -> None:
        """A task is done; ``line`` says what came out."""
        self.report(task, self._work[task.name])
        self._ended += 1
        self._bar.set_description_str(f"{self._title} {self._ended}/{self._count}")
        if self._bar.disable:
            print(f"{self._ended}/{self._count} {line}{self._time_left()}", file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        """A line that stays on the screen above the bar."""
        self._bar.write(line, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()

    def _time_left(self) -> str:
        done = sum(self._done.values())
        if done == self._total:
            return ""
        seconds = (time.perf_counter() - self._started) * (self._total - done) / done
        return f" ({_duration(seconds)} left)"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _run_here(tasks, jobs, threads, on_report) -> Iterator[Outcome]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for task in tasks:
            yield _attempt(task, lambda units, remark="", task=task: on_report(task, units, remark))
    finally:
        torch.set_num_threads(before)


def _attempt(task: Task, report: Callable[..., None]) -> Outcome:
    try:
        return Outcome(task, task(report))
    except Exception as error:
        message = " ".join(str(error).split())
        return Outcome(task, error=f"{type(error).__name__}: {message}", traceback=traceback.format_exc())


class _Worker:
    """A process that does one task after another."""

    def __init__(self, threads: int) -> None:
        # Spawned, because a process forked after torch has started its threads or CUDA cannot use them.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, threads), daemon=True)
        with _environment(OMP_NUM_THREADS=str(threads)):
            self.process.start()
        theirs.close()
        self.task: Task | None = None

    def start(self, task: Task) -> None:
        self.task = task
        self.connection.send(task)

    def end(self) -> None:
        # Not by SIGTERM, of which Lightning makes an exception and a traceback.
        self.process.kill()
        self.process.join()
        self.connection.close()


def _run_in_processes(tasks, jobs, threads, on_report) -> Iterator[Outcome]:
    waiting = deque(tasks)
    workers: list[_Worker] = []
    try:
        while waiting or workers:
            while waiting and len(workers) < jobs:
                workers.append(_Worker(threads))
                workers[-1].start(waiting.popleft())
            ready = wait([worker.connection for worker in workers])
            for worker in [worker for worker in workers if worker.connection in ready]:
                outcome = _receive(worker, on_report)
                if outcome is None:
                    continue
                if waiting and worker.process.is_alive() and outcome.error is None:
                    worker.start(waiting.popleft())
                else:
                    # After a failure a fresh process, because nobody knows what the failure left behind.
                    workers.remove(worker)
                    worker.end()
                yield outcome
    finally:
        for worker in workers:
            worker.end()


def _receive(worker: _Worker, on_report: Callable[..., None]) -> Outcome | None:
    """One message of a worker: an outcome, or None for a report."""
    try:
        kind, *content = worker.connection.recv()
    except (EOFError, OSError):
        worker.process.join(5)
        code = worker.process.exitcode
        reason = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        return Outcome(worker.task, error=f"its process ended with {reason}")
    if kind == "report":
        on_report(worker.task, *content)
        return None
    value, error, trace = content
    return Outcome(worker.task, value, error, trace)


def _serve(connection: Connection, threads: int) -> None:
    # Ctrl-C, and the end of the terminal, reach every process of it; the first one decides what becomes of the others.
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        # A broken pipe here means that nobody is left to work for.
        outcome = _attempt(task, lambda units, remark="": connection.send(("report", units, remark)))
        connection.send(("outcome", outcome.value, outcome.error, outcome.traceback))


def _end_with_parent() -> None:
    """Ends this process once its parent has, however that came about: nobody is left to work for."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
