"""Accuracies of backbones and heads on common episodes, as a table, JSON and CSV."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewshot_ext._files import replace_text
from fewshot_ext.evaluation.protocol import mean_and_interval

# What makes a spreadsheet run a cell, by the advice of OWASP on CSV injection.
_FORMULA = (*"=+-@\t\r\n", *"\uff1d\uff0b\uff0d\uff20")  # the last four are full-width forms of the first
RESULT_FILES = ("results.json", "results.csv")


@dataclass(frozen=True)
class HeadAccuracy:
    """Accuracy of one head on the features of one backbone at one number of shots.

    Attributes:
        backbone: its name in the comparison.
        head: its name, as ``choose_head`` takes it.
        shot: support images a class.
        correct: for each episode the number of queries classified rightly.
        queries: queries an episode, of all its classes together.
        measures: what else was measured, by name: the mean over episodes and the half-width of its interval. "ece" is
            the expected calibration error in percent and "nll" the negative log-likelihood in nats, and of validation
            classes both "_at_fitted" too, with ``fitted_temperature``. Of open-set episodes there are those of
            ``open_set_measures``, in percent.
        fitted_temperature: that of the least negative log-likelihood, on validation classes; None on others.
    """

    backbone: str
    head: str
    shot: int
    correct: tuple[int, ...]
    queries: int
    measures: Mapping[str, tuple[float, float]] = field(default_factory=dict, compare=False)
    fitted_temperature: float | None = None

    def per_episode(self) -> Tensor:
        """``[episodes]`` float64, in percent."""
        return torch.tensor(self.correct, dtype=torch.float64) * (100 / self.queries)


@dataclass
class ComparisonResults:
    """What ``Comparison`` measured, with what is needed to repeat it.

    Args:
        config: the resolved settings, in plain JSON types.
        versions: of every package that decides the numbers.
        data: name, checksum, split and size of the image set.
        backbones: for each its name, and where known the path and checksum of its checkpoint.
        way: classes an episode.
        accuracies: one entry for each backbone, head and number of shots that is finished.
    """

    config: dict[str, Any]
    versions: dict[str, str]
    data: dict[str, Any]
    backbones: list[dict[str, Any]]
    way: int
    accuracies: list[HeadAccuracy] = field(default_factory=list)

    @property
    def shots(self) -> list[int]:
        return sorted({row.shot for row in self.accuracies})

    def find(self, backbone: str, head: str, shot: int) -> HeadAccuracy:
        """The accuracy of a backbone under a head at a number of shots.

        Raises:
            KeyError: it has not been measured.
        """
        for row in self.accuracies:
            if (row.backbone, row.head, row.shot) == (backbone, head, shot):
                return row
        raise KeyError((backbone, head, shot))

    def difference(self, row: HeadAccuracy) -> tuple[float, float] | None:
        """How far ``row`` lies above the first backbone under the same head, and the half-width of the interval.

        Both met the same episodes, so the interval is that of the mean of the differences, episode by episode:
        the luck of the draw, which they share, drops out of it. In percentage points; None for the first backbone.
        """
        first = self.accuracies[0].backbone
        if row.backbone == first:
            return None
        return mean_and_interval(row.per_episode() - self.find(first, row.head, row.shot).per_episode())

    def table(self) -> str:
        """The accuracies as text, and the differences to the first backbone where there are several."""
        first = self.accuracies[0]
        queries = first.queries // self.way
        lines = [
            f"{self.way}-way accuracy (%) on the {self.data['split']} classes of {self.data['name']}",
            f"mean ± 95 % interval over {self.draw()}, {queries} {'query' if queries == 1 else 'queries'} a class",
            "",
            *self._rows_of_text(
                {row: mean_and_interval(row.per_episode()) for row in self.accuracies}, "{:.2f} ± {:.2f}"
            ),
        ]
        differences = {row: self.difference(row) for row in self.accuracies if row.backbone != first.backbone}
        if differences:
            lines += [
                "",
                f"difference to {first.backbone} on the same episodes, in points",
                "",
                *self._rows_of_text(differences, "{:+.2f} ± {:.2f}"),
            ]
        for title, cells, layout in self._further():
            lines += ["", title, "", *self._rows_of_text(cells, layout)]
        return "\n".join(lines)

    def _further(self) -> Iterator[tuple[str, dict[HeadAccuracy, tuple[float, ...]], str]]:
        """Titles, cells and layouts of the tables below that of accuracies, where they are asked for."""
        temperature, rows = self.config.get("temperature", 1.0), self.accuracies
        if not all(row.measures for row in rows):  # of a file of an earlier version
            return
        fitted = all(row.fitted_temperature for row in rows)
        open_set = all("auroc" in row.measures for row in rows)
        if open_set:
            unknown = self.config["protocol"]["open_set"]
            classes = "1 unknown class" if unknown == 1 else f"{unknown} unknown classes"
            for name, title in (
                ("auroc", f"AUROC (%) of the known classes against {classes}, by the largest score"),
                ("accuracy_over_rejection", "area under the accuracy-rejection curve (%), unknown classes included"),
                ("accuracy_at_20_rejected", "accuracy (%) with 20 % of all queries rejected"),
                ("accuracy_at_50_rejected", "accuracy (%) with 50 % of all queries rejected"),
            ):
                yield title, {row: row.measures[name] for row in rows}, "{:.2f} ± {:.2f}"
        if fitted or open_set or temperature != 1:
            title = f"expected calibration error (%) at temperature {temperature:g}"
            yield title, {row: row.measures["ece"] for row in rows}, "{:.2f} ± {:.2f}"
        if fitted:
            title = "temperature of the least negative log-likelihood; pass it on as --temperature"
            yield title, {row: (row.fitted_temperature,) for row in rows}, "{:.4g}"
            title = "expected calibration error (%) at that temperature, on the same episodes"
            yield title, {row: row.measures["ece_at_fitted"] for row in rows}, "{:.2f} ± {:.2f}"

    def draw(self) -> str:
        """How many episodes there are, in words; for each number of shots where these differ."""
        counts = {row.shot: len(row.correct) for row in self.accuracies}
        if len(set(counts.values())) == 1:
            return f"{len(self.accuracies[0].correct):,} episodes"
        return " and ".join(f"{counts[shot]:,} {shot}-shot episodes" for shot in self.shots)

    def _rows_of_text(self, cells: Mapping[HeadAccuracy, tuple[float, ...]], layout: str) -> list[str]:
        names = list(dict.fromkeys((row.backbone, row.head) for row in cells))
        backbone_width = max(len("backbone"), *(len(backbone) for backbone, _ in names))
        head_width = max(len("head"), *(len(head) for _, head in names))
        text = {(row.backbone, row.head, row.shot): layout.format(*cell) for row, cell in cells.items()}
        width = max(map(len, text.values())) + 3
        heads = "".join(f"{shot}-shot".rjust(width) for shot in self.shots)
        lines = [f"{'backbone':<{backbone_width}}  {'head':<{head_width}}{heads}"]
        before = None
        for backbone, head in names:
            values = "".join(text.get((backbone, head, shot), "").rjust(width) for shot in self.shots)
            lines.append(f"{backbone if backbone != before else '':<{backbone_width}}  {head:<{head_width}}{values}")
            before = backbone
        return lines

    def write(self, directory: Path) -> list[Path]:
        """Writes ``results.json`` and ``results.csv``, each whole or not; the second once there is a row for it.

        Returns:
            The files written.

        Raises:
            OSError: the folder cannot be written to.
        """
        texts = dict(zip(RESULT_FILES, (self._json(), self._csv() if self.accuracies else None), strict=True))
        for name, text in texts.items():
            if text is None:
                (directory / name).unlink(missing_ok=True)
            else:
                replace_text(directory / name, text)
        return [directory / name for name, text in texts.items() if text is not None]

    def _json(self) -> str:
        head = {key: getattr(self, key) for key in ("config", "versions", "data", "backbones", "way")}
        return json_with_rows(head, {"accuracies": self._rows()})

    def _csv(self) -> str:
        checksums = {backbone["name"]: backbone["sha256"] for backbone in self.backbones}
        same = {
            "seed": self.config.get("seed"),
            "split": self.data["split"],
            "data": self.data["name"],
            "data_sha256": self.data["sha256"],
            **self.versions,
        }
        rows = [{**row, "backbone_sha256": checksums[row["backbone"]], **same} for row in self._rows()]
        return csv_of_rows(rows)

    def _rows(self) -> list[dict[str, Any]]:
        rows = []
        for row in self.accuracies:
            mean, interval = mean_and_interval(row.per_episode())
            difference = self.difference(row) or (None, None)
            rows.append(
                {
                    "backbone": row.backbone,
                    "head": row.head,
                    "way": self.way,
                    "shot": row.shot,
                    "episodes": len(row.correct),
                    "accuracy": round(mean, 4),
                    "interval": round(interval, 4),
                    "difference": _rounded(difference[0]),
                    "difference_interval": _rounded(difference[1]),
                    "queries": row.queries,
                    **{
                        key: round(number, 4)
                        for name, value in row.measures.items()
                        for key, number in zip((name, f"{name}_interval"), value, strict=True)
                    },
                    "fitted_temperature": _rounded(row.fitted_temperature),
                    "correct": list(row.correct),
                }
            )
        return rows


def json_with_rows(head: Mapping[str, Any], tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """JSON with one line a row: hundreds of episodes, each on a line of its own, would bury the rest of the file.

    Args:
        head: written first, indented.
        tables: rows by the name of their table.
    """
    parts = [json.dumps(head, indent=2).removesuffix("\n}")]
    for name, rows in tables.items():
        lines = ",\n".join(f"    {json.dumps(row)}" for row in rows)
        parts.append(f'  "{name}": [\n{lines}\n  ]')
    return ",\n".join(parts) + "\n}\n"


def csv_of_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """CSV of the columns that hold one value each; a row may lack a column that others have.

    A text that a spreadsheet would take for a formula, and run, has an apostrophe before it.
    """
    columns = list(
        dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, list | tuple | dict))
    )
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows({key: _inert(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def _inert(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
