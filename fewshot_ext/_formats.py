"""Files that others have written: reading without running code, and checks against a schema."""

import errno
import json
import re
import types
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor
from torch.serialization import safe_globals

from fewshot_ext._files import check_unpacked_size

Settings = TypeVar("Settings")

# What code that was written for the right content raises for another.
MISFITS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError)


def check_schema(value: Any, schema: Any, name: str = "content") -> None:
    """Raises ValueError unless ``value``, as JSON or ``torch.load`` gives it, is what ``schema`` says.

    Args:
        value: plain containers, numbers, texts and tensors.
        schema: a type or several; ``[schema]`` for a list or tuple of such; ``{"key": schema}`` for a mapping that has
            these keys and perhaps others, where ``"key?"`` may be missing; ``{str: schema}`` for one of any texts.
        name: what to call the value.

    Example:
        >>> check_schema({"way": 5, "rows": [{"shot": 1}]}, {"way": int, "rows": [{"shot": int}], "split?": str})
        >>> check_schema({"way": 5, "rows": [{}]}, {"way": int, "rows": [{"shot": int}]}, "file")
        Traceback (most recent call last):
        ValueError: file['rows'][0] lacks 'shot'
    """
    if isinstance(schema, list):
        _check_type(value, (list, tuple), name)
        for index, part in enumerate(value):
            check_schema(part, schema[0], f"{name}[{index}]")
    elif isinstance(schema, Mapping):
        _check_type(value, (dict,), name)
        for key, part in schema.items():
            if key is str:
                for own in value:
                    _check_type(own, (str,), f"a key of {name}")
                    check_schema(value[own], part, f"{name}[{own!r}]")
                continue
            known = key.removesuffix("?")
            if known in value:
                check_schema(value[known], part, f"{name}[{known!r}]")
            elif known == key:
                raise ValueError(f"{name} lacks {key!r}")
    else:
        _check_type(value, schema if isinstance(schema, tuple) else (schema,), name)
        if isinstance(value, Tensor):
            _check_tensor(value, name)


def _check_type(value: Any, expected: tuple[type, ...], name: str) -> None:
    taken = (*expected, int) if float in expected else expected
    if not isinstance(value, taken) or (isinstance(value, bool) and not {bool, object} & set(expected)):
        raise ValueError(f"{name}: expected {_words(expected)}, got {type(value).__name__}")


def _words(schema: Any) -> str:
    if isinstance(schema, tuple):
        return " or ".join("null" if kind is type(None) else kind.__name__ for kind in schema)
    return "a list" if isinstance(schema, list) else "a mapping" if isinstance(schema, Mapping) else schema.__name__


def _check_tensor(value: Tensor, name: str) -> None:
    # A stride of zero makes any number of elements out of one.
    if value.layout != torch.strided or value.nbytes > value.untyped_storage().nbytes():
        raise ValueError(f"{name}: expected a dense tensor, got one with fewer values than elements")


def typed(cls: type[Settings], values: Mapping[str, Any]) -> Settings:
    """The dataclass ``cls`` with ``values``, each of which has the type that its field is declared with.

    Settings within settings may be dictionaries and tuples lists, as YAML and checkpoints have them.

    Raises:
        ValueError: a setting that there is not, or a value of another type.
    """
    hints, values = _hints(cls), nested(cls, values)
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"there is no setting {name!r} of {cls.__name__}")
        if not _is_a(value, hints[name]):
            raise ValueError(f"{name} of {cls.__name__}: expected {_hint_name(hints[name])}, got {_kind(value)}")
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, Integral) and int(part).bit_length() > 63:
                raise ValueError(f"{name} of {cls.__name__}: expected numbers of 64 bits, got a longer one")
    return cls(**values)


