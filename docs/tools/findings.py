"""Hold measured numbers against a paper's claims: shown, not shown or contradicted, each with its numbers.

Reads the results files of the other analyses and writes Markdown with one line a claim and the pictures. A claim about
accuracies is shown where the 95 % interval of the paired difference leaves zero out and every seed agrees on the sign;
one about a trend where the rank correlation with the margin is at least 0.8 in every seed; contradicted where the same
holds the other way round; not shown otherwise. Claims of the Anti-Collapse paper are shown where the 95 % t interval
of the paired difference over seeds leaves zero out.

For DeepEMD each folder is an image set, with the output of fewshot-ext evaluate in evaluation/ and, for 10-way ones,
in evaluation_10way/, of retrieve --rerank in retrieval/ and of analyze matches in matches/, as far as they are there;
evaluate was given its checkpoints in pairs, each before and after meta-training.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from report import PAPERS, page_with_report, read_results

from fewshot_ext._checks import check_choice
from fewshot_ext._files import replace_file


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page; the exit code is 2 for a wrong argument or file, told in one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results", nargs="+", default=[], metavar="FOLDER", help="folders with what was measured, a section each"
    )
    parser.add_argument("--paper", default="negative_margin", help=" or ".join(PAPERS))
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="a new file, or a page whose lines between the two findings markers are replaced (default: PAPER.md here)",
    )
    try:
        page = write_page(parser.parse_args(arguments))
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"written: {page}")
    return 0


def write_page(arguments) -> Path:
    """Checks the settings and writes the page."""
    check_choice("paper", arguments.paper, *PAPERS)
    folders = [Path(name).expanduser() for name in arguments.results]
    for folder in folders:
        if not folder.is_dir():
            raise NotADirectoryError(f"results {str(folder)!r} is not a folder")
        if not read_results(folder, arguments.paper):
            files = ", ".join(PAPERS[arguments.paper].files)
            raise ValueError(f"results {str(folder)!r} holds no results file of an analysis, that is one of {files}")
    page = Path(arguments.output or f"{arguments.paper}.md").expanduser()
    if not page.parent.is_dir():
        raise NotADirectoryError(f"output {str(page)!r} is in no folder that there is")
    text = page_with_report(folders, page, arguments.paper)
    replace_file(page, lambda path: path.write_text(text, encoding="utf-8"))
    return page


if __name__ == "__main__":
    sys.exit(main())
