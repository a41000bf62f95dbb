"""Image sets by their path or by the name of a known one, as ``--data`` takes them."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from fewshot_ext.data.archive import ImageArchive, Split
from fewshot_ext.data.digits import load_digits
from fewshot_ext.data.folders import list_folder, read_listing
from fewshot_ext.data.mnist import load_mnist
from fewshot_ext.data.splits import load_split
from fewshot_ext.data.walk import warn_passed_over


@dataclass(frozen=True)
class _Known:
    """An image set that has a name; ``read`` is given its file, or nothing where the set needs none."""

    summary: str
    how_to_get: str
    read: Callable[..., ImageArchive] = ImageArchive.load
    files: tuple[str, ...] = ()


def _with_novel_classes(archive: ImageArchive) -> ImageArchive:
    """The first packs of Omniglot number their two halves 0 and 1, and know of no validation classes."""
    if (archive.class_split == Split.NOVEL).any():
        return archive
    return replace(archive, class_split=archive.class_split * Split.NOVEL)


_OMNIGLOT = (
    "fewshot-ext data download omniglot, then data pack --class-depth 2 --size 28 --mode L --invert --output "
    "omniglot28.npz"
)
_MNIST = "put mnist.npz there, with the arrays x_train, y_train, x_test, y_test (as Keras has it)"
_MINI = "fewshot-ext data download miniimagenet tells where to get the pictures and how to pack them, with --size 32"
KNOWN = {
    "digits": _Known("8 x 8 handwritten digits that scikit-learn ships", "nothing to do", lambda: load_digits()),
    "omniglot28": _Known(
        "Omniglot at 28 x 28, background classes base and evaluation classes novel",
        _OMNIGLOT,
        lambda path: _with_novel_classes(ImageArchive.load(path)),
        ("omniglot28.npz",),
    ),
    "omniglot28_vinyals": _Known(
        "the same images with Vinyals' split of 1028 base, 172 validation and 423 novel classes",
        _OMNIGLOT,
        lambda path: ImageArchive.load(path).with_roles(load_split("omniglot_vinyals").roles),
        ("omniglot28.npz",),
    ),
    "miniimagenet32": _Known(
        "mini-ImageNet at 32 x 32", _MINI, files=("miniimagenet32.npz", "miniimagenet32_jpeg.npz")
    ),
    "miniimagenet32_small": _Known("30 images of each class of it", _MINI, files=("miniimagenet32_small.npz",)),
    "mnist": _Known("the training images of MNIST, 0-6 base and 7-9 novel", _MNIST, load_mnist, ("mnist.npz",)),
    "mnist_test": _Known(
        "the test images of MNIST", _MNIST, lambda path: load_mnist(path, part="test"), ("mnist.npz",)
    ),
}


def data_folders() -> list[Path]:
    """Where named sets are looked for: ``$FEWSHOT_EXT_DATA`` if set, then the user's cache folder."""
    chosen = os.environ.get("FEWSHOT_EXT_DATA")
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folders = [*([chosen] if chosen else []), f"{cache}/fewshot_ext"]
    return [Path(folder).expanduser() for folder in folders]


def load_images(name_or_path: str | Path) -> ImageArchive:
    """An image set by name, or from an archive or a folder of pictures; what it passes over is told by a warning.

    Args:
        name_or_path: one of ``KNOWN`` (``digits``, ``omniglot28``, ``miniimagenet32``, ``mnist``, ...) or the name
            of any ``NAME.npz`` in ``$FEWSHOT_EXT_DATA`` or ``~/.cache/fewshot_ext``; or the path of an archive, or of
            a folder tree of pictures all of one size (see ``read_folder``).
            A known name wins over a file of that name: write ``./mnist`` for the file. Two of these with a plus
            between them are two domains: all classes of the first to train on, validation and novel classes of the
            second; see ``ImageArchive.with_test_classes``.

    Raises:
        ImportError: a package that the set needs is missing.
        OSError: no such name or path; the message lists what is known and how to get it.
        ValueError: the file is no image set or is damaged; see ``ImageArchive.load`` and
            ``read_folder``.

    Example:
        >>> load_images("digits").images.shape
        torch.Size([1797, 1, 8, 8])
    """
    archive = open_images(name_or_path)
    warn_passed_over(name_or_path, archive.passed_over)
    return archive


def open_images(name_or_path: str | Path) -> ImageArchive:
    """As ``load_images``, without a warning, for commands that tell what was passed over in their own way."""
    name = str(name_or_path)
    path = find_archive(name)
    if name in KNOWN:
        known = KNOWN[name]
        if not known.files:
            return known.read()
        if path is None:
            raise FileNotFoundError(
                f"{name} ({known.summary}) is not at hand: no {' or '.join(known.files)} in {_folders()}. "
                f"To get it: {known.how_to_get}. Known names: {', '.join(KNOWN)}"
            )
        return known.read(path)
    if path is not None:
        # The same file gives the same images, by its name and by its path.
        read = next((known.read for known in KNOWN.values() if path.name in known.files), ImageArchive.load)
        return read(path)
    if Path(name).expanduser().is_dir():
        return read_listing(list_folder(name))
    if (domains := two_domains(name)) is not None:
        base, test = domains
        return open_images(base).with_test_classes(open_images(test))
    raise FileNotFoundError(
        f"there is no image set {name!r}: not a file, not a folder, not {name}.npz in {_folders()}, "
        f"and not one of the known names {', '.join(KNOWN)}"
    )


def two_domains(name: str) -> tuple[str, str] | None:
    """The two sets in a name such as "mini.npz+cub.npz"; None where it has no plus, or one of a single set's name."""
    parts = name.split("+")
    pairs = [("+".join(parts[:count]), "+".join(parts[count:])) for count in range(1, len(parts))]
    pairs = [pair for pair in pairs if all(pair)]
    if not pairs or _is_there(name):
        return None
    # Where a path has a plus of its own, it is told by what exists.
    return next((pair for pair in pairs if all(map(_is_there, pair))), pairs[0])


def short_name(name: str) -> str:
    """What a table calls an image set: its name or file without folder and suffix.

    Example:
        >>> short_name("packed/mini.npz+packed/cub.npz")
        'mini+cub'
    """
    return "+".join(Path(part).stem for part in two_domains(name) or (name,))


def _is_there(name: str) -> bool:
    return name in KNOWN or find_archive(name) is not None or Path(name).expanduser().is_dir()


def find_archive(name: str) -> Path | None:
    """The file that ``load_images`` would read for ``name``; None where that is no file, or there is none."""
    path = Path(name).expanduser()
    if name in KNOWN:
        files: tuple[str, ...] = KNOWN[name].files
    elif path.is_file():
        return path
    elif path.is_dir() or path.name != name:
        return None
    else:
        files = (f"{name}.npz",)
    return next((folder / file for folder in data_folders() for file in files if (folder / file).is_file()), None)


def _folders() -> str:
    return " or ".join(str(folder) for folder in data_folders())
