"""Tasks spread over processes and machines: one that fails, or takes its process down, leaves the others alone."""

import os
import queue
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from fewshot_ext import _extras
from fewshot_ext._files import replace_text, temporary_folder
from fewshot_ext._progress import progress_bar
from fewshot_ext._validation import check_count

_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_TO_ANSWER = 10


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
    executor: Executor | None = None,
    folder: Path | None = None,
    on_report: Callable[[Task, int, str], None] | None = None,
) -> Iterator[Outcome]:
    """Runs every task and yields their outcomes in the order in which they end.

    Args:
        tasks: what to do; they are pickled except with one job.
        jobs: processes on this machine; with 1 the tasks run in this one.
        threads: CPU threads of each task.
        executor: takes the tasks in place of these processes. Its workers must see the folders of this machine under
            the same paths and do one task at a time.
        folder: where tasks in other processes leave word of their progress; the system's folder for temporary files
            where None.
        on_report: called in this process with what a task reports; a report that another follows soon may be left out.

    Raises:
        KeyboardInterrupt: Ctrl-C; the processes are ended first, and tasks elsewhere end with their next report.
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
    on_report = on_report or (lambda *_: None)
    if not tasks or (executor is None and jobs == 1):
        return (_attempt(task, threads, partial(on_report, task)) for task in tasks)
    folder = Path(folder or tempfile.gettempdir()).absolute()
    if executor is None:
        return _run_in_processes(min(jobs, len(tasks)), tasks, threads, folder, on_report)
    return _run_in(executor, tasks, threads, folder, on_report)


@contextmanager
def connect(scheduler: str) -> Iterator[Executor]:
    """An executor of the workers of a Dask cluster, which resume elsewhere what one of them was killed in.

    Args:
        scheduler: its address, such as "tcp://host:8786".

    Raises:
        ImportError: the extra ``cluster`` is missing.
        OSError: the scheduler does not answer, or has no workers.
        ValueError: it is no address, or a worker does several tasks at a time, which then share one random generator.
    """
    _extras.require("cluster", "distributed")
    from distributed import Client, TimeoutError

    try:
        client = Client(scheduler, timeout=_SECONDS_TO_ANSWER, set_as_default=False)
    except OSError as error:
        raise OSError(f"scheduler: expected a Dask scheduler that answers at {scheduler}, got none: {error}") from error
    except ValueError as error:
        raise ValueError(
            f"scheduler: expected an address such as tcp://host:8786, got {scheduler!r}: {error}"
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=_SECONDS_TO_ANSWER)
        except TimeoutError as error:
            raise OSError(
                f"scheduler: expected workers at {scheduler}, got none; dask worker {scheduler} --nthreads 1 starts one"
            ) from error
        most = max(client.nthreads().values())
        if most > 1:
            raise ValueError(
                f"scheduler: expected workers of one thread (dask worker --nthreads 1), got {most} threads"
            )
        yield client.get_executor(pure=False)


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


def _attempt(task: Task, threads: int, report: Callable[..., None]) -> Outcome:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return Outcome(task, task(report))
    except Exception as error:
        return _failure(task, error)
    finally:
        torch.set_num_threads(before)


def _failure(task: Task, error: Exception) -> Outcome:
    message = " ".join(str(error).split())
    trace = "".join(traceback.format_exception(error))
    return Outcome(task, error=f"{type(error).__name__}: {message}", traceback=trace)


def _run_in(executor, tasks, threads, folder, on_report) -> Iterator[Outcome]:
    # What tasks report goes through files, because no two kinds of executor have another way in common. A report fails
    # where the folder is gone, and so ends a task that nobody waits for any more.
    running: dict[Future, tuple[Task, Path]] = {}
    told: dict[Path, str] = {}
    with temporary_folder(folder, "progress") as reports:
        try:
            for number, task in enumerate(tasks):
                file = reports / str(number)
                running[executor.submit(_attempt_there, task, threads, file, os.getcwd())] = (task, file)
            while running:
                done, _ = wait(running, _SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED)
                for task, file in running.values():
                    text = file.read_text(encoding="utf-8") if file.exists() else ""
                    if text != told.get(file, ""):
                        told[file] = text
                        units, _, remark = text.partition(" ")
                        on_report(task, int(units), remark)
                for future in done:
                    yield _outcome(running.pop(future)[0], future)
        finally:
            for future in running:
                future.cancel()


def _attempt_there(task: Task, threads: int, file: Path, folder: str) -> Outcome:
    before = os.getcwd()
    os.chdir(folder)  # of which the paths of images and results may be parts
    try:
        return _attempt(task, threads, lambda units, remark="": replace_text(file, f"{units} {remark}"))
    finally:
        os.chdir(before)


def _outcome(task: Task, future: Future) -> Outcome:
    try:
        return replace(future.result(), task=task)
    except BrokenExecutor as error:
        code = re.search(r"exit codes of the workers are \{(.*)\}", str(error))
        return Outcome(task, error=f"its process ended with {code[1]}") if code else _failure(task, error)
    except Exception as error:
        return _failure(task, error)


def _run_in_processes(jobs, tasks, *rest) -> Iterator[Outcome]:
    with _Processes(jobs, threads=rest[0]) as executor:
        yield from _run_in(executor, tasks, *rest)


class _Processes(ThreadPoolExecutor):
    """A thread for each job, with a process for each thread: one that is killed would break a pool of several for all.

    After a failure a fresh process follows, because nobody knows what the failure left behind.
    """

    def __init__(self, jobs: int, threads: int) -> None:
        from loky import ProcessPoolExecutor

        # Ctrl-C, and the end of the terminal, reach every process of it: blocked here, and so in what is started from
        # here, they are left to the first process, which decides what becomes of the others.
        blocked = partial(signal.pthread_sigmask, signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
        super().__init__(jobs, initializer=blocked)
        settings = {"initializer": _start_worker, "initargs": (os.getpid(),), "env": {"OMP_NUM_THREADS": str(threads)}}
        self._new_process = partial(ProcessPoolExecutor, 1, **settings)
        self._ended = False
        before = blocked()
        self._processes = [self._new_process() for _ in range(jobs)]  # starts a process that keeps their semaphores
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._idle = queue.SimpleQueue()
        for process in self._processes:
            self._idle.put(process)

    def submit(self, function: Callable[..., Outcome], *arguments: Any) -> Future:
        return super().submit(self._do, function, *arguments)

    def _do(self, function: Callable[..., Outcome], *arguments: Any) -> Outcome:
        process, outcome = self._idle.get(), None
        try:
            if self._ended:
                raise KeyboardInterrupt
            outcome = process.submit(function, *arguments).result()
            return outcome
        finally:
            if outcome is None or outcome.error:
                process.shutdown(kill_workers=True)
                process = self._new_process()
                self._processes.append(process)
            self._idle.put(process)

    def __exit__(self, *_: object) -> None:
        self.shutdown(wait=False, cancel_futures=True)
        self._ended = True
        for process in self._processes:
            process.shutdown(kill_workers=True)
        self.shutdown()


def _start_worker(parent: int) -> None:
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """Ends this process once its parent has, however that came about: nobody is left to work for."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
