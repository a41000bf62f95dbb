"""Holds every CUDA kernel to its share of a multiprocessor and to its number of instructions.

    python python_tests/packaging/kernel_budgets.py build/wheel.log dist/*.whl            # as "make wheel-cuda" does
    python python_tests/packaging/kernel_budgets.py --renew build/wheel.log dist/*.whl    # writes the table anew

The table, kernel_budgets.csv, has for each kernel the threads of a block, how many blocks a multiprocessor of each
compute capability holds at least, and how many instructions of which kind its code for 9.0 has. Blocks follow from
what ptxas reports in the log of the build; instructions are counted in the library by cuobjdump, which is in CUDA
toolkits and on PyPI. Compilers differ, and so the table is for one release of nvcc; where another was used, or there
is no cuobjdump, that is said.

The number of a kernel's instructions stands for the time that its compilation takes too. That time itself is told where
it is long, and no more: it is the machine's as much as the kernels'.
"""

import argparse
import csv
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

spec = importlib.util.spec_from_file_location("kernel_resources", Path(__file__).with_name("kernel_resources.py"))
kernel_resources = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel_resources)

TABLE = Path(__file__).with_suffix(".csv")
LIBRARY = "fewshot_ext/_C_cuda.abi3.so"
FACTS = "fewshot_ext/_build_info.json"
BUILT = re.compile(r"built fewshot_ext\._C_cuda in (\d+) s")
SECONDS = 360  # of the CUDA library's compilation, on two quiet cores
NO_TOOLS = "no cuobjdump and nvdisasm here: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"

# Per compute capability: the code that its GPUs run, threads, blocks and shared memory of a multiprocessor. From the
# table of compute capabilities in NVIDIA's CUDA Programming Guide.
CAPABILITIES = {
    "8.0": ("sm_80", 2048, 32, 164 << 10),
    "8.6": ("sm_80", 1536, 16, 100 << 10),
    "8.9": ("sm_80", 1536, 24, 100 << 10),
    "9.0": ("sm_90", 2048, 32, 228 << 10),
    "10.0": ("sm_100", 2048, 32, 228 << 10),
    "12.0": ("sm_120", 1536, 24, 100 << 10),
}
REGISTERS = 65536  # of a multiprocessor, on all of them, as is what follows
PARTITIONS, REGISTER_UNIT = 4, 256  # where warps live; what a warp's registers are rounded up to
SHARED_UNIT, SHARED_OF_SYSTEM = 128, 1024  # bytes, of a block
# Shared memory that launches ask for on top, in bytes, of problems of the size that the kernel is for.
DYNAMIC = {"finetune_in_span": 10 << 10}  # 25 features of 5 classes

COUNTED = "sm_90"
# Kind -> the beginnings of its instructions' names; what is of no kind is in the total alone.
KINDS = {
    "float32": r"F(FMA|ADD|MUL|MNMX|SETP|SEL|SET|CHK)",
    "float64": r"D(FMA|ADD|MUL|MNMX|SETP)",
    "special": r"MUFU",
    "integer": r"I(MAD|ADD|SETP|MNMX|ABS)|V(IADD|IMNMX|ABSDIFF)|LEA|LOP|SHF$|SEL|PRMT|POPC|FLO|BREV",
    "convert": r"[FI]2[FI]|F2FP|I2FP",
    "shared": r"LDS|STS|ATOMS",
    "global": r"LDG|STG|LD$|ST$|ATOM|RED$",
    "local": r"LDL|STL",
    "warp": r"SHFL|VOTE|REDUX|MATCH",
    "barrier": r"BAR|MEMBAR|ERRBAR|WARPSYNC|BSSY|BSYNC|BREAK|ENDCOLLECTIVE",
    "jump": r"BRA|BRX|CALL|RET|EXIT|JMP",
}
# Where the time goes. Others are held to their total.
HOT = (
    "emd_by_blocks",
    "emd_by_warps",
    "emd_flow_backward_by_warps",
    "finetune_directly",
    "finetune_in_span",
    "margin_softmax_gradient",
    "margin_softmax_one_launch",
    "margin_softmax_one_pass",
    "margin_softmax_row_statistics",
)
ALLOWANCE, FEW = 1.05, 4  # how much a count may grow unnoticed: by a twentieth, or by so many

