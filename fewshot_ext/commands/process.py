"""Ends of a command that come from outside: closed pipes, full disks behind standard output, signals."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


@contextmanager
def signals_as_interrupt() -> Iterator[None]:
    """SIGTERM, and SIGHUP of a closed terminal, become what Ctrl-C is: a command then tells what is done, and ends.

    What ``nohup`` or a caller has set stays as it is.
    """

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Unbroken:
    """A text stream that goes quiet where it cannot be written to any more, and keeps the reason."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.trouble = stream, None

    def write(self, text: str) -> int:
        return self._attempt(self.stream.write, text) or 0

    def flush(self) -> None:
        self._attempt(self.stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _attempt(self, function, *arguments: str) -> Any:
        if self.trouble is None:
            try:
                return function(*arguments)
            except OSError as error:
                self.trouble = error
                # Or Python itself would try again, and complain, at its end.
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self.stream.fileno())
                os.close(null)
        return None


@contextmanager
def unbroken_output() -> Iterator["_Unbroken"]:
    """Lets a command go on to its results where ``| head`` has gone or the disk behind standard output is full.

    Yields standard output, whose ``trouble`` is what went wrong with it.
    """
    before = sys.stdout, sys.stderr
    # One that the caller has closed is None.
    with open(os.devnull, "w") as null:
        sys.stdout, sys.stderr = output, _ = [_Unbroken(stream or null) for stream in before]
        try:
            yield output
        finally:
            output.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = before
