"""What setup.py makes of the machine, the environment and what an earlier build left; nothing is compiled."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import setuptools
import torch
from torch.utils import cpp_extension

CHECKOUT = Path(__file__).resolve().parents[2]
GIB = 2**30
TOOLKIT = Path("/toolkit")


@pytest.fixture
def setup(monkeypatch):
    """Imports setup.py, which then neither builds nor looks for CUDA."""
    for variable in ("TORCH_CUDA_ARCH_LIST", "MAX_JOBS"):
        # Set first, because what a test deletes from nowhere is not restored.
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    monkeypatch.setenv("FEWSHOT_EXT_CUDA", "0")
    monkeypatch.setattr(setuptools, "setup", lambda **settings: None)

    def load():
        spec = importlib.util.spec_from_file_location("setup", CHECKOUT / "setup.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(module, "known_architectures", lambda toolkit: ["sm_80", "sm_90", "sm_100", "sm_120"])
        return module

    return load


@pytest.mark.parametrize(
    ("cores", "memory", "jobs"), [(2, 24 * GIB, 2), (16, 8 * GIB, 4), (8, 5 * GIB, 2), (4, GIB, 1), (64, 256 * GIB, 64)]
)
def test_jobs_are_as_many_as_cores_and_memory_allow(setup, monkeypatch, cores, memory, jobs):
    module = setup()
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(cores))
    monkeypatch.setattr(module, "memory_available", lambda: memory)
    assert module.default_jobs() == jobs


@pytest.mark.parametrize(("share", "gib"), [(None, 16), ("max\n", 16), (f"{4 * GIB}\n", 4), (f"{64 * GIB}\n", 16)])
def test_memory_is_no_more_than_the_containers_share(setup, monkeypatch, tmp_path, share, gib):
    module = setup()
    files = {
        "/proc/meminfo": f"MemTotal: {32 * 2**20} kB\nMemFree: 5 kB\nMemAvailable:   {16 * 2**20} kB\nCached: 7 kB\n"
    }
    if share is not None:
        files["/sys/fs/cgroup/memory.max"] = share
    for name, text in files.items():
        path = tmp_path / name.lstrip("/")
        path.parent.mkdir(parents=True)
        path.write_text(text)
    monkeypatch.setattr(module, "Path", lambda name: tmp_path / name.lstrip("/"))
    assert module.memory_available() == gib * GIB


def test_jobs_of_the_user_stand(setup, monkeypatch):
    setup()
    assert int(os.environ["MAX_JOBS"]) >= 1
    monkeypatch.setenv("MAX_JOBS", "7")
    setup()
    assert os.environ["MAX_JOBS"] == "7"


@pytest.mark.parametrize(
    ("wanted", "built"),
    [
        (None, "8.0;9.0+PTX;10.0;12.0"),
        ("", "8.0;9.0+PTX;10.0;12.0"),
        ("8.6", "8.6"),
        ("12.0+PTX;8.6 9.0a", "8.6;9.0a;12.0+PTX"),
        ("Hopper", "9.0+PTX"),
    ],
)
def test_architectures_are_recorded_as_they_are_compiled(setup, monkeypatch, wanted, built):
    module = setup()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    if wanted is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    flags = module.architecture_flags(TOOLKIT)
    assert module.architecture_list(flags) == built
    assert len(flags) == len(built.split(";")) + built.count("PTX")


@pytest.mark.parametrize(
    ("known", "built"), [(["sm_80", "sm_90"], "8.0;9.0+PTX"), (["sm_90", "sm_100"], "8.0;9.0+PTX;10.0")]
)
def test_toolkit_that_does_not_know_the_latest_gpus_serves_them_by_ptx(setup, monkeypatch, known, built):
    module = setup()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(module, "known_architectures", lambda toolkit: known)
    assert module.architecture_list(module.architecture_flags(TOOLKIT)) == built


@pytest.mark.parametrize("wanted", ["7.5", "7.5+PTX;9.0", "Turing", "9.0 7.0"])
def test_architectures_without_kernels_are_refused_by_name(setup, monkeypatch, wanted):
    module = setup()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    with pytest.raises(SystemExit) as refused:
        module.architecture_flags(TOOLKIT)
    assert str(refused.value).startswith(
        f"fewshot_ext: TORCH_CUDA_ARCH_LIST={wanted!r}: expected architectures from 8.0 on, got 7."
    )


def test_gpu_without_kernels_is_refused_by_its_architecture(setup, monkeypatch):
    module = setup()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80"])
    with pytest.raises(SystemExit, match=r"the GPUs that torch sees: .* got 7\.5.*FEWSHOT_EXT_CUDA=0 builds none"):
        module.architecture_flags(TOOLKIT)


def test_architectures_are_of_the_gpus_where_there_are_some(setup, monkeypatch):
    module = setup()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: [(9, 0), (8, 6), (9, 0)][gpu])
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_86", "sm_90", "sm_120"])
    assert module.architecture_list(module.architecture_flags(TOOLKIT)) == "8.6;9.0+PTX"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert module.architecture_list(module.architecture_flags(TOOLKIT)) == "8.0"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [("native", "=native, but torch .* sees no GPU"), ("8.0;ten", "='8.0;ten': .*ten")],
)
def test_architectures_that_cannot_be_built_get_one_clear_error(setup, monkeypatch, wanted, message):
    module = setup()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    with pytest.raises(SystemExit, match=f"^fewshot_ext: TORCH_CUDA_ARCH_LIST{message}"):
        module.architecture_flags(TOOLKIT)


def test_cuda_library_gets_the_architectures_whatever_the_folders_are_called(setup, monkeypatch):
    module = setup()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(cpp_extension, "include_paths", lambda: ["/research/torch/include"])
    architectures = module.architecture_flags(TOOLKIT)
    _, cuda = module.libraries(TOOLKIT, architectures)
    flags = cuda.extra_compile_args["nvcc"]
    assert [flag for flag in flags if "gencode" in flag] == architectures
    assert {"-lineinfo", "--resource-usage"} <= set(flags)
    assert not [flag for flag in flags if "fast" in flag], "fast-math would change results"


def test_cuda_without_a_source_is_an_error_where_it_is_asked_for(setup, monkeypatch):
    module = setup()
    monkeypatch.setattr(module, "find_cuda_toolkit", lambda: TOOLKIT)
    monkeypatch.setattr(module, "sources", lambda suffix: [])
    monkeypatch.setenv("FEWSHOT_EXT_CUDA", "1")
    with pytest.raises(SystemExit, match=r"FEWSHOT_EXT_CUDA=1, but no CUDA source under .*csrc"):
        module.choose_cuda()


def test_nothing_of_an_earlier_build_is_used(setup, monkeypatch, tmp_path):
    module = setup()
    command = module.BuildLibraries(setuptools.Distribution({"ext_modules": module.ext_modules}))
    command.build_temp = str(tmp_path / "temp")
    (tmp_path / "temp").mkdir()
    stale = tmp_path / "_C_cuda.abi3.so"
    stale.touch()
    seen = []
    monkeypatch.setattr(cpp_extension.BuildExtension, "run", lambda self: seen.append(self.force))
    monkeypatch.setattr(module.BuildLibraries, "get_ext_fullpath", lambda self, name: str(tmp_path / "_C.abi3.so"))
    command.run()
    assert seen == [True]
    assert not stale.exists()
    assert not (tmp_path / "temp").exists()
    assert json.loads((tmp_path / "_build_info.json").read_text())["cuda_architectures"] is None


def test_source_distribution_has_every_native_source(tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(CHECKOUT, tree, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so"))
    for name in ("cuda.cu", "kernels.cuh"):
        (tree / "csrc" / "common" / name).touch()
    code = f"import backend; print(backend.build_sdist({str(tmp_path)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree / "build_backend"), "FEWSHOT_EXT_CUDA": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / done.stdout.splitlines()[-1]) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {str(path.relative_to(tree)) for path in tree.glob("csrc/**/*.*")}
    assert any(name.endswith(".cuh") for name in wanted)
    assert wanted - packed == set()
