"""Options that the analyses share, and what becomes of them."""

import sys
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from fewshot_ext import _extras
from fewshot_ext._files import replace_text
from fewshot_ext._formats import repeated
from fewshot_ext._record import versions
from fewshot_ext._validation import check_at_least, check_choice
from fewshot_ext.commands.common import (
    DATA_HELP,
    add_settings,
    load_data,
    print_written,
    resolve_device,
    writable_folder,
)
from fewshot_ext.commands.locks import hold_sweep
from fewshot_ext.data.named import short_name
from fewshot_ext.data.walk import FOLDER_RULE
from fewshot_ext.evaluation import ProtocolConfig
from fewshot_ext.experiments.measurements import FewShotAccuracy, Measurement
from fewshot_ext.experiments.runs import SweepRun
from fewshot_ext.experiments.sweep import JointSweep, Sweep, TaskSweep
from fewshot_ext.experiments.workers import connect
from fewshot_ext.heads import FineTuningConfig
from fewshot_ext.recipes import load_recipe, recipe_names
from fewshot_ext.training import MetricTrainingConfig, PreTrainingConfig

# Settings of a recipe that --set leaves alone, because loss and margin are what an analysis varies.
_DECIDED_BY_THE_ANALYSIS = ("similarity", "margin", "scale")

# What the name of a recipe has after that of the image set, by the command that takes it.
_DEFAULT_RECIPE = {"pretrain": "_conv4_cosine", "metric-train": "_conv4"}

# Options that say where things are on one machine and how the work is spread.
_PLACES = ("config", "output", "runs", "sweep", "checkpoint", "query", "support")
_PLACES += ("device", "jobs", "threads", "scheduler")


def add_run_arguments(parser, data: str | None = None, *, several: bool = False) -> None:
    """Adds where things are and how the work is spread; ``several`` where there may be more than one image set."""
    parser.epilog = FOLDER_RULE
    run = parser.add_argument_group("run")
    many = {"nargs": "+"} if several else {}
    run.add_argument("--data", default=data, metavar="NAME|PATH", help=DATA_HELP, **many)
    run.add_argument("--output", metavar="FOLDER", help="folder that numbers, pictures and checkpoints are written to")
    run.add_argument(
        "--runs",
        type=str | None,
        default=None,
        metavar="FOLDER",
        help="folder that trained backbones are kept in and looked for; null takes runs/ in the output folder",
    )
    _add_machine_arguments(run)


def add_sweep_arguments(parser, losses: Sequence[str] = ("cosine",)) -> None:
    """Adds which trained runs are looked at, and where the results go."""
    run = parser.add_argument_group("run")
    run.add_argument("--sweep", metavar="FOLDER", help="output folder of fewshot-ext analyze margins")
    run.add_argument(
        "--output",
        type=str | None,
        default=None,
        metavar="FOLDER",
        help="folder that the results are written to; null takes the folder of the sweep",
    )
    _add_machine_arguments(run)
    chosen = parser.add_argument_group("runs of the sweep to look at")
    chosen.add_argument("--losses", nargs="+", default=list(losses), metavar="LOSS", help="losses: cosine, softmax")
    chosen.add_argument(
        "--margins",
        type=float,
        nargs="*",
        default=[],
        metavar="M",
        help="pre-training margins; takes all if none is given",
    )
    chosen.add_argument(
        "--seeds", type=int, nargs="*", default=[], metavar="S", help="seeds; takes all if none is given"
    )


def _add_machine_arguments(group) -> None:
    group.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu or cuda")
    group.add_argument("--jobs", type=int, default=1, help="number of processes that the runs are spread over")
    group.add_argument("--threads", type=int, default=1, help="number of CPU threads of each process")
    group.add_argument(
        "--scheduler",
        type=str | None,
        default=None,
        metavar="ADDRESS",
        help="scheduler of a Dask cluster whose workers do the runs in place of --jobs, such as tcp://host:8786; they "
        "must see the same folders",
    )


