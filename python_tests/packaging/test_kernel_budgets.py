"""The budgets of CUDA kernels: blocks as NVIDIA counts them, instructions by kind, a fault for each that is over."""

import importlib.util
import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("kernel_budgets", Path(__file__).with_name("kernel_budgets.py"))
budgets = importlib.util.module_from_spec(spec)
spec.loader.exec_module(budgets)
Kernel = budgets.kernel_resources.Kernel

MANGLED = "_ZN11fewshot_ext12emd_by_warpsIfEEvNS_10EmdProblemIT_EE"
NAME = "emd_by_warps<float>"
# As cuobjdump 13.2 prints it, with what a predicate and the second half of an instruction look like.
SASS = f"""
\tcode for sm_90
\t\tFunction : {MANGLED}
\t.headerflags\t@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                        /* 0x00000a00ff017b82 */
                                                                                 /* 0x000fe20000000800 */
        /*0010*/                   IMAD.MOV.U32 R13, RZ, RZ, RZ ;                /* 0x000000ffff0d7224 */
        /*0020*/               @P0 LDG.E R0, desc[UR4][R2.64] ;                  /* 0x0000000402007981 */
        /*0030*/              @!P1 FFMA R5, R4, R3, R5 ;                         /* 0x0000000402007981 */
        /*0040*/             @!UP1 UIADD3 UR4, UR4, 0x1, URZ ;                   /* 0x0000000402007981 */
        /*0050*/                   LDS.128 R4, [R2] ;                            /* 0x0000000402007981 */
        /*0060*/                   DFMA R4, R4, R6, R8 ;                         /* 0x0000000402007981 */
        /*0070*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;                 /* 0x0000000402007981 */
        /*1080*/                   EXIT ;                                        /* 0x0000000402007981 */
        /*1090*/                   BRA 0x1090 ;                                  /* 0x0000000402007981 */
        /*10a0*/                   NOP ;                                         /* 0x0000000402007981 */
"""
COUNTS = {
    "instructions": 10,
    "integer": 1,
    "global": 1,
    "float32": 1,
    "shared": 1,
    "float64": 1,
    "barrier": 1,
    "jump": 2,
}
ELF = f"""
.nv.info
\t<0x1>
\tAttribute:\tEIATTR_REGCOUNT
\tValue:\tfunction: {MANGLED}(0x2)\tregister count: 72
.nv.info.{MANGLED}
\t<0x1>
\tAttribute:\tEIATTR_MAXREG_COUNT
\tFormat:\tEIFMT_HVAL
\tValue:\t0xff
\t<0x2>
\tAttribute:\tEIATTR_MAX_THREADS
\tFormat:\tEIFMT_SVAL
\tValue:\t0x80 0x1 0x1 
\t<0x3>
\tAttribute:\tEIATTR_CRS_STACK_SIZE
\tValue:\t0x0 
"""  # noqa: W291
LOG = f"""\
  fewshot_ext: built fewshot_ext._C_cuda in 120 s with MAX_JOBS=2
  ptxas info    : Compiling entry function '{MANGLED}' for 'sm_90'
  ptxas info    : Function properties for {MANGLED}
      0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
  ptxas info    : Used 72 registers, used 1 barriers, 29696 bytes smem, 372 bytes cmem[0]
"""

NVIDIA = r"""
#include <cuda_occupancy.h>
#include <cstdio>
int main() {
  int major, minor, most_threads, memory, threads, registers, shared;
  while (std::scanf("%d %d %d %d", &major, &minor, &most_threads, &memory) == 4 &&
         std::scanf("%d %d %d", &threads, &registers, &shared) == 3) {
    cudaOccDeviceProp device;
    device.computeMajor = major;
    device.computeMinor = minor;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = most_threads;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.warpSize = 32;
    device.sharedMemPerBlock = 48 << 10;
    device.sharedMemPerMultiprocessor = memory;
    device.sharedMemPerBlockOptin = memory - 1024;
    device.reservedSharedMemPerBlock = 1024;
    device.numSms = 1;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 1024;
    kernel.numRegs = registers;
    kernel.sharedSizeBytes = shared;
    kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_DEFAULT;
    kernel.maxDynamicSharedSizeBytes = 0;
    kernel.numBlockBarriers = 1;
    cudaOccDeviceState state;
    cudaOccResult result;
    const auto status = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, 0);
    std::printf("%d\n", status == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : -1);
  }
}
"""


