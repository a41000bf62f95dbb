"""Show what is installed, what was built with which compiler, which kernels run on which device, and why not.

The same as ``python -m fewshot_ext.env``, which needs none of the optional packages.
"""

from collections.abc import Callable

from fewshot_ext import env

SUMMARY = "versions, libraries, devices and kernels, for bug reports"


def add_arguments(parser) -> None:
    """Adds the options of ``env`` to a jsonargparse parser."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def prepare(arguments, resolved: str) -> Callable[[], int]:
    """Returns the function that prints the report; nothing can be wrong with the settings."""

    def run() -> int:
        env.main(["--json"] if arguments.json else [])
        return 0

    return run
