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

from collections.abc import Callable
from pathlib import Path

from fewshot_ext._checks import check_choice
from fewshot_ext._files import replace_file
from fewshot_ext.commands.common import print_written
from fewshot_ext.commands.locks import hold_folder
from fewshot_ext.experiments.report import PAPERS, page_with_report, read_results

SUMMARY = "a paper's claims against the numbers, as a page"


def add_arguments(parser) -> None:
    """Adds the options of ``analyze report`` to a jsonargparse parser."""
    parser.add_argument(
        "--results", nargs="+", default=[], metavar="FOLDER", help="folders with what was measured, a section each"
    )
    parser.add_argument("--paper", default="negative_margin", help=" or ".join(PAPERS))
    parser.add_argument(
        "--output",
        type=str | None,
        default=None,
        metavar="FILE",
        help="null for PAPER.md here; a new file, or a page whose lines between the two findings markers are replaced",
    )


def prepare(arguments, resolved: str) -> Callable[[], int]:
    """Checks the settings and returns the function that writes the page."""
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
    hold_folder(page.parent, page.name)
    text = page_with_report(folders, page, arguments.paper)

    def run() -> int:
        replace_file(page, lambda path: path.write_text(text, encoding="utf-8"))
        print_written([page])
        return 0

    return run
