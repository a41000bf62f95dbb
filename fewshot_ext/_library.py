"""Loads the native libraries and explains a failure.

``_C`` holds the operator schemas and the CPU kernels: without it nothing works, so its absence is an ImportError.
``_C_cuda`` holds the CUDA kernels: without it everything works on the CPU, so its absence is silent until a CUDA
tensor arrives.
"""

import os
from pathlib import Path

import torch

LIBRARY_DIR_VARIABLE = "FEWSHOT_EXT_LIBRARY_DIR"  # another build of the libraries, such as the sanitizers' one
REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."

cpu_error: str | None = None  # why _C is missing; None once it is loaded
cuda_error: str | None = None  # why _C_cuda is missing; None once it is loaded
_loaded: set[Path] = set()


def library_dir() -> Path:
    return Path(os.environ.get(LIBRARY_DIR_VARIABLE) or Path(__file__).parent)


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
        raise ImportError(f"fewshot_ext: {cpu_error}. Build it with: {REBUILD}")
    if torch.version.cuda is None:
        cuda_error = f"torch {torch.__version__} is built without CUDA"
    else:
        cuda_error = _load("_C_cuda")


def require_cuda() -> None:
    """Raises RuntimeError, with the reason and the mend, where CUDA tensors have no kernels to go to."""
    if cuda_error is not None:
        raise RuntimeError(
            f"fewshot_ext has no CUDA kernels here: {cuda_error}. Build them with: FEWSHOT_EXT_CUDA=1 {REBUILD}"
        )