FUNCTION = re.compile(r"\s+Function : (\w+)")
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)")


def blocks_of_multiprocessor(capability, threads, registers, shared):
    """How many blocks of so many threads, registers each and bytes of shared memory are there at once."""
    _, most_threads, most_blocks, memory = CAPABILITIES[capability]
    warps = -(-threads // 32)
    of_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    warps_by_registers = REGISTERS // PARTITIONS // of_warp * PARTITIONS if registers else most_threads // 32
    of_block = -(-shared // SHARED_UNIT) * SHARED_UNIT + SHARED_OF_SYSTEM
    return min(most_blocks, most_threads // 32 // warps, warps_by_registers // warps, memory // of_block)


def blocks_of_kernel(capability, threads, kernel):
    shared = kernel.shared + DYNAMIC.get(kernel.base_name(), 0)
    return blocks_of_multiprocessor(capability, threads, kernel.registers, shared)


def find_cuobjdump():
    """The environment in which cuobjdump runs, with its path under "CUOBJDUMP"; None where there is none."""
    site = Path(sysconfig.get_path("purelib"))
    folders = [Path(os.environ["CUDA_HOME"], "bin")] if os.environ.get("CUDA_HOME") else []
    folders += [*map(Path, os.get_exec_path()), Path("/usr/local/cuda/bin"), *sorted(site.glob("nvidia/*/bin"))]
    path = os.pathsep.join(map(str, folders))
    tools = [shutil.which(name, path=path) for name in ("cuobjdump", "nvdisasm")]
    return {**os.environ, "PATH": path, "CUOBJDUMP": tools[0]} if all(tools) else None


def dump(environment, *arguments):
    command = [environment["CUOBJDUMP"], *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def kind_of(name):
    return next((kind for kind, names in KINDS.items() if re.match(names, name)), None)


def count(sass):
    """Kernel -> its instructions, by kind and in all."""
    counts, kinds = {}, {}
    for line in sass.splitlines():
        if function := FUNCTION.match(line):
            current = counts.setdefault(function[1], Counter())
        elif (instruction := INSTRUCTION.match(line)) and instruction[1] != "NOP":
            if instruction[1] not in kinds:
                kinds[instruction[1]] = kind_of(instruction[1])
            current["instructions"] += 1
            if kinds[instruction[1]]:
                current[kinds[instruction[1]]] += 1
    return dict(zip(kernel_resources.demangle(list(counts)), counts.values(), strict=True))


def threads_of_blocks(elf):
    """Kernel -> the threads of its __launch_bounds__."""
    name, found = None, {}
    for line in elf.splitlines():
        if section := re.match(r"\.nv\.info\.(\w+)", line):
            name = section[1]
        elif re.match(r"\s+Attribute:\s+EIATTR_MAX_THREADS", line):
            found[name] = None
        elif found and name in found and found[name] is None and (value := re.match(r"\s+Value:\s+0x(\w+)", line)):
            found[name] = int(value[1], 16)
    return dict(zip(kernel_resources.demangle(list(found)), found.values(), strict=True))


def occupancy_faults(table, kernels):
    found = []
    for kernel in kernels:
        row = table.get(kernel.name)
        if row is None:
            found.append(f"{kernel.name} for {kernel.architecture} has no line in {TABLE.name}; --renew writes it")
            continue
        for capability, (architecture, *_) in CAPABILITIES.items():
            if architecture != kernel.architecture:
                continue
            blocks = blocks_of_kernel(capability, int(row["threads"]), kernel)
            if blocks < int(row[capability]):
                found.append(
                    f"{kernel.name} on {capability}: expected {row[capability]} blocks a multiprocessor or more, got "
                    f"{blocks} ({kernel.registers} registers, {kernel.shared} bytes of shared memory)"
                )
    gone = sorted(set(table) - {kernel.name for kernel in kernels})
    return found + [f"{name} has a line in {TABLE.name} and is not in the log" for name in gone]


def count_faults(table, counts):
    found = []
    for name, row in table.items():
        for kind in ("instructions", *KINDS):
            if row[kind] and name in counts:
                most = max(int(row[kind]) * ALLOWANCE, int(row[kind]) + FEW)
                if counts[name][kind] > most:
                    what = "instructions" if kind == "instructions" else f"instructions of the kind {kind}"
                    found.append(f"{name}: expected {row[kind]} {what} or few more, got {counts[name][kind]}")
        if name not in counts:
            found.append(f"{name} is not in the library's code for {COUNTED}")
    return found


def table_of(kernels, threads, counts):
    """The table's rows, by kernel."""
    table = {}
    for kernel in kernels:
        if kernel.name not in threads:
            raise SystemExit(f"{kernel.name}: expected __launch_bounds__, which tell the threads of a block")
        row = table.setdefault(kernel.name, {"kernel": kernel.name, "threads": threads[kernel.name]})
        for capability, (architecture, *_) in CAPABILITIES.items():
            if architecture == kernel.architecture:
                row[capability] = blocks_of_kernel(capability, row["threads"], kernel)
        row["instructions"] = counts[kernel.name]["instructions"]
        if kernel.base_name() in HOT:
            row.update({kind: counts[kernel.name][kind] for kind in KINDS})
    return table


def read_table():
    """The release of nvcc that the table is for, and its rows by kernel."""
    release, *lines = TABLE.read_text().splitlines()
    return release.removeprefix("# nvcc "), {row["kernel"]: row for row in csv.DictReader(lines)}


def write_table(release, table):
    with TABLE.open("w", newline="") as file:
        file.write(f"# nvcc {release}\n")
        writer = csv.DictWriter(file, ["kernel", "threads", *CAPABILITIES, "instructions", *KINDS], lineterminator="\n")
        writer.writeheader()
        writer.writerows(table[name] for name in sorted(table))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--renew", action="store_true", help="write the table anew instead of checking")
    parser.add_argument("log", type=Path, help="of the build, with what ptxas reports")
    parser.add_argument("wheel", type=Path)
    options = parser.parse_args(arguments)
    log = options.log.read_text()
    kernels = [kernel for kernel in kernel_resources.parse(log) if kernel.registers]  # the others are functions
    environment = find_cuobjdump()
    with zipfile.ZipFile(options.wheel) as archive, tempfile.TemporaryDirectory() as folder:
        release = json.loads(archive.read(FACTS))["cuda_toolkit"]
        library = archive.extract(LIBRARY, folder)
        if environment:
            counts = count(dump(environment, "-sass", "-arch", COUNTED, library))
        if options.renew:
            if not environment:
                raise SystemExit(f"--renew: {NO_TOOLS}")
            write_table(release, table_of(kernels, threads_of_blocks(dump(environment, "-elf", library)), counts))
            return
    wanted, table = read_table()
    found = []
    if release != wanted:
        print(f"NOT CHECKED: blocks and instructions: {TABLE.name} is for nvcc {wanted}, and this is {release}")
    else:
        found += occupancy_faults(table, kernels)
        if environment:
            found += count_faults(table, counts)
            total = sum(counts[name]["instructions"] for name in counts)
            print(f"{len(counts)} kernels, {total} instructions for {COUNTED}")
        else:
            print(f"NOT CHECKED: instructions: {NO_TOOLS}")
    seconds = BUILT.search(log)
    if seconds and int(seconds[1]) > SECONDS:
        print(
            f"SLOW: the CUDA library took {seconds[1]} s to compile, which on two quiet cores takes {SECONDS} at most"
        )
    for fault in found:
        print(f"FAULT: {fault}")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
