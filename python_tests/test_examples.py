import doctest
import importlib
import pkgutil

import pytest

import fewshot_ext.data
import fewshot_ext.evaluation
import fewshot_ext.experiments
import fewshot_ext.models
import fewshot_ext.training

ROOMS = (
    fewshot_ext.data,
    fewshot_ext.evaluation,
    fewshot_ext.experiments,
    fewshot_ext.models,
    fewshot_ext.training,
)
MODULES = [info.name for room in ROOMS for info in pkgutil.iter_modules(room.__path__, f"{room.__name__}.")]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_the_docstrings_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert doctest.testmod(importlib.import_module(name)).failed == 0
