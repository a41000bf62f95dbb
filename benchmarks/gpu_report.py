"""Tests and times the package on this machine's GPU: the first thing to run where there is one.

    python benchmarks/gpu_report.py

Runs the CUDA half of the test suite, measures the copy and the matrix-product rates of the machine, then times every
operator against its peers, and writes a Markdown report and one CSV an operator. It builds
nothing and installs nothing; what cannot be imported is listed in the report and left out.
"""

import argparse
import sys
from pathlib import Path

EPILOG = """
It takes the given minutes at most. The files are written anew after every case, so that a run that is stopped leaves
what it had; the last lines it prints say how far it got. Exit code: 0 for a report, also an incomplete one; 1 where
tests failed, a sanitizer found errors or an operator's result was wrong; 2 where there is no GPU to run on; 128 + n
after signal n.
"""
OPERATORS = ("margin_softmax", "emd", "episode_finetune")  # each has a module gpu_<name>, see benchmarks/README.md
SECTIONS = ("tests", *OPERATORS)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="gpu_report.py",
        description=__doc__.partition("\n\n")[0] + " " + __doc__.rpartition("\n\n")[2],
        epilog=EPILOG,
    )
    options.add_argument("--minutes", type=float, default=8.0, help="time for everything (default: 8)")
    options.add_argument(
        "--only",
        nargs="+",
        choices=SECTIONS,
        metavar="SECTION",
        help=f"of the sections {', '.join(SECTIONS)} run these alone",
    )
    options.add_argument("--skip-tests", action="store_true", help="leave out the test suite")
    options.add_argument(
        "--sanitize",
        action="store_true",
        help="instead of tests and timings, run small CUDA tests under the four tools of compute-sanitizer",
    )
    options.add_argument(
        "--quick", action="store_true", help="small cases and few repetitions, to try the script itself"
    )
    options.add_argument(
        "--seconds", type=float, help="time for the turns of one case and kind of timing, about (default: 1.5)"
    )
    where = options.add_mutually_exclusive_group()
    where.add_argument("--save", action="store_true", help="write the files into benchmarks/results, to be committed")
    where.add_argument(
        "--output-dir",
        type=Path,
        help="write them into this folder (default: gpu_report in the folder for temporary files)",
    )
    # A rehearsal of the script where there is no GPU; its times mean nothing.
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    return options


def parse(arguments: list[str] | None) -> argparse.Namespace:
    options_parser = parser()
    options = options_parser.parse_args(arguments)
    for name in ("minutes", "seconds"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            options_parser.error(f"--{name}: expected a positive number, got {value}")
    if options.sanitize and (options.only or options.skip_tests):
        options_parser.error("--sanitize: expected without --only and --skip-tests, because it replaces all sections")
    if options.skip_tests and options.only and "tests" in options.only:
        options_parser.error("--skip-tests: expected without --only tests")
    if options.seconds is None:
        options.seconds = 0.05 if options.quick else 1.5
    wanted = options.only or SECTIONS
    options.sections = [name for name in SECTIONS if name in wanted and not (name == "tests" and options.skip_tests)]
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        import gpu_sections
    except ImportError as error:
        print(f"gpu_report: cannot import what it measures: {error}", file=sys.stderr)
        return 2
    return gpu_sections.Report(options).run()


if __name__ == "__main__":
    sys.exit(main())
