"""The page of the Anti-Collapse paper: its claims held against the results of ``fewshot-ext analyze collapse``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from verdicts import (
    Finding,
    findings_markdown,
    judge,
    markdown_table,
    picture_markdown,
    read_table,
    source_markdown,
)

from fewshot_ext.experiments.accuracies import Row, select, values
from fewshot_ext.experiments.collapse import QUANTITIES, SeedMean, arms_of, blocks_of, caption_of, gain
from fewshot_ext.experiments.metric_runs import LOSS_TITLES

FILES = {"collapse": "collapse.json"}
_CAPTION = "Singular values of the embeddings after the last epoch, Recall@1 and coding rate over the epochs."


def read(folder: Path) -> dict[str, Any]:
    """The results file, if it is in ``folder``, under "collapse".

    Raises:
        OSError: it cannot be read.
        ValueError: it does not hold what its name says.
    """
    return {"collapse": read_table(folder, "collapse")} if (folder / FILES["collapse"]).exists() else {}


def section(results: Mapping[str, Any], link: str) -> list[str]:
    """Lines of Markdown about one folder: tables, verdicts and the picture.

    Args:
        results: of ``read``, not empty.
        link: the folder, as the page links it.
    """
    table = results["collapse"]
    command = f"fewshot-ext analyze collapse --config {link}/collapse.yaml --output OUTPUT"
    return [
        *source_markdown(table["data"]["name"], table["versions"]),
        *collapse_markdown(table["rows"]),
        *findings_markdown(collapse_findings(table["rows"])),
        *picture_markdown(f"{link}/collapse.png", _CAPTION, command),
    ]


def missing(results: Mapping[Path, Mapping[str, Any]]) -> list[str]:
    """Lines of Markdown: the command, unless a folder has what it writes."""
    return [] if any(results.values()) else ["- `fewshot-ext analyze collapse --data DATA --output OUTPUT`"]


def collapse_markdown(rows: Sequence[Row]) -> list[str]:
    """Lines of Markdown: every quantity after the last epoch, a table a set of classes."""
    lines = [f"{caption_of(rows)}.", ""]
    for classes, block in blocks_of(rows).items():
        head = [f"{classes} classes", *(title for title, *_ in QUANTITIES.values())]
        lines += [*markdown_table(head, [[name, *cells] for name, cells in block]), ""]
    return lines


def collapse_findings(rows: Sequence[Row]) -> list[Finding]:
    """Anti-Collapse: what the term does to the spectrum and to retrieval, for every loss and arm."""
    found = []
    claims = (
        ("effective_rank", "seen", "the spectrum of seen classes flattens (effective rank rises)"),
        ("effective_rank", "unseen", "the spectrum of unseen classes flattens (effective rank rises)"),
        ("coding_rate", "unseen", "the coding rate of unseen classes rises"),
        ("recall_at_1", "unseen", "Recall@1 on unseen classes rises"),
    )
    for loss in values(rows, "loss"):
        for arm in arms_of(select(rows, loss=loss)):
            for quantity, classes, claim in claims if arm.weight else ():
                difference = gain(rows, loss, arm, classes, quantity)
                if difference is None:
                    continue
                title, factor, layout = QUANTITIES[quantity]
                seeds = ", ".join(format(factor * value, f"+{layout}") for value in difference.by_seed)
                measured = f"{title} {difference.text(f'+{layout}', factor)} (by seed {seeds})"
                where = f"{LOSS_TITLES[loss]}, {arm.variant} {arm.weight:g}"
                found.append(Finding("abstract", f"{claim} ({where})", measured, judge(1, sign_of_mean(difference))))
    return found


def sign_of_mean(gain: SeedMean) -> int:
    """1 or -1 where the interval leaves zero out, 0 elsewhere and for a single seed."""
    return 0 if not abs(gain.mean) > gain.interval else 1 if gain.mean > 0 else -1
