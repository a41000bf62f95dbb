"""A page of findings made from results files, so that its text cannot disagree with the numbers."""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fewshot_ext.experiments.claims import CONTRADICTED, FINDINGS, NOT_SHOWN, SHOWN, Finding
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
PAPERS = {"negative_margin": ANALYSES, "anti_collapse": COLLAPSE}

# What a section says before its findings.
_TABLES: dict[str, Callable[[Mapping[str, Any]], list[str]]] = {"collapse": collapse_markdown}
_WITH_SWEEP = ("variance", "label_distribution", "tsne", "shots", "finetuning_margin")


def read_results(folder: Path, paper: str = "negative_margin") -> dict[str, dict[str, Any]]:
    """Every results file of a paper's analyses that is in ``folder``, by its name.

    Args:
        folder: output of the analyses.
        paper: one of ``PAPERS``.

    Raises:
        ValueError: a file does not hold what its name says.
    """
    names = [name for files, _, _ in PAPERS[paper].values() for name in files]
    return {name: read_table(folder, name) for name in names if (folder / f"{name}.json").exists()}


def findings(results: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """What the results say about the paper's claims, in the order of ``FINDINGS``."""
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
    analyses = PAPERS[paper]
    results = {folder: read_results(folder, paper) for folder in folders}
    lines = [line for folder, own in results.items() for line in _section(folder, own, relative_to, analyses)]
    there = {name for own in results.values() for name in own}
    if missing := [analysis for analysis, (files, _, _) in analyses.items() if files[0] not in there]:
        lines += ["Not yet measured:", ""]
        lines += [f"- `fewshot-ext analyze {analysis} {_arguments(analysis)}`" for analysis in missing]
        lines.append("")
    return "\n".join(lines)


def _section(
    folder: Path, results: Mapping[str, Mapping[str, Any]], relative_to: Path, analyses: Mapping[str, Any]
) -> list[str]:
    link = Path(os.path.relpath(folder, relative_to)).as_posix()
    head = next(iter(results.values()))
    packages = ", ".join(f"{name} {version}" for name, version in head["versions"].items())
    lines = [f"### {folder.name}", "", f"Image set {head['data']['name']}; {packages}.", ""]
    for name, table in _TABLES.items():
        lines += table(results[name]) if name in results else []
    if found := findings(results):
        counts = Counter(one.verdict for one in found)
        lines += [", ".join(f"{counts[verdict]} {verdict}" for verdict in (SHOWN, NOT_SHOWN, CONTRADICTED)) + ".", ""]
        lines += ["| | claim | measured | verdict |", "|---|---|---|---|"]
        lines += [f"| {one.source} | {one.claim} | {one.measured} | **{one.verdict}** |" for one in found]
        lines.append("")
    for analysis, (files, picture, caption) in analyses.items():
        if files[0] not in results:
            continue
        sweep = " --sweep SWEEP" if analysis in _WITH_SWEEP else ""
        command = f"fewshot-ext analyze {analysis} --config {link}/{analysis}.yaml{sweep} --output OUTPUT"
        lines += [f"![{caption}]({link}/{picture}.png)", "", f"{caption} Again: `{command}`", ""]
    return lines


def _arguments(analysis: str) -> str:
    if analysis in _WITH_SWEEP:
        return "--sweep SWEEP"
    return "--data mnist --output OUTPUT" if analysis == "angles" else "--data DATA --output OUTPUT"
