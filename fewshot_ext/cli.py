"""The command line: ``fewshot-ext COMMAND ...``."""

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType

from fewshot_ext import _extras
from fewshot_ext._version import __version__
from fewshot_ext.commands import demo

# Each command is a module with SUMMARY, add_arguments(parser) and prepare(arguments) -> run. `prepare` finds
# every mistake of the user and raises it as ImportError, OSError, TypeError or ValueError; `run` does the
# work, and what it raises is a defect of ours that deserves its traceback.
COMMANDS: dict[str, ModuleType] = {"demo": demo}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs ``fewshot-ext`` and returns its exit code: 0, 2 for a wrong argument, 130 after Ctrl-C.

    Args:
        arguments: what follows the program's name; ``sys.argv`` where None.
    """
    command = None
    try:
        _extras.require("train", "jsonargparse", "yaml")
        parser = _build_parser()
        parsed = parser.parse_args(arguments)
        command = parsed.command
        settings = parsed[command]
        subparser = parser._subcommands_action._name_parser_map[command]
        run = COMMANDS[command].prepare(subparser.instantiate(settings), subparser.dump(settings))
    except (argparse.ArgumentError, ImportError, OSError, TypeError, ValueError) as error:
        prog = " ".join(filter(None, ("fewshot-ext", command)))
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fewshot-ext: interrupted before any work was done", file=sys.stderr)
        return 130
    return run()


def _build_parser():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="fewshot-ext",
        description="Few-shot image classification with PyTorch.",
        version=__version__,
        exit_on_error=False,
    )
    commands = parser.add_subcommands(dest="command", metavar="COMMAND")
    for name, module in COMMANDS.items():
        subparser = ArgumentParser(
            usage=f"fewshot-ext {name} [options]", description=module.__doc__, exit_on_error=False
        )
        subparser.add_argument("--config", action="config", help="YAML file with any of the settings below")
        module.add_arguments(subparser)
        commands.add_subcommand(name, subparser, help=module.SUMMARY)
    return parser


if __name__ == "__main__":
    sys.exit(main())
