"""Cooperative launches: all blocks of a grid at once, waiting for each other in a grid barrier."""

import re
import time

import numpy as np
import pytest

from . import build

SANITIZED = build.sanitized()
# Pairs of schedules: a block goes on until it waits, or others may go on at any point where threads take turns.
SEEDS = (0, 3) if SANITIZED else range(8)


@pytest.mark.parametrize("seed", SEEDS)
class TestRightKernels:
    @pytest.mark.parametrize("blocks", [1, 2, 7, 40])
    def test_every_block_reads_what_all_have_written(self, kernels, rng, seed, blocks):
        x = rng.integers(-9, 9, 32 * blocks).astype(np.float32)
        np.testing.assert_array_equal(kernels.sum_over_grid(x, seed), np.full(blocks, x.sum()))

    @pytest.mark.parametrize("blocks, threads", [(1, 64), (2, 1), (5, 33), (16, 64)])
    def test_many_barriers_in_a_loop(self, kernels, rng, seed, blocks, threads):
        x = rng.integers(-9, 9, blocks * threads).astype(np.int32)
        np.testing.assert_array_equal(kernels.scan_grid(x, threads, seed), x.cumsum())

    def test_each_block_has_shared_memory_of_its_own(self, kernels, rng, seed):
        x = rng.standard_normal(5 * 96).astype(np.float32)
        expected = 3 * x.reshape(5, 96)[:, ::-1].reshape(-1)
        np.testing.assert_allclose(kernels.keep_shared_memory(x, 5, seed), expected, rtol=1e-6)

    def test_blocks_may_spin_until_others_come(self, kernels, seed):
        np.testing.assert_array_equal(kernels.wait_for_all_blocks(6, 40, seed), np.full(6, 6))
        with pytest.raises(kernels.Deadlock):
            kernels.wait_for_all_blocks(6, 40, seed, cooperative=False)


class TestMissingGridBarrier:
    """Global memory is not tracked. What shows the fault is a wrong result, on some schedules or all."""

    def test_before_reading_what_other_blocks_write(self, kernels):
        # Unwritten sums are NaN, and whichever block comes first meets some.
        for seed in SEEDS:
            assert np.isnan(kernels.sum_over_grid_without_barrier(np.ones(32 * 7, np.float32), seed)).any()

    def test_before_writing_what_other_blocks_read(self, kernels):
        x = np.ones(4 * 32, np.int32)
        results = [kernels.scan_grid_with_one_barrier(x, 32, seed) for seed in SEEDS]
        assert any((result != x.cumsum()).any() for result in results)


FAULTS = {
    "wait_for_grid_in_a_plain_launch": (
        "LaunchError",
        r"grid_barrier at cooperative_kernels.cuh:\d+ needs all blocks at once",
    ),
    "leave_before_grid_barrier": (
        "DivergentBarrier",
        r"waits in grid_barrier at .*:\d+ for all threads of the grid, but block \(1, 0, 0\) has exited",
    ),
    "leave_between_grid_barriers": (
        "DivergentBarrier",
        r"block \(1, 0, 0\), .*: waits in grid_barrier at .* but block \(0, 0, 0\) has exited",
    ),
    "leave_block_before_grid_barrier": (
        "DivergentBarrier",
        r"waits in grid_barrier at .* for all threads of the grid, but thread \(33, 0, 0\) has exited",
    ),
    "wait_for_grid_and_for_block": (
        "DivergentBarrier",
        r"waits in grid_barrier at .* but thread \(32, 0, 0\) waits in __syncthreads at",
    ),
    "wait_at_two_grid_barriers": (
        "DivergentBarrier",
        r"waits in grid_barrier at .* but block \(1, 0, 0\) waits in grid_barrier at",
    ),
    "shuffle_with_lanes_at_grid_barrier": ("MissingLane", "for lane 7, but .* waits in grid_barrier at"),
    "spin_while_others_wait": ("Deadlock", "no progress"),
}