def nested(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` for the dataclass ``cls``: dictionaries made the dataclasses that it declares, and lists tuples."""

    def build(value: Any, hint: Any) -> Any:
        taken = (hint, *get_args(hint))  # both parts of "Settings | None"
        inner = next((part for part in taken if is_dataclass(part)), None)
        if isinstance(value, dict) and inner is not None:
            return typed(inner, value)
        takes_tuple = any(get_origin(part) is tuple for part in taken)
        return tuple(value) if isinstance(value, list) and takes_tuple else value

    hints = _hints(cls)
    return {name: build(value, hints.get(name)) for name, value in values.items()}


@cache
def _hints(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


def _is_a(value: Any, hint: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_is_a(value, part) for part in parts)
    if origin is Literal:
        return isinstance(value, str | int | None) and value in parts
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_a(part, parts[0]) for part in value)
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    return isinstance(value, hint)


def _hint_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")


def _kind(value: Any) -> str:
    # Not the value: it may be of any size.
    return repr(value[:40]) if isinstance(value, str) else type(value).__name__


@contextmanager
def misfits_named(what: str) -> Iterator[None]:
    """Turns what reading a file's content raises into a ValueError of one line that begins with ``what``."""
    try:
        yield
    except MISFITS as error:
        # A ValueError is one of our own checks and says all.
        kind, most = ("", 1000) if isinstance(error, ValueError) else (f"{type(error).__name__}: ", 200)
        raise ValueError(f"{what}: {kind}{' '.join(str(error).split())[:most]}") from error


def read_json(path: Path, schema: Any, what: str) -> Any:
    """The content of a JSON file that ``check_schema`` finds right.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else; the message names it, and says that it is not ``what``.
    """
    text = path.read_bytes()
    with misfits_named(f"{path} does not hold {what}"):
        try:
            content = json.loads(text)
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error
        check_schema(content, schema)
    return content


def repeated(names: Iterable[str]) -> str | None:
    """The first name that comes more than once; None where none does."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


class _NumberType:
    """What stands for ``numpy.dtype`` while a file is read: it keeps the letters of a type, and runs nothing."""

    def __init__(self, code: str = "", *_: object) -> None:
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]


def _plain_number(kind: object, data: object) -> int | float | bool:
    """What stands for the function that makes numpy's scalars: Python's number of these bytes."""
    if type(kind) is not _NumberType or not re.fullmatch("b1|[iu][1248]|f[248]", str(kind.code)):
        raise ValueError("it holds a scalar of numpy that is no number")
    if kind.order not in ("<", ">", "=", "|") or type(data) is not bytes or len(data) != int(kind.code[1:]):
        raise ValueError("it holds a damaged scalar of numpy")
    return np.frombuffer(data, kind.order + kind.code)[0].item()


# Numpy's scalars stand in many checkpoints, as the accuracy of an epoch. Not numpy's own functions are let in, but two
# of ours under their names, of which one keeps letters and the other reads at most eight bytes.
_SCALARS = [
    (_NumberType, "numpy.dtype"),
    (_plain_number, "numpy.core.multiarray.scalar"),
    (_plain_number, "numpy._core.multiarray.scalar"),
]


def _reason(error: Exception) -> str:
    """Why torch refused a file, in a line without its advice to run whatever code is in it."""
    text = str(error)
    named = re.search(r"GLOBAL ([\w.]+)|unrecognized function (.+)|but got (<.+>)", text)
    if "weights_only" in text and named is not None:
        name = next(filter(None, named.groups()))
        return f"it holds something that is not weights and settings, and needs code to run: {name[:200]}"
    reason = text.partition("\n")[0]
    # A KeyError's text is the key alone.
    if not reason or "weights_only" in text or isinstance(error, LookupError):
        return "it holds something that is not weights and settings"
    return reason


def read_weights(path: Path, *, scalars: bool = False) -> Any:
    """What ``torch.save`` wrote to a file, on the CPU: tensors and plain containers, without running code in it.

    Args:
        path: the file.
        scalars: take numpy's scalars too, as Python's numbers.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is another file, is damaged, or holds anything else; a class that would need code to run is
            named.
    """
    if path.is_fifo():  # to open one would wait for a writer for ever
        raise OSError(errno.ESPIPE, "it is a pipe, not a file", str(path))
    with open(path, "rb") as file, warnings.catch_warnings():
        # Torch asks to report each kind of pickle to its authors.
        warnings.filterwarnings("ignore", "Detected pickle protocol")
        try:
            if zipfile.is_zipfile(file):
                with zipfile.ZipFile(file) as members:
                    unpacked = sum(member.file_size for member in members.infolist())
                # Torch does not compress.
                check_unpacked_size("the file", unpacked, path.stat().st_size, ratio=2, least=2**20)
            file.seek(0)
            with safe_globals(_SCALARS if scalars else []):
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # what torch raises depends on where the file is damaged, or what lies there instead
            raise ValueError(_reason(error)) from error
