"""What the package says when a native library is missing, and what it brings along when it is imported."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

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


def test_source_without_a_library_says_where_to_go(tmp_path):
    package = Path(fewshot_ext.__file__).parent
    (tmp_path / "setup.py").touch()
    shutil.copytree(package, tmp_path / "fewshot_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    run = run_python(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import fewshot_ext", FEWSHOT_EXT_LIBRARY_DIR=""
    )
    assert run.returncode == 1
    last_line = run.stderr.strip().splitlines()[-1]
    assert f"Change to another folder than {tmp_path}, or compile it here with: pip install -e ." in last_line


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
        _library.require_cuda(torch.device("cuda", 0))
    assert str(raised.value) == (
        f"fewshot_ext has no CUDA kernels here: torch {torch.__version__} is built without CUDA. "
        f"Build them with: FEWSHOT_EXT_CUDA=1 {BUILD}"
    )


def arguments(device):
    return (
        torch.ones(4, 3, device=device),
        torch.ones(2, 3, device=device),
        torch.zeros(4, dtype=torch.int64, device=device),
    )


def test_cuda_is_asked_for_only_by_cuda_tensors(monkeypatch):
    monkeypatch.setattr(_library, "cuda_error", "no _C_cuda library in /nowhere")
    assert fewshot_ext.margin_cosine_loss(*arguments("cpu")).isfinite()
    with FakeTensorMode():
        on_gpu = arguments("cuda")
        with pytest.raises(RuntimeError, match="no _C_cuda library in /nowhere"):
            fewshot_ext.margin_cosine_loss(*on_gpu)


@pytest.mark.parametrize(("index", "name"), [(1, "weight"), (2, "target")])
def test_tensors_on_two_devices_are_named(index, name):
    with FakeTensorMode():
        mixed = list(arguments("cuda"))
        mixed[index] = arguments("cpu")[index]
        with pytest.raises(ValueError, match=f"^{name}: expected device cuda:0 as features is on, got cpu$"):
            fewshot_ext.margin_cosine_loss(*mixed)


class FakeGpus:
    """A machine with these GPUs, and a CUDA library built for ``architectures``."""

    def __init__(self, monkeypatch, architectures, *capabilities):
        self.capabilities = capabilities
        self.asked = []
        monkeypatch.setattr(_library, "cuda_error", None)
        monkeypatch.setattr(_library, "_served", set())
        monkeypatch.setattr(_library, "build_record", lambda: architectures and {"cuda_architectures": architectures})
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", self.capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA T4")

    def capability(self, device):
        self.asked.append(device)
        return self.capabilities[device.index]


@pytest.mark.parametrize(
    ("architectures", "runs_on", "not_on"),
    [
        ("8.0;9.0+PTX", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 1)], [(7, 5), (6, 1)]),
        ("8.0;9.0+PTX;10.0;12.0", [(8, 6), (9, 0), (10, 0), (10, 3), (11, 0), (12, 1)], [(7, 5)]),
        ("8.6", [(8, 6), (8, 9)], [(8, 0), (9, 0), (7, 5)]),
        ("8.0+PTX", [(8, 0), (8, 6), (9, 0), (12, 0)], [(7, 5)]),
        ("9.0a", [(9, 0)], [(8, 0), (10, 0)]),
        ("9.0a+PTX", [(9, 0)], [(10, 0), (9, 1)]),
        ("7.5;12.0", [(7, 5), (12, 0), (12, 1)], [(8, 0), (7, 0), (10, 0)]),
        ("Hopper", [(7, 5), (9, 0)], []),
        ("8.0;the build machine's GPUs", [(7, 5)], []),
    ],
)
def test_kernels_run_where_a_binary_or_ptx_fits(architectures, runs_on, not_on):
    assert [capability for capability in runs_on if not _library.serve(architectures, capability)] == []
    assert [capability for capability in not_on if _library.serve(architectures, capability)] == []


def test_gpu_without_kernels_names_itself_what_was_built_and_the_command(monkeypatch):
    gpus = FakeGpus(monkeypatch, "8.6;9.0", (9, 0), (8, 0))
    _library.require_cuda(torch.device("cuda", 0))
    for _ in range(2):
        with pytest.raises(RuntimeError) as raised:
            _library.require_cuda(torch.device("cuda", 1))
        assert str(raised.value) == (
            "fewshot_ext does not run on cuda:1: the CUDA kernels are built for 8.6;9.0, and NVIDIA T4 has compute "
            f'capability 8.0. Build them with: TORCH_CUDA_ARCH_LIST="8.0" FEWSHOT_EXT_CUDA=1 {BUILD}'
        )
    assert [device.index for device in gpus.asked] == [0, 1, 1]


def test_gpu_that_no_kernel_is_written_for_is_not_told_to_build_some(monkeypatch):
    FakeGpus(monkeypatch, "8.0;9.0+PTX", (7, 5))
    with pytest.raises(RuntimeError) as raised:
        _library.require_cuda(torch.device("cuda", 0))
    assert str(raised.value) == (
        "fewshot_ext does not run on cuda:0: expected compute capability 8.0 or later, got 7.5 of NVIDIA T4; "
        "there are no kernels for it"
    )


class Driver:
    """libcuda where ``version`` is what it says of itself, in CUDA's way of counting."""

    def __init__(self, version, status=0):
        self.version, self.status = version, status

    def cuDriverGetVersion(self, pointer):
        pointer._obj.value = self.version
        return self.status


