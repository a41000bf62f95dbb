"""Claims held against numbers, whatever the paper: verdicts, and how a page shows them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

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
