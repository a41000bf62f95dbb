import sys
import types

import pytest

from fewshot_ext._extras import is_installed, require


def test_installed_modules_pass_without_being_imported():
    sys.modules.pop("this", None)
    require("train", "torch", "this")
    assert "this" not in sys.modules


def test_a_missing_module_is_named_with_the_line_that_brings_it():
    with pytest.raises(ImportError) as caught:
        require("train", "torch", "no_such_module")
    assert str(caught.value) == ("fewshot_ext: 'no_such_module' is missing; pip install 'fewshot_ext[train]'")
    assert caught.value.name == "no_such_module"


def test_all_missing_modules_are_named_at_once():
    with pytest.raises(ImportError, match=r"'nope', 'nope\.child' are missing; pip install 'fewshot_ext\[bench\]'"):
        require("bench", "nope", "nope.child")


def test_a_child_of_a_plain_module_and_a_module_without_spec_count_as_missing(monkeypatch):
    assert not is_installed("this.child")
    stub = types.ModuleType("stub")
    stub.__spec__ = None
    monkeypatch.setitem(sys.modules, "stub", stub)
    assert not is_installed("stub")
