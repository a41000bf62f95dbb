"""Processes of a process group that stay for many tests: to start one costs seconds."""

import datetime
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent.parent
DEADLINE = 60.0  # seconds; a test that hangs fails then
COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=25)


class Ranks:
    """``size`` processes with a gloo group. They start at the first call, and anew after one that went wrong."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[multiprocessing.Process] = []
        self._connections: list[Connection] = []

    def outcomes(self, function: Callable, *arguments: object, **options: object) -> list[object]:
        """What ``function(rank, *arguments, **options)`` returns in each process, or the exception that it raised, or
        None for a process that died."""
        if not self._processes:
            self._start()
        for connection in self._connections:
            connection.send((function, arguments, options))
        results: list[object] = [None] * self.size
        waiting = dict(zip(self._connections, range(self.size), strict=True))
        end = time.monotonic() + DEADLINE
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, end - time.monotonic()))
            if not ready:
                self.stop()
                raise TimeoutError(f"ranks {sorted(waiting.values())} had no answer within {DEADLINE:.0f} s")
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    results[rank] = connection.recv()
                except EOFError:
                    self._processes[rank].join()
        return results

    def run(self, function: Callable, *arguments: object, **options: object) -> list[object]:
        """As ``outcomes``, and raises the first exception."""
        results = self.outcomes(function, *arguments, **options)
        for rank, result in enumerate(results):
            if isinstance(result, BaseException):
                self.stop()  # the others may wait for it
                raise AssertionError(f"rank {rank}: {result}") from result
        return results

    def _start(self) -> None:
        # Processes forked from one that has imported torch start in no time, and fork no thread of this one.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed.tensor"])
        meeting = tempfile.mkdtemp()
        # Behind everything else: fewshot_ext stays the one that this process has imported.
        sys.path.append(str(ROOT))
        try:
            for rank in range(self.size):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_serve, args=(rank, self.size, f"{meeting}/store", theirs), daemon=True
                )
                process.start()
                theirs.close()
                self._processes.append(process)
                self._connections.append(ours)
        finally:
            sys.path.remove(str(ROOT))

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []


def _serve(rank: int, size: int, store: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT
    )
    while True:
        try:
            function, arguments, options = connection.recv()
        except EOFError:
            os._exit(0)
        try:
            connection.send(function(rank, *arguments, **options))
        except Exception as error:
            error.trace = traceback.format_exc()
            connection.send(error)
