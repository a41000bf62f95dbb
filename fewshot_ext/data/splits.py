"""Class splits: the official ones by name, and split files in the formats of the field."""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from itertools import zip_longest
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from fewshot_ext._extras import require
from fewshot_ext._files import check_unpacked_size
from fewshot_ext._formats import repeated
from fewshot_ext.data.archive import Split

# What a role is called in the names of folders, of files and of the entries of a JSON file.
ROLES = {
    **dict.fromkeys(("base", "train", "training", "background", "images_background"), Split.BASE),
    **dict.fromkeys(("validation", "val", "valid"), Split.VALIDATION),
    **dict.fromkeys(("novel", "test", "testing", "evaluation", "images_evaluation"), Split.NOVEL),
}
# The role of a file such as base_val.json: images of base classes that are not to train on.
_HELD_OUT = "held out"
_Role = Split | str
SPLIT_NAMES = (
    "miniimagenet",
    "tieredimagenet",
    "cub",
    "cub_easyfsl",
    "cifar_fs",
    "fc100",
    "omniglot_vinyals",
)
# Sorted by name, the first half of the classes is base and the second novel: CUB and Cars196 in metric learning.
HALVES = "halves"
# The lists of metric learning: the columns of the file, of the class and of the role or None where its name tells it.
_TABLES = {
    ("image_id", "class_id", "super_class_id", "path"): (3, 1, None),  # Stanford Online Products
    ("image_name", "item_id", "evaluation_status"): (0, 1, 2),  # In-Shop Clothes
}
_QUERY, _GALLERY = "query", "gallery"
_STATUS = {"train": Split.BASE, _QUERY: Split.NOVEL, _GALLERY: Split.NOVEL}
# Of what a .gz file unpacks to, for lists of names take many times their length once they are read.
_TEXT_RATIO, _LEAST_TEXT = 20, 2**24
_SUFFIXES = (".csv", ".json", ".txt")
_ROTATION = re.compile(r"/rot(000|090|180|270)$")


@dataclass(frozen=True)
class ClassSplit:
    """Which classes are base, validation and novel, and, where the split lists files, which files they hold.

    Attributes:
        roles: the role of each class, by the class's name.
        files: the class of each listed file, by its path as listed; empty where the split names classes alone.
        held_out: those of the listed files that are images of base classes, and not to train on.
        queries: those of ``files`` that are searched in a gallery, which the others of their role are; see
            ``ImageArchive.is_query``.
        name: what to call the split in messages.

    Example:
        >>> split = load_split("miniimagenet")
        >>> len(split.of(Split.BASE)), len(split.of(Split.VALIDATION)), len(split.of(Split.NOVEL))
        (64, 16, 20)
    """

    roles: Mapping[str, Split]
    files: Mapping[str, str] = field(default_factory=dict)
    name: str = "split"
    held_out: frozenset[str] = frozenset()
    queries: frozenset[str] = frozenset()

    def of(self, role: Split) -> list[str]:
        """The classes of one role."""
        return [name for name, given in self.roles.items() if given == role]


@dataclass
class _Draft:
    """A split while its files are read."""

    name: str
    roles: dict[str, Split] = field(default_factory=dict)
    files: dict[str, list[str]] = field(default_factory=dict)
    held_out: set[str] = field(default_factory=set)
    queries: set[tuple[str, str]] = field(default_factory=set)  # file and class

    def add(self, names: Iterable[str], role: Split) -> None:
        for name in names:
            if self.roles.setdefault(name, role) != role:
                raise ValueError(
                    f"{self.name}: class {name!r} is both {self.roles[name].name.lower()} and {role.name.lower()}"
                )

    def add_file(self, path: str, name: str) -> None:
        names = self.files.setdefault(path, [])
        if name not in names:
            names.append(name)
        if len(names) > 1 and "/" in path:
            raise ValueError(f"{self.name}: file {path!r} belongs to both {names[0]!r} and {name!r}")

    def hold_out(self, other: "_Draft") -> None:
        """Takes the files of another draft as images of base classes that are not to train on."""
        if not other.files:
            raise ValueError(f"{other.name}: expected a list of images, as they are held out from training")
        if both := self.files.keys() & other.files.keys():
            raise ValueError(f"{other.name} holds out {sorted(both)[0]!r}, which is listed to train on")
        if new := other.roles.keys() - self.roles.keys():
            raise ValueError(
                f"{other.name} holds out images of class {sorted(new)[0]!r}, of which none are to train on"
            )
        self.add(other.roles, Split.BASE)
        self.files |= other.files
        self.held_out |= other.files.keys()

    def finish(self) -> ClassSplit:
        if not self.roles:
            raise ValueError(f"{self.name} names no class")
        # Of a bare name that several classes list each has its own in its folder.
        listed = {
            (path, name): path if len(names) == 1 else f"{name}/{path}"
            for path, names in self.files.items()
            for name in names
        }
        return ClassSplit(
            self.roles,
            {place: name for (_, name), place in listed.items()},
            self.name,
            held_out=frozenset(place for (path, _), place in listed.items() if path in self.held_out),
            queries=frozenset(listed[entry] for entry in self.queries),
        )


