"""Training runs that analyses share: each in a folder of its own, found again by its settings."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fewshot_ext import _extras
from fewshot_ext._formats import misfits_named, read_json
from fewshot_ext.data import ImageArchive
from fewshot_ext.data.named import open_images, short_name
from fewshot_ext.experiments.accuracies import setting
from fewshot_ext.experiments.measurements import Measurement
from fewshot_ext.experiments.runs import SweepImages, SweepRun
from fewshot_ext.experiments.sweep_task import SweepTask, TrainAndMeasure, write_json
from fewshot_ext.experiments.workers import Outcome, run_tasks, sweep_progress
from fewshot_ext.models import build_backbone
from fewshot_ext.training import PreTrainingConfig

PLAN = "sweep.json"
_PLAN = {"checksum": str, "checkpoints": str, "runs": [{"data": str, "seed": int, "pretraining": dict}]}


@dataclass(frozen=True)
class Failure:
    """A run that did not come to its end.

    Attributes:
        name: of the run.
        error: why, in one line.
        log: file with the traceback.
    """

    name: str
    error: str
    log: Path


class TaskSweep:
    """Tasks that belong to one question, their results, and what became of those that failed.

    Args:
        tasks: all different.

    Raises:
        ValueError: a folder holds a run of other settings.
    """

    def __init__(self, tasks: Sequence[SweepTask]) -> None:
        self.tasks = list(tasks)
        for task in self.tasks:
            task.check_record()
        self.failures: list[Failure] = []
        self._left_out = 0

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All results so far with the labels of their run, in the order of the runs."""
        return [{**task.run.labels, **row} for task in self.tasks for row in task.rows() or ()]

    def run(
        self,
        *,
        jobs: int = 1,
        threads: int = 1,
        executor: Executor | None = None,
        on_rows: Callable[[list[dict[str, Any]]], None] | None = None,
    ) -> list[dict[str, Any]]:
        """Trains and measures what is not there yet.

        Args:
            jobs, threads, executor: who does it, see ``run_tasks``.
            on_rows: called with all rows after every run that ends.

        Returns:
            ``rows``; ``failures`` says which runs are missing from them.

        Raises:
            KeyboardInterrupt: Ctrl-C; the next call goes on.
        """
        todo = [task for task in self.tasks if task.work]
        self.failures = []
        for task in todo:
            # The tasks make no folders above, for one that is gone by then was removed.
            task.folder.parent.mkdir(parents=True, exist_ok=True)
        with sweep_progress("runs", todo) as progress:
            if self._left_out:
                progress.say(f"left out, because they are not trained yet: {self._left_out} of the runs asked for")
            progress.say(f"{len(self.tasks) - len(todo)} of {len(self.tasks)} runs are there already")
            workers = {"jobs": jobs, "threads": threads, "executor": executor, "folder": self.tasks[0].folder.parent}
            for outcome in run_tasks(todo, **workers, on_report=progress.report):
                if outcome.error is None:
                    progress.end(outcome.task, f"{outcome.task.name}: {summary(outcome.value)}")
                else:
                    self.failures.append(self._failure(outcome))
                    progress.end(outcome.task, f"{outcome.task.name}: failed: {outcome.error}")
                if on_rows and (rows := self.rows):
                    on_rows(rows)
        return self.rows

    def _failure(self, outcome: Outcome) -> Failure:
        log = outcome.task.folder / "error.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(outcome.traceback or f"{outcome.error}\n", encoding="utf-8")
        return Failure(outcome.task.name, outcome.error, log)


