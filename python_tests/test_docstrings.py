"""Every example in a docstring runs and prints what it says."""

import doctest
import importlib

import pytest

import fewshot_ext

MODULES = ("fewshot_ext.ops.margin_softmax", "fewshot_ext.losses.margin_softmax")


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    failed, attempted = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert attempted > 0
    assert failed == 0


@pytest.mark.parametrize("name", [name for name in fewshot_ext.__all__ if not name.startswith("__")])
def test_public_names_have_examples(name):
    assert ">>>" in getattr(fewshot_ext, name).__doc__
