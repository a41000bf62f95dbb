"""Shows what every CUDA kernel takes of a multiprocessor, and fails where one leaves its registers.

    FEWSHOT_EXT_CUDA=1 python -m pip wheel --verbose --no-deps --wheel-dir dist . > build.log
    python python_tests/packaging/kernel_resources.py build.log

setup.py has ptxas report on each kernel while it compiles the library, so the figures are those of the wheel. A
register that spills, or an array with a stack frame because it cannot live in registers, is memory traffic that
nobody wrote. It passes in kernels that compute in float64 alone, where values take two registers each and exactness
is the purpose, and in those that stand in ALLOWED.
"""

import re
import subprocess
import sys
from dataclasses import astuple, dataclass, fields
from pathlib import Path

# Name without template arguments, and where it is one architecture alone "for" it -> why it may leave its registers.
ALLOWED: dict[str, str] = {
    "emd_exactly_by_warps": "integers of any width, in memory by their nature; a kernel for what no other could prove",
    "emd_by_warps for sm_100": "seven blocks a multiprocessor leave 72 registers, too few by some; not mended yet",
    "emd_by_blocks for sm_120": "two blocks of 512 threads leave 64 registers, too few by some; not mended yet",
}

ENTRY = re.compile(r"ptxas info\s*: Compiling entry function '\w+' for '(\w+)'")
FUNCTION = re.compile(r"ptxas info\s*: Function properties for (\w+)")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"ptxas info\s*: Used (\d+) registers(?:.*\b(\d+) bytes smem)?")
SCALAR = re.compile(r"\b(double|float|B?Float16|__half|__nv_bfloat16)\b")


@dataclass
class Kernel:
    """What ptxas says of a kernel, or of a function that kernels call; in bytes but for the registers."""

    name: str
    architecture: str
    registers: int = 0  # a function's count as its callers'
    shared: int = 0  # what a launch asks for comes on top
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0

    def base_name(self) -> str:
        return self.name.partition("<")[0]

    def names_in_allowed(self) -> set[str]:
        return {self.base_name(), f"{self.base_name()} for {self.architecture}"}

    def is_float64(self) -> bool:
        return set(SCALAR.findall(self.name.partition("<")[2])) == {"double"}

    def leaves_registers(self) -> bool:
        return bool(self.stack or self.spill_stores or self.spill_loads)


def demangle(symbols: list[str]) -> list[str]:
    """Names as in the source, without parameters and without the package's namespace."""
    command = ["c++filt", "--no-params"]
    done = subprocess.run(command, input="\n".join(symbols), capture_output=True, text=True, check=True)
    return [name.replace("fewshot_ext::", "") for name in done.stdout.splitlines()]


def parse(log: str) -> list[Kernel]:
    kernels: list[Kernel] = []
    architecture = ""
    for line in log.splitlines():
        if entry := ENTRY.search(line):
            architecture = entry[1]
        elif function := FUNCTION.search(line):
            kernels.append(Kernel(function[1], architecture))
        elif frame := FRAME.search(line):
            kernels[-1].stack, kernels[-1].spill_stores, kernels[-1].spill_loads = map(int, frame.groups())
        elif used := USED.search(line):
            kernels[-1].registers, kernels[-1].shared = int(used[1]), int(used[2] or 0)
    for kernel, name in zip(kernels, demangle([kernel.name for kernel in kernels]), strict=True):
        kernel.name = name
    return sorted(kernels, key=astuple)


def table(kernels: list[Kernel]) -> str:
    rows = [[field.name.replace("_", " ") for field in fields(Kernel)]]
    rows += [[str(value) for value in astuple(kernel)] for kernel in kernels]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def faults(kernels: list[Kernel], allowed: dict[str, str]) -> list[str]:
    if not kernels:
        return ["no report of ptxas in the log: has it compiled the CUDA library, with --resource-usage?"]
    wrong = [kernel for kernel in kernels if kernel.leaves_registers() and not kernel.is_float64()]
    needed = {name for kernel in wrong for name in kernel.names_in_allowed()} & set(allowed)
    found = [
        f"{kernel.name} for {kernel.architecture}: {kernel.stack} bytes of stack frame, "
        f"{kernel.spill_stores} of spill stores, {kernel.spill_loads} of spill loads"
        for kernel in wrong
        if needed.isdisjoint(kernel.names_in_allowed())
    ]
    # A line that outlives its kernel's fault would hide the next one; what was not built has none.
    built = {kernel.architecture for kernel in kernels}
    known = {name for name in allowed if name.partition(" for ")[2] in {"", *built}}
    idle = sorted(known - needed)
    return found + [f"{name} stays in its registers and needs no line in ALLOWED" for name in idle]


def main(arguments: list[str]) -> None:
    if len(arguments) != 1:
        raise SystemExit("usage: kernel_resources.py BUILD_LOG")
    kernels = parse(Path(arguments[0]).read_text())
    if kernels:
        print(table(kernels))
    for name, reason in ALLOWED.items():
        print(f"allowed: {name}: {reason}")
    found = faults(kernels, ALLOWED)
    for fault in found:
        print(f"FAULT: {fault}")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main(sys.argv[1:])
