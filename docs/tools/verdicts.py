"""Claims held against numbers, whatever the paper: results files, verdicts, and how a page shows them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewshot_ext._formats import read_json
from fewshot_ext.experiments.accuracies import Difference

SHOWN, NOT_SHOWN, CONTRADICTED = "shown", "not shown", "contradicted"


@dataclass(frozen=True)
class Finding:
    """What became of one claim.

    Attributes:
        source: figure, table or section of the paper, or what the claim is about.
        claim: in words.
        measured: the numbers that decide.
        verdict: "shown", "not shown" or "contradicted".
    """

    source: str
    claim: str
    measured: str
    verdict: str


def judge(expected: int, observed: int) -> str:
    """The verdict on a claim of one sign where the numbers have another, or 0 for no clear one.

    Example:
        >>> judge(1, 0)
        'not shown'
    """
    return SHOWN if observed == expected else NOT_SHOWN if not observed else CONTRADICTED


def sign_of(gain: Difference) -> int:
    """1 or -1 where the interval leaves zero out and every seed agrees, 0 elsewhere."""
    sign = 1 if gain.mean > 0 else -1
    clear = abs(gain.mean) > gain.interval and all(sign * value > 0 for value in gain.by_seed)
    return sign if clear else 0


def gain_text(gain: Difference) -> str:
    """A difference in words, with its seeds where there are several.

    Example:
        >>> gain_text(Difference(1.5, 0.25, (1.5,))), gain_text(Difference(1.5, 0.25, (1.0, 2.0)))
        ('+1.50 ± 0.25 points', '+1.50 ± 0.25 points (by seed +1.00, +2.00)')
    """
    text = f"{gain.mean:+.2f} ± {gain.interval:.2f} points"
    seeds = ", ".join(f"{value:+.2f}" for value in gain.by_seed)
    return f"{text} (by seed {seeds})" if len(gain.by_seed) > 1 else text


def read_table(folder: Path, name: str) -> dict[str, Any]:
    """The content of ``NAME.json``, as an analysis wrote it: the head, and the rows under "rows".

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else.
    """
    path = folder / f"{name}.json"
    what = f"the results of {name}"
    content = read_json(path, {"analysis": str, "rows": [{str: object}]}, what)
    if content["analysis"] != name:
        raise ValueError(f"{path} does not hold {what}: it holds the analysis {content['analysis']!r}")
    return content


def findings_markdown(found: Sequence[Finding]) -> list[str]:
    """Lines of Markdown: how many claims have each verdict, and a table of all; none without findings.

    Example:
        >>> findings_markdown([Finding("Fig. 1", "it rises", "+3", SHOWN)])[0]
        '1 shown, 0 not shown, 0 contradicted.'
    """
    if not found:
        return []
    counts = Counter(one.verdict for one in found)
    lines = [", ".join(f"{counts[verdict]} {verdict}" for verdict in (SHOWN, NOT_SHOWN, CONTRADICTED)) + ".", ""]
    lines += markdown_table(
        ["", "claim", "measured", "verdict"],
        [[one.source, one.claim, one.measured, f"**{one.verdict}**"] for one in found],
    )
    return [*lines, ""]


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table.

    Example:
        >>> markdown_table(["", "accuracy"], [["ours", "55.1"]])
        ['| | accuracy |', '|---|---|', '| ours | 55.1 |']
    """
    lines = ["|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|" for cells in (head, *rows)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:]]


def picture_markdown(picture: str, caption: str, command: str) -> list[str]:
    """Lines of Markdown: a picture, its caption, and the command that makes it again.

    Example:
        >>> picture_markdown("digits/tsne.png", "t-SNE.", "fewshot-ext analyze tsne")[0]
        '![t-SNE.](digits/tsne.png)'
    """
    return [f"![{caption}]({picture})", "", f"{caption} Again: `{command}`", ""]


def source_markdown(data: str, versions: dict[str, str]) -> list[str]:
    """Lines of Markdown: the image set, and the versions of what decided the numbers."""
    return [f"Image set {data}; {', '.join(f'{name} {version}' for name, version in versions.items())}.", ""]
