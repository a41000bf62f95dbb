"""The command line: ``fewshot-ext COMMAND ...``."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType

from fewshot_ext import _extras
from fewshot_ext._version import __version__
from fewshot_ext.commands import (
    analyze,
    classify,
    data,
    demo,
    env,
    evaluate,
    metatrain,
    metric_train,
    pretrain,
    retrieve,
)
from fewshot_ext.commands.locks import release_locks

# Each command is a module with SUMMARY, add_arguments(parser) and prepare(arguments, resolved) -> run. `prepare`
# finds every mistake of the user and raises it as ImportError, OSError, TypeError or ValueError; `run` does the
# work, and what it raises is a defect of ours that deserves its traceback. A module with SUMMARY and COMMANDS, a
# mapping of the same kind, is a group: "fewshot-ext data pack". A module may have config_action() -> the argparse
# action of its --config.
COMMANDS: dict[str, ModuleType] = {
    "analyze": analyze,
    "classify": classify,
    "data": data,
    "demo": demo,
    "env": env,
    "evaluate": evaluate,
    "metatrain": metatrain,
    "metric-train": metric_train,
    "pretrain": pretrain,
    "retrieve": retrieve,
}


@release_locks()
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs ``fewshot-ext`` and returns its exit code: 0, 2 for a wrong argument, 130 after Ctrl-C.

    Args:
        arguments: what follows the program's name; ``sys.argv`` where None.
    """
    path, command = _find_command(sys.argv[1:] if arguments is None else arguments)
    if hasattr(sys.stdout, "reconfigure"):
        # A name that the terminal cannot show must not end a run whose work is done; standard error is so already.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        _extras.require("train", "jsonargparse", "yaml")
        parser = _build_parser()
        settings = parser.parse_args(arguments)
        for name in path:
            parser, settings = parser._subcommands_action._name_parser_map[name], settings[name]
        run = command.prepare(parser.instantiate(settings), parser.dump(settings))
    except (argparse.ArgumentError, ImportError, OSError, TypeError, ValueError) as error:
        message = " ".join(str(error).split())
        if message.startswith(("the following arguments are required", 'expected "')):
            # Jsonargparse calls an option by its whole way down the commands: data.pack.source.
            message = message.replace("".join(f"{name}." for name in path), "")
        print(f"{' '.join(['fewshot-ext', *path])}: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fewshot-ext: interrupted before any work was done", file=sys.stderr)
        return 130
    return run()


def _find_command(arguments: Sequence[str]) -> tuple[list[str], ModuleType | None]:
    """The names of the groups and of the command that begin ``arguments``, and the command; None without one."""
    path, module, commands = [], None, COMMANDS
    for name in arguments:
        if name not in commands:
            break
        path.append(name)
        module = commands[name]
        commands = getattr(module, "COMMANDS", {})
    return path, module


def _build_parser():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="fewshot-ext",
        description="Few-shot image classification and metric learning with PyTorch.",
        version=__version__,
        exit_on_error=False,
    )
    _add_commands(parser, "fewshot-ext", COMMANDS)
    return parser


def _add_commands(parser, prog: str, commands: Mapping[str, ModuleType]) -> None:
    from jsonargparse import ArgumentParser

    subcommands = parser.add_subcommands(dest="command", metavar="COMMAND")
    for name, module in commands.items():
        path = f"{prog} {name}"
        is_group = hasattr(module, "COMMANDS")
        usage = f"{path} COMMAND ..." if is_group else f"{path} [options]"
        subparser = ArgumentParser(usage=usage, description=module.__doc__, exit_on_error=False)
        # Jsonargparse wants a group to have its place among its elders before it gets commands of its own.
        subcommands.add_subcommand(name, subparser, help=module.SUMMARY)
        if is_group:
            _add_commands(subparser, path, module.COMMANDS)
        else:
            config_action = module.config_action() if hasattr(module, "config_action") else "config"
            subparser.add_argument("--config", action=config_action, help="YAML file with any of the settings below")
            module.add_arguments(subparser)


if __name__ == "__main__":
    sys.exit(main())
