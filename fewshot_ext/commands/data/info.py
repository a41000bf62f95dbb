"""Show what an image set holds, and check that it is whole.

Reads all of it: every array, every encoded image and, where the file carries one, the checksum of its arrays.
"""

from collections.abc import Callable
from pathlib import Path

from fewshot_ext import _extras
from fewshot_ext.commands.common import writable_folder
from fewshot_ext.commands.data import report
from fewshot_ext.data import ImageArchive, load_images
from fewshot_ext.data.archive_file import has_checksum
from fewshot_ext.data.named import find_archive

SUMMARY = "show what an image set holds and check that it is whole"


def add_arguments(parser) -> None:
    """Adds the options of ``data info`` to a jsonargparse parser."""
    parser.add_argument("data", metavar="FILE", help="an archive, a folder of pictures, or the name of a known set")
    parser.add_argument("--preview", metavar="FILE.png", help="also write a picture of up to 64 classes")


def prepare(arguments, resolved: str) -> Callable[[], int]:
    """Checks the settings, reads the images and returns the function that shows them."""
    preview = None
    if arguments.preview is not None:
        preview = picture_file(arguments.preview)
    archive = load_images(arguments.data)
    return lambda: _run(archive, arguments.data, preview)


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
        raise ValueError(f"preview must be the name of a .png file, got {name!r}")
    writable_folder(str(path.parent))
    return path


def _run(archive: ImageArchive, name: str, preview: Path | None) -> int:
    print(report.table(archive))
    path = find_archive(name)
    if path is not None:
        print(f"file: {path} ({path.stat().st_size / 1e6:,.1f} MB)")
        print(f"checksum: {'ok' if has_checksum(path) else 'none in the file (written without one)'}")
    print(f"sha256 of the content: {archive.checksum()}")
    if preview is not None:
        report.write_preview(archive, preview)
        print(f"written: {preview} ({report.LEGEND})")
    return 0