def test_blocks_are_those_of_nvidias_calculator(tmp_path):
    nvcc = shutil.which("nvcc")
    folders = [Path(nvcc).resolve().parent.parent / "include"] if nvcc else []
    folders = [
        folder for folder in (*folders, Path("/usr/local/cuda/include")) if (folder / "cuda_occupancy.h").exists()
    ]
    if not folders:
        pytest.skip("no CUDA toolkit")
    (tmp_path / "nvidia.cpp").write_text(NVIDIA)
    command = ["c++", "-I", folders[0], tmp_path / "nvidia.cpp", "-o", tmp_path / "nvidia"]
    subprocess.run(command, check=True)
    cases = [
        (capability, threads, registers, shared)
        for capability in budgets.CAPABILITIES
        for threads in (32, 100, 128, 256, 320, 512, 1024)
        for registers in range(8, 256, 9)
        for shared in (0, 1, 1024, 6016, 16384, 29696, 40160, 48496, 49152)
    ]
    lines = [
        f"{capability.replace('.', ' ')} {budgets.CAPABILITIES[capability][1]} {budgets.CAPABILITIES[capability][3]} "
        f"{' '.join(map(str, kernel))}"
        for capability, *kernel in cases
    ]
    done = subprocess.run([tmp_path / "nvidia"], input="\n".join(lines), capture_output=True, text=True, check=True)
    assert [budgets.blocks_of_multiprocessor(*case) for case in cases] == list(map(int, done.stdout.split()))


@pytest.mark.parametrize(
    ("case", "blocks"),  # by NVIDIA's calculator, CUDA 13.0
    [
        (("9.0", 256, 32, 0), 8),
        (("8.6", 256, 32, 0), 6),
        (("8.0", 512, 64, 48496), 2),
        (("8.6", 512, 64, 48496), 2),
        (("9.0", 256, 172, 47488), 1),
        (("12.0", 32, 16, 0), 24),
    ],
)
def test_blocks_of_kernels_that_each_limit_holds(case, blocks):
    assert budgets.blocks_of_multiprocessor(*case) == blocks


def test_shared_memory_that_launches_ask_for_counts(monkeypatch):
    kernel = Kernel(NAME, "sm_90", registers=32, shared=1024)
    assert budgets.blocks_of_kernel("9.0", 128, kernel) == 16
    monkeypatch.setattr(budgets, "DYNAMIC", {kernel.base_name(): 48 << 10})
    assert budgets.blocks_of_kernel("9.0", 128, kernel) == 4


def test_instructions_are_counted_by_kind():
    assert budgets.count(SASS) == {NAME: COUNTS}


def test_threads_are_those_of_the_launch_bounds():
    assert budgets.threads_of_blocks(ELF) == {NAME: 128}


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("float32", "FFMA FADD FMUL FSETP"),
        ("float64", "DADD DFMA DSETP"),
        ("special", "MUFU"),
        ("integer", "IMAD IADD3 VIADD ISETP LEA LOP3 SHF PRMT"),
        ("convert", "F2F I2F F2I I2FP"),
        ("global", "LDG LD STG ST ATOMG RED"),
        ("shared", "LDS STS ATOMS"),
        ("local", "LDL STL"),
        ("warp", "SHFL VOTE REDUX"),
        ("barrier", "BAR BSSY BSYNC WARPSYNC"),
        ("jump", "BRA CALL EXIT"),
        (None, "LDC S2R MOV"),
    ],
)
def test_kinds_of_instructions(kind, names):
    assert {name: budgets.kind_of(name) for name in names.split()} == dict.fromkeys(names.split(), kind)


class Tools:
    """cuobjdump, a table of one kernel, a log and a wheel."""

    def __init__(self, monkeypatch, folder):
        self.folder, self.release = folder, "13.0"
        monkeypatch.setattr(budgets, "TABLE", folder / "table.csv")
        monkeypatch.setattr(budgets, "find_cuobjdump", lambda: {"CUOBJDUMP": "cuobjdump"})
        monkeypatch.setattr(budgets, "dump", lambda tool, what, *rest: {"-sass": SASS, "-elf": ELF}[what])

    def run(self, *options, log=LOG):
        (self.folder / "build.log").write_text(log)
        wheel = self.folder / "a.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(budgets.LIBRARY, "")
            archive.writestr(budgets.FACTS, json.dumps({"cuda_toolkit": self.release}))
        try:
            budgets.main([*options, str(self.folder / "build.log"), str(wheel)])
        except SystemExit as finished:
            return finished.code


