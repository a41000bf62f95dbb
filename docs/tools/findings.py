"""Writes the findings on a paper's page: each claim of the paper, the numbers measured, and a verdict.

    python docs/tools/findings.py deepemd
    python docs/tools/findings.py deepemd --results miniimagenet32 --output findings.md

Each folder of --results becomes a section. It holds the results files that fewshot-ext wrote, all or some of them:

  negative_margin  what "analyze" wrote: margins.json, variance.json, proposition.json and so on
  anti_collapse    collapse.json of "analyze collapse"
  deepemd          evaluation/ and evaluation_10way/ of "evaluate", retrieval/ of "retrieve --rerank" and matches/ of
                   "analyze matches"; "evaluate" was given its checkpoints in pairs, each before and after
                   meta-training

What is missing is listed with the command that measures it, and pictures are linked where they lie. The pages in docs/
say when a claim counts as shown, not shown or contradicted. The extra "train" must be installed.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import anti_collapse
import deepemd
import negative_margin

from fewshot_ext._files import replace_file
from fewshot_ext._formats import misfits_named

START = "<!-- findings: written by docs/tools/findings.py, edits are lost -->"
END = "<!-- end of findings -->"
DOCS = Path(__file__).resolve().parents[1]

# Each is a module with FILES, what a folder may hold; read(folder) -> the content of the files that are there, by the
# keys of FILES; section(results, link) -> lines about what was read from a folder that the page links so; and
# missing(results by folder) -> lines about what is in none of them, a command each.
PAPERS = {"negative_margin": negative_margin, "anti_collapse": anti_collapse, "deepemd": deepemd}


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page; the exit code is 2 for a wrong argument or file, which one line tells."""
    options = parse(arguments)
    page = options.output or DOCS / f"{options.paper}.md"
    try:
        text = page_with_findings(options.paper, options.results or committed_results(options.paper), page)
        replace_file(page, lambda path: path.write_text(text, encoding="utf-8"))
    except (OSError, ValueError) as error:
        print(f"findings.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"written: {page}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; ends the process for wrong ones and for ``--help``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paper", choices=PAPERS, help="the page is docs/PAPER.md")
    parser.add_argument(
        "--results", nargs="+", type=Path, metavar="FOLDER", help="folders with results (default: all in docs/PAPER/)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="a new file, or a page whose lines between the two findings markers are replaced (default: docs/PAPER.md)",
    )
    return parser.parse_args(arguments)


def committed_results(paper: str) -> list[Path]:
    """The folders with results that lie beside the paper's page."""
    return sorted(path for path in (DOCS / paper).iterdir() if path.is_dir())


def page_with_findings(paper: str, folders: Sequence[Path], page: Path) -> str:
    """The text of a page with the findings of all folders between two markers; whatever else is on it stays.

    Args:
        paper: one of ``PAPERS``.
        folders: with results files; one section each.
        page: a Markdown file with the markers, or one that is yet to be made.

    Raises:
        OSError: a file cannot be read, or a folder is missing, that of the page too.
        ValueError: a page without the markers, a folder without results, or a results file that does not hold what its
            name says.
    """
    if not page.parent.is_dir():
        raise NotADirectoryError(f"output {str(page)!r} is in no folder that there is")
    block = f"{START}\n\n{findings(paper, folders, page.parent)}\n{END}"
    if not page.exists():
        return f"{block}\n"
    before, start, rest = page.read_text(encoding="utf-8").partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"output {str(page)!r} has no place for findings: it lacks the lines {START} and {END}")
    return before + block + after


def findings(paper: str, folders: Sequence[Path], relative_to: Path) -> str:
    """The findings of all folders as Markdown; pictures are linked from the folder ``relative_to``."""
    own, results, lines = PAPERS[paper], {}, []
    for folder in folders:
        if not folder.is_dir():
            raise NotADirectoryError(f"results {str(folder)!r} is not a folder")
        results[folder] = own.read(folder)
        if not results[folder]:
            raise ValueError(f"results {str(folder)!r} holds none of the results files {', '.join(own.FILES.values())}")
        link = Path(os.path.relpath(folder, relative_to)).as_posix()
        # What each file is of was checked, and the columns of its rows are as many as there are analyses.
        with misfits_named(f"results {str(folder)!r} do not hold what the names of their files say"):
            lines += [f"### {folder.name}", "", *own.section(results[folder], link)]
    if missing := own.missing(results):
        lines += ["Not yet measured:", "", *missing, ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
