"""Checks what a wheel claims: one binary for every CPython from 3.10 and every torch from 2.11.

    python python_tests/packaging/check_wheel.py dist/*.whl

A symbol of at::, c10:: or torch:: that the library expects from libtorch would tie it to the one torch
release it was compiled against; the stable ABI consists of C functions alone. What is defined inside the
library is harmless.
"""

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

TAG = re.compile(r"-cp310-abi3-[^-]+\.whl$")
REQUIRED = ("fewshot_ext/_C.abi3.so", "fewshot_ext/_build_info.json", "fewshot_ext/py.typed")
# Itanium mangling: an identifier is its length and its letters, so at is "2at". A digit before would belong
# to a longer length, as in "12at_something".
UNSTABLE = re.compile(r"(?<!\d)(2at|3c10|5torch)(?=[\dNISLECD])")
FORBIDDEN_LIBRARIES = re.compile(r"libtorch_python|libpython|libc10_cuda|libtorch_cuda|libcudart")


def output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def undefined_symbols(library):
    return [line.split()[-1].partition("@")[0] for line in output("nm", "-D", "--undefined-only", library).splitlines()]


def needed_libraries(library):
    return re.findall(r"\(NEEDED\).*\[(.*)\]", output("readelf", "-d", library))


def library_faults(library):
    faults = [f"needs {name}" for name in needed_libraries(library) if FORBIDDEN_LIBRARIES.match(name)]
    for symbol in undefined_symbols(library):
        if symbol.startswith("_Z") and UNSTABLE.search(symbol):
            faults.append(f"C++ symbol of libtorch: {symbol}")
        elif re.match(r"_?Py[A-Z_]", symbol):
            faults.append(f"symbol of CPython: {symbol}")
    return [f"{Path(library).name}: {fault}" for fault in faults]


def wheel_faults(wheel):
    faults = [] if TAG.search(Path(wheel).name) else ["the file name lacks the tag cp310-abi3"]
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        members = archive.namelist()
        faults += [f"{name} is missing" for name in REQUIRED if name not in members]
        for member in members:
            if member.endswith(".so"):
                faults += library_faults(archive.extract(member, folder))
    return faults


def main(wheels):
    if not wheels:
        raise SystemExit("usage: check_wheel.py WHEEL...")
    failed = False
    for wheel in wheels:
        faults = wheel_faults(wheel)
        failed |= bool(faults)
        print(f"{wheel}: " + ("; ".join(faults) if faults else "stable ABI, no Python symbol, complete"))
    raise SystemExit(failed)


if __name__ == "__main__":
    main(sys.argv[1:])