def add_training_arguments(parser, seeds: Sequence[int] = (0, 1), command: str = "pretrain") -> None:
    """Adds the settings that all runs of a sweep share.

    Args:
        parser: a jsonargparse parser.
        seeds: by default.
        command: that trains such a run, "pretrain" or "metric-train".
    """
    training = parser.add_argument_group("training")
    training.add_argument(
        "--recipe",
        type=str | None,
        default=None,
        help=f"settings by name (fewshot-ext {command} --list-recipes); null for DATA{_DEFAULT_RECIPE[command]} where "
        "there is one",
    )
    training.add_argument("--epochs", type=int | None, default=None, help="number of epochs; null takes the recipe's")
    training.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="settings in place of the recipe's, such as weight_decay=0.0001 backbone.width=32",
    )
    training.add_argument(
        "--seeds", type=int, nargs="+", default=list(seeds), metavar="S", help="seeds; all runs are repeated with each"
    )
    if command == "pretrain":
        training.add_argument(
            "--held_out",
            type=float,
            default=0.2,
            help="share of the images of each base class that is kept from training, where the image set does not say "
            "which, as data pack takes it from base_val.json",
        )


def add_protocol_arguments(parser, shots: Sequence[int] = (1, 5), *, base: bool = True) -> None:
    """Adds the settings of the few-shot episodes; ``base`` where some are of base classes."""
    protocol = ProtocolConfig()
    episodes = parser.add_argument_group("episodes")
    episodes.add_argument("--way", type=int, default=protocol.way, help="number of classes in an episode")
    episodes.add_argument(
        "--shots", type=int, nargs="+", default=list(shots), metavar="K", help="numbers of support images of each class"
    )
    episodes.add_argument("--queries", type=int, default=protocol.queries, help="number of query images of each class")
    if base:
        episodes.add_argument(
            "--base_queries",
            type=int | None,
            default=None,
            help="number of query images of each base class, which has fewer held-out images; null takes --queries",
        )
    episodes.add_argument(
        "--episodes", type=int, default=protocol.episodes, help="number of episodes for each number of shots"
    )
    add_settings(parser, FineTuningConfig, "finetuning", "finetuning")


def add_classes_argument(parser, default: str = "novel") -> None:
    """Adds the set of classes that an analysis is about."""
    episodes = parser.add_argument_group("classes")
    episodes.add_argument("--classes", default=default, help="classes to look at: base, validation or novel")


def read_accuracy(arguments, **changes: Any) -> FewShotAccuracy:
    """The accuracy that the options ask for."""
    return FewShotAccuracy(
        ProtocolConfig(
            episodes=arguments.episodes,
            way=arguments.way,
            shots=tuple(arguments.shots),
            queries=arguments.queries,
        ),
        base_queries=arguments.get("base_queries"),
        finetuning=arguments.finetuning,
        **changes,
    )


def read_pretraining(arguments, data: str) -> PreTrainingConfig:
    """The recipe for an image set with what the options change in it.

    Raises:
        ValueError: an unknown recipe or setting, or a value that it does not take.
    """
    name = _recipe(arguments, data, "pretrain")
    return _changed(load_recipe(name) if name else PreTrainingConfig(), arguments, _DECIDED_BY_THE_ANALYSIS)


def read_metric_training(arguments, data: str, decided: Sequence[str]) -> MetricTrainingConfig:
    """As ``read_pretraining``, for metric training; ``decided`` are settings that the analysis varies."""
    name = _recipe(arguments, data, "metric-train")
    return _changed(load_recipe(name, "metric-train") if name else MetricTrainingConfig(), arguments, decided)


def _changed(recipe: Any, arguments, varied: Sequence[str]) -> Any:
    """The settings of a recipe with what the options change in them."""
    from jsonargparse import ArgumentParser

    decided = {field: getattr(recipe, field) for field in varied}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(type(recipe), "set", default=recipe, skip=set(decided))
    changes = [*arguments.set, *([] if arguments.epochs is None else [f"epochs={arguments.epochs}"])]
    for text in changes:
        if "=" not in text:
            raise ValueError(f"set: expected KEY=VALUE, as weight_decay=0.0001, got {text!r}")
    try:
        config = parser.instantiate(parser.parse_args([f"--set.{text}" for text in changes])).set
    except ArgumentError as error:
        _, unknown, key = str(error).partition("unrecognized arguments: --set.")
        if not unknown:
            raise
        known = sorted({field.name for field in fields(recipe)} - set(decided))
        key = key.partition("=")[0]
        raise ValueError(f"set: there is no setting {key!r}; the settings are {', '.join(known)}") from error
    return replace(config, **decided)


