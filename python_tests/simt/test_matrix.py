"""Matrix instructions and asynchronous copies: right kernels multiply right, every slip is seen."""

import re

import numpy as np
import pytest

from . import build

SANITIZED = build.sanitized()
# Four in a row: both kinds of schedule, and sums that are rounded to nearest (0, 3) or truncated (1, 2).
SEEDS = range(2 if SANITIZED else 4)
TYPES = ["bfloat16", "float16", "tf32"]
HALVES = TYPES[:2]

LANES = np.arange(32)
GROUP, IN_GROUP = LANES // 4, LANES % 4

# The rows and columns of a lane's elements, from the figures of the PTX ISA. They are written a third time, because the
# header and the emulator could agree on the same mistake.
HALF_LAYOUT = {
    "a": [(GROUP + 8 * down, 2 * IN_GROUP + 8 * right + i) for right in (0, 1) for down in (0, 1) for i in (0, 1)],
    "b": [(2 * IN_GROUP + 8 * down + i, GROUP) for down in (0, 1) for i in (0, 1)],
    "c": [(GROUP + 8 * down, 2 * IN_GROUP + i) for down in (0, 1) for i in (0, 1)],
}
TF32_LAYOUT = {
    "a": [(GROUP, IN_GROUP), (GROUP + 8, IN_GROUP), (GROUP, IN_GROUP + 4), (GROUP + 8, IN_GROUP + 4)],
    "b": [(IN_GROUP, GROUP), (IN_GROUP + 4, GROUP)],
    "c": HALF_LAYOUT["c"],
}


def layout_of(name):
    return TF32_LAYOUT if name == "tf32" else HALF_LAYOUT


def bits_of(x, name):
    """What memory holds for values that the type has; float32 itself for tf32."""
    if name == "bfloat16":
        bits = x.astype(np.float32).view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return x.astype(np.float16).view(np.uint16) if name == "float16" else x.astype(np.float32)


