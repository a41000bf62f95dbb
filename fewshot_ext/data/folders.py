"""Folders of picture files, one folder a class, read into an archive."""

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import takewhile, zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fewshot_ext._files import check_unpacked_size, is_text
from fewshot_ext._threads import in_threads
from fewshot_ext._validation import check_count
from fewshot_ext.data.archive import HELD_OUT, IS_QUERY, ImageArchive, Split
from fewshot_ext.data.pictures import check_reading, decode, picture_size
from fewshot_ext.data.splits import HALVES, ClassSplit, load_split, role_of
from fewshot_ext.data.walk import FoundPictures, find_pictures, warn_passed_over

_WORDNET_ID = re.compile(r"n\d{8}")


class _Found(NamedTuple):
    """What is known of a picture without a look at it."""

    name: str  # of its class
    role: Split
    held_out: bool = False
    is_query: bool = False


@dataclass(frozen=True)
class FolderListing:
    """What a folder holds, before any picture is opened.

    Attributes:
        files: the pictures, class by class.
        labels: the class of each.
        class_names, class_split: as in ``ImageArchive``.
        held_out: of each picture, whether the split holds it out from training.
        is_query: of each picture, as in ``ImageArchive``.
        left_out: number of pictures that the split does not name.
        passed_over: a line on each kind of thing that was passed over, with its number.
    """

    files: list[Path]
    labels: list[int]
    class_names: list[str]
    class_split: list[Split]
    held_out: list[bool]
    is_query: list[bool]
    left_out: int = 0
    passed_over: tuple[str, ...] = ()

    @property
    def classes(self) -> list[str]:
        """The class of each picture by its name."""
        return [self.class_names[label] for label in self.labels]


