"""The command line: ``fewshot-ext COMMAND ...``."""

import argparse
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from functools import cache
from types import ModuleType
from typing import Any

from fewshot_ext import _extras
from fewshot_ext._formats import repeated
from fewshot_ext._version import __version__
from fewshot_ext.commands import (
    analyze,
    classify,
    convert,
    data,
    demo,
    env,
    evaluate,
    meta_train,
    metric_train,
    pretrain,
    retrieve,
)
from fewshot_ext.commands.locks import release_locks
from fewshot_ext.commands.process import signals_as_interrupt, unbroken_output
from fewshot_ext.commands.training import recipe_action
from fewshot_ext.recipes import RECIPE_FOLDERS

# Each command is a module with SUMMARY, add_arguments(parser) and prepare(arguments, resolved) -> run, with USAGE where
# options are not all that it takes, and with dependent_defaults(settings, given) where defaults follow from other
# options: `given` has what the user gave, as an option or in a file, and `settings` the defaults too.
# `prepare` finds every mistake of the user and raises it as ImportError, OSError, TypeError or ValueError; `run` does
# the work, and what it raises is a defect of ours that deserves its traceback. A module with SUMMARY and COMMANDS, a
# mapping of the same kind, is a group: "fewshot-ext data pack".
COMMANDS: dict[str, ModuleType] = {
    "analyze": analyze,
    "classify": classify,
    "convert": convert,
    "data": data,
    "demo": demo,
    "env": env,
    "evaluate": evaluate,
    "meta-train": meta_train,
    "metric-train": metric_train,
    "pretrain": pretrain,
    "retrieve": retrieve,
}