def rounded(x, name):
    """The nearest values of the type, in float64."""
    if name == "bfloat16":
        return (bits_of(x, name).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if name == "float16":
        return x.astype(np.float16).astype(np.float64)
    fraction, exponent = np.frexp(x.astype(np.float64))
    return np.ldexp(np.trunc(fraction * 2**11 + np.copysign(0.5, fraction)), exponent - 11)


def in_registers(matrices, places):
    """[count, rows, columns] as [count, 32, elements]."""
    return np.stack([matrices[:, rows, columns] for rows, columns in places], axis=-1)


def operand(matrices, name, which):
    elements = in_registers(bits_of(matrices, name), layout_of(name)[which])
    return np.ascontiguousarray(elements).view(np.uint32)


def depth_of(name):
    return 8 if name == "tf32" else 16


def integers(rng, *shape):
    """Values of every type, whose sums float32 has exactly in any order."""
    return rng.integers(-8, 9, shape).astype(np.float64)


class TestLayout:
    @pytest.mark.parametrize("name", ["halves", "tf32"])
    def test_the_header_says_what_the_isa_says(self, matrix_kernels, name):
        tables = getattr(matrix_kernels, f"layout_of_{name}")()
        for which, places in layout_of(name).items():
            expected = np.stack([np.stack(place, axis=-1) for place in places], axis=1)
            np.testing.assert_array_equal(tables[which], expected, err_msg=which)

    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("name", TYPES)
    def test_each_pair_of_elements_lands_in_one_accumulator(self, matrix_kernels, name, seed):
        # One element of A is 1 at a time, those of B all differ: D has a row of B there, and nothing elsewhere.
        depth = depth_of(name)
        a = np.eye(16 * depth).reshape(-1, 16, depth)
        b = np.broadcast_to(np.arange(1.0, 8 * depth + 1).reshape(depth, 8), (len(a), depth, 8))
        c = np.broadcast_to(1000 * np.arange(1.0, 129).reshape(16, 8), (len(a), 16, 8))
        multiply = getattr(matrix_kernels, f"multiply_registers_{name}")
        places = layout_of(name)["c"]
        registers = in_registers(c, places).astype(np.float32)
        result = multiply(operand(a, name, "a"), operand(b, name, "b"), registers, seed)
        np.testing.assert_array_equal(result, in_registers(c + a @ b, places))

    @pytest.mark.parametrize("seed", SEEDS)
    def test_where_ldmatrix_brings_each_element(self, matrix_kernels, rng, seed):
        rows = rng.permutation(256).astype(np.uint16).reshape(32, 8)
        matrices = rows.reshape(4, 8, 8)
        plain = [[[m[lane // 4, lane % 4 * 2 + i] for i in (0, 1)] for m in matrices] for lane in LANES]
        np.testing.assert_array_equal(matrix_kernels.load_registers(rows, seed), plain)
        transposed = [[[m[lane % 4 * 2 + i, lane // 4] for i in (0, 1)] for m in matrices] for lane in LANES]
        np.testing.assert_array_equal(matrix_kernels.load_registers_transposed(rows, seed), transposed)


@pytest.mark.parametrize("seed", SEEDS)
class TestRightKernels:
    @pytest.mark.parametrize("name", TYPES)
    def test_product_by_the_layout(self, matrix_kernels, rng, name, seed):
        a, b, c = integers(rng, 16, 48), integers(rng, 48, 8), integers(rng, 16, 8)
        multiply = getattr(matrix_kernels, f"multiply_by_layout_{name}")
        result = multiply(bits_of(a, name), bits_of(b, name), c.astype(np.float32), seed)
        np.testing.assert_array_equal(result, c + a @ b)

    @pytest.mark.parametrize("name", TYPES)
    def test_factors_are_those_of_the_type_and_sums_are_float32(self, matrix_kernels, rng, name, seed):
        a, b = rng.standard_normal((16, 64)), rng.standard_normal((64, 8))
        multiply = getattr(matrix_kernels, f"multiply_by_layout_{name}")
        result = multiply(bits_of(a, name), bits_of(b, name), np.zeros((16, 8), np.float32), seed)
        a, b = rounded(a.astype(np.float32), name), rounded(b.astype(np.float32), name)
        assert np.all(np.abs(result - a @ b) < 2e-6 * (np.abs(a) @ np.abs(b)))

    @pytest.mark.parametrize(
        "name, stored",
        [
            (name, stored)
            for name in HALVES
            for stored in ("rows_columns", "rows_rows", "columns_rows", "columns_columns")
        ]
        + [("tf32", "rows_columns")],
    )
    def test_product_through_ldmatrix(self, matrix_kernels, rng, name, stored, seed):
        a, b = integers(rng, 16, 48), integers(rng, 48, 16)
        of_a, of_b = stored.split("_")
        multiply = getattr(matrix_kernels, f"multiply_loaded_{stored}_{name}")
        memory = (bits_of(x.T if way == "columns" else x, name) for x, way in ((a, of_a), (b, of_b)))
        result = multiply(*map(np.ascontiguousarray, memory), seed)
        np.testing.assert_array_equal(result, a @ b)

    # Zeros beyond the depth: what memory holds there is NaN.
    @pytest.mark.parametrize("depth", [16, 7, 8, 41, 1000])
    def test_pipeline_of_asynchronous_copies(self, matrix_kernels, rng, depth, seed):
        a, b = integers(rng, 32, depth), integers(rng, 16, depth)
        np.testing.assert_array_equal(pipelined(matrix_kernels.multiply_pipelined, a, b, seed), a @ b.T)

    def test_copies_that_are_waited_for(self, matrix_kernels, rng, seed):
        x = rng.standard_normal(64).astype(np.float32)
        np.testing.assert_array_equal(matrix_kernels.mirror_async(x, seed, blocks=3), x[::-1])


def pipelined(multiply, a, b, seed):
    stride = -(-a.shape[1] // 8) * 8 + 8
    memory = [np.full((len(x), stride), np.nan) for x in (a, b)]
    for padded, x in zip(memory, (a, b), strict=True):
        padded[:, : x.shape[1]] = x
    return multiply(*(bits_of(x, "bfloat16") for x in memory), a.shape[1], seed)


@pytest.mark.parametrize(
    "value, bits",
    [
        (1.0, 0x3F800000),
        (1 + 2**-11, 0x3F802000),  # ties go away from zero
        (-1 - 2**-11, 0xBF802000),
        (1 + 2**-11 - 2**-23, 0x3F800000),
        (2 - 2**-23, 0x40000000),  # up into the exponent
        (2.0**128 - 2**104, 0x7F800000),
        (float("inf"), 0x7F800000),
        (2.0**-149, 0),
        (-0.0, 0x80000000),
    ],
)
def test_rounding_to_tf32(matrix_kernels, value, bits):
    assert matrix_kernels.round_to_tf32(value) == bits


def relative_error(result, a, b):
    exact = a.astype(np.float64) @ b.astype(np.float64)
    return np.max(np.abs(result - exact) / (np.abs(a).astype(np.float64) @ np.abs(b)))


def fused_multiply_add(a, b):
    """As a thread computes it in float32. float64 has the products, and rounds the sums too finely to matter."""
    sums = np.zeros((a.shape[0], b.shape[1]), np.float32)
    for k in range(a.shape[1]):
        sums = (sums + a[:, k, None].astype(np.float64) * b[k].astype(np.float64)).astype(np.float32)
    return sums


class TestThreefoldTf32:
    """float32 factors in three products: as exact as float32, if nothing is left out."""

    @staticmethod
    def errors(kernel, seed, spread):
        rng = np.random.default_rng(7)
        worst = 0, 0
        for _ in range(4):
            a, b = (
                (rng.standard_normal(shape) * 2.0 ** rng.integers(-spread, spread + 1, shape)).astype(np.float32)
                for shape in ((16, 64), (64, 8))
            )
            mine = relative_error(kernel(a, b, np.zeros((16, 8), np.float32), seed), a, b)
            worst = max(worst[0], mine), max(worst[1], relative_error(fused_multiply_add(a, b), a, b))
        return worst

    @pytest.mark.parametrize("spread", [0, 20])
    @pytest.mark.parametrize("seed", SEEDS)
    def test_error_is_that_of_float32(self, matrix_kernels, seed, spread):
        mine, of_float32 = self.errors(matrix_kernels.multiply_threefold, seed, spread)
        assert mine < (2 if seed % 4 in (0, 3) else 5) * of_float32

    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize(
        "name", ["threefold_without_small_terms", "threefold_without_rounding", "multiply_unrounded"]
    )
    def test_a_slip_shows_in_the_error(self, matrix_kernels, name, seed):
        mine, of_float32 = self.errors(getattr(matrix_kernels, name), seed, 0)
        assert mine > 500 * of_float32

    @pytest.mark.parametrize("seed", SEEDS)
    def test_long_sums_of_one_sign_have_to_be_added_in_slabs(self, matrix_kernels, rng, seed):
        a, b = (rng.uniform(0, 1, shape).astype(np.float32) for shape in ((16, 1024), (1024, 8)))
        of_float32 = relative_error(fused_multiply_add(a, b), a, b)
        zeros = np.zeros((16, 8), np.float32)
        in_slabs = relative_error(matrix_kernels.multiply_threefold_in_slabs(a, b, zeros, seed), a, b)
        at_once = relative_error(matrix_kernels.multiply_threefold(a, b, zeros, seed), a, b)
        assert in_slabs < 2 * of_float32
        assert (at_once > 5 * of_float32) == (seed % 4 in (1, 2))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_missing_rounding_shows_where_one_product_of_tf32_is_meant(matrix_kernels, rng, seed):
    a, b = (rng.uniform(1, 2, shape).astype(np.float32) for shape in ((16, 64), (64, 8)))
    expected, zeros = rounded(a, "tf32") @ rounded(b, "tf32"), np.zeros((16, 8), np.float32)
    np.testing.assert_allclose(matrix_kernels.multiply_by_layout_tf32(a, b, zeros, seed), expected, rtol=4e-6)
    assert np.all(matrix_kernels.multiply_unrounded(a, b, zeros, seed) < expected * (1 - 2e-4))


# What ends in wrong numbers, and no error: a test has to compare them.
WRONG = [
    (f"{slip}_{name}", False)
    for name in TYPES
    for slip in ("swapped_registers_of_a", "swapped_registers_of_b", "exchanged_factors", "transposed_result")
]
WRONG += [(f"exchanged_elements_{name}", False) for name in HALVES]
WRONG += [(f"row_of_the_other_factor_{name}", True) for name in TYPES]
WRONG += [(f"plain_for_transposed_{name}", True) for name in HALVES]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name, loaded", WRONG)
def test_a_wrong_fragment_shows_in_the_result(matrix_kernels, rng, name, loaded, seed):
    kind = name.rsplit("_", 1)[1]
    a, b = integers(rng, 16, 16), integers(rng, 16, 16 if loaded else 8)
    if loaded:
        stored = (a.T, b) if name.startswith("plain") else (a, b.T)
        result = getattr(matrix_kernels, name)(*(np.ascontiguousarray(bits_of(x, kind)) for x in stored), seed)
    else:
        c = np.zeros((16, 8), np.float32)
        result = getattr(matrix_kernels, name)(bits_of(a, kind), bits_of(b, kind), c, seed)
    assert not np.array_equal(result, a @ b)


def fault_of_loads(name):
    at = r"ldmatrix_x4{} at matrix_kernels.cuh:\d+"
    return {
        f"lane_missing_{name}": ("MissingLane", at.format(r"\(0xffffffff\)") + " for lane 7, but .* has exited"),
        f"misaligned_rows_{name}": ("Misaligned", at.format("") + r" .* \d+ bytes off its alignment of 16"),
        f"load_from_global_memory_{name}": ("OutOfBounds", at.format("") + " .* not in shared memory"),
    }


def tracked_fault_of_loads(name):
    return {
        f"row_past_the_tile_{name}": ("OutOfBounds|UninitializedShared|MissingBarrier", "reads element .* of tiles"),
        f"load_without_barrier_{name}": (
            "MissingBarrier|UninitializedShared",
            "reads element .* of tiles .* (with no __syncwarp between|has written so far)",
        ),
        f"overwritten_without_barrier_{name}": ("MissingBarrier", "element .* of tiles .* with no __syncwarp between"),
    }


FAULTS_OF_LOADS = {error: found for name in TYPES for error, found in fault_of_loads(name).items()}
TRACKED_FAULTS_OF_LOADS = {error: found for name in TYPES for error, found in tracked_fault_of_loads(name).items()}
TRACKED_FAULTS_OF_PIPELINES = {
    "pipelined_with_two_pending": ("PendingCopy", "reads element .* of stages .* where a cp_async of thread"),
    "pipelined_without_barrier_before": (
        "MissingBarrier|PendingCopy|UninitializedShared",
        "reads element .* of stages .*",
    ),
    "pipelined_without_barrier_after": (
        "MissingBarrier|PendingCopy",
        "(copies to|reads) element .* of stages .*(with no __sync|has not waited)",
    ),
}

MISALIGNED = r"cp_async at faulty_copies.cuh:\d+ is given an address {} bytes off its alignment of 16"
FAULTS = {
    "multiply_at_two_places": ("MissingLane", r"mma_m16n8k16\(0xffffffff\) at .*, but .* waits in mma_m16n8k16"),
    "multiply_without_a_lane": ("MissingLane", r"mma_m16n8k8\(0xffffffff\) at .* for lane 7, but .* has exited"),
    "exit_before_the_wait": (
        "PendingCopy",
        r"thread \(\d*[02468], 0, 0\): exits and has not waited for its cp_async at faulty_copies.cuh:\d+",
    ),
    "copy_to_a_misaligned_address": ("Misaligned", MISALIGNED.format(8)),
    "copy_from_a_misaligned_address": ("Misaligned", MISALIGNED.format(4)),
    "copy_to_global_memory": ("OutOfBounds", "cp_async at .* not in shared memory"),
    "copy_too_many_bytes": ("OutOfBounds", "is to read 20 of 16 bytes"),
}
PENDING = r"where a cp_async of thread \(\d+, 0, 0\) at faulty_copies.cuh:\d+ is to write, for which it has not waited"
TRACKED_FAULTS = {
    "load_ones_own_rows_without_barrier": (
        "MissingBarrier",
        "reads .* of rows .*, written by .* no __syncwarp between",
    ),
    "load_one_row_too_far": ("OutOfBounds", r"thread \(45, 0, 0\): reads element 77 of rows \(byte 1232 of 1024\)"),
    "wait_for_all_but_the_last": ("PendingCopy", f"reads .* of fours .*{PENDING}"),
    "wait_without_commit": ("PendingCopy", f"reads .* of fours .*{PENDING}"),
    "read_before_the_wait": ("PendingCopy", f"reads .* of fours .*{PENDING}"),
    "read_ones_own_before_the_wait": ("PendingCopy", f"reads .* of fours .*{PENDING}"),
    "wait_without_barrier": ("MissingBarrier", "reads .* of fours .*, written by .* with no __syncwarp between"),
    "write_before_the_wait": ("PendingCopy", rf"writes .* of fours \(byte 36 of 4096\), {PENDING}"),
    "copy_twice": ("PendingCopy", f"copies to .* of fours .*{PENDING}"),
    "copy_over_what_is_read": (
        "MissingBarrier|PendingCopy",
        "(copies to .*, read by .* no __sync|reads .*, (written by .* no __sync|where a cp_async .* not waited))",
    ),
    "copy_past_the_array": ("OutOfBounds", r"copies to element 1 of fours \(byte \d+ of 4096\), out of bounds"),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "name",
    [*FAULTS, *FAULTS_OF_LOADS]
    + [
        pytest.param(name, marks=pytest.mark.skipif(SANITIZED, reason="accesses are not followed in this build"))
        for name in (*TRACKED_FAULTS, *TRACKED_FAULTS_OF_LOADS, *TRACKED_FAULTS_OF_PIPELINES)
    ],
)
def test_a_fault_is_found_and_named(matrix_kernels, rng, name, seed):
    tables = (FAULTS, FAULTS_OF_LOADS, TRACKED_FAULTS, TRACKED_FAULTS_OF_LOADS, TRACKED_FAULTS_OF_PIPELINES)
    error, message = next(table[name] for table in tables if name in table)
    kernel = getattr(matrix_kernels, name)
    with pytest.raises(matrix_kernels.KernelError, match=message) as caught:
        if name in TRACKED_FAULTS_OF_PIPELINES:
            pipelined(kernel, integers(rng, 32, 96), integers(rng, 16, 96), seed)
        elif name in FAULTS or name in TRACKED_FAULTS:
            kernel(np.ones(64, np.float32), seed, blocks=2)
        else:
            kind = name.rsplit("_", 1)[1]
            kernel(bits_of(integers(rng, 16, 48), kind), bits_of(integers(rng, 16, 48), kind), seed)
    assert re.fullmatch(error, caught.type.__name__)
    assert re.search(r"fewshot_ext::.*, block \(\d, 0, 0\), thread \(\d+, 0, 0\): ", str(caught.value))
    # What the fault has left behind does not reach the next launch.
    x = np.arange(64, dtype=np.float32)
    np.testing.assert_array_equal(matrix_kernels.mirror_async(x, seed), x[::-1])


def test_copies_run_early_on_some_seeds_and_late_on_others(matrix_kernels):
    """What a thread copies may change until it has waited, and then which value arrives is chance."""
    results = {matrix_kernels.copy_what_changes(seed) for seed in range(20)}
    assert results == {1.0, 2.0}
    assert [matrix_kernels.copy_what_changes(seed) for seed in (0, 1)] == [
        matrix_kernels.copy_what_changes(seed) for seed in (0, 1)
    ]


@pytest.mark.parametrize("name", TYPES)
def test_the_order_and_the_rounding_of_sums_depend_on_the_seed(matrix_kernels, rng, name):
    a, b = (bits_of(rng.standard_normal(shape), name) for shape in ((16, 64), (64, 8)))
    multiply = getattr(matrix_kernels, f"multiply_by_layout_{name}")
    results = [multiply(a, b, np.zeros((16, 8), np.float32), seed) for seed in (0, 3, 1, 2)]
    assert len({result.tobytes() for result in results}) == 3  # what is cut off does not depend on the order
    np.testing.assert_array_equal(results[2], results[3])