class Sweep(TaskSweep):
    """Runs that belong to one question, their results, and where both are kept.

    Finished runs are taken over as they are and interrupted ones go on from their last epoch, whichever call began
    them: a run is known by its settings, not by the sweep that asked for it.

    Args:
        runs: at least one, all different.
        archive: the images of ``data`` that all runs name.
        output: existing folder.
        measurement: what is measured on each; nothing where None.
        device: "cpu" or "cuda".
        checkpoints: folder of the trained runs, which several sweeps may share; ``output / "runs"`` where None.

    Raises:
        ImportError, ValueError: see ``check_runs``.
    """

    def __init__(
        self,
        runs: Sequence[SweepRun],
        archive: ImageArchive,
        output: str | Path,
        *,
        measurement: Measurement | None = None,
        device: str = "cpu",
        checkpoints: str | Path | None = None,
    ) -> None:
        if not runs:
            raise ValueError("runs: expected at least one run, got none")
        check_runs(runs, archive, measurement)
        self.archive, self.output, self.measurement, self.device = archive, Path(output), measurement, device
        self.checkpoints = Path(checkpoints or self.output / "runs")
        self.data = archive.record(runs[0].data)
        self.checksum = self.data["sha256"]
        super().__init__([TrainAndMeasure(run, self.checkpoints, self.checksum, measurement, device) for run in runs])

    def write_plan(self) -> None:
        """Writes ``sweep.json``, from which ``read`` finds the runs again."""
        fields = ("data", "seed", "held_out", "variant")
        runs = [
            {**{name: getattr(task.run, name) for name in fields}, "pretraining": asdict(task.run.pretraining)}
            for task in self.tasks
        ]
        checkpoints = os.path.relpath(self.checkpoints, self.output)
        write_json(self.output / PLAN, {"checksum": self.checksum, "checkpoints": checkpoints, "runs": runs})

    @classmethod
    def read(
        cls,
        folder: str | Path,
        measurement: Measurement,
        *,
        choose: Callable[[SweepRun], bool] = lambda run: True,
        device: str = "cpu",
    ) -> "Sweep":
        """The trained runs of the sweep whose plan is in ``folder``, for another measurement.

        Args:
            folder: the output of that sweep.
            measurement: what is measured now.
            choose: which of the runs are wanted.
            device: "cpu" or "cuda".

        Raises:
            OSError: there is none, or its images are not at hand.
            ValueError: the file is damaged, no run that is wanted has been trained, the images are others than those
                that the runs were trained on, or the measurement cannot be made on them.
        """
        folder = Path(folder)
        path = folder / PLAN
        if not path.exists():
            raise FileNotFoundError(
                f"there is no sweep in {str(folder)!r} (no {PLAN}): fewshot-ext analyze margins --output makes one"
            )
        what = "the plan of a sweep"
        plan = read_json(path, _PLAN, what)
        with misfits_named(f"{path} does not hold {what}"):
            runs = [
                SweepRun(**{**run, "pretraining": PreTrainingConfig.from_dict(run["pretraining"])})
                for run in plan["runs"]
            ]
            checksum, checkpoints = plan["checksum"], folder / plan["checkpoints"]
        wanted = [run for run in runs if choose(run)]
        trained = [run for run in wanted if TrainAndMeasure(run, checkpoints, checksum).is_trained]
        if not trained:
            there = ", ".join(run.name for run in runs)
            raise ValueError(
                f"of the runs that this asks for, none in {str(folder)!r} is trained; the sweep has {there}"
            )
        archive = open_images(runs[0].data)
        if archive.checksum() != checksum:
            raise ValueError(f"data {runs[0].data} is not what the sweep in {str(folder)!r} was trained on")
        sweep = cls(trained, archive, folder, measurement=measurement, device=device, checkpoints=checkpoints)
        sweep._left_out = len(wanted) - len(trained)
        return sweep

    def remeasure(self, measurement: Measurement) -> "Sweep":
        """The same runs for another measurement.

        Raises:
            ValueError: it cannot be made on them.
        """
        return self._copy([task.run for task in self.tasks], measurement)

    def restrict(self, choose: Callable[[SweepRun], bool]) -> "Sweep":
        """Some of the runs, for the same measurement."""
        return self._copy([task.run for task in self.tasks if choose(task.run)], self.measurement)

    def _copy(self, runs: Sequence[SweepRun], measurement: Measurement) -> "Sweep":
        settings = {"device": self.device, "checkpoints": self.checkpoints}
        return Sweep(runs, self.archive, self.output, measurement=measurement, **settings)


class JointSweep(TaskSweep):
    """Sweeps over several image sets as one; rows tell by a column ``data`` which set they are of.

    Args:
        parts: one a set, all with the same folders.
    """

    def __init__(self, parts: Sequence[Sweep]) -> None:
        super().__init__([task for part in parts for task in part.tasks])
        self.parts, self.output, self.checkpoints = parts, parts[0].output, parts[0].checkpoints
        self.data_name = ", ".join(short_name(part.tasks[0].run.data) for part in parts)
        for task in self.tasks:
            task.prefix = f"{short_name(task.run.data)}: "

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [{"data": short_name(part.tasks[0].run.data), **row} for part in self.parts for row in part.rows]


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """What was found on one run, in a line."""
    cells = [f"{row['classes']} {setting(row)} {row['accuracy']:.2f}" for row in rows if "accuracy" in row]
    last = max((row["epoch"] for row in rows if "recall_at_1" in row), default=None)
    cells += [
        f"{row['classes']} Recall@1 {100 * row['recall_at_1']:.2f}"
        for row in rows
        if "recall_at_1" in row and row["epoch"] == last
    ]
    if len(cells) > 6:
        cells = [*cells[:5], f"and {len(cells) - 5} more"]
    return ", ".join(cells) or "done"


def check_runs(runs: Sequence[SweepRun], archive: ImageArchive, measurement: Measurement | None) -> None:
    """Finds what would make a run fail, before any is started.

    Raises:
        ImportError: a package of the extra ``train`` is missing.
        ValueError: two runs with the same settings, images too small for a backbone, missing classes, or what the
            measurement finds.
    """
    _extras.require("train", "lightning", "tensorboard", "kornia", "matplotlib", "tqdm")
    if len(set(runs)) < len(runs):
        raise ValueError("runs: expected all to be different: a loss, margin or seed is given twice")
    channels, height, width = archive.images.shape[1:]
    for backbone in {run.pretraining.backbone for run in runs}:
        with torch.device("meta"):
            build_backbone(backbone, channels).feature_size(height, width)
    for run in {run.seed: run for run in runs}.values():
        images = SweepImages.part(archive, run)
        if images.training.num_classes < 2:
            raise ValueError(f"base classes of {run.data}: expected at least 2, got {images.training.num_classes}")
        if measurement is not None:
            measurement.check(run, images)
