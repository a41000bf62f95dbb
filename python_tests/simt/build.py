"""Compiles a pybind11 module of emulated kernels, and keeps it as long as its sources stay the same."""

import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent.parent
CACHE = CHECKOUT / ".cache" / "simt"

INCLUDES = (HERE, HERE / "include", CHECKOUT / "csrc")
RUNTIME = tuple(sorted(HERE.glob("runtime/*.cpp")))

CXX = os.environ.get("CXX", "g++")
COMMON_FLAGS = ("-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
# Kernels read floats as float4, and count on the roundings they spell out.
KERNEL_FLAGS = (
    "-DFEWSHOT_EXT_SIMT",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-Wno-unknown-pragmas",
    "-Wno-unused-variable",
)
# The sanitizers' calls, answered by runtime/instrumentation.cpp. Loops that leave an array are to do so, and
# not to be optimized as if they did not.
TRACKED = (
    "-O1",
    "-fsanitize=thread,bounds,alignment",
    "-fno-sanitize-recover=bounds,alignment",
    "-fno-aggressive-loop-optimizations",
)
SANITIZED = ("-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize=vptr")
SANITIZED += ("-fno-sanitize-recover=undefined", "-DSIMT_UCONTEXT")


def sanitized():
    """Whether this process wants the build for AddressSanitizer, whose library it has to have preloaded."""
    return os.environ.get("FEWSHOT_EXT_SIMT_SANITIZE") == "1"


def sanitizer_environment():
    """What a Python process needs to load such a build."""

    def library(name):
        command = [CXX, f"-print-file-name=lib{name}.so"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    return os.environ | {
        "FEWSHOT_EXT_SIMT_SANITIZE": "1",
        # With libstdc++ behind it, so that AddressSanitizer finds the __cxa_throw it intercepts.
        "LD_PRELOAD": f"{library('asan')}:{library('stdc++')}",
        # Python keeps memory to its end by design.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def load(name, *sources, includes=()):
    """Imports the module `name` that `sources` bind, compiled first where need be."""
    path = build(name, tuple(map(Path, sources)), tuple(includes))
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(name, sources, includes=()):
    import pybind11

    system = (sysconfig.get_path("include"), pybind11.get_include())
    include_flags = [flag for path in (*INCLUDES, *includes) for flag in ("-I", str(path))]
    include_flags += [flag for path in system for flag in ("-isystem", path)]
    jobs = []
    for unit in (*sources, *RUNTIME):
        if sanitized():
            flags = (*KERNEL_FLAGS, *SANITIZED)
        else:
            flags = (*KERNEL_FLAGS, *TRACKED) if unit in sources else ("-O2",)
        jobs.append((unit, [CXX, *COMMON_FLAGS, *flags, *include_flags]))
    link = [CXX, "-shared", *(SANITIZED if sanitized() else ())]
    return cached(f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}", jobs, link, includes)


def cached(file_name, jobs, link, includes=()):
    """The library that the jobs, a source and its command each, and the linker make: an earlier one where nothing has
    changed since."""
    folder = CACHE / digest(jobs, link, includes)
    library = folder / file_name
    folder.mkdir(parents=True, exist_ok=True)
    # Processes that test side by side want the same library: one compiles, the others wait.
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            compile_library(jobs, link, library)
    return library


def compile_library(jobs, link, library):
    def compile_unit(job):
        unit, command = job
        built = library.with_name(f"{unit.stem}.o")
        run([*command, "-c", str(unit), "-o", str(built)])
        return built

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_unit, jobs))
    # Under its own name only when complete: who builds may be killed.
    partial = library.with_suffix(".partial")
    run([*link, *map(str, objects), "-o", str(partial)])
    partial.rename(library)
    for built in objects:
        built.unlink()


def run(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def digest(jobs, link, includes):
    """Of the commands, the compiler and every file that could be included."""
    compiler = subprocess.run([CXX, "--version"], capture_output=True, text=True, check=True).stdout
    hashed = hashlib.sha256(repr((jobs, link, compiler)).encode())
    headers = {path for folder in (*INCLUDES, *includes) for path in Path(folder).rglob("*.[hc]*")}
    for path in sorted(headers | {unit for unit, _ in jobs}):
        if path.suffix in (".h", ".cuh", ".cpp"):
            hashed.update(f"{path}\0".encode() + path.read_bytes())
    return hashed.hexdigest()[:16]
