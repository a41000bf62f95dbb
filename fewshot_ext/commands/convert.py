"""Convert a checkpoint of other code to one of this package, or back.

IN is what --checkpoint of the other commands takes: a file of the official codes of Negative Margin Matters and
DeepEMD, of LibFewShot, few-shot-meta-baseline or torchvision, weights of a backbone of this package, or a checkpoint of
its trainings. OUT then holds the network with its preprocessing and, where IN has one, the classifier over the base
classes. What IN does not hold comes by the options below, or is assumed as its paper has it; that is said on standard
error, and kept in OUT.

--to writes what other code reads instead.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from fewshot_ext._files import file_sha256, replace_file
from fewshot_ext._validation import check_choice
from fewshot_ext.commands.common import add_checkpoint_settings, checkpoint_settings, print_written
from fewshot_ext.models.export import TARGETS, export
from fewshot_ext.models.network import read_checkpoint

SUMMARY = "convert a checkpoint of other code to one of this package, or back"
USAGE = "IN OUT [options]"


def add_arguments(parser) -> None:
    """Adds the options of ``convert`` to a jsonargparse parser."""
    parser.add_argument("source", metavar="IN", help="checkpoint to read")
    parser.add_argument("output", metavar="OUT", help="file to write")
    parser.add_argument(
        "--to",
        type=str | None,
        default=None,
        help="what to write: official (for the official code of the paper that IN belongs to: DeepEMD for what that "
        "wrote or what was meta-trained, otherwise Negative Margin Matters) or torchvision; null writes a checkpoint "
        "of this package",
    )
    add_checkpoint_settings(parser)


def prepare(arguments, resolved: str) -> Callable[[], int]:
    """Reads the checkpoint, and returns the function that writes it.

    Args:
        arguments: the parsed options.
        resolved: the same as YAML; the file itself keeps what was assumed.
    """
    if arguments.to is not None:
        check_choice("to", arguments.to, *TARGETS)
    source, output = (Path(name).expanduser() for name in (arguments.source, arguments.output))
    if not output.parent.is_dir():
        raise FileNotFoundError(f"OUT: expected a file in a folder that there is, got {output}")
    if output.is_dir():
        raise IsADirectoryError(f"OUT: expected a file, got the folder {output}")
    checkpoint = read_checkpoint(source, settings=checkpoint_settings(arguments))
    if output.exists() and output.samefile(source):
        raise ValueError(f"OUT: expected another file than IN, got {output} for both")
    if arguments.to is None:
        own = dict(checkpoint["hyper_parameters"])
        if "origin" in own:
            own["origin"] = {"sha256": file_sha256(source), **own["origin"]}
        # Without what only a run needs to go on: optimizer, schedule, progress.
        content, remark = {"hyper_parameters": own, "state_dict": checkpoint["state_dict"]}, ""
    else:
        content, title = export(checkpoint, arguments.to)
        remark = f" (for {title})"

    def run() -> int:
        replace_file(output, lambda temporary: torch.save(content, temporary))
        print_written([output], remark)
        return 0

    return run
