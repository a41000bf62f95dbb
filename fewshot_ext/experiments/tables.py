"""Numbers of an analysis on disk: JSON for programs, CSV for spreadsheets, the same rows in both."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fewshot_ext._files import replace_file
from fewshot_ext.evaluation import csv_of_rows, json_with_rows

Row = Mapping[str, Any]


def write_table(folder: Path, name: str, rows: Sequence[Row], **head: Any) -> list[Path]:
    """Writes ``NAME.json`` with ``head`` and all rows, and ``NAME.csv`` with the columns that hold one value each.

    Args:
        folder: must exist.
        name: of the analysis.
        rows: at least one. Rows may lack a column that others have; it stays empty in the CSV.
        head: what is needed to repeat the analysis.

    Returns:
        The files written.
    """
    texts = {
        f"{name}.json": json_with_rows({"analysis": name, **head}, {"rows": rows}),
        f"{name}.csv": csv_of_rows(rows),
    }
    for file, text in texts.items():
        replace_file(folder / file, lambda path, text=text: path.write_text(text, encoding="utf-8"))
    return [folder / file for file in texts]


def writer(
    name: str,
    plot: Callable[[Sequence[Row], Path], None],
    summarize: Callable[[Sequence[Row]], list[dict[str, Any]]] | None = None,
) -> Callable[..., list[Path]]:
    """The function that writes the results of an analysis, ``NAME.json``, ``NAME.csv`` and ``NAME.png``, into a folder.

    Args:
        name: of the analysis.
        plot: draws rows into a file.
        summarize: makes rows that the JSON has beside the others.

    Returns:
        ``write(folder, rows, **head)``, which returns the files written; its arguments are those of ``write_table``.
    """

    def write(folder: Path, rows: Sequence[Row], **head: Any) -> list[Path]:
        if summarize:
            head["summary"] = summarize(rows)
        written, picture = write_table(folder, name, rows, **head), folder / f"{name}.png"
        replace_file(picture, lambda path: plot(rows, path))
        return [*written, picture]

    return write
