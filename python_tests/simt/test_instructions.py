"""The one thing about matrix instructions that the emulator cannot see: what nvcc makes of the assembly strings."""

import re
import shutil
import subprocess

import pytest

from . import build

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc"),
    pytest.mark.skipif(build.sanitized(), reason="the compiler is not under test"),
]


def nvcc(*arguments):
    done = subprocess.run(["nvcc", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def ptx(tmp_path_factory):
    path = tmp_path_factory.mktemp("ptx") / "instructions.ptx"
    flags = ("-std=c++20", "-arch=compute_80", "-Werror=all-warnings", f"-I{build.CHECKOUT / 'csrc'}")
    nvcc(*flags, "-ptx", build.HERE / "instructions.cu", "-o", path)
    return path


class Kernel:
    """The instructions of a kernel, with registers named by what they come from: `p1.2` is word 2 of parameter 1, and
    `d0` the first word that the kernel stores."""

    def __init__(self, ptx, name):
        body = re.search(rf"\.entry {name}\(.*?\n\{{(.*?)\n\}}", ptx.read_text(), re.DOTALL)[1]
        self.name = name
        self.lines = [line.strip() for line in body.splitlines() if line.strip()]
        # Of the assembly strings, which nvcc marks.
        self.instructions = [
            self.lines[i + 1].rstrip(";") for i, line in enumerate(self.lines) if line == "// begin inline asm"
        ]
        self.values = {}
        for line in self.lines:
            self.follow(line)

    def follow(self, line):
        if found := re.match(rf"ld\.param\S*\s+(.*), \[{self.name}_param_(\d+)(?:\+(\d+))?\];", line):
            for i, register in enumerate(re.findall(r"%\w+", found[1])):
                self.values[register] = f"p{found[2]}.{int(found[3] or 0) // 4 + i}"
        elif found := re.match(r"st\.global\S*\s+\[%\w+(?:\+(\d+))?\], (.*);", line):
            for i, register in enumerate(re.findall(r"%\w+", found[2])):
                self.values[register] = f"d{int(found[1] or 0) // 4 + i}"
        elif found := re.match(r"(mov\.b32|mov\.u32|cvta\.to\.global\.u64)\s+(%\w+), (%?\w+);", line):
            self.values[found[2]] = self.values.get(found[3], found[3])
        elif found := re.match(r"(shl\.b32|add\.s32)\s+(%\w+), (%\w+), (%?\w+);", line):
            operands = (self.values.get(operand, operand) for operand in found.groups()[2:])
            self.values[found[2]] = f"{found[1][:3]}({', '.join(operands)})"
        elif found := re.match(r"sub\.f32\s+(%\w+), (%\w+), (%\w+);", line):
            self.values[found[1]] = f"{self.values.get(found[2], found[2])} - {self.values.get(found[3], found[3])}"

    def named(self):
        return [re.sub(r"%\w+", lambda found: self.values.get(found[0], found[0]), line) for line in self.instructions]


def braces(*names):
    return "{" + ", ".join(names) + "}"


D = braces("d0", "d1", "d2", "d3")


def fragment(parameter, registers):
    return braces(*(f"p{parameter}.{i}" for i in range(registers)))


@pytest.mark.parametrize(
    "name, instruction",
    [
        ("mma_bfloat16", "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"),
        ("mma_float16", "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"),
        ("mma_tf32", "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"),
    ],
)
def test_products_take_their_operands_in_order(ptx, name, instruction):
    operands = ", ".join([D, fragment(1, 4), fragment(2, 2), fragment(3, 4)])
    assert Kernel(ptx, name).named() == [f"{instruction} {operands}"]


def test_threefold_product_is_of_small_and_big_big_and_small_big_and_big(ptx):
    kernel = Kernel(ptx, "mma_threefold")
    big_a, small_a, big_b, small_b = fragment(1, 4), fragment(2, 4), fragment(3, 2), fragment(4, 2)
    pattern = r"mma\.sync\.aligned\.m16n8k8\.row\.col\.f32\.tf32\.tf32\.f32 ({.*}), ({.*}), ({.*}), ({.*})"
    products = [re.fullmatch(pattern, line).groups() for line in kernel.named()]
    assert [product[1:3] for product in products] == [(small_a, big_b), (big_a, small_b), (big_a, big_b)]
    # Each adds to what the one before gives.
    assert products[0][3] == fragment(5, 4)
    assert [product[3] for product in products[1:]] == [product[0] for product in products[:-1]]
    assert products[-1][0] == D


@pytest.mark.parametrize("name, registers", [("round_one", 1), ("round_a", 4), ("round_b", 2)])
def test_rounding(ptx, name, registers):
    assert sorted(Kernel(ptx, name).named()) == [f"cvt.rna.tf32.f32 d{i}, p1.{i}" for i in range(registers)]


def test_split_takes_three_instructions_of_plain_arithmetic(ptx):
    """The emulator computes the same ones, as long as the compiler leaves them as they are."""
    kernel = Kernel(ptx, "split_one")
    lines = [re.sub(r"\s+", " ", line) for line in kernel.lines]
    arithmetic = [line for line in lines if re.match(r"(fma|mul|sub|add|cvt\.r|neg)\b", line)]
    pattern = r"""mul\.f32 (%f\d+), (%f\d+), 0f46000400;
fma\.rn\.f32 (%f\d+), (%f\d+), \2, \1;
sub\.f32 (%f\d+), \2, \3;"""
    found = re.fullmatch(pattern, "\n".join(arithmetic))
    assert found and not kernel.instructions, arithmetic
    assert f"mov.f32 {found[4]}, 0fC6000000;" in lines  # -2^13


@pytest.mark.parametrize("factor", ["a", "b"])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_loads(ptx, factor, trans):
    kernel = Kernel(ptx, f"ldmatrix{'_trans' if trans else ''}_{factor}")
    (line,) = kernel.named()
    assert line.startswith(f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {D}, [add(")
    assert "dynamic_shared" in line and "shl(p1.0, 1)" in line


def test_asynchronous_copies(ptx):
    to = r"add\(\w*dynamic_shared\w*, shl\(p1\.0, 2\)\)"
    for name, last in (("copy_sixteen", ""), ("copy_some", r", p2\.0")):
        (line,) = Kernel(ptx, name).named()
        assert re.fullmatch(rf"cp\.async\.cg\.shared\.global \[{to}\], \[p0\.0\], 16{last}", line), line
    assert Kernel(ptx, "commit").named() == ["cp.async.commit_group"]
    assert Kernel(ptx, "wait_for_all").named() == ["cp.async.wait_group 0"]
    assert Kernel(ptx, "wait_but_for_three").named() == ["cp.async.wait_group 3"]


@pytest.mark.parametrize("architecture", [80, 90, 100, 120])
def test_the_assembler_takes_it(ptx, tmp_path, architecture):
    known = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    if f"sm_{architecture}" not in known:
        pytest.skip(f"this nvcc does not know sm_{architecture}")
    nvcc("-cubin", f"-arch=sm_{architecture}", ptx, "-o", tmp_path / "instructions.cubin")