def load_split(name_or_path: str | Path) -> ClassSplit:
    """An official split by name, or one from files.

    Args:
        name_or_path: ``miniimagenet`` (Ravi and Larochelle), ``tieredimagenet``, ``cub`` (100 / 50 / 50 classes,
            Chen et al.), ``cub_easyfsl`` (140 / 30 / 30), ``cifar_fs``, ``fc100``, ``omniglot_vinyals``; or a path,
            which is that of

            - one file for all roles: JSON ``{"train": [class, ...], "val": [...], "test": [...]}``, or CSV with
              the columns ``filename``, ``label`` and ``split``;
            - a list of metric learning: ``cars_annos.mat`` of Cars196, whose first half of classes is base, or
              ``list_eval_partition.txt`` of In-Shop Clothes, of which train is base, query and gallery are novel, and
              the pictures of query are ``queries``;
            - one of three files that differ in a word such as train, val and test, or base, val and novel; the
              other two are looked for beside it;
            - a folder with one such set of files.

            Files for one role are CSV (``filename,label``, as mini-ImageNet has it), JSON (a list of classes or of
            [superclass, class]; or ``class_names``; or ``label_names``, ``image_labels`` and ``image_names``, as the
            closer-look code writes it) or text (a class a line, or ``Ebay_train.txt`` of Stanford Online Products);
            each may end in ``.gz``. Base may be called train, training or background, validation val or valid, novel
            test, testing or evaluation. A fourth one beside them, ``base_val``, lists further images of base classes,
            which are held out from training: the official negative-margin code has it for mini-ImageNet.

    Raises:
        ImportError: scipy is missing, which reads ``cars_annos.mat``.
        OSError: no such name or file.
        ValueError: a file that cannot be read so, no class at all, a class with two roles, a list with other rows
            than its first line says, a file that is both query and gallery, or queries without a gallery; the message
            names the file, and the class or the line.
    """
    name = str(name_or_path)
    if name in SPLIT_NAMES:
        draft = _Draft(f"split {name!r}")
        text = resources.files("fewshot_ext.data").joinpath("class_splits", f"{name}.json").read_text("utf-8")
        _add_json(draft, json.loads(text), None, name)
        return draft.finish()
    path = Path(name).expanduser()
    if path.is_dir():
        files = _files_of_folder(path)
    elif path.is_file():
        files = _files_beside(path)
    else:
        raise FileNotFoundError(
            f"there is no split {name!r}: not a file or folder, nor one of {', '.join(SPLIT_NAMES)}"
        )
    draft = _Draft(f"split {name!r}")
    for file, role in files:
        if role != _HELD_OUT:
            _add_file(draft, file, role)
    for file, role in files:
        if role == _HELD_OUT:
            own = _Draft(f"split file {str(file)!r}")
            _add_file(own, file, Split.BASE)
            draft.hold_out(own)
    return draft.finish()


def role_of(name: str) -> Split | None:
    """The role that a word such as "train" stands for, or None."""
    return ROLES.get(name.lower())


def _role_in(file: Path) -> tuple[_Role | None, str]:
    """The role that a file's name tells, and the name with that word left out."""
    words = re.split(r"([^A-Za-z]+)", file.name.removesuffix(".gz"))
    found = [index for index, word in enumerate(words) if role_of(word) is not None]
    if not found or len(found) > 2:
        return None, file.name
    role: _Role | None = role_of(words[found[0]])
    if len(found) == 2:
        if words[found[0]].lower() != "base" or role_of(words[found[1]]) != Split.VALIDATION:
            return None, file.name
        role = _HELD_OUT
    words[found[0] : found[-1] + 1] = "*"
    return role, "".join(words)


def _is_split_file(path: Path) -> bool:
    name = path.name.removesuffix(".gz")
    return path.is_file() and not name.startswith(".") and name.endswith(_SUFFIXES)


