import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import fewshot_ext
from fewshot_ext import _library, env

RECORD = {
    "torch": "2.13.0",
    "torch_target": "2.11",
    "compiler": "c++ 12.2.0",
    "cuda_toolkit": "13.0",
    "cuda_architectures": "8.0;9.0+PTX",
    "cuda_missing_because": None,
}
NEEDS = {"present": "3.10", "of-the-future": "3.99"}  # by the Python that they are for


def run(*arguments, **settings):
    return subprocess.run(
        [sys.executable, "-m", "fewshot_ext.env", *arguments],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
    )


def test_json_report():
    done = run("--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["versions"]["fewshot_ext"] == fewshot_ext.__version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["libraries"]["cpu"] == {"library": "_C", "error": None}
    assert facts["devices"]["cpu"]["capability"] == torch.backends.cpu.get_cpu_capability()
    assert facts["operators"]
    assert all(set(on_device) == {"cpu", "cuda"} for on_device in facts["operators"].values())
    assert facts["operators"]["emd"]["cpu"] == "kernel"


def test_text_report(capsys):
    env.main([])
    told = capsys.readouterr().out
    for title in ("Versions", "Build", "Libraries", "Devices", "Operators", "Extras"):
        assert f"\n{title}\n" in f"\n{told}"
    assert f"torch        {torch.__version__}" in told
    assert re.search(r"^  margin_softmax +cpu: kernel, cuda: ", told, re.MULTILINE)
    # Made of torch's operators: a kernel on no device, and yet on all.
    assert re.search(r"^  coding_rate +cpu: by torch's operators, cuda: by torch's operators$", told, re.MULTILINE)


def test_unknown_option_gets_a_usage_error(capsys):
    with pytest.raises(SystemExit):
        env.main(["--yaml"])
    assert "unrecognized arguments: --yaml" in capsys.readouterr().err


def test_missing_extra_comes_with_its_pip_line(monkeypatch):
    monkeypatch.setattr(env.importlib.metadata, "requires", lambda name: ['no-such-thing; extra == "train"'])
    assert env.extras_report() == {
        "train": {"versions": {"no-such-thing": None}, "install": "pip install 'fewshot_ext[train]'"}
    }
    assert "train  not installed: pip install 'fewshot_ext[train]'" in env.render(env.report())
    requirements = ['numpy; extra == "train"', 'no-such-thing; extra == "train"']
    monkeypatch.setattr(env.importlib.metadata, "requires", lambda name: requirements)
    assert f"numpy {np.__version__}\n      without no-such-thing: pip install" in env.render(env.report())


def test_what_another_python_needs_is_not_missing():
    requirements = [f'{name}; python_version >= "{version}" and extra == "a"' for name, version in NEEDS.items()]
    assert env.declared_extras(requirements) == {"a": ["present"]}


def test_missing_cuda_library_comes_with_the_reason_from_the_build(monkeypatch):
    monkeypatch.setattr(_library, "cuda_error", "no _C_cuda library")
    libraries = env.library_report({"cuda_missing_because": "no CUDA toolkit at build time"})
    assert libraries["cuda"]["error"] == "not built: no CUDA toolkit at build time"
    assert env.library_report(None)["cuda"]["error"] == "no _C_cuda library"


def test_loaded_cuda_library_has_no_error(monkeypatch):
    monkeypatch.setattr(_library, "cuda_error", None)
    assert env.library_report({"cuda_missing_because": None})["cuda"]["error"] is None


def test_each_gpu_comes_with_its_capability_and_whether_it_has_kernels(monkeypatch):
    monkeypatch.setattr(_library, "cuda_error", None)
    monkeypatch.setattr(_library, "build_record", lambda: RECORD)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_library, "driver_version", lambda: (13, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: ["NVIDIA H100", "NVIDIA T4"][gpu])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: [(9, 0), (7, 5)][gpu])
    facts = env.report()
    served, unserved = facts["devices"]["cuda"]["gpus"]
    assert served == {"name": "NVIDIA H100", "capability": "9.0", "error": None}
    assert unserved["capability"] == "7.5"
    assert unserved["error"].startswith("expected compute capability 8.0 or later, got 7.5 of NVIDIA T4")
    told = env.render(facts)
    assert "cuda:0  NVIDIA H100, compute capability 9.0: kernels run" in told
    assert "cuda:1  NVIDIA T4, compute capability 7.5: expected compute capability 8.0 or later" in told
    assert "driver  for CUDA 13.0 at most" in told
    assert "toolkit 13.0, architectures 8.0;9.0+PTX" in told

    monkeypatch.setattr(_library, "cuda_error", "no _C_cuda library")
    assert {gpu["error"] for gpu in env.gpu_report()} == {"the CUDA library is not loaded"}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "torch is built with CUDA 13.0, but sees no GPU" in env.render(env.report())


@pytest.mark.parametrize("gpus", [0, 1])
def test_driver_too_old_for_the_library_is_told_whether_or_not_torch_sees_a_gpu(monkeypatch, gpus):
    monkeypatch.setattr(_library, "cuda_error", None)
    monkeypatch.setattr(_library, "build_record", lambda: RECORD)
    monkeypatch.setattr(_library, "driver_version", lambda: (12, 4))
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: (9, 0))
    facts = env.report()
    error = "the NVIDIA driver is for CUDA 12.4 at most, and the CUDA library is built with 13.0"
    assert facts["devices"]["cuda"]["driver"] == "12.4"
    assert facts["devices"]["cuda"]["driver_error"].startswith(error)
    assert [gpu["error"].startswith(error) for gpu in facts["devices"]["cuda"]["gpus"]] == [True] * gpus
    assert re.search(rf"^  driver +{error}\. Install a newer driver", env.render(facts), re.MULTILINE)


def test_report_without_the_compiled_library(tmp_path):
    done = run(FEWSHOT_EXT_LIBRARY_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert f"no _C library in {tmp_path}" in done.stdout
    assert "_C_cuda  not tried without _C" in done.stdout
    assert "no operator is registered" in done.stdout


def test_anything_else_without_the_compiled_library_is_an_import_error(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "import fewshot_ext"],
        env={**os.environ, "FEWSHOT_EXT_LIBRARY_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "ImportError: fewshot_ext: no _C library" in done.stderr
    assert "pip install" in done.stderr
