"""The matrix product of the CUDA kernels, on the CPU: its calls of torch's mm, and what a failed one says."""

from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from ..simt import build

SOURCE = Path(__file__).with_name("torch_multiply.cpp")
HALF_TYPES = (torch.bfloat16, torch.float16)
KEEPS_TEXT = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)  # torch, of an error of its own


@pytest.fixture(scope="module")
def multiply():
    includes = [flag for folder in cpp_extension.include_paths() for flag in ("-isystem", folder)]
    # The libraries that are loaded already, by their names alone; the version, because the headers are not hashed.
    libraries = [flag for folder in cpp_extension.library_paths() for flag in ("-L", folder)]
    command = [build.CXX, *build.COMMON_FLAGS, "-DTORCH_TARGET_VERSION=0x020b000000000000", *includes]
    command += [f"-DBUILT_WITH={torch.__version__!r}", "-I", str(build.CHECKOUT / "csrc")]
    link = [build.CXX, "-shared", "-Wl,--no-as-needed", *libraries, "-ltorch_cpu", "-lc10"]
    torch.ops.load_library(str(build.cached("torch_multiply.so", [(SOURCE, command)], link)))
    return torch.ops.fewshot_ext_test.multiply


@pytest.fixture
def fake_mm():
    """What stands in for torch's mm of half types, which only GPUs have; returns what each call was given."""
    calls = []
    library = torch.library.Library("aten", "IMPL")

    def mm(self, mat2, out_dtype, *, out):
        calls.append((self, mat2, out_dtype, out))
        return out.copy_(self.to(out_dtype) @ mat2.to(out_dtype))

    def register(kernel=mm):
        library.impl("mm.dtype_out", kernel, "CPU")
        return calls

    yield register
    library._destroy()


def operands(dtype, a_transposed, b_transposed):
    """Integers, whose products are exact, in rows that lie apart from each other; ``a`` [3, 5], ``b`` [5, 4]."""
    generator = torch.Generator().manual_seed(0)

    def matrix(rows, columns, transposed):
        shape = (columns, rows + 2) if transposed else (rows, columns + 2)
        padded = torch.randint(-4, 5, shape, generator=generator).to(dtype)
        return padded[:, :-2].T if transposed else padded[:, :-2]

    return matrix(3, 5, a_transposed), matrix(5, 4, b_transposed)


@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize("b_transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF_TYPES])
def test_product_of_matrices_however_they_lie(multiply, fake_mm, dtype, a_transposed, b_transposed):
    fake_mm()
    a, b = operands(dtype, a_transposed, b_transposed)
    padded = torch.full((3, 6), torch.nan, dtype=torch.float32 if dtype in HALF_TYPES else dtype)
    multiply(padded[:, :4], a, b)
    assert torch.equal(padded[:, :4].double(), a.double() @ b.double())
    assert padded[:, 4:].isnan().all()


@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_mm_of_half_types_gets_the_operands_in_order_and_a_result_in_float32(multiply, fake_mm, dtype):
    calls = fake_mm()
    a, b = operands(dtype, True, False)
    out = torch.empty(3, 4)
    multiply(out, a, b)
    ((left, right, out_dtype, result),) = calls
    for given, wanted in ((left, a), (right, b), (result, out)):
        assert given.data_ptr() == wanted.data_ptr()
        assert (given.shape, given.stride(), given.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)
    assert out_dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_types_need_no_mm_of_half_types(multiply, fake_mm, dtype):
    calls = fake_mm()
    multiply(torch.empty(3, 4, dtype=dtype), *operands(dtype, False, True))
    assert calls == []


def refuse(self, mat2, out_dtype, *, out):
    raise RuntimeError("Tunable GEMM is not supported here")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_that_fails_says_what_torch_said(multiply, fake_mm, dtype):
    fake_mm(refuse)
    a, b = operands(dtype, False, False)
    said = "Tunable GEMM is not supported here"
    if dtype == torch.float32:
        b, said = b[:4], r"mat1 and mat2 shapes cannot be multiplied \(3x5 and 4x4\)"
    with pytest.raises(RuntimeError) as raised:
        multiply(torch.empty(3, 4), a, b)
    if KEEPS_TEXT:
        assert raised.match(said)
    else:
        assert raised.match(r"aten::mm|mm.* API call failed at .*; torch printed why on standard error")
