"""Downloaded zip and tar files, unpacked without letting them write anywhere else."""

import gzip
import io
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from fewshot_ext._files import DAMAGE, check_unpacked_size, temporary_folder


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
        ValueError: a damaged file, up to its last byte; one that would unpack to far more than it has bytes; or a
            member that is encrypted or has no name, an absolute path, ``..`` in it, holes, or is neither a file nor a
            folder (a link could lead anywhere). Nothing is unpacked then.
    """
    archive, folder = Path(archive), Path(folder)
    members = _zip_members if archive.suffix == ".zip" else _tar_members
    with temporary_folder(folder, "unpacking") as temporary:
        try:
            for name, size, stream in members(archive):
                target = temporary / _safe(name, archive)
                target.parent.mkdir(parents=True, exist_ok=True)
                with stream, target.open("wb") as file:
                    shutil.copyfileobj(stream, file, 1 << 20)
                progress(size)
        except (*DAMAGE, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise ValueError(f"{str(archive)!r} is damaged or cut short: {error}") from error
        tops = sorted(temporary.iterdir())
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
    if not path.parts:
        raise ValueError(f"{str(archive)!r} is refused: it has a member without a name")
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
        raise ValueError(f"{str(archive)!r} is refused: its member {name!r} would be written outside of the folder")
    return path


def _zip_members(path: Path) -> Iterator[tuple[str, int, IO[bytes]]]:
    with zipfile.ZipFile(path) as file:
        check_unpacked_size(repr(str(path)), sum(member.file_size for member in file.infolist()), path.stat().st_size)
        for member in file.infolist():
            _safe(member.filename, path)
            # The upper half of these bits is the file's Unix mode, or zero where a machine without one wrote it.
            kind = stat.S_IFMT(member.external_attr >> 16)
            if member.is_dir():
                continue
            if kind not in (0, stat.S_IFREG):
                raise ValueError(f"{str(path)!r} is refused: its member {member.filename!r} is a link or a device")
            if member.flag_bits & 1:
                raise ValueError(f"{str(path)!r} is refused: its member {member.filename!r} is encrypted")
            yield member.filename, member.file_size, file.open(member)


class _Bounded(io.RawIOBase):
    """What a gzip file unpacks to, as far as its size is in proportion to the file's."""

    def __init__(self, path: Path, stream: IO[bytes]) -> None:
        self.path, self.stream, self.count, self.stored = path, stream, 0, path.stat().st_size

    def read(self, size: int = -1) -> bytes:
        chunk = self.stream.read(size)
        self.count += len(chunk)
        check_unpacked_size(repr(str(self.path)), self.count, self.stored)
        return chunk


def _tar_members(path: Path) -> Iterator[tuple[str, int, IO[bytes]]]:
    with gzip.open(path) as unpacked:
        stream = _Bounded(path, unpacked)
        # As a stream, because a seek back would let members lie over each other.
        with tarfile.open(fileobj=stream, mode="r|") as file:
            for member in file:
                if member.isdir():
                    if PurePosixPath(member.name).parts:  # "." is the folder itself
                        _safe(member.name, path)
                elif not member.isfile():
                    raise ValueError(f"{str(path)!r} is refused: its member {member.name!r} is a link or a device")
                elif member.issparse() or member.size < 0:
                    raise ValueError(f"{str(path)!r} is refused: its member {member.name!r} has holes")
                else:
                    yield member.name, member.size, file.extractfile(member)
        # The checksum comes last, behind what tar reads.
        while stream.read(1 << 20):
            pass
