"""Show what an image set holds, and check that it is whole.

Reads all of it: every array, every encoded image and, where the file carries one, the checksum of its arrays.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from fewshot_ext import _extras
from fewshot_ext._threads import in_threads
from fewshot_ext.commands.common import print_written, tell_passed_over, writable_folder
from fewshot_ext.commands.data import report
from fewshot_ext.commands.locks import hold_folder
from fewshot_ext.data import ImageArchive, read_image
from fewshot_ext.data.archive_file import has_checksum
from fewshot_ext.data.folders import FolderListing, list_folder, read_listing
from fewshot_ext.data.named import KNOWN, find_archive, open_images
from fewshot_ext.data.pictures import decode
from fewshot_ext.data.walk import FOLDER_RULE

SUMMARY = "show what an image set holds and check that it is whole"


def add_arguments(parser) -> None:
    """Adds the options of ``data info`` to a jsonargparse parser."""
    parser.epilog = FOLDER_RULE
    parser.add_argument("data", metavar="FILE", help="image set: an archive, a folder of pictures or a known name")
    parser.add_argument("--preview", metavar="FILE.png", help="also write a picture of up to 64 classes")


def prepare(arguments, resolved: str) -> Callable[[], int]:
    """Checks the settings, reads the images and returns the function that shows them."""
    preview = None
    if arguments.preview is not None:
        preview = picture_file(arguments.preview)
    folder = Path(arguments.data).expanduser()
    if arguments.data not in KNOWN and folder.is_dir():
        listing = list_folder(folder)
        tell_passed_over(arguments.data, listing.passed_over)
        shapes = list(in_threads(_shape, listing.files))
        if len(set(shapes)) > 1:
            return lambda: _run_sizes(listing, shapes, preview)
        archive = read_listing(listing)
    else:
        archive = open_images(arguments.data)
    return lambda: _run(archive, arguments.data, preview)


def _shape(file: Path) -> tuple[int, int]:
    """Height and width of a picture, all of which is read."""
    return decode(file).shape[1:]


def _run_sizes(listing: FolderListing, shapes: Sequence[tuple[int, int]], preview: Path | None) -> int:
    print(report.table_of_sizes(shapes, listing.labels, listing.class_split))
    if preview is not None:
        report.write_preview(
            lambda index: read_image(listing.files[index]),
            listing.labels,
            listing.class_names,
            listing.class_split,
            preview,
        )
        print_written([preview], f" ({report.LEGEND})")
    return 0


def picture_file(name: str) -> Path:
    """The path of a picture to be written, its folder made.

    Raises:
        ImportError: Pillow is missing.
        OSError: the folder cannot be written to.
        ValueError: the name does not end in .png.
    """
    _extras.require("train", "PIL")
    path = Path(name).expanduser()
    if path.suffix.lower() != ".png":
        raise ValueError(f"preview: expected the name of a .png file, got {name!r}")
    hold_folder(writable_folder(str(path.parent)), path.name)
    return path


def _run(archive: ImageArchive, name: str, preview: Path | None) -> int:
    print(report.table(archive))
    path = find_archive(name)
    if path is not None:
        print(f"file: {path} ({path.stat().st_size / 1e6:,.1f} MB)")
        print(f"checksum: {'ok' if has_checksum(path) else 'none in the file (written without one)'}")
    print(f"sha256 of the content: {archive.checksum()}")
    if preview is not None:
        report.write_preview(
            archive.images.__getitem__,
            archive.labels.tolist(),
            archive.class_words or archive.class_names,
            archive.class_split.tolist(),
            preview,
        )
        print_written([preview], f" ({report.LEGEND})")
    return 0
