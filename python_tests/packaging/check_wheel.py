"""Checks what a wheel claims: one binary for every CPython from 3.10 and every torch from 2.11.

    python python_tests/packaging/check_wheel.py [--require-cuda] dist/*.whl

What a library expects from others has to be the stable ABI's, which is C functions that torch declares in its shim
headers, or the C and C++ runtime's. A symbol of at::, c10:: or torch:: would tie the library to the one torch
release it was compiled against, one of CUDA to the one toolkit: its runtime is linked in. What is defined inside the
library is harmless, but for the CUDA runtime where others could see it: they may have brought another one.
"""

import argparse
import functools
import importlib.util
import re
import subprocess
import tempfile
import zipfile
from pathlib import Path

TAG = re.compile(r"-cp310-abi3-[^-]+\.whl$")
REQUIRED = (
    "fewshot_ext/_C.abi3.so",
    "fewshot_ext/_build_info.json",
    "fewshot_ext/py.typed",
    "fewshot_ext/data/class_splits/miniimagenet.json",
    "fewshot_ext/recipes/miniimagenet_resnet12_neg_cosine_1shot.yaml",
    "fewshot_ext/recipes/meta_train/resnet12_deepemd_fcn_1shot.yaml",
)
CUDA_LIBRARY = "fewshot_ext/_C_cuda.abi3.so"
LIBRARIES = re.compile(r"lib(c10|torch|torch_cpu|stdc\+\+|gcc_s|c|m|dl|rt|pthread)\.so[.\d]*|ld-linux.*")

RUNTIME_VERSION = re.compile(r"(GLIBC|GLIBCXX|CXXABI|GCC)_")
# Itanium mangling: of std::. Without a version where libtorch brings a copy of its own that the linker met first.
STANDARD = re.compile(r"_Z(T[ISV])?N?[KRO]*S[tabsiod]")
# An identifier is its length and its letters, so at is "2at". A digit before would belong to a longer length, as in
# "12at_something".
UNSTABLE = re.compile(r"(?<!\d)(2at|3c10|5torch)(?=[\dNISLECD])")
# Of the compiler's own start files, and weak: nobody has to have them.
START_FILES = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__cxa_finalize", "__gmon_start__"}
SHIM = re.compile(r"\b((?:aoti_)?torch_\w+)\s*\(")
SHIM_HEADERS = ("stable/c", "inductor/aoti_torch/c", "inductor/aoti_torch/generated")


def output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def symbols(library, which):
    """Name and version of the library's dynamic symbols, ``which`` being "undefined" or "defined"."""
    lines = output("nm", "-D", f"--{which}-only", library).splitlines()
    return [(name, version) for name, _, version in (line.split()[-1].partition("@") for line in lines)]


def needed_libraries(library):
    return re.findall(r"\(NEEDED\).*\[(.*)\]", output("readelf", "-d", library))


@functools.cache
def declared_shims():
    """The functions in the shim headers of the installed torch; none where no torch is installed."""
    torch = importlib.util.find_spec("torch")
    if torch is None:
        return frozenset()
    folder = Path(torch.submodule_search_locations[0], "include", "torch", "csrc")
    headers = [header for part in SHIM_HEADERS for header in sorted(folder.glob(f"{part}/*.h"))]
    return frozenset(name for header in headers for name in SHIM.findall(header.read_text()))


def is_shim(name):
    return name in declared_shims() if declared_shims() else bool(SHIM.fullmatch(f"{name}("))


def symbol_fault(name, version):
    """What is wrong with expecting this symbol from another library; None where nothing is."""
    if name.startswith("_Z") and UNSTABLE.search(name):
        return f"C++ symbol of libtorch: {name}"
    if re.match(r"_?Py[A-Z_]", name):
        return f"symbol of CPython: {name}"
    if RUNTIME_VERSION.match(version) or STANDARD.match(name) or name in START_FILES or is_shim(name):
        return None
    return f"symbol of neither the stable ABI nor the C and C++ runtime: {name}"


def library_faults(library):
    faults = [f"needs {name}" for name in needed_libraries(library) if not LIBRARIES.fullmatch(name)]
    faults += filter(None, (symbol_fault(*symbol) for symbol in symbols(library, "undefined")))
    exported = [name for name, _ in symbols(library, "defined") if re.match(r"(__)?cuda[A-Z]", name)]
    faults += [f"exports the CUDA runtime's {name}" for name in exported]
    return [f"{Path(library).name}: {fault}" for fault in faults]


def wheel_faults(wheel, require_cuda=False):
    faults = [] if TAG.search(Path(wheel).name) else ["the file name lacks the tag cp310-abi3"]
    required = (*REQUIRED, CUDA_LIBRARY) if require_cuda else REQUIRED
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        members = archive.namelist()
        faults += [f"{name} is missing" for name in required if name not in members]
        for member in members:
            if member.endswith(".so"):
                faults += library_faults(archive.extract(member, folder))
    return faults


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--require-cuda", action="store_true", help="a wheel without the CUDA library is at fault")
    parser.add_argument("wheels", nargs="+", metavar="WHEEL")
    options = parser.parse_args(arguments)
    failed = False
    for wheel in options.wheels:
        faults = wheel_faults(wheel, options.require_cuda)
        failed |= bool(faults)
        print(f"{wheel}: " + ("; ".join(faults) if faults else "stable ABI, no Python symbol, complete"))
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
