"""What the commands that train share: recipes, the options of a run, its records, and how it ends."""

import json
import os
import sys
import time
from argparse import SUPPRESS, Action
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fewshot_ext import _extras
from fewshot_ext._files import replace_text
from fewshot_ext._record import versions
from fewshot_ext._validation import check_at_least
from fewshot_ext.commands.common import (
    DATA_HELP,
    add_machine_arguments,
    load_data,
    print_written,
    set_up_machine,
    writable_folder,
)
from fewshot_ext.commands.locks import hold_folder
from fewshot_ext.data import ImageArchive, Split
from fewshot_ext.data.walk import FOLDER_RULE
from fewshot_ext.recipes import recipe_names, recipe_table, recipe_text

if TYPE_CHECKING:
    from fewshot_ext.training.run import TrainingRun


# Lines of the config.yaml that version 0.1 wrote, and what they are called now, by command.
_RENAMED = {
    "meta-train": {
        "weighting: cross_reference": "head: deepemd",
        "weighting: uniform": "head: deepemd_uniform",
    }
}


def recipe_action(command: str) -> type:
    """What ``--config`` does in ``command``: it takes the name of a recipe beside a file, also one of version 0.1."""
    from jsonargparse import ActionConfigFile

    class RecipeOrFile(ActionConfigFile):
        @staticmethod
        def apply_config(parser, cfg, dest, value) -> None:
            # A bare word that names no file can only be meant as a recipe, and its error should say so.
            is_word = Path(value).name == Path(value).stem == value
            if value in recipe_names(command) or (is_word and not Path(value).exists()):
                value = recipe_text(value, command)
            elif command in _RENAMED and Path(value).is_file():
                value = _with_new_names(value, command)
            ActionConfigFile.apply_config(parser, cfg, dest, value)

    return RecipeOrFile


def _with_new_names(path: str, command: str) -> str:
    """The file's path; its text with the names of today where it has some of version 0.1, which is told."""
    lines = Path(path).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    renamed = [_RENAMED[command].get(line.rstrip(), line) for line in lines]
    if renamed == lines:
        return path
    for old, new in zip(lines, renamed, strict=True):
        if old != new:
            print(f"{path}: version 0.1's {old.strip()!r} is now {new!r}, which is taken", file=sys.stderr)
    return "\n".join(renamed)


def add_run_arguments(parser, command: str, *, seed: str, processes: bool = True):
    """Adds ``--list-recipes`` and the options of every training run; returns their group.

    Args:
        parser: a jsonargparse parser.
        command: whose recipes are listed.
        seed: help of ``--seed``.
        processes: whether a run may have several.
    """
    parser.epilog = FOLDER_RULE
    parser.add_argument("--list_recipes", action=_list_recipes_action(command), help="print all recipes and exit")
    run = parser.add_argument_group("run")
    run.add_argument("--data", metavar="NAME|PATH", help=DATA_HELP)
    run.add_argument("--output", metavar="FOLDER", help="folder that checkpoints, logs and records are written to")
    run.add_argument(
        "--resume",
        action="store_true",
        help="go on from last.ckpt in the output folder. The settings must be the same; there may be more epochs, "
        "except in pretrain with Adam, where their number decides the learning rates",
    )
    run.add_argument("--seed", type=int, default=0, help=seed)
    add_machine_arguments(run)
    if processes:
        run.add_argument(
            "--devices",
            type=int,
            default=1,
            help="number of processes on this machine, one for each GPU, that share every step",
        )
        run.add_argument(
            "--num_nodes", type=int, default=1, help="number of machines; start the command on each by torchrun"
        )
    return run


def add_config_arguments(parser, config: type, **options: Any) -> None:
    """Adds the fields of a typed config, in groups with titles of one word."""
    parser.add_class_arguments(config, **options)
    # Otherwise the titles are sentences of docstrings.
    for name, group in parser.groups.items():
        group.title = "training" if name == config.__name__ else name


def fields_of(config: type, arguments, skip: Collection[str] = ()) -> dict[str, Any]:
    """The parsed options that are fields of a typed config."""
    return {field.name: arguments[field.name] for field in fields(config) if field.name not in skip}


class RunInputs(NamedTuple):
    """The checked options of a run, and what they name."""

    base: ImageArchive
    held_out: ImageArchive | None  # of the base classes
    validation: ImageArchive | None
    novel: ImageArchive | None
    output: Path
    options: dict[str, Any]  # of a training run
    record: dict[str, Any]  # for run.json


def check_run(arguments) -> RunInputs:
    """Checks the options that ``add_run_arguments`` added, and loads the images.

    Raises:
        ImportError: a package for training is missing.
        OSError: images cannot be read, the output folder not written to, or another process is writing to it.
        ValueError: an option missing or out of range, or an output folder with another run's checkpoint.
    """
    _extras.require("train", "lightning", "tensorboard", "tqdm")
    from lightning.pytorch.utilities import rank_zero_only

    for name in ("data", "output"):
        if arguments[name] is None:
            raise ValueError(f"--{name}: expected a value, got none")
    check_at_least("seed", arguments.seed, 0)
    processes = {name: arguments[name] for name in ("devices", "num_nodes") if name in arguments}
    for name, count in processes.items():
        check_at_least(name, count, 1)
    devices, num_nodes = processes.get("devices", 1), processes.get("num_nodes", 1)
    _check_launch(devices, num_nodes)
    device = set_up_machine(arguments)
    if device.type == "cuda" and devices > torch.cuda.device_count():
        raise ValueError(f"devices: expected at most {torch.cuda.device_count()}, the GPUs here, got {devices}")
    archive = load_data(arguments.data)
    base = archive.subset(Split.BASE)
    validation, novel = (
        archive.subset(split) if (archive.class_split == split).any() else None
        for split in (Split.VALIDATION, Split.NOVEL)
    )
    output = writable_folder(arguments.output)
    if not rank_zero_only.rank:  # which writes for all processes of the run
        hold_folder(output)
    if (output / "last.ckpt").exists() and not arguments.resume:
        raise ValueError(
            f"output {str(output)!r} holds the checkpoint of an earlier run: --resume goes on from it; "
            "to train afresh take another folder or remove last.ckpt"
        )
    options = {
        "validation": validation,
        "seed": arguments.seed,
        "device": device,
        **processes,
        "resume": arguments.resume,
        "progress": True,
    }
    record = {
        "data": {**archive.record(arguments.data), "base": _count(base)}
        | ({"validation": _count(validation)} if validation else {}),
        "seed": arguments.seed,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "devices": devices * num_nodes,
        "threads": torch.get_num_threads(),
        "versions": versions("torch", "numpy", "lightning", "kornia"),
    }
    held_out = archive.subset(Split.BASE, held_out=True) if archive.has_held_out else None
    return RunInputs(base, held_out, validation, novel, output, options, record)


