"""What pre-commit runs on a commit is what ``make lint`` runs on everything, in the versions of the extra ``dev``."""

import importlib.metadata
import re
from pathlib import Path

import pytest
import yaml

CHECKOUT = Path(__file__).resolve().parents[2]
HOOKS = yaml.safe_load((CHECKOUT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
# The words of a command that say what it checks; the others are options, which differ between checking and mending.
CHECKS = re.compile(r"(?:ruff|check-jsonschema --builtin-schema) \S+|^[\w-]+")


def checks_of_make():
    makefile = (CHECKOUT / "Makefile").read_text().replace("$(SCHEMA)", "$(BIN)/check-jsonschema --builtin-schema")
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE).group(1)
    return [CHECKS.match(line).group() for line in re.findall(r"^\t\$\(BIN\)/(.*)", recipe, re.MULTILINE)]


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook["id"])
def test_versions_of_a_hook_are_those_of_the_extra(hook):
    extra = [line.partition(";")[0] for line in importlib.metadata.requires("fewshot_ext") if 'extra == "dev"' in line]
    assert hook["additional_dependencies"], "it would find no linter"
    for requirement in hook["additional_dependencies"]:
        assert re.search(r"==[\d.]+\*$", requirement), f"{requirement} does not pin a minor release"
        assert normalized(requirement) in map(normalized, extra)


def normalized(requirement):
    name, _, version = requirement.strip().partition("==")
    base, _, options = name.rstrip("]").partition("[")
    return base, frozenset(options.split(",")), version


def test_make_and_the_hooks_check_the_same():
    assert sorted(CHECKS.match(hook["entry"]).group() for hook in HOOKS) == sorted(checks_of_make())
