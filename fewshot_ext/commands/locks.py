"""Folders that one process at a time writes to: locks that a command holds until it ends.

A lock is the kernel's, on an open file. It goes with the process however that ends, so that a killed run blocks nobody;
that the file of a killed run is still there means nothing.
"""

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from fewshot_ext._files import NO_LOCKS, release_lock, remove_leftovers
from fewshot_ext.experiments.sweep import TaskSweep

_held = ExitStack()


@contextmanager
def release_locks() -> Iterator[None]:
    """Releases at its end what was held in it."""
    try:
        yield
    finally:
        _held.close()


def hold_folder(folder: Path, name: str = "") -> None:
    """Keeps the folder for this process, and removes what killed ones left behind in it.

    Args:
        folder: an existing output folder.
        name: of what is written there, where several commands may write different things: an analysis or a file.

    Raises:
        OSError: another process holds it; the message names both.
    """
    _hold(folder / f".{name}.lock" if name else folder / ".lock", f"output {str(folder)!r}")
    remove_leftovers(folder)


def hold_sweep(name: str, sweep: TaskSweep, output: Path) -> None:
    """Keeps the results of a sweep in ``output`` for this process, and the runs that it is going to train.

    Sweeps that share a folder of trained runs may go on side by side as long as none trains what another does.

    Args:
        name: of the analysis.
        sweep: with ``checkpoints``, the folder of the runs.
        output: an existing folder.

    Raises:
        OSError: another process holds some of it; the message names both.
    """
    hold_folder(output, name)
    sweep.checkpoints.mkdir(parents=True, exist_ok=True)
    remove_leftovers(sweep.checkpoints)
    for task in sweep.tasks:
        remove_leftovers(task.folder)
        if not task.is_trained:
            _hold(sweep.checkpoints / f".{task.folder.name}.lock", f"run {task.name!r} in {str(sweep.checkpoints)!r}")


def _hold(path: Path, what: str) -> None:
    # A soft lock is a file whose existence counts.
    lock = FileLock(path, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise OSError(f"{what} is in use by {_owner(path)}: wait until it ends, or take another folder") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print(f"{what} cannot be locked ({error.strerror}): start no second command that writes there", file=sys.stderr)
        return
    _held.callback(release_lock, lock)
    path.write_text(f"process {os.getpid()} on {platform.node()}\n", encoding="utf-8")


def _owner(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip() or "another process"
    except OSError:
        return "another process"
