"""The emulator itself: right kernels give right results on every schedule, each kind of fault is found."""

import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from . import build

SANITIZED = build.sanitized()
SEEDS = range(2 if SANITIZED else 6)


def bfloat16_bits(x):
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def softmax(x):
    weights = np.exp(x - x.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("seed", SEEDS)
class TestRightKernels:
    @pytest.mark.parametrize("columns", [1, 31, 129, 1000])
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_block_reduction(self, kernels, rng, seed, columns, dtype):
        x = rng.standard_normal((7, columns)).astype(dtype)
        np.testing.assert_allclose(kernels.sum_rows(x, 256, seed), x.sum(1), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("columns", [1, 5, 32, 151])
    def test_softmax_of_a_row_by_a_warp(self, kernels, rng, seed, columns):
        x = 5 * rng.standard_normal((9, columns)).astype(np.float32)
        np.testing.assert_allclose(kernels.softmax_float32(x, seed), softmax(x), rtol=1e-5, atol=1e-7)

    def test_softmax_of_half_types(self, kernels, rng, seed):
        x = rng.standard_normal((9, 40)).astype(np.float16)
        result = kernels.softmax_float16(x.view(np.uint16), seed).view(np.float16)
        np.testing.assert_allclose(result, softmax(x.astype(np.float32)), rtol=2e-3)
        bits = bfloat16_bits(x)
        rounded = (bits.astype(np.uint32) << 16).view(np.float32)
        result = (kernels.softmax_bfloat16(bits, seed).astype(np.uint32) << 16).view(np.float32)
        np.testing.assert_allclose(result, softmax(rounded), rtol=2e-2)

    @pytest.mark.parametrize("shape", [(1, 1), (32, 32), (129, 65)])
    def test_transpose_through_shared_memory(self, kernels, rng, seed, shape):
        x = rng.standard_normal(shape).astype(np.float32)
        np.testing.assert_array_equal(kernels.transpose(x, seed), x.T)

    def test_histogram_with_atomics(self, kernels, rng, seed):
        x = rng.integers(0, 37, 5000).astype(np.int32)
        np.testing.assert_array_equal(kernels.histogram(x, 37, seed), np.bincount(x, minlength=37))

    @pytest.mark.parametrize("shape", [(1, 1, 1), (32, 32, 8), (45, 70, 19)])
    def test_register_tiled_matmul(self, kernels, rng, seed, shape):
        rows, columns, depth = shape
        a = rng.standard_normal((rows, depth)).astype(np.float32)
        b = rng.standard_normal((columns, depth)).astype(np.float32)
        np.testing.assert_allclose(kernels.matmul(a, b, seed), a @ b.T, rtol=1e-4, atol=1e-4)

    def test_warp_intrinsics(self, kernels, rng, seed):
        x = rng.integers(0, 9, 64).astype(np.int32)
        result = kernels.warp_intrinsics(x, seed).reshape(-1, 2, 32)
        lanes = np.arange(32)

        def groups(width):
            return lanes // width * width

        for warp in range(2):
            mine = x[32 * warp : 32 * warp + 32]
            halves = mine.reshape(2, 16)
            up, down, xor = lanes - 2, lanes + 3, lanes ^ 1
            expected = [
                np.full(32, mine[5]),
                mine[groups(8) + (lanes + 3) % 8],
                mine[np.where(up >= 0, up, lanes)],
                mine[np.where(down < groups(16) + 16, down, lanes)],
                mine[xor],
                mine[lanes ^ 7],
                np.full(32, np.sum((mine > 4) * (1 << lanes.astype(np.int64)))).astype(np.int32),
                np.repeat((halves == 0).any(1), 16),
                np.repeat((halves > 0).all(1), 16),
                [np.sum((mine == value) * (1 << lanes.astype(np.int64))).astype(np.int32) for value in mine],
                np.repeat(halves.sum(1), 16),
                np.full(32, mine.max()),
            ]
            np.testing.assert_array_equal(result[:, warp], expected)

    @pytest.mark.parametrize("name", ["float", "double", "int", "long", "long_long"])
    def test_shuffles_of_every_type(self, kernels, seed, name):
        dtype = {"float": np.float32, "double": np.float64, "int": np.int32}.get(name, np.int64)
        # Wider than 32 bits where the type is.
        x = (np.arange(32) * (2.0**40 + 1 if np.dtype(dtype).itemsize == 8 else 3)).astype(dtype)
        lanes = np.arange(32)
        sources = [
            np.full(32, 5),
            np.where(lanes < 2, lanes, lanes - 2),
            np.where(lanes < 29, lanes + 3, lanes),
            lanes ^ 1,
        ]
        result = getattr(kernels, f"warp_intrinsics_{name}")(x, seed)
        np.testing.assert_array_equal(result, x[np.array(sources)])

    def test_vector_types(self, kernels, rng, seed):
        x = rng.standard_normal(4 * 40).astype(np.float32)
        np.testing.assert_array_equal(kernels.vectors(x, seed).reshape(-1, 4), x.reshape(-1, 4)[:, ::-1])

    def test_counters(self, kernels, seed):
        np.testing.assert_array_equal(kernels.counters(57, seed), [114, 114 % 10, 0, 56])

    def test_synchronized_exchange_through_shared_memory(self, kernels, rng, seed):
        x = rng.standard_normal(96).astype(np.float32)
        np.testing.assert_array_equal(kernels.reverse(x, seed, blocks=3), x[::-1])
        np.testing.assert_array_equal(kernels.reverse_in_warp(x, seed), x.reshape(3, 32)[:, ::-1].reshape(-1))

    def test_neighboring_bytes_and_parts_of_a_warp(self, kernels, rng, seed):
        x = rng.integers(0, 255, 64, dtype=np.uint8)
        expected = 1 + x.reshape(2, 32)[:, ::-1].reshape(-1)
        np.testing.assert_array_equal(kernels.swap_bytes(x, seed), expected)


def test_math_functions(kernels, rng):
    x = rng.uniform(0.1, 3, 32).astype(np.float32)
    wide = x.astype(np.float64)

    def in_both_types(function):
        return [function(x), function(wide)]

    one = np.float32(1)
    expected = [
        *in_both_types(np.exp),
        *in_both_types(np.log1p),
        *in_both_types(lambda x: x * x + 1),
        *in_both_types(lambda x: 1 / np.sqrt(x)),
        np.minimum(x, one),
        np.maximum(wide, 1),
        2 * np.exp(x),
        np.log1p(x),
        2 * x + one,
        np.ones(32, np.float32),
        x,
        np.ones(32),
        -x,
        x,
        np.full(32, 2),
        np.full(32, 7),
    ]
    for row, (mine, theirs) in enumerate(zip(kernels.math_functions(x, 0), expected, strict=True)):
        tolerance = 1e-6 if theirs.dtype == np.float32 else 1e-14
        np.testing.assert_allclose(mine, theirs, rtol=tolerance, err_msg=f"row {row}")


FAULTS = {
    "leave_before_barrier": ("DivergentBarrier", "waits in __syncthreads at .* has exited"),
    "wait_at_two_barriers": ("DivergentBarrier", "waits in __syncthreads at .* waits in __syncthreads at"),
    "leave_before_shuffle": (
        "MissingLane",
        r"__shfl_xor_sync\(0xffffffff\) .* for lane 7, but .* has exited",
    ),
    "wait_elsewhere_than_the_shuffle": ("MissingLane", "for lane 7, but .* waits in __syncthreads at"),
    "differ_in_masks": ("MissingLane", r"__ballot_sync\(0xffff.* for lane 16, but|0x.*, but .*0x"),
    "differ_in_intrinsics": ("MissingLane", "whom the mask names, waits in __(any|shfl_xor)_sync"),
    "leave_oneself_out": ("MissingLane", r"__any_sync\(0x0000ffff\) .* leaves out this lane"),
    "read_outside_the_mask": ("MissingLane", "reads lane 20, which its mask leaves out"),
    "trust_active_mask": ("MissingLane", "its mask leaves out"),
    "wait_for_nobody": ("Deadlock", "no progress"),
    "give_up": ("Trap", r"thread \(3, 0, 0\): __trap at faulty_kernels.cuh"),
    "break_an_assertion": (
        "Trap",
        r"thread \(5, 0, 0\): assert\(x\[threadIdx.x\] == 1 && threadIdx.x != 5\) at faulty_kernels.cuh:\d+",
    ),
    "declare_too_much": ("LaunchError", "row takes the block past its limits"),
}

# Found by following each access, which the build for AddressSanitizer leaves to that.
TRACKED_FAULTS = {
    "reverse_twice": ("MissingBarrier", "element .* of row .* with no __syncthreads between"),
    "reverse_in_warp_without_barrier": (
        "MissingBarrier|UninitializedShared",
        "element .* of row .* (with no __syncwarp between|has written so far)",
    ),
    "reverse_without_barrier": (
        "MissingBarrier|UninitializedShared",
        "element .* of row .* (with no __syncthreads between|has written so far)",
    ),
    "synchronize_half_warps": (
        "MissingBarrier|UninitializedShared",
        "element .* of row .* (with no __syncwarp between|has written so far)",
    ),
    "mix_atomic_and_plain": ("MissingBarrier", "element 0 of sum"),
    "index_past_the_array": ("OutOfBounds", r"writes element 64 of row \(byte 256 of 256\)"),
    "index_before_the_array": ("OutOfBounds", "writes element -[123] of row"),
    "leave_the_row_of_a_tile": (
        "OutOfBounds",
        r"index \d+ of .*float \[33\].* at faulty_kernels.cuh:\d+, out",
    ),
    "read_fours_of_floats": ("Misaligned", r"access to .*float4.* at faulty_kernels.cuh:\d+, 4 bytes off"),
    "read_fours_from_the_next_float_on": (
        "Misaligned",
        r"access to .*float4.* at faulty_kernels.cuh:\d+, \d+ bytes off",
    ),
    "ask_for_too_little": ("OutOfBounds", "of dynamic shared memory .byte .* of 80"),
    "read_before_writing": (
        "UninitializedShared",
        r"thread \(5, 0, 0\): reads element 5 of row \(byte 20 of 4096\), which no thread",
    ),
    "keep_between_blocks": ("UninitializedShared", r"block \(1, 0, 0\), .*: reads element 0 of kept"),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", [*FAULTS, *TRACKED_FAULTS])
def test_a_fault_is_found_and_named(kernels, name, seed):
    if SANITIZED and name in TRACKED_FAULTS:
        pytest.skip("accesses are not followed in this build")
    error, message = (FAULTS | TRACKED_FAULTS)[name]
    with pytest.raises(kernels.KernelError, match=message) as caught:
        getattr(kernels, name)(np.ones(64, np.float32), seed, blocks=2, dynamic_shared_bytes=80)
    assert re.fullmatch(error, caught.type.__name__)
    place = r"fewshot_ext::\w+(<.*>)?, block \(\d, 0, 0\), thread \(\d+, 0, 0\): "
    assert re.match(place, str(caught.value))


def test_seeds_are_schedules_that_can_be_repeated(kernels):
    orders = [kernels.arrivals(3, 70, seed) for seed in SEEDS]
    for seed, order in zip(SEEDS, orders, strict=True):
        np.testing.assert_array_equal(np.sort(order), np.arange(210))
        np.testing.assert_array_equal(order, kernels.arrivals(3, 70, seed))
    assert len({order.tobytes() for order in orders}) == len(orders)
    # Under an odd seed one warp of a block comes before the next.
    warps = orders[1] // 70 * 3 + orders[1] % 70 // 32
    assert np.count_nonzero(np.diff(warps)) == 8


def test_launches_past_the_limits_are_refused(kernels):
    x = np.ones(64, np.float32)
    for arguments in ({"blocks": 0}, {"dynamic_shared_bytes": 228 << 10}):
        with pytest.raises(kernels.LaunchError, match="fewshot_ext::reverse"):
            kernels.reverse(x, 0, **arguments)
    with pytest.raises(kernels.LaunchError, match="1 to 1024 threads"):
        kernels.reverse(np.ones(1025, np.float32), 0)


def test_a_fault_leaves_the_emulator_usable(kernels, rng):
    x = rng.standard_normal(64).astype(np.float32)
    with pytest.raises(kernels.DivergentBarrier):
        kernels.leave_before_barrier(x, 0)
    np.testing.assert_array_equal(kernels.reverse(x, 0), x[::-1])


@pytest.mark.skipif(SANITIZED, reason="sanitizers take their time")
@pytest.mark.parametrize("seed", [0, 1])
def test_barriers_are_cheap(kernels, seed):
    begin = time.process_time()
    assert kernels.barriers(100, 256, 50, seed) == 100 * 25
    assert time.process_time() - begin < 1


@pytest.mark.skipif(SANITIZED, reason="it runs the tests of this folder once more")
@pytest.mark.slow
def test_under_address_and_undefined_behavior_sanitizers():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--confcutdir",
        build.HERE,
        build.HERE,
    ]
    done = subprocess.run(
        command, cwd=build.CHECKOUT, env=build.sanitizer_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(SANITIZED, reason="it starts a sanitized process of its own")
@pytest.mark.slow
@pytest.mark.parametrize(
    "call, report",
    [
        ("write_past_global_memory(x, 0)", "AddressSanitizer: heap-buffer-overflow"),
        ("index_past_the_array(x, 0)", "AddressSanitizer: use-after-poison|index 64 out of bounds"),
    ],
)
def test_sanitizers_see_a_kernel_leave_its_memory(call, report):
    script = f"""
import numpy as np
from simt import build
kernels = build.load("simt_kernels", build.HERE / "bindings.cpp")
x = np.ones(64, np.float32)
kernels.{call}
"""
    environment = build.sanitizer_environment() | {"PYTHONPATH": str(build.HERE.parent)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert re.search(report, done.stderr)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.skipif(SANITIZED, reason="the compiler is not under test")
def test_the_same_source_is_cuda(tmp_path):
    command = ["nvcc", "-std=c++20", "-arch=sm_90", "-Werror=all-warnings", f"-I{build.CHECKOUT / 'csrc'}"]
    command += ["-c", str(build.HERE / "kernels.cu"), "-o", str(tmp_path / "kernels.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
