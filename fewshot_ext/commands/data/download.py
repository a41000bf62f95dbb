"""Download an image set that has a public address, check its SHA-256 and unpack it.

NAME is omniglot, cifar100 (for CIFAR-FS and FC100), cub or sop (Stanford Online Products). For miniimagenet,
tieredimagenet, cars196 and inshop (In-Shop Clothes) the command says where to get them and how to pack them.
"""

import sys
from collections.abc import Callable
from pathlib import Path

from fewshot_ext import _extras
from fewshot_ext.commands.common import print_written, writable_folder
from fewshot_ext.commands.locks import hold_folder
from fewshot_ext.data.download import RemoteSet, download, remote_set

SUMMARY = "download a public image set and unpack it"


def add_arguments(parser) -> None:
    """Adds the options of ``data download`` to a jsonargparse parser."""
    parser.add_argument(
        "name", metavar="NAME", help="image set: omniglot (16 MB), cifar100 (169 MB), cub (1.2 GB) or sop (3.1 GB)"
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder that it is written to")


def prepare(arguments, resolved: str) -> Callable[[], int]:
    """Checks the settings and returns the function that downloads."""
    remote = remote_set(arguments.name)
    _extras.require("train", "pooch", "tqdm")
    output = writable_folder(arguments.output)
    hold_folder(output)
    return lambda: _run(remote, output)


def _run(remote: RemoteSet, output: Path) -> int:
    # What goes wrong here lies outside of the program: the network, the far machine, the disk.
    try:
        unpacked = download(remote, output)
    except (OSError, ValueError) as error:
        print(f"fewshot-ext data download: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; {output} holds no half-unpacked files", file=sys.stderr)
        return 130
    print_written(unpacked)
    print(f"to pack it: {remote.next_step.format(folder=output)}")
    return 0
