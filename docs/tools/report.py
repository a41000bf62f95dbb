"""A page of findings made from results files, so that its text cannot disagree with the numbers."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from claims import FINDINGS
from deepemd import deepemd_missing, deepemd_section
from deepemd_results import FILES as DEEPEMD_FILES
from deepemd_results import read_deepemd
from verdicts import Finding, findings_markdown, picture_markdown, source_markdown

from fewshot_ext._formats import misfits_named
from fewshot_ext.experiments.collapse import collapse_markdown
from fewshot_ext.experiments.tables import read_table

START = "<!-- findings: written by fewshot-ext analyze report, edits are lost -->"
END = "<!-- end of findings -->"

# The results files of each command, and its picture with a caption. The first file is the one that the command is known
# by; t-SNE has no claim that a number could decide.
ANALYSES = {
    "margins": (("margins",), "margins", "Fig. 1 and 6: accuracy over the pre-training margin."),
    "variance": (
        ("variance", "proposition"),
        "variance",
        "Fig. 2: variances over the margin, with jackknife intervals over classes.",
    ),
    "angles": (("angles",), "angles", "Fig. 3: directions of two-dimensional features."),
    "label_distribution": (
        ("label_distribution", "group_accuracy"),
        "label_distribution",
        "Fig. 4: base classes that unseen images are taken for, and the accuracy of classes sorted by it.",
    ),
    "regularizers": (("regularizers",), "regularizers", "Table 4: regularisers one at a time."),
    "label_smoothing": (("label_smoothing",), "label_smoothing", "Table 5: label smoothing beside the margin."),
    "tsne": (("tsne",), "tsne", "Fig. 7: t-SNE of features."),
    "shots": (("shots",), "shots", "Fig. 8: accuracy over the number of shots."),
    "finetuning_margin": (
        ("finetuning_margin",),
        "finetuning_margin",
        "Fig. 9: accuracy over the margin of the fine-tuning.",
    ),
}
COLLAPSE = {
    "collapse": (
        ("collapse",),
        "collapse",
        "Singular values of the embeddings after the last epoch, Recall@1 and coding rate over the epochs.",
    )
}

# What a section says before its findings.
_TABLES: dict[str, Callable[[Mapping[str, Any]], list[str]]] = {"collapse": collapse_markdown}
_WITH_SWEEP = ("variance", "label_distribution", "tsne", "shots", "finetuning_margin")

# What was read from one folder, by the name of the file.
Results = Mapping[str, Any]


@dataclass(frozen=True)
class Paper:
    """How what was measured about a paper becomes a page.

    Attributes:
        files: names of the results files that a folder may hold.
        read: the content of those that a folder holds, by name; raises ValueError for one that holds something else.
        section: lines about what was read from one folder, and how the page links that folder.
        missing: lines about what is in none of the folders, a command each; takes what was read, by folder.
    """

    files: tuple[str, ...]
    read: Callable[[Path], dict[str, Any]]
    section: Callable[[Results, str], list[str]]
    missing: Callable[[Mapping[Path, Results]], list[str]]


def findings(results: Results) -> list[Finding]:
    """What the results of analyses say about the paper's claims, in the order of ``FINDINGS``."""
    return [finding for name, find in FINDINGS.items() if name in results for finding in find(results[name])]


def page_with_report(folders: Sequence[Path], page: Path, paper: str = "negative_margin") -> str:
    """The text of a page with the findings of all folders between two markers; whatever else is on it stays.

    Args:
        folders: with results files; one section each.
        page: a Markdown file with the markers, or one that is yet to be made.
        paper: one of ``PAPERS``.

    Raises:
        OSError: the page cannot be read.
        ValueError: a page without the markers, or a results file that does not hold what its name says.
    """
    block = f"{START}\n\n{report(folders, page.parent, paper)}\n{END}"
    if not page.exists():
        return f"{block}\n"
    before, start, rest = page.read_text(encoding="utf-8").partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"output {str(page)!r} has no place for findings: it lacks the lines {START} and {END}")
    return before + block + after


def report(folders: Sequence[Path], relative_to: Path, paper: str = "negative_margin") -> str:
    """The findings of all folders as Markdown.

    Args:
        folders: with results files.
        relative_to: the folder of the page, from which pictures are linked.
        paper: one of ``PAPERS``.
    """
    own = PAPERS[paper]
    results = {folder: own.read(folder) for folder in folders}
    lines = []
    for folder, found in results.items():
        link = Path(os.path.relpath(folder, relative_to)).as_posix()
        # What each file is of was checked, and the columns of its rows are as many as there are analyses.
        with misfits_named(f"results {str(folder)!r} do not hold what the names of their files say"):
            lines += [f"### {folder.name}", "", *own.section(found, link)]
    if missing := own.missing(results):
        lines += ["Not yet measured:", "", *missing, ""]
    return "\n".join(lines)


def read_results(folder: Path, paper: str = "negative_margin") -> dict[str, Any]:
    """Every results file about a paper that is in ``folder``, by its name.

    Args:
        folder: with results files.
        paper: one of ``PAPERS``.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file does not hold what its name says.
    """
    return PAPERS[paper].read(folder)


def _read_analyses(analyses: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    names = [name for files, _, _ in analyses.values() for name in files]
    return {name: read_table(folder, name) for name in names if (folder / f"{name}.json").exists()}


def _section(analyses: Mapping[str, Any], results: Results, link: str) -> list[str]:
    head = next(iter(results.values()))
    lines = source_markdown(head["data"]["name"], head["versions"])
    for name, table in _TABLES.items():
        lines += table(results[name]) if name in results else []
    lines += findings_markdown(findings(results))
    for analysis, (files, picture, caption) in analyses.items():
        if files[0] not in results:
            continue
        sweep = " --sweep SWEEP" if analysis in _WITH_SWEEP else ""
        command = f"fewshot-ext analyze {analysis} --config {link}/{analysis}.yaml{sweep} --output OUTPUT"
        lines += picture_markdown(f"{link}/{picture}.png", caption, command)
    return lines


def _missing(analyses: Mapping[str, Any], results: Mapping[Path, Results]) -> list[str]:
    there = {name for own in results.values() for name in own}
    missing = [analysis for analysis, (files, _, _) in analyses.items() if files[0] not in there]
    return [f"- `fewshot-ext analyze {analysis} {_arguments(analysis)}`" for analysis in missing]


def _arguments(analysis: str) -> str:
    if analysis in _WITH_SWEEP:
        return "--sweep SWEEP"
    return "--data mnist --output OUTPUT" if analysis == "angles" else "--data DATA --output OUTPUT"


def _paper_of(analyses: Mapping[str, Any]) -> Paper:
    files = tuple(f"{name}.json" for names, _, _ in analyses.values() for name in names)
    return Paper(files, *(partial(function, analyses) for function in (_read_analyses, _section, _missing)))


PAPERS = {
    "negative_margin": _paper_of(ANALYSES),
    "anti_collapse": _paper_of(COLLAPSE),
    "deepemd": Paper(tuple(DEEPEMD_FILES.values()), read_deepemd, deepemd_section, deepemd_missing),
}