def train(
    command: str,
    run: "TrainingRun",
    record: Mapping[str, Any],
    resolved: str,
    *,
    headline: Sequence[str],
    summary: Callable[[dict[str, Any]], Sequence[str]],
    files: Sequence[str] = (),
) -> int:
    """Trains, and writes the records of the run; returns the exit code.

    Args:
        command: its name, for errors.
        run: what is trained.
        record: content of run.json, to which the results are added.
        resolved: content of config.yaml.
        headline: lines for the start, after those about the images.
        summary: lines for the end, made of the results.
        files: names of what the run itself writes into its folder beside the checkpoints.
    """
    from lightning.pytorch.utilities import rank_zero_only

    def say(*lines: str) -> None:
        if not rank_zero_only.rank:
            print(*lines, sep="\n", file=sys.stderr, flush=True)

    def write_record(**results: Any) -> None:
        if not rank_zero_only.rank:
            replace_text(run.directory / "run.json", json.dumps({**record, **results}, indent=2) + "\n")

    try:
        if not rank_zero_only.rank:
            replace_text(run.directory / "config.yaml", resolved)
        write_record()
        say(_images(run), *headline, *_before(run))
        started = time.perf_counter()
        run.train()
        seconds = time.perf_counter() - started
        results = {"epochs": run.config.epochs, **run.results(), "seconds": round(seconds, 1)}
        write_record(results=results)
    except KeyboardInterrupt:
        say(f"interrupted; {_how_to_go_on(run)}")
        return 130
    except (OSError, FloatingPointError) as error:
        say(f"fewshot-ext {command}: error: {error}; {_how_to_go_on(run)}")
        return 1
    if not rank_zero_only.rank:
        names = ("best.ckpt", "last.ckpt", *files, "run.json", "config.yaml")
        print(_trained(results), *summary(results), sep="\n")
        print_written([run.directory / name for name in names])
    return 0


def validation_line(run: "TrainingRun", results: Mapping[str, Any]) -> list[str]:
    """The line on the best epoch and the episodes that chose it; none without validation classes."""
    if run.validation is None:
        return []
    episodes = run.config.validation
    return [
        f"best epoch {results['best_epoch']}: {100 * results['best_validation_accuracy']:.2f} +- "
        f"{100 * results['best_validation_interval']:.2f} % on {episodes.episodes:,} validation episodes "
        f"({episodes.way}-way {episodes.shot}-shot, {run.config.validation_head[0]})"
    ]


def _images(run: "TrainingRun") -> str:
    archive = run.archive
    size = " x ".join(map(str, archive.images.shape[1:]))
    return f"base classes: {len(archive):,} images of {archive.num_classes} classes, {size}"


def _before(run: "TrainingRun") -> list[str]:
    lines = [] if run.validation else ["no validation classes: the last epoch is the best"]
    if run.epochs_done:
        lines.append(f"going on after epoch {run.epochs_done} of {run.config.epochs}")
    return lines


def _trained(results: Mapping[str, Any]) -> str:
    accuracy = f", accuracy {100 * results['accuracy']:.2f} %" if "accuracy" in results else ""
    return f"trained {results['epochs']} epochs: loss {results['loss']:.4f}{accuracy} in the last"


def _how_to_go_on(run: "TrainingRun") -> str:
    if run.has_checkpoint:
        return f"the same command with --resume goes on from {run.directory / 'last.ckpt'}"
    return "there is no checkpoint yet, so the same command starts again from the beginning"


def _count(archive: ImageArchive) -> dict[str, int]:
    return {"images": len(archive), "classes": archive.num_classes}


def _check_launch(devices: int, num_nodes: int) -> None:
    """Holds the two options against what torchrun started: Lightning's own error would come after the data."""
    world_size = os.environ.get("WORLD_SIZE") if "TORCHELASTIC_RUN_ID" in os.environ else None
    if world_size is not None and int(world_size) != devices * num_nodes:
        raise ValueError(
            f"devices times num_nodes: expected {world_size}, the processes that torchrun started, "
            f"got {devices} x {num_nodes}"
        )


def _list_recipes_action(command: str) -> type:
    class ListRecipes(Action):
        def __init__(self, option_strings, dest=SUPPRESS, default=SUPPRESS, help=None) -> None:
            super().__init__(option_strings, dest=SUPPRESS, default=SUPPRESS, nargs=0, help=help)

        def __call__(self, parser, namespace, values, option_string=None) -> None:
            print(recipe_table(command))
            parser.exit()

    return ListRecipes