def _files_beside(path: Path) -> list[tuple[Path, _Role | None]]:
    role, pattern = _role_in(path)
    if role is None:
        return [(path, None)]
    beside = ((file, *_role_in(file)) for file in sorted(path.parent.iterdir()) if _is_split_file(file))
    found = [(file, role) for file, role, other in beside if role is not None and other == pattern]
    return found or [(path, role)]


def _files_of_folder(folder: Path) -> list[tuple[Path, _Role | None]]:
    groups: dict[str, list[tuple[Path, _Role | None]]] = {}
    for file in sorted(folder.iterdir()):
        role, pattern = _role_in(file)
        if role is not None and _is_split_file(file):
            groups.setdefault(pattern, []).append((file, role))
    if len(groups) != 1:
        found = f"{', '.join(groups)}; name one of the files" if groups else "none"
        raise ValueError(
            f"{str(folder)!r}: expected one set of split files such as train, val and test.csv; got {found}"
        )
    return next(iter(groups.values()))


def _add_file(draft: _Draft, path: Path, role: Split | None) -> None:
    content = path.read_bytes()
    try:
        if path.suffix == ".gz":
            # One byte more than is taken, to see that there is more.
            most = max(_LEAST_TEXT, _TEXT_RATIO * len(content))
            unpacked = gzip.GzipFile(fileobj=io.BytesIO(content)).read(most + 1)
            check_unpacked_size(
                f"split file {str(path)!r}", len(unpacked), len(content), ratio=_TEXT_RATIO, least=_LEAST_TEXT
            )
            content = unpacked
        kind = Path(path.name.removesuffix(".gz")).suffix
        if kind == ".mat":
            _add_cars(draft, content)
            return
        text = content.decode("utf-8-sig")
        if kind == ".json":
            _add_json(draft, json.loads(text, object_pairs_hook=_unrepeated, parse_int=_number), role, str(path))
        elif kind == ".csv":
            _add_csv(draft, text, role, str(path))
        elif kind == ".txt":
            table = _table(text)
            if role is None and (table is None or table.columns[2] is None):
                raise ValueError(
                    f"split file {str(path)!r} holds one role, which its name must tell: train.txt, val.txt, test.txt"
                )
            if table is not None:
                _add_table(draft, table, role, str(path))
                return
            draft.add((_ROTATION.sub("", line.strip()) for line in text.splitlines() if line.strip()), role)
        else:
            raise ValueError(
                f"split file {str(path)!r}: expected a name that ends in {', '.join(_SUFFIXES)} or one of these and .gz"
            )
    except (
        json.JSONDecodeError,
        UnicodeDecodeError,
        OSError,
        EOFError,
        zlib.error,
        csv.Error,
        RecursionError,
        _Unfit,
    ) as error:
        raise ValueError(f"split file {str(path)!r} is damaged: {error}") from error


class _Table(NamedTuple):
    """A list of metric learning: its rows by the number of their line, and which column is what."""

    rows: dict[int, list[str]]
    columns: tuple[int, int, int | None]
    count: str | None  # what the line above the header says


def _table(text: str) -> _Table | None:
    """The list that a text holds; None for another text."""
    rows = {number: line.split() for number, line in enumerate(text.splitlines(), start=1)}
    # The number of its rows stands above In-Shop's header.
    for number in (1, 2):
        columns = _TABLES.get((*rows.get(number, ()),))
        if columns is not None:
            below = {line: row for line, row in rows.items() if line > number and row}
            return _Table(below, columns, " ".join(rows[1]) if number == 2 else None)
    return None


def _add_table(draft: _Draft, table: _Table, role: Split | None, path: str) -> None:
    file, name, status = table.columns
    uses: dict[tuple[str, str], str] = {}
    for line, row in table.rows.items():
        use = None if status is None or len(row) <= status else row[status]
        given = role if status is None else _STATUS.get(use)
        if given is None or len(row) <= max(file, name):
            columns = 1 + max(file, name, status or 0)
            last = "" if status is None else f", the last one of {', '.join(_STATUS)}"
            raise ValueError(
                f"split file {path!r}, line {line}: expected {columns} columns{last}; got {' '.join(row)[:200]!r}"
            )
        draft.add([row[name]], given)
        draft.add_file(row[file], row[name])
        if use is not None and (before := uses.setdefault((row[file], row[name]), use)) != use:
            raise ValueError(f"split file {path!r}, line {line}: file {row[file]!r} is both {before} and {use}")
    if table.count not in (None, str(len(table.rows))):
        raise _Unfit(f"its first line says {table.count} pictures, and {len(table.rows)} follow")
    draft.queries |= {listed for listed, use in uses.items() if use == _QUERY}
    if draft.queries and _GALLERY not in uses.values():
        raise _Unfit(f"it has queries and no {_GALLERY} to search them in")


