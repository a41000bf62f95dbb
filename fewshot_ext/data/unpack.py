"""Downloaded zip and tar files, unpacked without letting them write anywhere else."""

import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO


def unpack(archive: str | Path, folder: str | Path, progress: Callable[[int], None] = lambda size: None) -> list[Path]:
    """Unpacks a ``.zip``, ``.tar.gz`` or ``.tgz`` file into ``folder``, all of it or nothing.

    Args:
        archive: the file.
        folder: where its members go; must exist. Those that are there already are replaced.
        progress: called with the size of each file once it is written.

    Returns:
        What now lies in ``folder``: the file's topmost entries.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: a damaged file, or a member with an absolute path, with ``..`` in it, or that is neither a file
            nor a folder (a link could lead anywhere). Nothing is unpacked then.
    """
    archive, folder = Path(archive), Path(folder)
    members = _zip_members if archive.suffix == ".zip" else _tar_members
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unpacking-") as temporary:
        try:
            for name, size, stream in members(archive):
                target = Path(temporary, _safe(name, archive))
                target.parent.mkdir(parents=True, exist_ok=True)
                with stream, target.open("wb") as file:
                    shutil.copyfileobj(stream, file, 1 << 20)
                progress(size)
        except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, NotImplementedError) as error:
            raise ValueError(f"{str(archive)!r} is damaged or cut short: {error}") from error
        tops = sorted(Path(temporary).iterdir())
        if not tops:
            raise ValueError(f"{str(archive)!r} holds no files")
        for top in tops:
            target = folder / top.name
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            top.replace(target)
    return [folder / top.name for top in tops]


def _safe(name: str, archive: Path) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or not path.parts:
        raise ValueError(f"{str(archive)!r} is refused: its member {name!r} would be written outside of the folder")
    return path


def _zip_members(path: Path) -> Iterator[tuple[str, int, IO[bytes]]]:
    with zipfile.ZipFile(path) as file:
        for member in file.infolist():
            # The upper half of these bits is the file's Unix mode, or zero where a machine without one wrote it.
            kind = stat.S_IFMT(member.external_attr >> 16)
            if member.is_dir():
                _safe(member.filename, path)
            elif kind not in (0, stat.S_IFREG):
                raise ValueError(f"{str(path)!r} is refused: its member {member.filename!r} is a link or a device")
            else:
                yield member.filename, member.file_size, file.open(member)


def _tar_members(path: Path) -> Iterator[tuple[str, int, IO[bytes]]]:
    with tarfile.open(path) as file:
        for member in file:
            if member.isdir():
                _safe(member.name, path)
            elif not member.isfile():
                raise ValueError(f"{str(path)!r} is refused: its member {member.name!r} is a link or a device")
            else:
                yield member.name, member.size, file.extractfile(member)
