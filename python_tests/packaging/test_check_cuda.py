"""The CUDA check fails without the library, without operators, and with one operator left out."""

import importlib.util
from pathlib import Path

import pytest
import torch

from fewshot_ext import _library

spec = importlib.util.spec_from_file_location("check_cuda", Path(__file__).with_name("check_cuda.py"))
check_cuda = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_cuda)


@pytest.fixture
def loaded(monkeypatch):
    """A loaded CUDA library with kernels for the operators whose name ends as given."""
    monkeypatch.setattr(_library, "cuda_error", None)

    def registered(ending):
        monkeypatch.setattr(
            torch._C,
            "_dispatch_has_kernel_for_dispatch_key",
            lambda name, key: key == "CUDA" and name.endswith(ending),
        )

    return registered


def run(capsys):
    with pytest.raises(SystemExit) as finished:
        check_cuda.main()
    return finished.value.code, capsys.readouterr().out


def test_kernel_for_every_operator(loaded, capsys):
    loaded("")
    failed, told = run(capsys)
    assert not failed
    assert "fewshot_ext::margin_softmax_backward  " in told


def test_missing_kernel(loaded, capsys):
    loaded("_backward")
    failed, told = run(capsys)
    assert failed
    assert "FAULT: fewshot_ext::margin_softmax has no CUDA kernel\n" in told
    assert "margin_softmax_backward has no CUDA kernel" not in told


def test_operator_in_python_needs_no_kernel_but_a_fallback_of_a_native_one_is_none(loaded, monkeypatch, capsys):
    monkeypatch.setattr(torch._C, "_dispatch_get_all_op_names", lambda: ["fewshot_ext::python", "fewshot_ext::native"])
    composite = "CompositeExplicitAutograd"
    keys = {"fewshot_ext::python": {composite}, "fewshot_ext::native": {composite, "CPU"}}
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: key in keys[name])
    failed, told = run(capsys)
    assert failed
    assert "FAULT: fewshot_ext::native has no CUDA kernel\n" in told
    assert "python has no CUDA kernel" not in told


def test_missing_library(monkeypatch, capsys):
    monkeypatch.setattr(_library, "cuda_error", "no _C_cuda library in /nowhere")
    failed, told = run(capsys)
    assert failed
    assert "FAULT: the CUDA library is not loaded: no _C_cuda library in /nowhere" in told


def test_no_operator(loaded, monkeypatch, capsys):
    loaded("")
    monkeypatch.setattr(torch._C, "_dispatch_get_all_op_names", lambda: ["aten::mm"])
    failed, told = run(capsys)
    assert failed
    assert "FAULT: no operator is registered" in told