RENAMED = {"metatrain": "meta-train"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs ``fewshot-ext`` and returns its exit code.

    That is 0, 2 for a wrong argument, 1 for what goes wrong later, a full disk for one, and 130 after Ctrl-C, SIGTERM
    or SIGHUP.

    Args:
        arguments: what follows the program's name; ``sys.argv`` where None.
    """
    with unbroken_output() as output, release_locks(), signals_as_interrupt():
        try:
            exit_code = _main(arguments)
        except SystemExit:  # --help has been printed, or not
            output.flush()
            if output.trouble is None or isinstance(output.trouble, BrokenPipeError):
                raise
            exit_code = 1
        output.flush()
        trouble = output.trouble
        if trouble is None or isinstance(trouble, BrokenPipeError):  # a reader that has seen enough, as head
            return exit_code
        print(f"fewshot-ext: error: cannot write to standard output: {trouble.strerror}", file=sys.stderr)
        return exit_code or 1


def _main(arguments: Sequence[str] | None) -> int:
    arguments = _as_declared(sys.argv[1:] if arguments is None else arguments)
    path, command = _find_command(arguments)
    if hasattr(sys.stdout, "reconfigure"):
        # A name that the terminal cannot show must not end a run whose work is done; standard error is so already.
        sys.stdout.reconfigure(errors="backslashreplace")
    name = " ".join(["fewshot-ext", *path])
    try:
        _extras.require("train", "jsonargparse", "yaml")
        parsers = _build_parsers()
        if hasattr(command, "dependent_defaults"):
            # The settings are printed when they are all known.
            first = [argument for argument in arguments if not argument.startswith("--print_config")]
            both = (_parse(parsers, first, path, defaults=defaults) for defaults in (True, False))
            parsers[name].set_defaults(command.dependent_defaults(*both))
        settings, parser = _parse(parsers, arguments, path), parsers[name]
        run = command.prepare(parser.instantiate(settings), parser.dump(settings))
    except (argparse.ArgumentError, ImportError, OSError, TypeError, ValueError) as error:
        message = " ".join(str(error).split())
        if message.startswith(("the following arguments are required", 'expected "')):
            # Jsonargparse calls an option by its whole way down the commands: data.pack.source.
            message = message.replace("".join(f"{part}." for part in path), "")
        print(f"{name}: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fewshot-ext: interrupted before any work was done", file=sys.stderr)
        return 130
    try:
        return run()
    except OSError as error:  # the disk is full, or the output folder is gone
        print(f"{name}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parse(parsers: Mapping[str, Any], arguments: Sequence[str], path: Sequence[str], *, defaults: bool = True) -> Any:
    """The settings of the command that ``path`` leads to, with the defaults of those that are not given or without."""
    settings = parsers["fewshot-ext"].parse_args(arguments, defaults=defaults)
    for part in path:
        settings = settings[part]
    return settings


def _as_declared(arguments: Sequence[str]) -> list[str]:
    """Arguments with the names that the parser knows: hyphens in commands, and in options underscores, as settings have
    them in Python and YAML. Help shows hyphens; both are taken, and a command's old name."""
    declared = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        is_option = name.startswith("--") and len(name) > 2
        declared.append(f"--{name[2:].replace('-', '_')}{equals}{value}" if is_option else argument)
    commands = COMMANDS
    for place, argument in enumerate(declared):
        name = RENAMED.get(argument, argument.replace("_", "-"))
        if name not in commands:
            break
        declared[place], commands = name, getattr(commands[name], "COMMANDS", {})
    return declared


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


@cache
def _guard_yaml() -> None:
    """Refuses aliases, of which some hundred bytes may stand for more values than there is memory for, and settings
    that come twice, of which the first would be lost."""
    import yaml
    from jsonargparse import get_loader, set_loader
    from jsonargparse._loaders_dumpers import get_yaml_default_loader

    # Not a loader of our own: what set_loader sets does not see texts in numbers' places, which are YAML once more.
    loader, events = get_yaml_default_loader(), getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    begin, construct = loader.__init__, loader.construct_mapping

    def begin_without_aliases(self, text: str) -> None:
        if "*" in text and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, events)):
            raise yaml.YAMLError("aliases such as *name are not taken in YAML: write the value out")
        begin(self, text)

    def construct_without_repeats(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        if (name := repeated(str(key.value) for key, _ in node.value)) is not None:
            raise yaml.YAMLError(f"{name} comes twice in YAML: leave one out")
        return construct(self, node, deep)

    loader.__init__, loader.construct_mapping = begin_without_aliases, construct_without_repeats
    set_loader("yaml", get_loader("yaml"), (yaml.YAMLError, RecursionError, ValueError))


@cache
def _parser_class() -> type:
    """Jsonargparse's parser, whose help has hyphens in options, paragraphs, and no Python types or reST."""
    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    class Formatter(DefaultHelpFormatter):
        def _format_action_invocation(self, action):
            text = super()._format_action_invocation(action)
            return re.sub(r"--[\w.]+", lambda option: option[0].replace("_", "-"), text)

        def _expand_help(self, action):
            text = super()._expand_help(action).replace("``", "")
            text = re.sub(r"type: (Optional\[)?Literal\[.*?\]+, ", "", text)  # the choices stand beside the option
            text = text.replace("Optional[tuple[float, ...]]", "[float, ...] | null")
            return re.sub(r"\.? \((type|default): ", r" (\1: ", text)

        def _fill_text(self, text, width, indent):
            settings = {"initial_indent": indent, "subsequent_indent": indent, "break_on_hyphens": False}
            return "\n\n".join(
                part if part.startswith("    ") else textwrap.fill(" ".join(part.split()), width, **settings)
                for part in text.strip().split("\n\n")
            )  # commands are indented, and stay as they are

    class Parser(ArgumentParser):
        def __init__(self, *args, **settings):
            super().__init__(*args, formatter_class=Formatter, **settings)

    return Parser


def _build_parsers() -> dict[str, Any]:
    """Parsers by the commands that they parse: "fewshot-ext", "fewshot-ext data", "fewshot-ext data pack"."""
    _guard_yaml()
    parser = _parser_class()(
        prog="fewshot-ext",
        description="Few-shot image classification and metric learning with PyTorch.",
        version=__version__,
        exit_on_error=False,
    )
    parsers = {"fewshot-ext": parser}
    _add_commands(parsers, "fewshot-ext", COMMANDS)
    return parsers


def _add_commands(parsers: dict[str, Any], prog: str, commands: Mapping[str, ModuleType]) -> None:
    subcommands = parsers[prog].add_subcommands(dest="command", metavar="COMMAND")
    for name, module in commands.items():
        path = f"{prog} {name}"
        is_group = hasattr(module, "COMMANDS")
        usage = f"{path} COMMAND ..." if is_group else f"{path} {getattr(module, 'USAGE', '[options]')}"
        subparser = parsers[path] = _parser_class()(usage=usage, description=module.__doc__, exit_on_error=False)
        # Jsonargparse wants a group to have its place among its elders before it gets commands of its own.
        subcommands.add_subcommand(name, subparser, help=module.SUMMARY)
        if is_group:
            _add_commands(parsers, path, module.COMMANDS)
        else:
            action = recipe_action(name) if name in RECIPE_FOLDERS else "config"
            subparser.add_argument("--config", action=action, help="YAML file with any of the settings below")
            module.add_arguments(subparser)


if __name__ == "__main__":
    sys.exit(main())
