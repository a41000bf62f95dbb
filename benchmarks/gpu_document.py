"""The GPU report as files: one Markdown document and a CSV for each operator, written anew after every finding."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import harness


@dataclass(frozen=True)
class Goal:
    operator: str
    goal: str
    measured: str
    met: bool | None  # None where it was not measured


def slug(device: str) -> str:
    """The device's name as a part of file names.

    >>> slug("NVIDIA H100 80GB HBM3")
    'nvidia_h100_80gb_hbm3'
    """
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")


def goals_table(goals: Iterable[Goal]) -> str:
    verdicts = {True: "met", False: "**not met**", None: "not measured"}
    return table(["goal", "measured", ""], [[goal.goal, goal.measured, verdicts[goal.met]] for goal in goals])


def table(header: list[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table of cells with anything in them."""
    return harness.markdown_table(header, ([_cell(value) for value in row] for row in rows))


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def code_block(text: str) -> str:
    return f"```\n{text.rstrip()}\n```\n"


class Document:
    """Sections of Markdown by title, and rows of CSV by operator."""

    def __init__(self, directory: Path, device: str, preface: str) -> None:
        self.directory, self.device, self.preface = directory, device, preface
        self.name = slug(device)
        self.state = "Incomplete: still running."
        self.sections: dict[str, str] = {}
        self.columns: dict[str, object] = {}  # of every CSV row
        self.rows: dict[str, list[dict]] = {}
        self.files: list[Path] = []

    def write(self) -> None:
        parts = [f"# GPU report: {self.device}", self.preface, f"**{self.state}**"]
        parts += [f"## {title}\n\n{text.rstrip()}" for title, text in self.sections.items()]
        self.file(f"gpu_report_{self.name}.md", "\n\n".join(parts) + "\n")
        for operator, rows in self.rows.items():
            if rows:
                path = self._path(f"{operator}_{self.name}.csv")
                harness.write_csv(path, [{**row, **self.columns} for row in rows])

    def file(self, name: str, text: str) -> Path:
        path = self._path(name)
        harness.write_text(path, text)
        return path

    def _path(self, name: str) -> Path:
        path = self.directory / name
        if path not in self.files:
            self.files.append(path)
        return path
