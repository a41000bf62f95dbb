"""Compiles csrc/ into two libraries on the LibTorch stable ABI; all else about the package stands in pyproject.toml.

    fewshot_ext/_C.abi3.so        operator schemas and CPU kernels, from csrc/**/*.cpp
    fewshot_ext/_C_cuda.abi3.so   CUDA kernels, from csrc/**/*.cu

A library with CUDA kernels cannot be loaded by a CPU-only torch, hence two. Neither has a Python symbol: the package
loads them with torch.ops.load_library, so one binary serves every CPython from 3.10 and every torch from 2.11.

    FEWSHOT_EXT_CUDA=0|1     leave the CUDA library out | fail where it cannot be built (default: built if a toolkit is found)
    CUDA_HOME                the CUDA toolkit, where it is not found through nvcc on the PATH
    TORCH_CUDA_ARCH_LIST     GPU architectures (default: those of the GPUs present, or 8.0, 9.0 and PTX for later ones)
    MAX_JOBS                 parallel compile jobs
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    import torch
    from torch.utils import cpp_extension
except ModuleNotFoundError:
    # Source distributions and metadata need no compiler and therefore no torch.
    cpp_extension = None

PACKAGE = "fewshot_ext"
TORCH_TARGET = (2, 11)
PORTABLE_ARCHITECTURES = "8.0;9.0+PTX"

ROOT = Path(__file__).resolve().parent


def sources(suffix):
    # Relative, because setuptools refuses absolute paths in a source distribution; sorted for reproducible links.
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(f"csrc/**/*{suffix}"))


def find_cuda_toolkit():
    """The CUDA toolkit's folder, or None.

    torch.utils.cpp_extension looks for one only if torch itself was built with CUDA, but the stable ABI's headers
    suffice to compile for it, and a build machine may well have a CPU-only torch.
    """
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        candidates = [Path(named)]
    else:
        nvcc = shutil.which("nvcc")
        candidates = [Path(nvcc).resolve().parent.parent] if nvcc else []
        candidates.append(Path("/usr/local/cuda"))
    for folder in candidates:
        # nvcc on the PATH is often a wrapper script outside the toolkit, so the folder has to prove itself.
        headers = [folder / "include", *folder.glob("targets/*/include")]
        if (folder / "bin" / "nvcc").is_file() and any(
            (path / "cuda_runtime_api.h").is_file() for path in headers
        ):
            return folder
    return None


def choose_cuda():
    """(toolkit, None) if the CUDA library is to be built, else (None, why not)."""
    wanted = os.environ.get("FEWSHOT_EXT_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"{PACKAGE}: FEWSHOT_EXT_CUDA must be 0 or 1, got {wanted!r}")
    if wanted == "0":
        return None, "turned off by FEWSHOT_EXT_CUDA=0 at build time"
    toolkit = find_cuda_toolkit()
    if toolkit is None:
        if wanted == "1":
            raise SystemExit(
                f"{PACKAGE}: FEWSHOT_EXT_CUDA=1, but no CUDA toolkit was found; "
                "set CUDA_HOME to its folder (the one with bin/nvcc) or put nvcc on the PATH"
            )
        return None, "no CUDA toolkit at build time"
    if not sources(".cu"):
        return None, "this version has no CUDA kernels"
    return toolkit, None


def libraries(toolkit):
    target = f"-DTORCH_TARGET_VERSION=0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}{0:012x}"
    # torch's headers do not pass -Wextra; a system folder keeps their warnings out of ours.
    system = [flag for folder in cpp_extension.include_paths() for flag in ("-isystem", folder)]
    # ISO mode (-std=c++20, which torch adds) turns contraction off in g++; kernels count on fused multiply-add.
    # -g0 undoes the -g of distributions' Python: debugging is what the CMake build is for.
    cxx = ["-O3", "-g0", target, "-ffp-contract=fast", "-fvisibility=hidden", "-Wall", "-Wextra", *system]
    include_dirs = [str(ROOT / "csrc")]

    built = [
        cpp_extension.CppExtension(
            f"{PACKAGE}._C",
            sources(".cpp"),
            include_dirs=list(include_dirs),
            extra_compile_args={"cxx": cxx},
            py_limited_api=True,
        )
    ]
    if toolkit is not None:
        # CUDAExtension would link libtorch_cuda, which a CPU-only torch lacks. libtorch stands for whichever of its
        # parts exist at load time, so it must stay among the needed libraries although nothing refers to it directly.
        # The CUDA runtime is linked statically and hidden: torch wheels for different CUDA versions then all do.
        built.append(
            cpp_extension.CppExtension(
                f"{PACKAGE}._C_cuda",
                sources(".cu"),
                include_dirs=[*include_dirs, str(toolkit / "include")],
                library_dirs=[str(toolkit / "lib64"), str(toolkit / "lib")],
                libraries=["cudart_static", "dl", "rt", "pthread"],
                extra_compile_args={
                    "cxx": [*cxx, "-DUSE_CUDA"],
                    "nvcc": ["-O3", target, "-DUSE_CUDA", "-Xcompiler", "-fvisibility=hidden,-Wall,-Wextra"],
                },
                extra_link_args=["-Wl,--no-as-needed", "-Wl,--exclude-libs,libcudart_static.a"],
                py_limited_api=True,
            )
        )
    return built


def first_line(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]


def toolkit_version(toolkit):
    report = subprocess.run(
        [toolkit / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True
    ).stdout
    return re.search(r"release (\d+\.\d+)", report).group(1)


if cpp_extension is None:

    class BuildLibraries(build_ext):
        def run(self):
            raise SystemExit(
                f"{PACKAGE}: compiling needs torch>={'.'.join(map(str, TORCH_TARGET))} in the build environment; "
                "install it first, or build without --no-build-isolation"
            )

    # A name without flags: enough for source lists, and for wheels to be tagged as platform dependent.
    ext_modules = [Extension(f"{PACKAGE}._C", sources(".cpp"), py_limited_api=True)]
else:
    cuda_toolkit, cuda_reason = choose_cuda()
    if cuda_toolkit is not None:
        cpp_extension.CUDA_HOME = str(cuda_toolkit)
        if torch.cuda.device_count() == 0:
            # torch takes the architectures of the GPUs it sees, and raises IndexError where it sees none.
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", PORTABLE_ARCHITECTURES)

    class BuildLibraries(cpp_extension.BuildExtension):
        """Builds the libraries and leaves a record of how beside them, for ``python -m fewshot_ext.env``."""

        def run(self):
            if not sources(".cpp"):
                raise SystemExit(
                    f"{PACKAGE}: no C++ source under {ROOT / 'csrc'}; the source tree is incomplete"
                )
            super().run()
            folder = Path(self.get_ext_fullpath(f"{PACKAGE}._C")).parent
            if cuda_toolkit is None:
                # From an earlier build with other settings: setuptools would install it beside the new _C.
                for stale in folder.glob("_C_cuda*.so"):
                    stale.unlink()
            self.record(folder).write_text(json.dumps(self.facts(), indent=2) + "\n")

        def get_outputs(self):
            outputs = super().get_outputs()
            return [*outputs, *{str(self.record(Path(output).parent)) for output in outputs}]

        @staticmethod
        def record(folder):
            return folder / "_build_info.json"

        @staticmethod
        def facts():
            return {
                "torch": str(torch.__version__),
                "torch_target": ".".join(map(str, TORCH_TARGET)),
                "compiler": first_line(os.environ.get("CXX", "c++"), "--version"),
                "cuda_toolkit": toolkit_version(cuda_toolkit) if cuda_toolkit else None,
                "cuda_architectures": os.environ.get(
                    "TORCH_CUDA_ARCH_LIST", "of the GPUs present at build time"
                )
                if cuda_toolkit
                else None,
                "cuda_missing_because": cuda_reason,
            }

    ext_modules = libraries(cuda_toolkit)

setup(
    ext_modules=ext_modules,
    cmdclass={"build_ext": BuildLibraries},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
