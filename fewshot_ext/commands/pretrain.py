"""Pre-train a backbone on base classes with a margin softmax loss.

The first of the two stages of few-shot classification by transfer. Trains on the base classes of an image set,
validates on episodes of its validation classes where it has some, and writes last.ckpt, best.ckpt, config.yaml,
run.json and a TensorBoard log to the output folder. Published settings come by name:
fewshot-ext pretrain --config miniimagenet_resnet12_neg_cosine_5shot --data mini.npz --output out
"""

import json
import os
import sys
import time
from argparse import SUPPRESS
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fewshot_ext import _extras
from fewshot_ext._checks import check_at_least
from fewshot_ext._files import replace_file
from fewshot_ext._record import versions
from fewshot_ext.commands.common import resolve_device, set_threads, writable_folder
from fewshot_ext.data import ImageArchive, Split, load_images
from fewshot_ext.recipes import recipe_names, recipe_path, recipe_table
from fewshot_ext.training.config import LOSSES, PreTrainingConfig

if TYPE_CHECKING:
    from fewshot_ext.training import PreTrainingRun

SUMMARY = "train a backbone on base classes"

# What `--loss`, `--margin` and `--scale` decide together; see PreTrainingConfig.for_loss.
_LOSS_FIELDS = {"similarity", "margin", "scale"}


def config_action() -> type:
    """What ``--config`` does here: it takes the name of a recipe beside a file."""
    from jsonargparse import ActionConfigFile

    class RecipeOrFile(ActionConfigFile):
        @staticmethod
        def apply_config(parser, cfg, dest, value) -> None:
            # A bare word that names no file can only be meant as a recipe, and its error should say so.
            if value in recipe_names() or (Path(value).name == Path(value).stem == value and not Path(value).exists()):
                value = str(recipe_path(value))
            ActionConfigFile.apply_config(parser, cfg, dest, value)

    return RecipeOrFile


def add_arguments(parser) -> None:
    """Adds the options of ``pretrain`` to a jsonargparse parser."""
    parser.add_argument("--list-recipes", action=_list_recipes_action(), help="print all recipes and exit")
    run = parser.add_argument_group("run")
    run.add_argument("--data", metavar="NAME|FILE", help="image set: a known name, such as miniimagenet32, or a file")
    run.add_argument("--output", metavar="FOLDER", help="where checkpoints, logs and records go")
    run.add_argument(
        "--resume", action="store_true", help="go on from last.ckpt in the output folder, with the same settings"
    )
    run.add_argument("--seed", type=int, default=0, help="decides weights, batches, augmentation, validation episodes")
    run.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu or cuda")
    run.add_argument("--devices", type=int, default=1, help="processes on this machine, one a GPU, sharing each batch")
    run.add_argument("--num_nodes", type=int, default=1, help="machines; start the command on each by torchrun")
    run.add_argument("--threads", type=int, default=None, help="CPU threads; null for torch's own choice")
    loss = parser.add_argument_group("loss")
    loss.add_argument("--loss", choices=list(LOSSES), default="neg-cosine", help="the last two have margin 0")
    loss.add_argument("--margin", type=float | None, default=None, help="of neg-cosine and neg-softmax, as -0.02")
    loss.add_argument(
        "--scale",
        type=float | None,
        default=None,
        help="of the similarities; null for 30 (cosine), 5 (softmax) or 10 (softmax, resnet12)",
    )
    parser.add_class_arguments(PreTrainingConfig, skip=_LOSS_FIELDS)
    # Otherwise the titles are sentences of docstrings.
    for name, group in parser.groups.items():
        group.title = "training" if name == PreTrainingConfig.__name__ else name


