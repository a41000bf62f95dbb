"""Files that are written whole or not at all, and checksums to know them again."""

import errno
import hashlib
import os
import re
import shutil
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# What Python's readers of packed files raise for their contents, besides OSError without a number.
DAMAGE: tuple[type[Exception], ...] = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, struct.error),
    *(NotImplementedError, RuntimeError, LookupError, OverflowError, UnicodeError),
)
try:
    from lzma import LZMAError
except ImportError:  # a Python built without it
    pass
else:
    DAMAGE += (LZMAError,)

# What locking says on some network file systems, which have no locks.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)

# What temporary files and folders are called; no user calls a file so.
_PARTIAL = re.compile(r"\..*-[a-z0-9_]{8}\.partial(\.[^.]*)?")


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes beside ``path`` and renames, so that a reader, a full disk or Ctrl-C never leaves half a file.

    Args:
        path: the file to make or to replace; its folder must exist.
        write: called with the path of an empty file to fill.
    """

    def make() -> Path:
        # Cut, because a file's name must not become too long by what is added to it.
        handle, name = tempfile.mkstemp(f".partial{path.suffix}", f".{path.stem[:50]}-", path.parent)
        os.close(handle)
        return Path(name)

    with _owned(make, lambda made: made.unlink(missing_ok=True)) as temporary:
        write(temporary)
        # mkstemp makes files that the owner alone can read; these are meant to be shared as any other file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)


@contextmanager
def temporary_folder(parent: Path, name: str) -> Iterator[Path]:
    """A hidden folder in ``parent``, removed at the end; after a kill, by ``remove_leftovers``."""
    with _owned(
        lambda: Path(tempfile.mkdtemp(".partial", f".{name}-", parent)),
        lambda made: shutil.rmtree(made, ignore_errors=True),
    ) as folder:
        yield folder


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes left behind in ``folder`` while they wrote: what no living process owns."""
    try:
        names = [name for name in os.listdir(folder) if _PARTIAL.fullmatch(name)]
    except OSError:  # no folder yet
        return
    for path in (folder / name for name in names):
        with _lock(path) as is_ours:
            if is_ours and path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif is_ours:
                path.unlink(missing_ok=True)


@contextmanager
def _owned(make: Callable[[], Path], remove: Callable[[Path], Any]) -> Iterator[Path]:
    """What ``make`` makes, locked while it is in use so that ``remove_leftovers`` of others leaves it alone."""
    while True:
        path = make()
        with _lock(path) as is_ours:
            # Whoever clears the folder may take it between these two lines.
            if is_ours is False or not path.exists():
                continue
            try:
                yield path
            finally:
                remove(path)
            return


@contextmanager
def _lock(path: Path) -> Iterator[bool | None]:
    """Locks a file or folder, as the kernel does it, until the end of this process at the latest.

    Yields whether that worked: False where another process has it, None where it is gone or there are no locks.
    """
    handle = None
    try:
        handle = os.open(path, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_ours: bool | None = True
    except BlockingIOError:
        is_ours = False
    except (OSError, AttributeError):
        is_ours = None
    try:
        yield is_ours
    finally:
        if handle is not None:
            os.close(handle)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Waits until no other process is in such a block with the same folder; not where the file system has no locks."""
    from filelock import FileLock

    # By a name that `remove_leftovers` knows, for a process that is killed in the block leaves the file behind.
    lock = FileLock(folder / ".alone-lockfile.partial", fallback_to_soft=False)
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    try:
        yield
    finally:
        release_lock(lock)


def release_lock(lock: Any) -> None:
    """Releases a lock of ``filelock`` and removes its file."""
    # Removed while it is held: who opened it before and gets the lock after finds that it has no name any more.
    Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


def replace_text(path: Path, text: str) -> None:
    """Makes or replaces a UTF-8 file, whole or not at all; what UTF-8 cannot hold is escaped, see ``as_text``."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="backslashreplace"))


def is_text(name: str) -> bool:
    """Whether UTF-8 can hold ``name``; of a file's name with other bytes it cannot.

    Example:
        >>> is_text("Größe"), is_text(os.fsdecode(b"Gr\\xf6"))
        (True, False)
    """
    return name.encode("utf-8", "replace") == name.encode("utf-8", "surrogatepass")


def as_text(name: str | Path) -> str:
    """A file's name as text that can be printed and written; bytes that are no UTF-8 become ``\\udcXX``."""
    return str(name).encode("utf-8", "backslashreplace").decode()


def check_unpacked_size(name: str, size: int, stored: int, *, ratio: int = 100, least: int = 2**28) -> None:
    """Holds what a file unpacks to against what is in it: a few kilobytes may otherwise fill memory or disk.

    Args:
        name: what to call the file.
        size: bytes that it says it unpacks to, or has unpacked to so far.
        stored: bytes of the file.
        ratio: how much smaller than its content a file may be; pictures and text come to 30.
        least: what is always taken; 256 MiB.

    Raises:
        ValueError: it is too much.
    """
    most = max(least, ratio * stored)
    if size > most:
        raise ValueError(
            f"{name} is refused: it would unpack to {size:,} bytes or more from {stored:,}; at most {most:,} are taken"
        )


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's content, in hexadecimal.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
