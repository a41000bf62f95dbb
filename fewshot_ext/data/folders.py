"""Folders of picture files, one folder a class, read into an archive."""

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import numpy as np

from fewshot_ext.data._threads import in_threads
from fewshot_ext.data.archive import ImageArchive, Split
from fewshot_ext.data.pictures import check_reading, decode, list_images, picture_size
from fewshot_ext.data.splits import ClassSplit, load_split, role_of

_WORDNET_ID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class FolderListing:
    """What a folder holds, before any picture is opened.

    Attributes:
        files: the pictures, class by class.
        labels: the class of each.
        class_names, class_split: as in ``ImageArchive``.
        left_out: number of pictures that the split does not name.
    """

    files: list[Path]
    labels: list[int]
    class_names: list[str]
    class_split: list[Split]
    left_out: int


def list_folder(root: str | Path, split: str | Path | Split | ClassSplit | None = None) -> FolderListing:
    """Finds the pictures of a folder tree and their classes; see ``read_folder``."""
    root = Path(root).expanduser()
    files = list_images(root)
    parts = [file.relative_to(root).parts for file in files]
    if split is None or isinstance(split, Split):
        top = _common_folders(parts)
        found = _by_folder([part[top:] for part in parts], split, str(root))
    else:
        found = _by_split(parts, split if isinstance(split, ClassSplit) else load_split(split), str(root))

    roles: dict[str, Split] = {}
    for name, role in filter(None, found):
        if roles.setdefault(name, role) != role:
            raise ValueError(
                f"class {name!r} of {str(root)!r} is both {roles[name].name.lower()} and {role.name.lower()}"
            )
    names = sorted(roles, key=lambda name: (roles[name], name))
    label = {name: number for number, name in enumerate(names)}
    kept = sorted((label[entry[0]], file) for entry, file in zip(found, files, strict=True) if entry is not None)
    return FolderListing(
        files=[file for _, file in kept],
        labels=[number for number, _ in kept],
        class_names=names,
        class_split=[roles[name] for name in names],
        left_out=len(files) - len(kept),
    )


def read_folder(
    root: str | Path,
    split: str | Path | Split | ClassSplit | None = None,
    *,
    size: int | None = None,
    mode: str | None = None,
    resize: str = "crop",
    progress: bool = False,
) -> ImageArchive:
    """An archive of a folder tree, ``root/CLASS/*.jpg``; a class may lie deeper, and is named by its path then.

    Folders that all pictures lie in are passed over, so that ``root`` may be the folder above the classes. With no
    split, folders ``train``, ``val`` and ``test`` (or ``base``, ``novel``, ``images_background``, ...) around
    those of the classes tell the roles; with neither, every class is novel.

    Args:
        root: the folder.
        split: a split's name or path (see ``load_split``), or one role for every class. Pictures of other classes,
            and those that a split with file lists does not list, are left out. Where all pictures lie in one folder
            a split with file lists tells their classes; for ImageNet's the file names do.
        size, resize: as in ``read_image``; without a size, all pictures must have the same.
        mode: "RGB", "L", or None for L where every picture is grey and RGB otherwise.
        progress: show a bar with the time left on a terminal.

    Raises:
        ImportError: Pillow is missing.
        OSError: the folder or a picture cannot be opened.
        ValueError: no pictures, a class with two roles, a class of the split without pictures, a damaged picture,
            pictures of unequal size where none is asked for. The message names the class or the picture.
    """
    check_reading(size, mode, resize)
    return read_listing(list_folder(root, split), size=size, mode=mode, resize=resize, progress=progress)


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
        grey, first = True, None
        for file, (height, width, own_mode) in zip(listing.files, shapes, strict=True):
            grey &= own_mode == "L"
            first = first or (height, width)
            if size is None and (height, width) != first:
                raise ValueError(
                    f"{str(file)!r} is {height} x {width}, but {str(listing.files[0])!r} is {first[0]} x {first[1]}: "
                    "give a size to resize them to (fewshot-ext data pack --size)"
                )
        mode = mode or ("L" if grey else "RGB")
        shape = (size, size) if size is not None else first
    images = np.empty((len(listing.files), 1 if mode == "L" else 3, *shape), np.uint8)

    def read(file: Path) -> np.ndarray:
        return decode(file, size=size, mode=mode, resize=resize)

    decoded = _shown(in_threads(read, listing.files), len(listing.files), "reading", progress)
    for index, image in enumerate(decoded):
        images[index] = image
    return ImageArchive.from_arrays(
        images.transpose(0, 2, 3, 1), np.array(listing.labels), listing.class_names, np.array(listing.class_split)
    )


def _common_folders(parts: list[tuple[str, ...]]) -> int:
    """How many folders every picture lies in, short of its class's own folder and of one that tells a role."""
    same = takewhile(lambda names: len(set(names)) == 1, zip(*(part[:-1] for part in parts), strict=False))
    common = min(sum(1 for _ in same), max(0, min(map(len, parts)) - 2))
    return next((depth for depth in range(common) if role_of(parts[0][depth]) is not None), common)


def _by_folder(parts, role: Split | None, root: str) -> list[tuple[str, Split]]:
    tops = {part[0]: role_of(part[0]) for part in parts if len(part) > 1}
    roles = set(tops.values()) - {None}
    # A class may be called "train", as one of CIFAR-100 is; two such folders are roles.
    nested = role is None and bool(roles) and (None not in tops.values() or len(roles) > 1)
    if nested and None in tops.values():
        odd = next(name for name, found in tops.items() if found is None)
        raise ValueError(f"{root!r} holds folders for roles, such as train and test, beside the folder {odd!r}")
    found = []
    for part in parts:
        name = "/".join(part[nested:-1])
        if not name:
            raise ValueError(
                f"{'/'.join(part)!r} in {root!r} lies in no class's folder; a split with file lists can tell its class"
            )
        found.append((name, tops[part[0]] if nested else Split.NOVEL if role is None else role))
    return found


def _by_split(parts, split: ClassSplit, root: str) -> list[tuple[str, Split] | None]:
    found: list[tuple[str, Split] | None] = []
    for part in parts:
        name = _listed_class(part, split) if split.files else _named_class(part, split)
        found.append(None if name is None else (name, split.roles[name]))
    empty = split.roles.keys() - {entry[0] for entry in found if entry is not None}
    if empty:
        raise ValueError(
            f"{split.name} names {len(split.roles)} classes; {len(empty)} of them have no picture in {root!r}: "
            f"{', '.join(sorted(empty)[:3])}{', ...' if len(empty) > 3 else ''}"
        )
    return found


def _listed_class(part: tuple[str, ...], split: ClassSplit) -> str | None:
    tails = ("/".join(part[start:]) for start in range(len(part)))
    return next((split.files[tail] for tail in tails if tail in split.files), None)


def _named_class(part: tuple[str, ...], split: ClassSplit) -> str | None:
    tails = ("/".join(part[start:-1]) for start in range(len(part) - 1))
    name = next((tail for tail in tails if tail in split.roles), None)
    if name is None and (code := _WORDNET_ID.match(part[-1])) and code[0] in split.roles:
        return code[0]
    return name


def _shown(items: Iterable, total: int, what: str, progress: bool) -> Iterable:
    if not progress:
        return items
    from tqdm import tqdm

    return tqdm(items, what, total, file=sys.stderr, disable=None, unit=" images", dynamic_ncols=True)