@pytest.fixture
def tools(monkeypatch, tmp_path):
    return Tools(monkeypatch, tmp_path)


def test_table_that_was_just_written_holds(tools, capsys):
    assert tools.run("--renew") is None
    release, header, row = budgets.TABLE.read_text().splitlines()
    assert release == "# nvcc 13.0"
    written = dict(zip(header.split(","), row.rsplit(",", len(header.split(",")) - 1), strict=True))
    assert (written["kernel"], written["threads"], written["9.0"], written["10.0"]) == (NAME, "128", "7", "")
    assert not tools.run()
    assert "1 kernels, 10 instructions for sm_90" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (
            ("72 registers", "128 registers"),
            f"{NAME} on 9.0: expected 7 blocks a multiprocessor or more, got 4 (128 reg",
        ),
        (("29696 bytes smem", "48000 bytes smem"), f"{NAME} on 9.0: expected 7 blocks a multiprocessor or more, got 4"),
        (("12emd_by_warps", "13emd_by_blocks"), "emd_by_blocks<float> for sm_90 has no line in table.csv"),
        (("12emd_by_warps", "13emd_by_blocks"), f"{NAME} has a line in table.csv and is not in the log"),
    ],
)
def test_kernel_that_leaves_its_share_is_a_fault_by_name(tools, capsys, change, fault):
    tools.run("--renew")
    assert tools.run(log=LOG.replace(*change))
    assert f"FAULT: {fault}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        ("FFMA R5, R4, R3, R5 ;", f"{NAME}: expected 1 instructions of the kind float32 or few more, got 6"),
        ("LDC R1, c[0x0][0x28] ;", f"{NAME}: expected 10 instructions or few more, got 15"),
    ],
)
def test_kernel_with_more_instructions_is_a_fault_by_kind(tools, monkeypatch, capsys, more, fault):
    tools.run("--renew")
    four, five = (SASS + f"        /*2000*/      {more}\n" * count for count in (4, 5))
    monkeypatch.setattr(budgets, "dump", lambda *arguments: four)
    assert not tools.run()
    monkeypatch.setattr(budgets, "dump", lambda *arguments: five)
    assert tools.run()
    assert f"FAULT: {fault}" in capsys.readouterr().out


def test_kernel_without_launch_bounds_has_no_line(tools, monkeypatch):
    monkeypatch.setattr(budgets, "threads_of_blocks", lambda elf: {})
    assert tools.run("--renew") == f"{NAME}: expected __launch_bounds__, which tell the threads of a block"


def test_what_is_not_checked_is_said(tools, monkeypatch, capsys):
    tools.run("--renew")
    monkeypatch.setattr(budgets, "find_cuobjdump", lambda: None)
    assert not tools.run(log=LOG.replace("in 120 s", "in 400 s"))
    told = capsys.readouterr().out
    assert "NOT CHECKED: instructions: no cuobjdump" in told
    assert "SLOW: the CUDA library took 400 s to compile" in told
    assert tools.run(log=LOG.replace("72 registers", "128 registers")), "blocks need no cuobjdump"
    assert tools.run("--renew").startswith("--renew: no cuobjdump")
    tools.release = "13.2"
    assert not tools.run(log=LOG.replace("72 registers", "128 registers"))
    assert (
        "NOT CHECKED: blocks and instructions: table.csv is for nvcc 13.0, and this is 13.2" in capsys.readouterr().out
    )


def test_committed_table_has_every_budget():
    _, table = budgets.read_table()
    assert len(table) > 60
    for name, row in table.items():
        assert all(int(row[column]) > 0 for column in ("threads", *budgets.CAPABILITIES, "instructions")), name
        assert bool(row["integer"]) == (Kernel(name, "sm_90").base_name() in budgets.HOT), name
    assert {Kernel(name, "").base_name() for name in table} >= set(budgets.HOT)