def prepare(arguments, resolved: str) -> Callable[[], int]:
    """Checks the settings and returns the function that trains.

    Args:
        arguments: the parsed options.
        resolved: the same as YAML, to be written beside the results.
    """
    _extras.require("train", "lightning", "tensorboard", "tqdm")
    for name in ("data", "output"):
        if arguments[name] is None:
            raise ValueError(f"--{name} must be given")
    settings = {
        field.name: arguments[field.name] for field in fields(PreTrainingConfig) if field.name not in _LOSS_FIELDS
    }
    config = PreTrainingConfig.for_loss(arguments.loss, margin=arguments.margin, scale=arguments.scale, **settings)
    check_at_least("seed", arguments.seed, 0)
    for name in ("devices", "num_nodes"):
        check_at_least(name, arguments[name], 1)
    _check_launch(arguments.devices, arguments.num_nodes)
    set_threads(arguments.threads)
    device = resolve_device(arguments.device)
    if device.type == "cuda" and arguments.devices > torch.cuda.device_count():
        raise ValueError(f"devices must be at most {torch.cuda.device_count()}, the GPUs here, got {arguments.devices}")
    archive = load_images(arguments.data)
    base = archive.subset(Split.BASE)
    validation = archive.subset(Split.VALIDATION) if (archive.class_split == Split.VALIDATION).any() else None
    output = writable_folder(arguments.output)
    if (output / "last.ckpt").exists() and not arguments.resume:
        raise ValueError(
            f"output {str(output)!r} holds the checkpoint of an earlier run: --resume goes on from it; "
            "to train afresh take another folder or remove last.ckpt"
        )

    from fewshot_ext.training import PreTrainingRun

    run = PreTrainingRun(
        config,
        base,
        output,
        validation=validation,
        seed=arguments.seed,
        device=device,
        devices=arguments.devices,
        num_nodes=arguments.num_nodes,
        resume=arguments.resume,
        progress=True,
    )
    record = {
        "data": {"name": arguments.data, "sha256": archive.checksum(), "base": _count(base)}
        | ({"validation": _count(validation)} if validation else {}),
        "config": asdict(config),
        "seed": arguments.seed,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "devices": arguments.devices * arguments.num_nodes,
        "threads": torch.get_num_threads(),
        "versions": versions("torch", "numpy", "lightning", "kornia"),
    }
    return lambda: _run(run, record, resolved)


def _run(run: "PreTrainingRun", record: dict[str, Any], resolved: str) -> int:
    from lightning.pytorch.utilities import rank_zero_only

    def say(*lines: str) -> None:
        if not rank_zero_only.rank:
            print(*lines, sep="\n", file=sys.stderr, flush=True)

    def write_record(**results: Any) -> None:
        if not rank_zero_only.rank:
            text = json.dumps({**record, **results}, indent=2) + "\n"
            replace_file(run.directory / "run.json", lambda path: path.write_text(text, encoding="utf-8"))

    try:
        if not rank_zero_only.rank:
            replace_file(run.directory / "config.yaml", lambda path: path.write_text(resolved, encoding="utf-8"))
        write_record()
        say(*_headline(run))
        started = time.perf_counter()
        run.train()
        seconds = time.perf_counter() - started
        results = {"epochs": run.config.epochs, **run.results(), "seconds": round(seconds, 1)}
        write_record(results=results)
    except KeyboardInterrupt:
        say(f"interrupted; {_how_to_go_on(run)}")
        return 130
    except (OSError, FloatingPointError) as error:
        say(f"fewshot-ext pretrain: error: {error}; {_how_to_go_on(run)}")
        return 1
    if not rank_zero_only.rank:
        print(*_summary(run, results), sep="\n", flush=True)
    return 0


def _headline(run: "PreTrainingRun") -> list[str]:
    config, images = run.config, run.archive.images
    parameters = sum(parameter.numel() for parameter in run.module.backbone.parameters())
    lines = [
        f"base classes: {len(run.archive):,} images of {run.archive.num_classes} classes, "
        + " x ".join(map(str, images.shape[1:])),
        f"backbone: {config.backbone.name}, {parameters:,} parameters, {run.module.extractor.out_features:,} features",
        f"loss: {config.similarity}, margin {config.margin:g}, scale {config.scale:g}",
    ]
    if run.validation is None:
        lines.append("no validation classes: the last epoch is the best")
    if run.epochs_done:
        lines.append(f"going on after epoch {run.epochs_done} of {config.epochs}")
    return lines


def _summary(run: "PreTrainingRun", results: dict[str, Any]) -> list[str]:
    lines = [
        f"trained {results['epochs']} epochs: loss {results['loss']:.4f}, "
        f"accuracy {100 * results['accuracy']:.2f} % in the last"
    ]
    if run.validation:
        episodes = run.config.validation
        lines.append(
            f"best epoch {results['best_epoch']}: {100 * results['best_validation_accuracy']:.2f} % on "
            f"{episodes.episodes} validation episodes ({episodes.way}-way {episodes.shot}-shot, nearest class mean)"
        )
    names = ("best.ckpt", "last.ckpt", "run.json", "config.yaml")
    return [*lines, "written: " + ", ".join(str(run.directory / name) for name in names)]


def _how_to_go_on(run: "PreTrainingRun") -> str:
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
            f"devices times num_nodes must be {world_size}, the processes that torchrun started, "
            f"got {devices} x {num_nodes}"
        )


def _list_recipes_action() -> type:
    from argparse import Action

    class ListRecipes(Action):
        def __init__(self, option_strings, dest=SUPPRESS, default=SUPPRESS, help=None) -> None:
            super().__init__(option_strings, dest=SUPPRESS, default=SUPPRESS, nargs=0, help=help)

        def __call__(self, parser, namespace, values, option_string=None) -> None:
            print(recipe_table())
            parser.exit()

    return ListRecipes
