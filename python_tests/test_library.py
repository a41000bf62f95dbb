"""What the package says when a native library is missing, and what it brings along when it is imported."""

import os
import subprocess
import sys

import pytest
import torch

import fewshot_ext
from fewshot_ext import _library

BUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


def run_python(code, **environment):
    # The package under test need not be installed: the child finds it where this process did.
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )


def test_missing_library_names_cause_and_command(tmp_path):
    run = run_python("import fewshot_ext", FEWSHOT_EXT_LIBRARY_DIR=str(tmp_path))
    assert run.returncode == 1
    last_line = run.stderr.strip().splitlines()[-1]
    assert last_line == f"ImportError: fewshot_ext: no _C library in {tmp_path}. Build it with: {BUILD}"


def test_broken_library_names_cause_and_command(tmp_path):
    (tmp_path / "_C.abi3.so").write_bytes(b"not a library")
    run = run_python("import fewshot_ext", FEWSHOT_EXT_LIBRARY_DIR=str(tmp_path))
    assert run.returncode == 1
    message = run.stderr[run.stderr.index("ImportError: ") :]
    assert f"_C.abi3.so does not load into torch {torch.__version__}" in message
    assert BUILD in message


def test_library_is_loaded_once():
    _library.load()
    assert _library.cpu_error is None


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built with CUDA")
def test_missing_cuda_library_says_why_and_how():
    with pytest.raises(RuntimeError) as raised:
        _library.require_cuda()
    assert str(raised.value) == (
        f"fewshot_ext has no CUDA kernels here: torch {torch.__version__} is built without CUDA. "
        f"Build them with: FEWSHOT_EXT_CUDA=1 {BUILD}"
    )


def test_cuda_is_asked_for_only_by_cuda_tensors(monkeypatch):
    monkeypatch.setattr(_library, "cuda_error", "no _C_cuda library in /nowhere")
    features, weight, target = torch.randn(4, 3), torch.randn(2, 3), torch.zeros(4, dtype=torch.int64)
    assert fewshot_ext.margin_cosine_loss(features, weight, target).isfinite()
    with pytest.raises(RuntimeError, match="no _C_cuda library in /nowhere"):
        _library.require_cuda()


def test_import_brings_torch_and_numpy_alone():
    code = """
import sys, torch, numpy
before = {name.partition(".")[0] for name in sys.modules}
import fewshot_ext
after = {name.partition(".")[0] for name in sys.modules}
print(sorted(after - before - sys.stdlib_module_names))
"""
    run = run_python(code)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "['fewshot_ext']"


def test_import_sets_no_global_state():
    code = """
import torch
before = torch.get_num_threads(), torch.get_default_dtype(), torch.random.get_rng_state()
import fewshot_ext
after = torch.get_num_threads(), torch.get_default_dtype(), torch.random.get_rng_state()
assert before[:2] == after[:2] and torch.equal(before[2], after[2])
"""
    run = run_python(code)
    assert run.returncode == 0, run.stderr
