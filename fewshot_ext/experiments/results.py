"""What a margin sweep found: rows of accuracies, kept in JSON and CSV and read back to resume."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from fewshot_ext._files import replace_file
from fewshot_ext._formats import misfits_named, read_json, typed
from fewshot_ext.evaluation import csv_of_rows, json_with_rows, mean_and_interval
from fewshot_ext.experiments.plots import plot_accuracy_over_margin

CLASSES = ("base", "novel")
_SCHEMA = {"config": dict, "versions": {str: str}, "way": int, "accuracies": [{"correct": [int]}]}
_PANELS = {"base": "base classes, held-out images", "novel": "novel classes"}


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of one backbone on one set of classes at one number of shots.

    Attributes:
        run: 0, 1, ...; runs differ in their seed.
        margin: of the pre-training.
        classes: "base" or "novel".
        shot: support images a class.
        correct: for each episode the number of queries classified rightly.
        queries: queries an episode.
    """

    run: int
    margin: float
    classes: str
    shot: int
    correct: tuple[int, ...]
    queries: int

    def per_episode(self) -> torch.Tensor:
        """``[episodes]`` float64, in percent."""
        return torch.tensor(self.correct, dtype=torch.float64) * (100 / self.queries)


@dataclass
class SweepResults:
    """All accuracies of a sweep so far, with what is needed to repeat it.

    Args:
        config: the resolved settings, in plain JSON types.
        versions: of every package that decides the numbers.
        way: classes an episode.
        accuracies: one entry for each run, margin, set of classes and number of shots that is finished.
    """

    config: dict[str, Any]
    versions: dict[str, str]
    way: int
    accuracies: list[Accuracy] = field(default_factory=list)

    @property
    def finished(self) -> set[tuple[int, float]]:
        """The pairs of run and margin that are there."""
        return {(row.run, row.margin) for row in self.accuracies}

    @property
    def margins(self) -> list[float]:
        """The margins finished in at least one run, in rising order."""
        return sorted({row.margin for row in self.accuracies})

    @property
    def shots(self) -> list[int]:
        return sorted({row.shot for row in self.accuracies})

    def runs(self, margin: float, classes: str, shot: int) -> dict[int, Accuracy]:
        """The accuracy in each run."""
        key = (margin, classes, shot)
        return {row.run: row for row in self.accuracies if (row.margin, row.classes, row.shot) == key}

    def percent(self, margin: float, classes: str, shot: int) -> tuple[float, float]:
        """Mean over the episodes of all runs and half-width of its 95 % interval, in percent."""
        runs = self.runs(margin, classes, shot).values()
        return mean_and_interval(torch.cat([row.per_episode() for row in runs]))

    def differences(self, margin: float, other: float, classes: str, shot: int) -> list[float]:
        """Accuracy at ``margin`` less that at ``other``, in percentage points, for each run that has both.

        Within a run all margins share seeds and episodes, so this is a paired comparison.
        """
        ours, theirs = (self.runs(m, classes, shot) for m in (margin, other))
        return [
            (ours[run].per_episode() - theirs[run].per_episode()).mean().item()
            for run in sorted(ours.keys() & theirs.keys())
        ]

    def table(self) -> str:
        """The accuracies as text, one line a margin."""
        width = 16
        columns = [(classes, shot) for classes in CLASSES for shot in self.shots]
        heads = "".join(_PANELS[classes].center(width * len(self.shots)) for classes in CLASSES)
        runs, episodes = len({row.run for row in self.accuracies}), len(self.accuracies[0].correct)
        lines = [
            f"{self.way}-way accuracy (%), mean ± 95 % interval over {runs} x {episodes} episodes "
            "(training runs x episodes)",
            "",
            f"{'':>8}{heads}".rstrip(),
            f"{'margin':>8}" + "".join(f"{shot}-shot".rjust(width - 2) + "  " for _, shot in columns).rstrip(),
        ]
        for margin in self.margins:
            cells = ("{:.2f} ± {:.2f}".format(*self.percent(margin, *column)) for column in columns)
            lines.append(f"{margin:>+8g}" + "".join(cell.rjust(width - 2) + "  " for cell in cells).rstrip())
        return "\n".join(lines)

    def findings(self) -> list[str]:
        """What the numbers say about the paper's claim, one sentence a line.

        The claim (section 1, Fig. 1): a negative margin costs accuracy on base classes and gains it on novel
        ones. Each sentence gives the difference in every run, because training runs differ by more than the
        interval over episodes says.
        """
        if 0.0 not in self.margins or len(self.margins) < 2:
            return []
        lines = []
        for classes in CLASSES:
            for shot in self.shots:
                best = max(self.margins, key=lambda m: self.percent(m, classes, shot)[0])
                line = f"{classes} classes, {shot}-shot: margin {best:+g} is best"
                if best:
                    points = ", ".join(f"{d:+.2f}" for d in self.differences(best, 0.0, classes, shot))
                    line += f"; against margin 0, run by run: {points} points"
                lines.append(line)
        return [*lines, "Intervals cover the draw of episodes, not that of initial weights and batches."]

    def write(self, directory: Path) -> list[Path]:
        """Writes ``results.json``, ``results.csv`` and ``accuracy_over_margin.png``, each whole or not.

        Before the first accuracy only ``results.json`` is written, with the settings, and the other two,
        which an earlier sweep may have left, are removed.

        Returns:
            The files written.
        """
        writers = {
            "results.json": lambda path: path.write_text(self._json(), encoding="utf-8"),
            "results.csv": lambda path: path.write_text(self._csv(), encoding="utf-8"),
            "accuracy_over_margin.png": self._plot,
        }
        written = []
        for name, writer in writers.items():
            if self.accuracies or name == "results.json":
                replace_file(directory / name, writer)
                written.append(directory / name)
            else:
                (directory / name).unlink(missing_ok=True)
        return written

    @classmethod
    def read(cls, path: Path) -> "SweepResults":
        """Reads ``results.json`` back.

        Raises:
            ValueError: the file is not one that ``write`` wrote.
        """
        keys = [field.name for field in fields(Accuracy)]
        what = "the results of a margin sweep"
        content = read_json(path, _SCHEMA, what)
        with misfits_named(f"{path} does not hold {what}"):
            rows = [
                typed(Accuracy, {**{key: row[key] for key in keys}, "correct": tuple(row["correct"])})
                for row in content["accuracies"]
            ]
            return cls(content["config"], content["versions"], content["way"], rows)

    def _json(self) -> str:
        summary = []
        for margin in self.margins:
            for classes in CLASSES:
                for shot in self.shots:
                    mean, interval = self.percent(margin, classes, shot)
                    cell = {"margin": margin, "classes": classes, "shot": shot}
                    summary.append({**cell, "accuracy": round(mean, 4), "interval": round(interval, 4)})
        head = {"config": self.config, "versions": self.versions, "way": self.way}
        return json_with_rows(head, {"summary": summary, "accuracies": self._rows()})

    def _csv(self) -> str:
        columns = ("run", "margin", "classes", "shot", "accuracy", "interval", "episodes")
        rows = ({**row, "episodes": len(row["correct"])} for row in self._rows())
        return csv_of_rows([{name: row[name] for name in columns} for row in rows])

    def _rows(self) -> list[dict[str, Any]]:
        rows = []
        for row in self.accuracies:
            mean, interval = mean_and_interval(row.per_episode())
            rows.append({**asdict(row), "accuracy": round(mean, 4), "interval": round(interval, 4)})
        return rows

    def _plot(self, path: Path) -> None:
        curves = {
            _PANELS[classes]: {
                f"{shot}-shot": [(m, *self.percent(m, classes, shot)) for m in self.margins] for shot in self.shots
            }
            for classes in CLASSES
        }
        plot_accuracy_over_margin(curves, path, way=self.way)
