"""The ``.npz`` file of an image archive: written whole, and used only after every array has been checked."""

import hashlib
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from fewshot_ext import _extras
from fewshot_ext._files import DAMAGE, check_unpacked_size, replace_file
from fewshot_ext._threads import in_threads
from fewshot_ext.data.pictures import MODES, damage_named, encode_jpeg, opened

FORMAT_VERSION = 1
_CHUNK = 256


@dataclass(frozen=True)
class ArraySpec:
    """What an array of the file must be."""

    kinds: str  # of numpy.dtype.kind
    ranks: tuple[int, ...]
    uint8: bool = False

    def __str__(self) -> str:
        what = "uint8" if self.uint8 else {"U": "text", "f": "floats"}.get(self.kinds, "integers")
        return f"{what} of {' or '.join(map(str, self.ranks))} dimensions"

    def fits(self, dtype: np.dtype, shape: tuple[int, ...]) -> bool:
        return dtype.kind in self.kinds and len(shape) in self.ranks and (not self.uint8 or dtype == np.uint8)


_IMAGE_FIELD = ArraySpec("iu", (1,))
_ARRAYS = {
    "images": ArraySpec("iu", (3, 4), uint8=True),
    "data": ArraySpec("iu", (1,), uint8=True),
    "offsets": ArraySpec("iu", (1,)),
    "labels": ArraySpec("iu", (1,)),
    "class_names": ArraySpec("U", (1,)),
    "class_split": ArraySpec("iu", (1,)),
    "class_words": ArraySpec("U", (1,)),
    "format_version": ArraySpec("iu", (0,)),
    "sha256": ArraySpec("U", (0,)),
}
_NEEDED = ("labels", "class_names", "class_split")


class _Unfit(ValueError):
    """A finding of ours, with the file's name in it already."""


def read(path: str | Path) -> dict[str, Any]:
    """The arguments of ``ImageArchive.from_arrays`` that a file holds; see ``ImageArchive.load``."""
    arrays = read_arrays(path, lambda key: _ARRAYS.get(key, _IMAGE_FIELD))
    try:
        _verify(path, arrays)
        return _arguments(path, arrays)
    except UnicodeError as error:
        raise ValueError(f"{str(path)!r} holds texts that are none: {error}") from error


def has_checksum(path: str | Path) -> bool:
    """Whether the file carries a checksum, which ``load`` then verifies."""
    with zipfile.ZipFile(Path(path).expanduser()) as file:
        return "sha256.npy" in file.namelist()


def write(path: str | Path, pixels: np.ndarray, arrays: Mapping[str, np.ndarray], jpeg_quality: int | None) -> None:
    """Writes pixels, uint8 ``[N, C, H, W]``, and the other arrays; see ``ImageArchive.save``."""
    if jpeg_quality is not None and not 1 <= jpeg_quality <= 100:
        raise ValueError(f"jpeg_quality: expected a number in [1, 100], got {jpeg_quality}")
    if jpeg_quality is None:
        channels_last = pixels[:, 0] if pixels.shape[1] == 1 else pixels.transpose(0, 2, 3, 1)
        images = {"images": np.ascontiguousarray(channels_last)}
    else:
        _extras.require("train", "PIL")
        images = pack_files(list(in_threads(lambda image: encode_jpeg(image, jpeg_quality), pixels)))
    narrow = {key: _narrow(array) if array.dtype == np.int64 else array for key, array in arrays.items()}
    content = {**images, **narrow, "format_version": np.array(FORMAT_VERSION)}
    content["sha256"] = np.array(_digest(content))
    replace_file(Path(path).expanduser(), lambda temporary: _write(temporary, content))


def pack_files(files: list[bytes]) -> dict[str, np.ndarray]:
    """The arrays ``data`` and ``offsets`` that hold encoded pictures one behind the other."""
    return {
        "data": np.frombuffer(b"".join(files), np.uint8),
        "offsets": np.cumsum([0, *map(len, files)], dtype=np.int64),
    }


def read_arrays(path: str | Path, expected: Callable[[str], ArraySpec | None]) -> dict[str, np.ndarray]:
    """Every array of an ``.npz`` file, its header held against ``expected(key)`` before its content is read.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is no ``.npz`` file, is damaged or cut short, or an array is not what is expected.
    """
    path = Path(path).expanduser()
    name = repr(str(path))
    if path.is_dir():
        raise IsADirectoryError(f"{name} is a folder, not an image archive")
    arrays: dict[str, np.ndarray] = {}
    try:
        stream = path.open("rb")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no image archive {name}") from error
    with stream:
        try:
            with zipfile.ZipFile(stream) as file:
                _check_size(name, sum(member.file_size for member in file.infolist()), path)
                for member in file.infolist():
                    key = member.filename.removesuffix(".npy")
                    if key == member.filename or key in arrays:
                        raise _Unfit(f"{name} is not an image archive: it holds {member.filename!r}")
                    arrays[key] = _read_array(file, member, f"{key!r} in {name}", expected(key))
        except _Unfit:
            raise
        except (*DAMAGE, OSError, ValueError) as error:
            raise ValueError(f"{name} is not an .npz file, is damaged or cut short: {error}") from error
    return arrays


