"""The walk over folders of pictures that all commands share, and its account of what it passes over."""

import errno
import os
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fewshot_ext.data.pictures import suffixes

# Told by the help of every command that takes a folder, and by docs/command_line.md.
FOLDER_RULE = (
    "Folders of pictures: Pictures are looked for in the folder and in all folders below it, and links are followed. "
    "The class of a picture is the first folder on the way down to it, however deep the picture lies in that folder. "
    "Folders train, val and test (or base, novel, ...) around the classes' folders tell roles, and a folder that "
    "everything lies in is stepped over. These are errors: a picture in no class's folder, a class's folder without "
    "pictures, a class in two roles, and a folder that cannot be read. These are passed over: hidden files and folders "
    "(their names begin with a dot), files of other kinds, pipes and broken links, and folders that a link leads to a "
    "second time. Whatever is passed over is counted and named on the terminal and in the results."
)
_HIDDEN, _OTHER_KINDS, _SPECIAL = "hidden files and folders", "files of other kinds", "pipes, broken links and the like"
_AGAIN, _EMPTY = "links to folders that were read already", "folders without pictures"
_NEEDS = {
    ".avif": " (pillow 11.3 or later reads them)",
    **dict.fromkeys((".heic", ".heif", ".hif"), " (with pillow-heif installed they are read)"),
}
_KINDS_NAMED = 6


@dataclass(frozen=True)
class FoundPictures:
    """What a walk over a folder found.

    Attributes:
        root: the folder.
        files: the pictures, sorted by path.
        folders: the folders below ``root`` that were looked into, as parts of their paths.
        passed_over: a line on each kind of thing that is no picture, with its number and an example.
    """

    root: Path
    files: list[Path]
    folders: list[tuple[str, ...]]
    passed_over: tuple[str, ...]

    @cached_property
    def parts(self) -> list[tuple[str, ...]]:
        """The folders between ``root`` and each file, and the file's name."""
        return [file.relative_to(self.root).parts for file in self.files]


def find_pictures(folder: str | Path) -> FoundPictures:
    """The pictures in ``folder`` and in all folders below it.

    Raises:
        NotADirectoryError: ``folder`` is no folder.
        OSError: it, or a folder below it, cannot be read.
        ValueError: it holds no picture; the message tells what it holds.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise NotADirectoryError(f"{str(root)!r} is not a folder")
    taken = suffixes()
    files: list[Path] = []
    folders: list[tuple[str, ...]] = []
    others: dict[str, list[str]] = {label: [] for label in (_OTHER_KINDS, _HIDDEN, _SPECIAL, _AGAIN, _EMPTY)}
    waiting, seen = [(root, ())], set()
    while waiting:
        path, parts = waiting.pop()
        # Data sets are often put together from links, and a link to a folder above would never end.
        real = os.path.realpath(path)
        if real in seen:
            others[_AGAIN].append("/".join(parts))
            continue
        seen.add(real)
        folders.append(parts)
        below = []
        for entry in _entries(path):
            name, kind = "/".join((*parts, entry.name)), _kind(entry)
            if entry.name.startswith("."):
                others[_HIDDEN].append(name)
            elif kind == "folder":
                below.append((path / entry.name, (*parts, entry.name)))
            elif kind == "special":
                others[_SPECIAL].append(name)
            elif os.path.splitext(entry.name)[1].lower() in taken:
                files.append(path / entry.name)
            else:
                others[_OTHER_KINDS].append(name)
        waiting += reversed(below)
    holding = {file.parent for file in files}
    holding |= {parent for folder in holding for parent in folder.parents}
    others[_EMPTY] = ["/".join(parts) for parts in folders if parts and root.joinpath(*parts) not in holding]
    passed_over = tuple(_account(others))
    if not files:
        told = "; ".join((f"looked for {', '.join(sorted(taken))}", *passed_over))
        raise ValueError(f"no pictures in {str(root)!r}: {told}")
    return FoundPictures(root, sorted(files), folders[1:], passed_over)


def list_images(folder: str | Path) -> list[Path]:
    """The picture files in ``folder`` and all folders below it, sorted by path.

    Hidden files, files of other kinds and whatever is no regular file are passed over, which a warning tells with
    their numbers.

    Raises:
        NotADirectoryError: ``folder`` is no folder.
        OSError: it, or a folder below it, cannot be read.
        ValueError: it holds no picture.

    Example:
        >>> list_images(".")
        Traceback (most recent call last):
        ValueError: no pictures in '.': looked for ...
    """
    found = find_pictures(folder)
    warn_passed_over(found.root, found.passed_over)
    return found.files


def warn_passed_over(root: str | Path, passed_over: Iterable[str]) -> None:
    """Warns of what a walk passed over, where a program and not a command asked for it."""
    told = "; ".join(passed_over)
    if told:
        warnings.warn(f"{str(root)!r}: {told}", stacklevel=3)


def _entries(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise type(error)(error.errno, f"this folder cannot be read: {error.strerror}", str(folder)) from error


def _kind(entry: os.DirEntry) -> str:
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else "special"
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself
            return "special"
        raise


def _account(others: dict[str, list[str]]) -> Iterable[str]:
    for label, names in others.items():
        if not names:
            continue
        if label == _OTHER_KINDS:
            counts = Counter(os.path.splitext(name)[1].lower() or "without a suffix" for name in names).most_common()
            kinds = [f"{count:,} {kind}{_NEEDS.get(kind, '')}" for kind, count in counts[:_KINDS_NAMED]]
            kinds += [f"{sum(count for _, count in counts[_KINDS_NAMED:]):,} others"] if counts[_KINDS_NAMED:] else []
            label += f" ({', '.join(kinds)})"
        yield f"{label} passed over: {len(names):,}, {'namely' if len(names) == 1 else 'such as'} {names[0]!r}"