def _add_cars(draft: _Draft, content: bytes) -> None:
    require("train", "scipy")
    from scipy.io import loadmat

    try:
        table = loadmat(io.BytesIO(content), squeeze_me=True)
        names = [str(name) for name in table["class_names"]]
        files = [str(file) for file in table["annotations"]["relative_im_path"]]
        classes = [names[number - 1] for number in table["annotations"]["class"].tolist()]
    except Exception as error:  # whatever a reader of a binary format stumbles over
        raise _Unfit(f"it is no cars_annos.mat: {error}") from error
    for number, name in enumerate(names):
        draft.add([name], Split.BASE if number < len(names) // 2 else Split.NOVEL)
    for file, name in zip(files, classes, strict=True):
        draft.add_file(file, name)


class _Unfit(ValueError):
    """What a parser of JSON lets pass, or refuses without the name of the file."""


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if (name := repeated(name for name, _ in pairs)) is not None:
        raise _Unfit(f"it has {name!r} twice")
    return dict(pairs)


def _number(text: str) -> int:
    if len(text) > 20:
        raise _Unfit(f"it has a number of {len(text):,} digits")
    return int(text)


def _add_csv(draft: _Draft, text: str, role: Split | None, path: str) -> None:
    table = csv.reader(io.StringIO(text))
    columns = [column.strip() for column in next(table, ())]
    needed = {"filename", "label"} if role is not None else {"filename", "label", "split"}
    if not needed <= set(columns):
        raise ValueError(
            f"split file {path!r}: expected the columns {', '.join(sorted(needed))}, got {', '.join(sorted(columns))}"
        )
    for cells in filter(None, table):
        row = dict(zip_longest(columns, (cell.strip() for cell in cells[: len(columns)]), fillvalue=""))
        given = role if role is not None else role_of(row["split"])
        if given is None or not row["filename"] or not row["label"]:
            raise ValueError(f"split file {path!r}, line {table.line_num}: got {row}")
        draft.add([row["label"]], given)
        draft.add_file(row["filename"], row["label"])


def _add_json(draft: _Draft, content: Any, role: Split | None, path: str) -> None:
    if role is None:
        lists = (
            {name: value for name, value in content.items() if role_of(name) is not None}
            if isinstance(content, dict)
            else {}
        )
        if not lists:
            raise ValueError(f'split file {path!r}: expected a JSON object such as {{"train": [...], "test": [...]}}')
        odd = [name for name, value in content.items() if name not in lists and isinstance(value, list)]
        if odd:
            raise ValueError(f"split file {path!r} has classes under {odd[0]!r}, no role such as train or test")
        for name, value in lists.items():
            draft.add(_class_names(value, path), role_of(name))
    elif isinstance(content, dict) and "label_names" in content:
        _add_image_lists(draft, content, role, path)
    else:
        draft.add(_class_names(content.get("class_names") if isinstance(content, dict) else content, path), role)


def _add_image_lists(draft: _Draft, content: dict, role: Split, path: str) -> None:
    """The closer-look form, whose ``label_names`` are the classes of all roles."""
    names, labels = content["label_names"], content.get("image_labels")
    images = content.get("image_names")
    if not (_is_list_of(names, str) and _is_list_of(labels, int) and _is_list_of(images, str)):
        raise ValueError(f"split file {path!r}: expected lists label_names, image_labels and image_names")
    if len(labels) != len(images) or not all(0 <= label < len(names) for label in labels):
        raise ValueError(
            f"split file {path!r}: expected image_labels to give a number below {len(names)} for each image"
        )
    draft.add((names[label] for label in dict.fromkeys(labels)), role)
    for image, label in zip(images, labels, strict=True):
        # The paths are those of the machine that wrote the file; the class's folder and the file's name last.
        draft.add_file("/".join(PurePosixPath(image).parts[-2:]), names[label])


def _class_names(value: Any, path: str) -> list[str]:
    if not isinstance(value, list):
        raise ValueError(f"split file {path!r}: expected a list of classes, got {type(value).__name__}")
    names = [entry[-1] if isinstance(entry, list) and entry else entry for entry in value]
    if not _is_list_of(names, str):
        raise ValueError(f"split file {path!r}: expected a list of class names or of [superclass, class]")
    return names


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(entry, kind) for entry in value)
