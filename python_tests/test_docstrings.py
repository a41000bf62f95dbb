"""Every example in a docstring runs and prints what it says."""

import doctest
import importlib
import pkgutil

import pytest

import fewshot_ext

# The compiled libraries look like modules there, and are none.
MODULES = [
    info.name
    for info in pkgutil.walk_packages(fewshot_ext.__path__, "fewshot_ext.")
    if not info.ispkg and not info.name.startswith("fewshot_ext._C")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS).failed == 0


@pytest.mark.parametrize("name", [name for name in fewshot_ext.__all__ if not name.startswith("__")])
def test_public_names_have_examples(name):
    assert ">>>" in getattr(fewshot_ext, name).__doc__
