"""Compiles csrc/ into two libraries on the LibTorch stable ABI; pyproject.toml says all else.

    fewshot_ext/_C.abi3.so        operator schemas and CPU kernels, from csrc/**/*.cpp
    fewshot_ext/_C_cuda.abi3.so   CUDA kernels, from csrc/**/*.cu

A CPU-only torch cannot load a library with CUDA kernels, hence two. Neither has a Python symbol: the package
loads them with torch.ops.load_library, so one binary serves every CPython from 3.10 and every torch from
2.11.

    FEWSHOT_EXT_CUDA=0      leaves the CUDA library out
    FEWSHOT_EXT_CUDA=1      fails without a CUDA toolkit (default: CUDA is built where there is one)
    CUDA_HOME               the CUDA toolkit, where nvcc on the PATH does not lead to it
    TORCH_CUDA_ARCH_LIST    GPU architectures from 8.0 on (default: of the GPUs present, else 8.0, 9.0, 10.0 and 12.0 as
                            far as the toolkit knows them, and others by PTX)
    MAX_JOBS                parallel compile jobs (default: one a core, fewer where memory is short)
"""

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    import torch
    from torch.utils import cpp_extension
except ModuleNotFoundError:
    # Source distributions and metadata need no compiler and therefore no torch.
    torch = cpp_extension = None

PACKAGE = "fewshot_ext"
TORCH_TARGET = "2.11"
PORTABLE_ARCHITECTURES = "8.0;9.0+PTX"
# From the PTX of 9.0 too, so that their GPUs need not compile it at the first call. The kernels have nothing of their
# own for them, and so ptxas is all that it costs. Toolkits from 12.8 on know them.
LATER_ARCHITECTURES = ("10.0", "12.0")
LEAST_ARCHITECTURE = (8, 0)
NVCC_THREADS = 2  # one for each of the portable architectures that are compiled from the source
GIB_PER_JOB = 2  # a thread of nvcc takes 0.5, g++ 0.3, and kernels grow

ROOT = Path(__file__).resolve().parent


def sources(suffix):
    # Relative, as setuptools wants them for source distributions; sorted, so that links are reproducible.
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(f"csrc/**/*{suffix}"))


def find_cuda_toolkit():
    """The CUDA toolkit's folder, or None.

    torch.utils.cpp_extension looks for one only if torch itself was built with CUDA, but the headers suffice
    to compile against the stable ABI, and a build machine may well have a CPU-only torch.
    """
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc")
    if named:
        candidates = [Path(named)]
    else:
        candidates = [Path(nvcc).resolve().parent.parent] if nvcc else []
        candidates.append(Path("/usr/local/cuda"))
    for folder in candidates:
        # nvcc on the PATH is often a wrapper outside the toolkit, so a folder has to prove itself by the
        # headers.
        if (folder / "bin" / "nvcc").is_file() and (folder / "include" / "cuda_runtime_api.h").is_file():
            return folder
    return None


def choose_cuda():
    """(toolkit, None) if the CUDA library is to be built, else (None, why not)."""
    wanted = os.environ.get("FEWSHOT_EXT_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"{PACKAGE}: FEWSHOT_EXT_CUDA: expected 0 or 1, got {wanted!r}")
    if wanted == "0":
        return None, "turned off by FEWSHOT_EXT_CUDA=0 at build time; build again without it"
    toolkit = find_cuda_toolkit()
    if toolkit is None:
        if wanted == "1":
            raise SystemExit(
                f"{PACKAGE}: FEWSHOT_EXT_CUDA=1, but no CUDA toolkit was found; "
                "set CUDA_HOME to its folder (the one with bin/nvcc) or put nvcc on the PATH"
            )
        return None, "no CUDA toolkit at build time; with one, FEWSHOT_EXT_CUDA=1 pip install . builds it"
    if not sources(".cu"):
        if wanted == "1":
            raise SystemExit(f"{PACKAGE}: FEWSHOT_EXT_CUDA=1, but no CUDA source under {ROOT / 'csrc'}")
        return None, "this version has no CUDA kernels"
    return toolkit, None


def memory_available():
    """Bytes to be had without swapping, in a container no more than its share."""
    available = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text()).group(1))
    limit = Path("/sys/fs/cgroup/memory.max")
    share = limit.read_text().strip() if limit.is_file() else "max"
    return available if share == "max" else min(available, int(share))


