"""Pack a folder of pictures into one archive that every command takes as --data.

The folder holds a folder of pictures for each class. Folders train, val and test (or base, novel, ...) around those
of the classes tell the classes' roles; else --split does: the name of an official split (miniimagenet,
tieredimagenet, cub, cub_easyfsl, cifar_fs, fc100, omniglot_vinyals), or your own CSV, JSON or text file, or base,
validation or novel for all classes. For metric learning it is halves (the first half of the classes by name is base
and the second novel: CUB and Cars196), Ebay_train.txt of Stanford Online Products, cars_annos.mat of Cars196 or
list_eval_partition.txt of In-Shop Clothes, whose queries are marked: retrieval searches them in the gallery alone.
Without either every class is novel. An unpacked cifar-100-binary.tar.gz is taken too. A .json file beside the archive
tells where it comes from and what was passed over.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from fewshot_ext import _extras
from fewshot_ext._files import replace_text
from fewshot_ext._record import versions
from fewshot_ext.commands.common import print_written, tell_passed_over, writable_folder
from fewshot_ext.commands.data import report
from fewshot_ext.commands.locks import hold_folder
from fewshot_ext.data import ImageArchive, Split, load_cifar100, load_split
from fewshot_ext.data.cifar import is_cifar100
from fewshot_ext.data.folders import list_folder, read_listing, without_damaged
from fewshot_ext.data.pictures import check_reading
from fewshot_ext.data.walk import FOLDER_RULE

SUMMARY = "pack a folder of pictures into one archive"


def add_arguments(parser) -> None:
    """Adds the options of ``data pack`` to a jsonargparse parser."""
    parser.epilog = FOLDER_RULE
    parser.add_argument("--source", required=True, metavar="FOLDER", help="folder of the pictures")
    parser.add_argument("--output", required=True, metavar="FILE.npz", help="archive to write")
    parser.add_argument("--split", metavar="NAME|FILE", help="roles of the classes; see above")
    parser.add_argument("--size", type=int, metavar="PIXELS", help="side to resize to; needed if the sizes differ")
    parser.add_argument(
        "--resize_mode",
        type=Literal["crop", "stretch"],
        default="crop",
        help="how to resize: crop makes the short side SIZE and cuts out the middle, stretch makes both sides SIZE, "
        "as the published recipes take it",
    )
    parser.add_argument(
        "--mode",
        type=Literal["auto", "RGB", "L"],
        default="auto",
        help="channels: RGB, L (gray), or auto, which is L if every picture is gray",
    )
    parser.add_argument(
        "--class_depth",
        type=int,
        default=1,
        metavar="FOLDERS",
        help="number of folders that name a class: 2 for Omniglot, with classes such as Greek/character01",
    )
    parser.add_argument(
        "--invert",
        action="store_true",
        help="invert the pixels, so that dark on light becomes light on dark, for Omniglot",
    )
    parser.add_argument(
        "--skip_corrupt", action="store_true", help="leave out pictures that cannot be read; takes twice the time"
    )
    parser.add_argument(
        "--jpeg_quality",
        type=int,
        metavar="1-100",
        help="store JPEG of this quality instead of pixels; 95 changes little",
    )


def prepare(arguments, resolved: str) -> Callable[[], int]:
    """Checks the settings, lists the pictures and returns the function that packs them."""
    _extras.require("train", "PIL", "tqdm")
    output = Path(arguments.output).expanduser()
    if output.suffix != ".npz":
        raise ValueError(f"output: expected the name of an .npz file, got {arguments.output!r}")
    if output.is_dir():
        raise IsADirectoryError(f"output {str(output)!r} is a folder")
    if arguments.jpeg_quality is not None and not 1 <= arguments.jpeg_quality <= 100:
        raise ValueError(f"jpeg_quality: expected a number in [1, 100], got {arguments.jpeg_quality}")
    read = _reader(arguments)
    hold_folder(writable_folder(str(output.parent)), output.name)
    return lambda: _run(read, arguments.source, output, arguments.invert, arguments.jpeg_quality)


def _reader(arguments) -> Callable[[], ImageArchive]:
    roles = {role.name.lower(): role for role in Split}
    split = roles.get(arguments.split, arguments.split)
    if is_cifar100(arguments.source):
        if arguments.size not in (None, 32) or arguments.mode == "L":
            raise ValueError("CIFAR-100 is packed as it is, 32 x 32 RGB: leave size and mode out")
        named = None if split is None or isinstance(split, Split) else load_split(split)
        archive = load_cifar100(arguments.source)
        every = dict.fromkeys(archive.class_names, Split.NOVEL if split is None else split)
        archive = archive.with_roles(every if named is None else named.roles)
        return lambda: archive
    check_reading(arguments.size, None, arguments.resize_mode)
    listing = list_folder(arguments.source, split, arguments.class_depth)
    tell_passed_over(arguments.source, listing.passed_over)
    mode = None if arguments.mode == "auto" else arguments.mode

    def read() -> ImageArchive:
        readable = without_damaged(listing, progress=True) if arguments.skip_corrupt else listing
        tell_passed_over(arguments.source, readable.passed_over[len(listing.passed_over) :])
        return read_listing(readable, size=arguments.size, mode=mode, resize=arguments.resize_mode, progress=True)

    return read


def _run(read: Callable[[], ImageArchive], source: str, output: Path, invert: bool, jpeg_quality: int | None) -> int:
    beside = output.with_name(f"{output.name}.json")
    # Unlike most mistakes, a damaged picture or a full disk shows itself only when the work is under way.
    try:
        archive = read()
        if invert:
            archive = replace(archive, images=255 - archive.images)
        if sys.stderr.isatty():
            print(f"writing {output}", file=sys.stderr)
        archive.save(output, jpeg_quality)
    except (OSError, ValueError) as error:
        print(f"fewshot-ext data pack: error: {error}; nothing was written", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; nothing was written to {output}", file=sys.stderr)
        return 130
    print(report.table(archive))
    record = {**archive.record(source), "versions": versions("numpy", "pillow")}
    try:
        replace_text(beside, json.dumps(record, indent=2) + "\n")
    except OSError as error:
        print(f"fewshot-ext data pack: error: {error}; {output} was written, and no record beside it", file=sys.stderr)
        return 1
    print_written([output, beside], f" ({output.stat().st_size / 1e6:,.1f} MB)")
    return 0