def _check_size(name: str, unpacked: int, path: Path) -> None:
    try:
        check_unpacked_size(name, unpacked, path.stat().st_size)
    except ValueError as error:
        raise _Unfit(str(error)) from error


def _read_array(file: zipfile.ZipFile, member: zipfile.ZipInfo, what: str, expected: ArraySpec | None) -> np.ndarray:
    with file.open(member) as stream:
        try:
            version = npy.read_magic(stream)
            read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, _, dtype = read_header(stream)
        except Exception as error:  # the header is Python source, and fails in many ways
            # Numpy's own words advise to unpickle whatever is in the file.
            raise _Unfit(f"{what} is not a numpy array: its header cannot be read") from error
        if min(shape, default=0) < 0 or not dtype.itemsize:
            raise _Unfit(f"{what} is damaged: its header says {dtype} of shape {shape}")
        if dtype.hasobject:
            raise _Unfit(f"{what} holds Python objects; they are pickles, which can run code, and are not read")
        if expected is not None and not expected.fits(dtype, shape):
            raise _Unfit(f"{what}: expected {expected}, got {dtype} of shape {shape}")
        count = int(np.prod(shape, dtype=object))
        # Numpy trusts the header and would set the memory aside first.
        if count * dtype.itemsize != member.file_size - stream.tell():
            raise _Unfit(
                f"{what} is damaged: its header says shape {shape}, but {member.file_size - stream.tell()} bytes follow"
            )
    with file.open(member) as stream:
        return npy.read_array(stream, allow_pickle=False)


def _verify(path: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError where the format is newer than this program, or the arrays do not match their checksum."""
    version = int(arrays.get("format_version", FORMAT_VERSION))
    if not 1 <= version <= FORMAT_VERSION:
        raise ValueError(
            f"{str(path)!r} has format version {version}; this fewshot_ext reads up to {FORMAT_VERSION}: update it"
        )
    if "sha256" not in arrays:
        return
    found = _digest(arrays)
    if found != str(arrays["sha256"]):
        raise ValueError(
            f"{str(path)!r} is damaged or was changed: the sha256 of its arrays is {found}, "
            f"but it was written with {arrays['sha256']}"
        )


def _arguments(path: str | Path, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    name = repr(str(path))
    missing = [key for key in _NEEDED if key not in arrays]
    if "images" not in arrays and not {"data", "offsets"} <= arrays.keys():
        missing.append("images (or data and offsets)")
    if missing:
        raise ValueError(f"{name} is not an image archive: {', '.join(missing)} missing; it holds {', '.join(arrays)}")
    if "images" in arrays and "data" in arrays:
        raise ValueError(f"{name} holds both images and data; an archive has one of them")
    images = arrays["images"] if "images" in arrays else _decode_all(arrays["data"], arrays["offsets"], name)
    fields = {key: value for key, value in arrays.items() if key not in _ARRAYS}
    own = {key: arrays.get(key) for key in (*_NEEDED, "class_words")}
    return {"images": images, **own, "image_fields": fields}


def _decode_all(data: np.ndarray, offsets: np.ndarray, name: str) -> np.ndarray:
    _extras.require("train", "PIL")
    count = len(offsets) - 1
    if count < 1 or offsets[0] != 0 or offsets[-1] != len(data) or (offsets[1:] <= offsets[:-1]).any():
        raise ValueError(f"'offsets' in {name}: expected to rise from 0 to the {len(data)} bytes of data")

    def image(index: int):
        content = data[offsets[index] : offsets[index + 1]].tobytes()
        return opened(content, f"image {index} in {name}", ("JPEG", "PNG"))

    def fill(start: int) -> None:
        for index in range(start, min(start + _CHUNK, count)):
            with image(index) as picture, damage_named(f"image {index} in {name}"):
                if _form(picture) != form:
                    raise ValueError(f"it is {_form(picture)}, but the first image is {form}")
                images[index] = picture

    with image(0) as first:
        form = _form(first)
        if first.mode not in MODES:
            raise ValueError(f"image 0 in {name} is {form}; an archive holds L or RGB images")
        check_unpacked_size(name, count * first.height * first.width * len(first.mode), len(data))
        images = np.empty((count, first.height, first.width, *(() if first.mode == "L" else (3,))), np.uint8)
    for _ in in_threads(fill, range(0, count, _CHUNK)):
        pass
    return images


def _form(picture) -> str:
    return f"{picture.width} x {picture.height} {picture.mode}"


def _narrow(values: np.ndarray) -> np.ndarray:
    """The same integers in the smallest dtype that holds them."""
    return values.astype(np.result_type(np.min_scalar_type(values.min()), np.min_scalar_type(values.max())))


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for key in sorted(arrays.keys() - {"sha256"}):
        array = np.ascontiguousarray(arrays[key])
        digest.update(f"{key} {array.dtype.str} {np.shape(arrays[key])}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    # Encoded pictures do not shrink any further; for pixels more effort gains little and takes minutes.
    compression = zipfile.ZIP_STORED if "data" in arrays else zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(path, "w", compression, compresslevel=1) as file:
        for key, array in arrays.items():
            # A member opened by name carries no date, and so the same arrays give the same file.
            with file.open(f"{key}.npy", "w", force_zip64=True) as stream:
                npy.write_array(stream, array, allow_pickle=False)