def prepare_sweep(
    name: str,
    arguments,
    runs: Callable[[str], Sequence[Any]],
    kind: Callable[..., TaskSweep] = Sweep,
    **settings: Any,
) -> TaskSweep:
    """Checks everything and returns the sweep, which no other process then works on.

    Args:
        name: of the analysis.
        arguments: the parsed options of all groups above; ``data`` is the name of an image set or a list of them.
        runs: makes the runs of an image set.
        kind: makes the sweep of them.
        settings: of the sweep beside the options.
    """
    for option in ("data", "output"):
        if arguments[option] is None:
            raise ValueError(f"--{option}: expected a value, got none")
    names = arguments.data if isinstance(arguments.data, list) else [arguments.data]
    if (twice := repeated(map(short_name, names))) is not None:
        raise ValueError(f"data: expected each image set once, got {twice!r} twice")
    planned, device = [runs(data) for data in names], _check_workers(arguments)
    archives = [load_data(data) for data in names]
    output = writable_folder(arguments.output)
    settings["checkpoints"] = None if arguments.runs is None else writable_folder(arguments.runs)
    sweeps = [
        kind(of_data, archive, output, device=device, **settings)
        for of_data, archive in zip(planned, archives, strict=True)
    ]
    sweep = JointSweep(sweeps) if isinstance(arguments.data, list) else sweeps[0]
    hold_sweep(name, sweep, output)
    return sweep


def _check_workers(arguments) -> str:
    """Checks who is to do the runs; returns the kind of device that they have."""
    for option in ("jobs", "threads"):
        check_at_least(option, arguments[option], 1)
    if arguments.jobs > 1:
        _extras.require("train", "loky")
        if arguments.scheduler is not None:
            raise ValueError(f"jobs: expected 1 with --scheduler, whose workers do the runs, got {arguments.jobs}")
    with _executor(arguments) as executor:
        if executor is None:
            return resolve_device(arguments.device).type
        return executor.submit(resolve_device, arguments.device).result().type


def _executor(arguments) -> AbstractContextManager[Executor | None]:
    return nullcontext() if arguments.scheduler is None else connect(arguments.scheduler)


def check_one_loss(arguments) -> None:
    """Raises ValueError where several losses are asked for and a picture has room for one."""
    if len(set(arguments.losses)) != 1:
        raise ValueError(f"losses: expected one loss here, got {' '.join(arguments.losses) or 'none'}")


def open_sweep(name: str, arguments, measurement: Measurement) -> tuple[Sweep, Path]:
    """Checks everything and returns the trained runs that the options choose, and the folder for what is found.

    Args:
        name: of the analysis, which no other process then makes in that folder.
        arguments: the parsed options.
        measurement: what is measured on each.
    """
    if arguments.sweep is None:
        raise ValueError("--sweep: expected the output folder of analyze margins, got none")
    for loss in arguments.losses:
        check_choice("losses", loss, "cosine", "softmax")

    def choose(run: SweepRun) -> bool:
        config = run.pretraining
        return (
            config.loss in arguments.losses
            and (not arguments.margins or config.margin in arguments.margins)
            and (not arguments.seeds or run.seed in arguments.seeds)
        )

    sweep = Sweep.read(arguments.sweep, measurement, choose=choose, device=_check_workers(arguments))
    output = writable_folder(arguments.output or arguments.sweep)
    hold_sweep(name, sweep, output)
    return sweep, output


