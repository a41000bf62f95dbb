"""Files that are there whole or not at all, and how to know one again."""

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes beside ``path`` and renames, so that a reader, a full disk or Ctrl-C never leaves half a file.

    Args:
        path: the file to make or to replace; its folder must exist.
        write: called with the path of an empty file to fill.
    """
    handle, name = tempfile.mkstemp(suffix=path.suffix, prefix=f".{path.stem}-", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        # mkstemp makes files that the owner alone can read; these are meant to be shared as any other file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