@pytest.mark.parametrize(
    ("driver", "version"), [(Driver(12040), (12, 4)), (Driver(13000), (13, 0)), (Driver(13020, status=999), None)]
)
def test_driver_says_which_cuda_it_is_for(monkeypatch, driver, version):
    monkeypatch.setattr(_library.ctypes, "CDLL", lambda name: {"libcuda.so.1": driver}[name])
    assert _library.driver_version() == version


def test_machine_without_a_driver(monkeypatch):
    def load(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(_library.ctypes, "CDLL", load)
    assert _library.driver_version() is None
    assert _library.driver_error() is None


@pytest.mark.parametrize(
    ("toolkit", "driver", "too_old"),
    [
        ("13.0", (12, 9), True),
        ("13.2", (13, 0), False),  # of one major version: CUDA's minor version compatibility
        ("12.8", (13, 0), False),
        ("13.0", None, False),
        (None, (11, 0), False),
    ],
)
def test_driver_older_than_the_runtime_in_the_library(monkeypatch, toolkit, driver, too_old):
    gpus = FakeGpus(monkeypatch, "8.0;9.0+PTX", (9, 0))
    record = {"cuda_architectures": "8.0;9.0+PTX", "cuda_toolkit": toolkit}
    monkeypatch.setattr(_library, "build_record", lambda: record)
    monkeypatch.setattr(_library, "driver_version", lambda: driver)
    if not too_old:
        return _library.require_cuda(torch.device("cuda", 0))
    with pytest.raises(RuntimeError) as raised:
        _library.require_cuda(torch.device("cuda", 0))
    assert str(raised.value) == (
        "fewshot_ext does not run on cuda:0: the NVIDIA driver is for CUDA 12.9 at most, and the CUDA library is built "
        "with 13.0. Install a newer driver, or build with a toolkit of the driver's: CUDA_HOME=... "
        f"FEWSHOT_EXT_CUDA=1 {BUILD}"
    )
    assert gpus.asked == []


def test_operators_ask_for_the_gpu_of_their_tensors(monkeypatch):
    with FakeTensorMode():
        on_gpu = arguments("cuda")
        FakeGpus(monkeypatch, "9.0", (8, 6))
        with pytest.raises(RuntimeError, match=r"^fewshot_ext does not run on cuda:0: .* compute capability 8\.6"):
            fewshot_ext.margin_cosine_loss(*on_gpu)


def test_gpu_with_kernels_is_asked_once(monkeypatch):
    gpus = FakeGpus(monkeypatch, "8.0", (8, 6))
    for _ in range(3):
        _library.require_cuda(torch.device("cuda", 0))
    assert len(gpus.asked) == 1


def test_unrecorded_build_and_fake_tensors_pass(monkeypatch):
    FakeGpus(monkeypatch, None, (5, 2))
    _library.require_cuda(torch.device("cuda", 0))
    gpus = FakeGpus(monkeypatch, "8.0")
    _library.require_cuda(torch.device("cuda", 0))
    assert gpus.asked == []


def test_traced_check_does_not_depend_on_the_gpus_seen_in_eager_mode(monkeypatch):
    monkeypatch.setattr(_library, "cuda_error", None)
    monkeypatch.setattr(_library, "_served", set())

    @torch.compile(fullgraph=True, backend="eager")
    def checked(x):
        _library.require_cuda(x.device)
        return x + 1

    zeros = torch.zeros(2)
    assert torch.equal(checked(zeros), torch.ones(2))
    _library._served.add(zeros.device)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(checked(zeros), torch.ones(2))
    monkeypatch.setattr(_library, "cuda_error", "no _C_cuda library in /nowhere")
    with pytest.raises(RuntimeError, match="no _C_cuda library in /nowhere"):
        checked(zeros)


def test_build_record_lies_beside_the_libraries(monkeypatch, tmp_path):
    monkeypatch.setenv("FEWSHOT_EXT_LIBRARY_DIR", str(tmp_path))
    assert _library.build_record() is None
    (tmp_path / "_build_info.json").write_text('{"cuda_architectures": "8.0"}')
    assert _library.build_record() == {"cuda_architectures": "8.0"}


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