# Found by following each access, which the build for AddressSanitizer leaves to that.
TRACKED_FAULTS = {
    "trust_shared_memory_of_another_block": (
        "UninitializedShared",
        r"block \(1, 0, 0\), .*: reads element 0 of kept",
    ),
    "overwrite_behind_grid_barrier": ("MissingBarrier", "element .* of row .* with no __syncthreads between"),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", [*FAULTS, *TRACKED_FAULTS])
def test_a_fault_is_found_and_named(kernels, name, seed):
    if SANITIZED and name in TRACKED_FAULTS:
        pytest.skip("accesses are not followed in this build")
    error, message = (FAULTS | TRACKED_FAULTS)[name]
    with pytest.raises(kernels.KernelError, match=message) as caught:
        getattr(kernels, name)(np.ones(64, np.float32), seed, blocks=2)
    assert re.fullmatch(error, caught.type.__name__)
    place = r"fewshot_ext::\w+(<.*>)?, block \(\d, 0, 0\), thread \(\d+, 0, 0\): "
    assert re.match(place, str(caught.value))
    # What the fault has left behind does not reach the next launch.
    np.testing.assert_array_equal(kernels.sum_over_grid(np.ones(64, np.float32), seed), [64, 64])
    np.testing.assert_array_equal(kernels.reverse(np.arange(64, dtype=np.float32), seed), np.arange(64)[::-1])


@pytest.mark.skipif(SANITIZED, reason="accesses are not followed in this build")
@pytest.mark.parametrize("seed", SEEDS)
def test_a_block_stays_out_of_the_shared_memory_of_another(kernels, seed):
    with pytest.raises(kernels.OutOfBounds, match=r"point_into_another_block, .*writes element -?\d+ of row"):
        kernels.point_into_another_block(seed)


def test_seeds_are_schedules_that_can_be_repeated(kernels):
    orders = [kernels.arrivals(3, 70, seed, cooperative=True) for seed in SEEDS]
    for seed, order in zip(SEEDS, orders, strict=True):
        np.testing.assert_array_equal(np.sort(order), np.arange(210))
        np.testing.assert_array_equal(order, kernels.arrivals(3, 70, seed, cooperative=True))
    assert len({order.tobytes() for order in orders}) == len(orders)


@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_interleave_under_every_other_pair_of_seeds(kernels, seed):
    changes = np.count_nonzero(np.diff(kernels.arrivals(3, 70, seed, cooperative=True) // 70))
    assert (changes > 2) == (seed // 2 % 2 == 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_go_on_in_another_order_after_each_barrier(kernels, seed):
    phases = kernels.order_of_blocks(6, 5, seed)
    np.testing.assert_array_equal(np.sort(phases), np.tile(np.arange(6), (5, 1)))
    assert len({phase.tobytes() for phase in phases}) == 5


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"blocks": 0}, "the grid is empty"),
        ({"blocks": 4225, "threads": 1}, "grid of 4225 blocks, but at most 4224 of 1 threads are resident"),
        ({"blocks": 1064, "threads": 225}, "grid of 1064 blocks, but at most 1056 of 225 threads are resident"),
        ({"blocks": 17, "threads": 1024}, "grid of 17408 threads, but the emulator takes at most 16384"),
        ({"dynamic_shared_bytes": 228 << 10}, "233472 bytes of dynamic shared memory, but .* at most 232448"),
        (
            {"blocks": 133, "dynamic_shared_bytes": 114 << 10},
            "116736 bytes of dynamic shared memory, but .* at most 115712 in so large a grid",
        ),
        # The kernel declares 4096 bytes.
        ({"blocks": 133, "dynamic_shared_bytes": 110 << 10}, "row takes .*: 49152 bytes .* statically, 115712 in all"),
    ],
)
def test_grids_past_the_limits_are_refused(kernels, arguments, message):
    x = np.ones(arguments.pop("threads", 64), np.float32)
    with pytest.raises(kernels.LaunchError, match=f"fewshot_ext::reverse<true>.*: .*{message}"):
        kernels.reverse_together(x, 0, **arguments)


def test_grids_up_to_the_limits_are_taken(kernels):
    for blocks, threads, dynamic_shared_bytes in ((16, 1024, 0), (132, 64, 223 << 10), (133, 64, 109 << 10)):
        x = np.arange(threads, dtype=np.float32)
        y = kernels.reverse_together(x, 0, blocks=blocks, dynamic_shared_bytes=dynamic_shared_bytes)
        np.testing.assert_array_equal(y, x[::-1])


@pytest.mark.skipif(SANITIZED, reason="sanitizers take their time")
@pytest.mark.parametrize("seed", [0, 1])
def test_launches_and_barriers_are_cheap(kernels, seed):
    x = np.ones(16 * 256, np.int32)
    kernels.scan_grid(x, 256, seed)
    begin = time.process_time()
    for _ in range(20):
        kernels.scan_grid(x, 256, seed)
    assert time.process_time() - begin < 1
