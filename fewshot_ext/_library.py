"""Loads the native libraries and explains a failure.

``_C`` holds the operator schemas and the CPU kernels: without it nothing works, so its absence is an ImportError.
``_C_cuda`` holds the CUDA kernels: without it everything works on the CPU, so its absence is silent until a CUDA
tensor arrives.
"""

import ctypes
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

LIBRARY_DIR_VARIABLE = "FEWSHOT_EXT_LIBRARY_DIR"  # another build of the libraries, such as the sanitizers' one
LEAST_CAPABILITY = (8, 0)  # of a GPU; setup.py and csrc/common/device.h refuse to compile for less
REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."

cpu_error: str | None = None  # why _C is missing; None once it is loaded
cuda_error: str | None = None  # why _C_cuda is missing; None once it is loaded
_loaded: set[Path] = set()
_served: set[torch.device] = set()  # GPUs that the kernels are known to run on

_ARCHITECTURE = re.compile(r"(\d+)\.(\d)(a?)(\+PTX)?")


def library_dir() -> Path:
    return Path(os.environ.get(LIBRARY_DIR_VARIABLE) or Path(__file__).parent)


def build_record() -> dict[str, Any] | None:
    """What setup.py recorded beside the libraries; None for libraries that came about in another way."""
    record = library_dir() / "_build_info.json"
    if not record.is_file():
        return None
    facts: dict[str, Any] = json.loads(record.read_text())
    return facts


def _load(name: str) -> str | None:
    """Loads the library ``name``; returns what went wrong, None where nothing did."""
    directory = library_dir()
    found = sorted(directory.glob(f"{name}.*so")) + sorted(directory.glob(f"{name}.*pyd"))
    if not found:
        return f"no {name} library in {directory}"
    if found[0] in _loaded:
        return None
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"{found[0].name} does not load into torch {torch.__version__}: {error}"
    _loaded.add(found[0])
    return None


def load() -> None:
    """Loads ``_C``, and ``_C_cuda`` where it fits.

    Raises:
        ImportError: ``_C`` is missing or does not load; the message says why and which command mends it.
    """
    global cpu_error, cuda_error
    cpu_error = _load("_C")
    if cpu_error is not None:
        source = library_dir().parent
        if not os.environ.get(LIBRARY_DIR_VARIABLE) and (source / "setup.py").exists():
            raise ImportError(
                f"fewshot_ext: {cpu_error}: nothing is compiled in the source, which Python takes before an installed "
                f"package. Change to another folder than {source}, or compile it here with: pip install -e ."
            )
        raise ImportError(f"fewshot_ext: {cpu_error}. Build it with: {REBUILD}")
    if torch.version.cuda is None:
        cuda_error = f"torch {torch.__version__} is built without CUDA"
    else:
        cuda_error = _load("_C_cuda")


def serve(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether kernels built for ``architectures``, as TORCH_CUDA_ARCH_LIST lists them, run on such a GPU.

    A binary runs on GPUs of its major version from its minor version on, PTX on all later ones too; what is
    built for an architecture with an "a" runs on no other. A name of another kind counts as one that runs.
    """
    for name in architectures.split(";"):
        known = _ARCHITECTURE.fullmatch(name)
        if known is None:
            return True
        major, minor, own_features, ptx = known.groups()
        built = int(major), int(minor)
        if own_features:
            runs = built == capability
        else:
            runs = built <= capability and (built[0] == capability[0] or ptx is not None)
        if runs:
            return True
    return False


def driver_version() -> tuple[int, int] | None:
    """The latest CUDA that the NVIDIA driver knows; None where there is no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def driver_error() -> str | None:
    """Why the driver cannot serve the CUDA library; None where it can, where there is none, and without a record.

    The library brings its own CUDA runtime, which may be newer than torch's. A driver serves every runtime of its major
    version.
    """
    toolkit = (build_record() or {}).get("cuda_toolkit")
    driver = driver_version() if toolkit else None
    if driver is None or driver[0] >= int(toolkit.partition(".")[0]):
        return None
    return (
        f"the NVIDIA driver is for CUDA {driver[0]}.{driver[1]} at most, and the CUDA library is built with {toolkit}. "
        f"Install a newer driver, or build with a toolkit of the driver's: CUDA_HOME=... FEWSHOT_EXT_CUDA=1 {REBUILD}"
    )


def gpu_error(device: torch.device | int) -> str | None:
    """Why the CUDA kernels do not run on this GPU; None where they do, or where nobody recorded what they are for."""
    too_old = driver_error()
    if too_old is not None:
        return too_old
    architectures = (build_record() or {}).get("cuda_architectures")
    capability = torch.cuda.get_device_capability(device)
    if architectures is None or serve(architectures, capability):
        return None
    version = ".".join(map(str, capability))
    name = torch.cuda.get_device_name(device)
    if capability < LEAST_CAPABILITY:
        least = ".".join(map(str, LEAST_CAPABILITY))
        return f"expected compute capability {least} or later, got {version} of {name}; there are no kernels for it"
    return (
        f"the CUDA kernels are built for {architectures}, and {name} has compute capability {version}. "
        f'Build them with: TORCH_CUDA_ARCH_LIST="{version}" FEWSHOT_EXT_CUDA=1 {REBUILD}'
    )


def require_cuda(device: torch.device) -> None:
    """Raises RuntimeError, with the reason and the mend, where tensors on ``device`` have no kernels to go to."""
    if cuda_error is not None:
        raise RuntimeError(
            f"fewshot_ext has no CUDA kernels here: {cuda_error}. Build them with: FEWSHOT_EXT_CUDA=1 {REBUILD}"
        )
    # Traced code asks nothing: what it learned would become a guard, and its first run in eager mode a recompilation.
    if is_dynamo_compiling() or device in _served:
        return
    # Without a GPU the tensor is a fake one, and there is no device to ask.
    if not torch.cuda.is_available():
        return
    error = gpu_error(device)
    if error is not None:
        raise RuntimeError(f"fewshot_ext does not run on {device}: {error}")
    _served.add(device)
