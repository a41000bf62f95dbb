"""Who may import whom: no arrow from a room to one above it, no circle, no private name of another module."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1] / "fewshot_ext"
# Each imports from its own level only its own room, and from levels above it in this list. What lies beside the rooms
# with a leading underscore serves all of them and takes from none.
LEVELS = (
    ("ops", "reference", "data"),
    ("losses", "parallel"),
    ("models",),
    ("heads",),
    ("evaluation",),
    ("classifier_assessment", "classifier_file", "classifier_labels"),
    ("retrieval", "classifier"),
    ("training",),
    ("recipes",),
    ("experiments",),
    ("commands",),
    ("cli",),
)
LEVEL = {room: number for number, rooms in enumerate(LEVELS) for room in rooms}


class Import(NamedTuple):
    module: str
    imported: str
    name: str  # what is taken from it, empty where the module is


def modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports_of(module: str) -> Iterator[Import]:
    """Those in functions and for annotations too."""
    tree = ast.parse(MODULES[module].read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are written out"
            if (node.module or "").partition(".")[0] != ROOT.name:
                continue
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found = (whole, "") if whole in MODULES else (node.module, alias.name)
                yield Import(module, *found)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in MODULES:
                    yield Import(module, alias.name, "")


IMPORTS = [found for module in MODULES for found in imports_of(module)]


def room(module: str) -> str:
    """The folder or file right below the package, empty for the package itself."""
    return module.split(".")[1] if "." in module else ""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_every_room_has_a_level():
    rooms = {room(module) for module in MODULES} - {"", "env"}
    assert {name for name in rooms if not is_private(name)} == LEVEL.keys()


def test_no_arrow_runs_back_up():
    wrong = [
        found
        for found in IMPORTS
        if room(found.imported) in LEVEL
        and room(found.imported) != room(found.module)
        and room(found.module)
        and (is_private(room(found.module)) or LEVEL[room(found.imported)] >= LEVEL[room(found.module)])
    ]
    assert not wrong


def test_no_circle():
    # Neither what hides in a function nor what only annotates may look back.
    graph: dict[str, set[str]] = {}
    for found in IMPORTS:
        if found.imported != ROOT.name:
            graph.setdefault(found.module, set()).add(found.imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_no_private_name_of_another_module():
    # A private module serves its own room.
    wrong = [
        found
        for found in IMPORTS
        if is_private(found.name)
        or (
            (is_private(found.imported.split(".")[-1]) and room(found.imported) not in ("", room(found.module)))
            and not is_private(room(found.imported))
        )
    ]
    assert not wrong