def list_folder(
    root: str | Path, split: str | Path | Split | ClassSplit | None = None, class_depth: int = 1
) -> FolderListing:
    """Finds the pictures of a folder tree and their classes by ``walk.FOLDER_RULE``; see ``read_folder``."""
    check_count("class_depth", class_depth, 1)
    pictures = find_pictures(root)
    parts, told = pictures.parts, list(pictures.passed_over)
    if split is None or split == HALVES or isinstance(split, Split):
        top = _common_folders(parts, class_depth)
        if top:
            told.append(f"folders above those of the classes stepped over: {top}, namely {'/'.join(parts[0][:top])!r}")
        role = Split.NOVEL if split == HALVES else split
        found = _by_folder(pictures, top, role, class_depth, told)
        if split == HALVES:
            names = sorted({name for name, *_ in found})
            base = {*names[: len(names) // 2]}
            found = [_Found(name, Split.BASE if name in base else Split.NOVEL) for name, *_ in found]
    else:
        found = _by_split(pictures, split if isinstance(split, ClassSplit) else load_split(split), told)

    roles: dict[str, Split] = {}
    for name, role, *_ in filter(None, found):
        if roles.setdefault(name, role) != role:
            raise ValueError(
                f"class {name!r} of {str(root)!r} is both {roles[name].name.lower()} and {role.name.lower()}: "
                "--split (base, validation, novel or the name of a split) gives it one role"
            )
    names = sorted(roles, key=lambda name: (roles[name], name))
    label = {name: number for number, name in enumerate(names)}
    kept = sorted(
        (label[entry.name], file, entry) for entry, file in zip(found, pictures.files, strict=True) if entry is not None
    )
    left_out = len(found) - len(kept)
    if left_out:
        first = pictures.files[found.index(None)].relative_to(pictures.root)
        told.append(f"pictures that the split does not name left out: {left_out:,}, such as {str(first)!r}")
    searched = {number for number, _, entry in kept if not entry.is_query}
    lone = [file for number, file, entry in kept if entry.is_query and number not in searched]
    if lone:
        first = lone[0].relative_to(pictures.root)
        told.append(f"queries whose class has no picture in the gallery: {len(lone):,}, such as {str(first)!r}")
    return FolderListing(
        files=[file for _, file, _ in kept],
        labels=[number for number, *_ in kept],
        class_names=names,
        class_split=[roles[name] for name in names],
        held_out=[entry.held_out for *_, entry in kept],
        is_query=[entry.is_query for *_, entry in kept],
        left_out=left_out,
        passed_over=tuple(told),
    )


def read_folder(
    root: str | Path,
    split: str | Path | Split | ClassSplit | None = None,
    *,
    size: int | None = None,
    mode: str | None = None,
    resize: str = "crop",
    class_depth: int = 1,
    progress: bool = False,
) -> ImageArchive:
    """An archive of a folder tree, ``root/CLASS/.../*.jpg``; what is passed over is told by a warning.

    Folders that all pictures lie in are stepped over, so that ``root`` may be the folder above the classes. With no
    split, folders ``train``, ``val`` and ``test`` (or ``base``, ``novel``, ``images_background``, ...) around
    those of the classes tell the roles; with neither, every class is novel.

    Args:
        root: the folder.
        split: a split's name or path (see ``load_split``), one role for every class, or "halves", by which the first
            half of the classes is base and the second novel, as metric learning divides CUB and Cars196. Pictures of
            other classes, and those that a split with file lists does not list, are left out. Where all pictures lie in
            one folder a split with file lists tells their classes; for ImageNet's the file names do. The list of
            In-Shop Clothes marks its queries, see ``ImageArchive.is_query``.
        size, resize: as in ``read_image``; without a size, all pictures must have the same.
        mode: "RGB", "L", or None for L where every picture is gray and RGB otherwise.
        class_depth: folders that name a class: with 2, as Omniglot has it, ``Greek/alpha/1.png`` is of the class
            ``Greek/alpha``, and with 1 of the class ``Greek``.
        progress: show a bar with the time left on a terminal.

    Raises:
        ImportError: Pillow is missing.
        OSError: the folder, one in it or a picture cannot be opened.
        ValueError: no pictures, a picture in no class's folder, a class's folder without pictures, a class with two
            roles, a class of the split without pictures, a name that is not UTF-8, a damaged picture, pictures of
            unequal size where none is asked for. The message names the class or the picture.
    """
    check_reading(size, mode, resize)
    listing = list_folder(root, split, class_depth)
    warn_passed_over(root, listing.passed_over)
    return read_listing(listing, size=size, mode=mode, resize=resize, progress=progress)


def without_damaged(listing: FolderListing, progress: bool = False) -> FolderListing:
    """The listing without the pictures that cannot be decoded; ``passed_over`` says how many.

    Raises:
        ValueError: no picture of a class is left.
    """

    def trouble(file: Path) -> str | None:
        try:
            decode(file)
        except (OSError, ValueError) as error:
            return str(error)
        return None

    found = list(_shown(in_threads(trouble, listing.files), len(listing.files), "looking", progress))
    kept = [index for index, message in enumerate(found) if message is None]
    if len(kept) == len(found):
        return listing
    labels = [listing.labels[index] for index in kept]
    if lost := sorted(set(listing.labels) - set(labels)):
        raise ValueError(f"class {listing.class_names[lost[0]]!r} has no picture that can be read")
    first = next(message for message in found if message is not None)
    return replace(
        listing,
        files=[listing.files[index] for index in kept],
        labels=labels,
        held_out=[listing.held_out[index] for index in kept],
        is_query=[listing.is_query[index] for index in kept],
        passed_over=(
            *listing.passed_over,
            f"pictures that cannot be read left out: {len(found) - len(kept):,}, such as this: {first}",
        ),
    )


def read_listing(
    listing: FolderListing,
    *,
    size: int | None = None,
    mode: str | None = None,
    resize: str = "crop",
    progress: bool = False,
) -> ImageArchive:
    """As ``read_folder``, of what ``list_folder`` found."""
    shape = (size, size)
    if size is None or mode is None:
        shapes = _shown(in_threads(picture_size, listing.files), len(listing.files), "looking", progress)
        gray, first = True, None
        for file, (height, width, own_mode) in zip(listing.files, shapes, strict=True):
            gray &= own_mode == "L"
            first = first or (height, width)
            if size is None and (height, width) != first:
                raise ValueError(
                    f"{str(file)!r} is {height} x {width}, but {str(listing.files[0])!r} is {first[0]} x {first[1]}: "
                    "give a size to resize them to (fewshot-ext data pack --size)"
                )
        mode = mode or ("L" if gray else "RGB")
        shape = (size, size) if size is not None else first
    if size is None:
        stored = sum(file.stat().st_size for file in listing.files)
        unpacked = len(listing.files) * (1 if mode == "L" else 3) * shape[0] * shape[1]
        check_unpacked_size(f"{str(listing.files[0])!r} and the other pictures", unpacked, stored)
    images = np.empty((len(listing.files), 1 if mode == "L" else 3, *shape), np.uint8)

    def read(file: Path) -> np.ndarray:
        return decode(file, size=size, mode=mode, resize=resize)

    decoded = _shown(in_threads(read, listing.files), len(listing.files), "reading", progress)
    for index, image in enumerate(decoded):
        images[index] = image
    archive = ImageArchive.from_arrays(
        images.transpose(0, 2, 3, 1),
        np.array(listing.labels),
        listing.class_names,
        np.array(listing.class_split),
        image_fields={
            name: np.array(marks, np.int64)
            for name, marks in ((HELD_OUT, listing.held_out), (IS_QUERY, listing.is_query))
            if any(marks)
        },
    )
    return replace(archive, passed_over=listing.passed_over)


def _common_folders(parts: list[tuple[str, ...]], class_depth: int) -> int:
    """How many folders every picture lies in, short of its class's own and of one that tells a role."""
    same = takewhile(lambda names: len(set(names)) == 1, zip(*(part[:-1] for part in parts), strict=False))
    common = min(sum(1 for _ in same), max(0, min(map(len, parts)) - 1 - class_depth))
    return next((depth for depth in range(common) if role_of(parts[0][depth]) is not None), common)


def _by_folder(
    pictures: FoundPictures, top: int, role: Split | None, class_depth: int, told: list[str]
) -> list[_Found]:
    root, parts = str(pictures.root), [part[top:] for part in pictures.parts]
    tops = {part[0]: role_of(part[0]) for part in parts if len(part) > 1}
    roles = set(tops.values()) - {None}
    # A class may be called "train", as one of CIFAR-100 is; two such folders are roles.
    nested = bool(roles) and (None not in tops.values() or len(roles) > 1)
    if nested and None in tops.values():
        odd = next(name for name, found in tops.items() if found is None)
        raise ValueError(f"{root!r} holds folders for roles, such as train and test, beside the folder {odd!r}")
    found = []
    for part in parts:
        names = part[nested:-1][:class_depth]
        if len(names) < class_depth:
            raise ValueError(
                f"{'/'.join(part)!r} in {root!r} lies in no class's folder: move it into one, as in CLASS/{part[-1]}, "
                "or take a split with file lists"
            )
        own = role if role is not None else tops[part[0]] if nested else Split.NOVEL
        found.append(_Found("/".join(names), own))
    _check_class_folders(pictures, top + nested, class_depth)
    deeper = sorted({"/".join(part[:-1]) for part in pictures.parts if len(part) - 1 > top + nested + class_depth})
    if deeper:
        told.append(f"folders in a class's, their pictures being of that class: {len(deeper):,}, such as {deeper[0]!r}")
    return found


def _check_class_folders(pictures: FoundPictures, start: int, class_depth: int) -> None:
    """A class without pictures is a mistake; an empty folder elsewhere is none."""
    above = {part[:start] for part in pictures.parts}
    full = {part[:depth] for part in pictures.parts for depth in range(start + 1, start + class_depth + 1)}
    for folder in pictures.folders:
        if start < len(folder) <= start + class_depth and folder[:start] in above:
            name = "/".join(folder)
            if folder not in full:
                told = "; ".join(pictures.passed_over)
                raise ValueError(
                    f"the class's folder {name!r} in {str(pictures.root)!r} holds no pictures: remove it, or see what "
                    f"was not taken for a picture ({told})"
                )
            if not is_text(name):
                raise ValueError(f"the class's folder {name!r} in {str(pictures.root)!r} has a name that is not UTF-8")


def _by_split(pictures: FoundPictures, split: ClassSplit, told: list[str]) -> list[_Found | None]:
    entries: list[str | None] = []
    if split.files:
        entries = _listed_entries(pictures, split, told)
        names = [None if entry is None else split.files[entry] for entry in entries]
    else:
        names = [_named_class(part, split) for part in pictures.parts]
    empty = split.roles.keys() - set(names)
    if empty:
        raise ValueError(
            f"{split.name} names {len(split.roles)} classes; {len(empty)} of them have no picture in "
            f"{str(pictures.root)!r}: {', '.join(sorted(empty)[:3])}{', ...' if len(empty) > 3 else ''}"
        )
    return [
        None if name is None else _Found(name, split.roles[name], entry in split.held_out, entry in split.queries)
        for name, entry in zip_longest(names, entries)
    ]


def _listed_entries(pictures: FoundPictures, split: ClassSplit, told: list[str]) -> list[str | None]:
    """The list's longest entry that the path of each picture ends in."""
    fitting: dict[str, list[int]] = {}
    for index, part in enumerate(pictures.parts):
        tails = ("/".join(part[start:]) for start in range(len(part)))
        listed = next((tail for tail in tails if tail in split.files), None)
        if listed is not None:
            fitting.setdefault(listed, []).append(index)
    entries: list[str | None] = [None] * len(pictures.files)
    for listed, indices in fitting.items():
        name = split.files[listed]
        # Cameras number their pictures alike, and each class has its IMG_1.jpg: the folder tells which is meant.
        named = {index: split.roles.keys() & set(_runs(pictures.parts[index])) for index in indices}
        own = [index for index in indices if name in named[index]]
        own = own or [index for index in indices if not named[index]]
        if len(own) > 1:
            files = " and ".join(repr("/".join(pictures.parts[index])) for index in own[:2])
            raise ValueError(
                f"{split.name} lists {listed!r}, which fits several pictures in {str(pictures.root)!r}: {files}"
            )
        for index in own:
            entries[index] = listed
    there = set(entries)
    missing = [listed for listed in split.files if listed not in there]
    if missing:
        told.append(f"listed pictures that are not there: {len(missing):,}, such as {missing[0]!r}")
    return entries


def _named_class(part: tuple[str, ...], split: ClassSplit) -> str | None:
    name = next((run for run in _runs(part) if run in split.roles), None)
    if name is None and (code := _WORDNET_ID.match(part[-1])) and code[0] in split.roles:
        return code[0]
    return name


def _runs(part: tuple[str, ...]) -> Iterator[str]:
    """What a picture's folders can be called, the deepest first and those above before it left out last."""
    return ("/".join(part[start:end]) for end in range(len(part) - 1, 0, -1) for start in range(end))


def _shown(items: Iterable, total: int, what: str, progress: bool) -> Iterable:
    if not progress:
        return items
    from tqdm import tqdm

    return tqdm(items, what, total, file=sys.stderr, disable=None, unit=" images", dynamic_ncols=True)