def default_jobs():
    return max(1, min(len(os.sched_getaffinity(0)), memory_available() // (GIB_PER_JOB << 30)))


def known_architectures(toolkit):
    """What nvcc compiles for, as in "sm_80"."""
    return output(toolkit / "bin" / "nvcc", "--list-gpu-code").split()


def architecture_flags(toolkit):
    """nvcc's flags for TORCH_CUDA_ARCH_LIST.

    torch would add them, but not to flags in which it reads "arch", be it in the name of a folder.
    """
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    portable = torch.cuda.device_count() == 0 and not wanted
    if torch.cuda.device_count() == 0:
        # torch takes the architectures of the GPUs it sees, and raises IndexError where it sees none.
        if wanted == "native":
            raise SystemExit(f"{PACKAGE}: TORCH_CUDA_ARCH_LIST=native, but torch {torch.__version__} sees no GPU")
        os.environ["TORCH_CUDA_ARCH_LIST"] = wanted or PORTABLE_ARCHITECTURES
    try:
        flags = cpp_extension._get_cuda_arch_flags()
    except ValueError as error:
        raise SystemExit(f"{PACKAGE}: TORCH_CUDA_ARCH_LIST={wanted!r}: {error}") from None
    too_old = [name for name in architecture_list(flags).split(";") if version_of(name) < LEAST_ARCHITECTURE]
    if too_old:
        whose = f"TORCH_CUDA_ARCH_LIST={wanted!r}" if wanted else "the GPUs that torch sees"
        raise SystemExit(
            f"{PACKAGE}: {whose}: expected architectures from {'.'.join(map(str, LEAST_ARCHITECTURE))} on, got "
            f"{', '.join(too_old)}, for which there are no kernels; TORCH_CUDA_ARCH_LIST names others, "
            "FEWSHOT_EXT_CUDA=0 builds none"
        )
    if portable:
        known = known_architectures(toolkit)
        for name in (later.replace(".", "") for later in LATER_ARCHITECTURES):
            flags += [f"-gencode=arch=compute_90,code=sm_{name}"] * (f"sm_{name}" in known)
    return flags


def version_of(architecture):
    """("8.6+PTX") -> (8, 6)"""
    return tuple(map(int, re.match(r"(\d+)\.(\d)", architecture).groups()))


def architecture_list(flags):
    """The architectures of nvcc's flags, in the words of TORCH_CUDA_ARCH_LIST."""
    targets = re.findall(r"code=(sm|compute)_(\d+)(\d)(a?)", " ".join(flags))
    later = {target[1:] for target in targets if target[0] == "compute"}
    binaries = sorted((int(major), int(minor), letter) for kind, major, minor, letter in targets if kind == "sm")
    return ";".join(
        f"{major}.{minor}{letter}" + "+PTX" * ((str(major), str(minor), letter) in later)
        for major, minor, letter in binaries
    )


def libraries(toolkit, architectures):
    major, minor = map(int, TORCH_TARGET.split("."))
    target = f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}{0:012x}"
    # torch's headers do not pass -Wextra; as system folders they keep their warnings to themselves.
    system = [flag for folder in cpp_extension.include_paths() for flag in ("-isystem", folder)]
    # Errors name the line of the source that raised them, but not the folder that it was built in.
    folder = f"-fmacro-prefix-map={ROOT}/="
    # torch adds -std=c++20, and in ISO mode g++ contracts nothing; the kernels count on fused multiply-add, and on
    # square roots that need no errno. -g0 undoes the -g of a distribution's Python: debugging is what the CMake build
    # is for.
    cxx = ["-O3", "-g0", target, folder, "-ffp-contract=fast", "-fno-math-errno", "-fvisibility=hidden", *system]
    cxx += ["-Wall", "-Wextra"]
    host = f"-fvisibility=hidden,-Wall,-Wextra,{folder}"
    nvcc = ["-O3", "-DNDEBUG", target, "-DUSE_CUDA", "-Xcompiler", host, *system]
    # Profilers show source lines, and python_tests/packaging/kernel_resources.py reads the log of the build.
    nvcc += ["-lineinfo", "--resource-usage", f"--threads={NVCC_THREADS}", *architectures]

    # With py_limited_api torch leaves libtorch_python out and sets Py_LIMITED_API to CPython 3.10.
    built = [
        cpp_extension.CppExtension(
            f"{PACKAGE}._C",
            sources(".cpp"),
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args={"cxx": cxx},
            py_limited_api=True,
        )
    ]
    if toolkit is not None:
        # CUDAExtension would link libtorch_cuda, which a CPU-only torch lacks. libtorch brings whichever
        # parts torch has at load time; nothing refers to it directly, so the linker has to be told to keep
        # it. The CUDA runtime is linked statically and hidden, so that torch may have been built with another
        # one.
        built.append(
            cpp_extension.CppExtension(
                f"{PACKAGE}._C_cuda",
                sources(".cu"),
                include_dirs=[str(ROOT / "csrc"), str(toolkit / "include")],
                library_dirs=[str(toolkit / "lib64"), str(toolkit / "lib")],
                libraries=["cudart_static", "dl", "rt", "pthread"],
                extra_compile_args={"nvcc": nvcc},
                extra_link_args=["-Wl,--no-as-needed,-ltorch", "-Wl,--exclude-libs,libcudart_static.a"],
                py_limited_api=True,
            )
        )
    return built


def output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def build_facts(toolkit, architectures, why_no_cuda):
    """What ``python -m fewshot_ext.env`` reports about the build."""
    facts = {
        "torch": str(torch.__version__),
        "torch_target": TORCH_TARGET,
        "compiler": output(os.environ.get("CXX", "c++"), "--version").splitlines()[0],
        "cuda_toolkit": None,
        "cuda_architectures": None,
        "cuda_missing_because": why_no_cuda,
    }
    if toolkit is not None:
        release = re.search(r"release (\d+\.\d+)", output(toolkit / "bin" / "nvcc", "--version"))
        facts["cuda_toolkit"] = release.group(1)
        facts["cuda_architectures"] = architecture_list(architectures)
    return facts


if torch is None:

    class BuildLibraries(build_ext):
        def run(self):
            raise SystemExit(
                f"{PACKAGE}: compiling needs torch>={TORCH_TARGET} in the build environment; "
                "install it first, or build without --no-build-isolation"
            )

    # Names the sources for a source distribution, and keeps a wheel without libraries from being built.
    ext_modules = [Extension(f"{PACKAGE}._C", sources(".cpp"), py_limited_api=True)]
else:
    toolkit, why_no_cuda = choose_cuda()
    architectures = []
    if toolkit is not None:
        cpp_extension.CUDA_HOME = str(toolkit)
        architectures = architecture_flags(toolkit)
    os.environ.setdefault("MAX_JOBS", str(default_jobs()))

    class BuildLibraries(cpp_extension.BuildExtension):
        """Builds the libraries and leaves the facts of the build beside them."""

        def run(self):
            if not sources(".cpp"):
                raise SystemExit(f"{PACKAGE}: no C++ source under {ROOT / 'csrc'}; the tree is incomplete")
            # torch tells ninja of no header that nvcc read unless torch itself has CUDA, and distutils of none at
            # all: a build on top of an earlier one would keep what a changed header makes wrong.
            shutil.rmtree(self.build_temp, ignore_errors=True)
            self.force = True
            super().run()
            folder = Path(self.get_ext_fullpath(f"{PACKAGE}._C")).parent
            if toolkit is None:
                # One left from a build with other settings would be packed or loaded beside the new _C.
                for stale in folder.glob("_C_cuda*.so"):
                    stale.unlink()
            facts = json.dumps(build_facts(toolkit, architectures, why_no_cuda), indent=2)
            (folder / "_build_info.json").write_text(facts + "\n")

        def build_extension(self, extension):
            start = time.monotonic()
            super().build_extension(extension)
            seconds, jobs = time.monotonic() - start, os.environ["MAX_JOBS"]
            print(f"{PACKAGE}: built {extension.name} in {seconds:.0f} s with MAX_JOBS={jobs}", flush=True)

        def get_outputs(self):
            outputs = super().get_outputs()
            return [*outputs, str(Path(outputs[0]).with_name("_build_info.json"))]

    ext_modules = libraries(toolkit, architectures)

setup(
    ext_modules=ext_modules,
    cmdclass={"build_ext": BuildLibraries},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