def train_and_write(
    name: str,
    sweep: TaskSweep,
    arguments,
    resolved: str,
    write: Callable[..., Sequence[Path]],
    table: Callable[[list[dict[str, Any]]], str],
) -> int:
    """Trains and measures every run, writes the files again after each of them, and prints the table.

    Args:
        name: of the analysis.
        sweep: with an ``output`` folder.
        arguments: the parsed options.
        resolved: the same as YAML.
        write: called with folder, rows and the head of a results file; returns the files written.
        table: makes a text of the rows.

    Returns:
        The exit code.
    """
    # Before any run starts: a signal in the midst of this import would leave half a module to write with.
    from matplotlib.backends import backend_agg  # noqa: F401

    head = head_of(sweep, resolved)
    write_config(sweep.output, name, resolved)

    def write_rows(rows: list[dict[str, Any]]) -> Sequence[Path]:
        return write(sweep.output, rows=rows, **head)

    exit_code = run_sweep(sweep, arguments, write_rows)
    if rows := sweep.rows:
        written = write_rows(rows)
        print(table(rows))
        print_written(written)
    return exit_code


def analyze_sweep(
    name: str, sweep: Sweep, arguments, resolved: str, write: Callable[..., Sequence[Path]], output: Path
) -> int:
    """Measures every run and writes what was found.

    Args:
        name: of the analysis.
        sweep: of ``open_sweep``.
        arguments: the parsed options.
        resolved: the same as YAML.
        write: called with the folder, all rows and the head of a results file; returns the files written.
        output: the folder.

    Returns:
        The exit code.
    """
    write_config(output, name, resolved)
    exit_code = run_sweep(sweep, arguments)
    if rows := sweep.rows:
        print_written(write(output, rows, **head_of(sweep, resolved)))
    return exit_code


def head_of(sweep: TaskSweep, resolved: str) -> dict[str, Any]:
    """What a results file says about how its numbers came about."""
    told = []
    for part in sweep.parts if isinstance(sweep, JointSweep) else [sweep]:
        settings = part.tasks[0].run.settings(part.checksum)
        stage = "pretraining" if "pretraining" in settings else "training"
        shared = {key: value for key, value in settings[stage].items() if key not in _DECIDED_BY_THE_ANALYSIS}
        told.append({stage: shared, "data": part.data})
    return {
        "config": settings_of(resolved),
        **({"data": {"name": sweep.data_name}, "sets": told} if isinstance(sweep, JointSweep) else told[0]),
        "versions": versions("torch", "numpy", "lightning", "kornia"),
    }


def settings_of(resolved: str) -> dict[str, Any]:
    """The settings that decide the numbers: where things lie on one machine is no part of them."""
    import yaml

    settings = yaml.safe_load(resolved)
    return {key: value for key, value in settings.items() if key not in _PLACES}


def write_config(folder: Path, name: str, resolved: str) -> None:
    """Writes ``NAME.yaml``, which ``--config`` of the same command takes."""
    import yaml

    text = yaml.safe_dump(settings_of(resolved), sort_keys=False)
    replace_text(folder / f"{name}.yaml", text)


def run_sweep(sweep: TaskSweep, arguments, on_rows: Callable[[list[dict[str, Any]]], Any] | None = None) -> int:
    """Trains and measures; ``on_rows`` is called with all rows after every run. Returns the exit code."""
    try:
        with _executor(arguments) as executor:
            sweep.run(jobs=arguments.jobs, threads=arguments.threads, executor=executor, on_rows=on_rows)
    except KeyboardInterrupt:
        done = sum(not task.work for task in sweep.tasks)
        print(
            f"interrupted with {done} of {len(sweep.tasks)} runs done; the same command goes on from there",
            file=sys.stderr,
        )
        return 130
    for failure in sweep.failures:
        print(f"failed: {failure.name}: {failure.error} (see {failure.log})", file=sys.stderr)
    if sweep.failures:
        print(
            f"{len(sweep.failures)} of {len(sweep.tasks)} runs failed; the same command tries them again",
            file=sys.stderr,
        )
    return 1 if sweep.failures else 0


def _recipe(arguments, data: str, command: str) -> str | None:
    if arguments.recipe is not None:
        return arguments.recipe
    name = f"{short_name(data).partition('+')[0]}{_DEFAULT_RECIPE[command]}"
    return name if name in recipe_names(command) else None
