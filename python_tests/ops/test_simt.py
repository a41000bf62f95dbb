"""What only the CUDA kernels have, on the emulator: schedules, sizes around their tiles, labels nobody looked at."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fewshot_ext.ops.margin_softmax
from fewshot_ext import finetune_episodes, margin_cosine_loss

from ..simt import build
from .contract import BACKENDS, Backend, assert_equals_reference, assert_same, evaluate, on_backends
from .margin_softmax_case import draw, margin_cosine, margin_softmax
from .simt_backend import emulated, kernels

CHECKOUT = Path(__file__).resolve().parents[2]
SIMT = tuple(backend for backend in BACKENDS if backend.name.startswith("simt-"))
ON_A_GPU = tuple(backend for backend in BACKENDS if not backend.name.startswith("cpu"))
NAMES = ("features", "weight")
REDUCTIONS = ("none", "mean", "sum")


@pytest.mark.parametrize("seed", range(6))
@on_backends(SIMT)
def test_schedules_give_the_same_bits(backend, seed):
    """Even seeds let all threads advance alike, odd ones some warps far ahead; blocks come in another order each."""
    for reduction in REDUCTIONS:
        problem = draw(70, 70, 40, dtype=torch.float32, margin=-0.3, scale=10.0, reduction=reduction)
        found = []
        with backend.activate():
            for start in (0, 1000 + seed):
                kernels().set_seed(start)
                results, gradients = evaluate(margin_cosine_loss, problem, NAMES)
                found.append({**dict(enumerate(results)), **gradients})
        assert_same(*found)


@pytest.mark.parametrize("blocks", (1, 2, 7))
def test_any_number_of_blocks_gives_the_same_bits(blocks):
    problem = draw(70, 40, 50, dtype=torch.float32, margin=-0.3, scale=10.0)
    found = []
    for count in (blocks, 4):
        with emulated("one_launch", blocks=count, sums=blocks):
            results, gradients = evaluate(margin_cosine_loss, problem, NAMES)
        found.append({**dict(enumerate(results)), **gradients})
    assert_same(*found)


# One less and one more than a tile of 32, than a stage of 64 of the inner dimension, than 256 classes that a warp reads
# together, than four elements; dimensions in many slices, the last one shorter.
SIZES_AROUND_TILES = (
    *((31, 33, 65), (32, 32, 32), (33, 31, 4), (1, 2, 1), (257, 5, 8), (8, 260, 36), (300, 40, 33)),
    *((63, 65, 129), (65, 64, 127), (5, 33, 1100)),
)


@pytest.mark.parametrize("sizes", SIZES_AROUND_TILES, ids=str)
@on_backends(SIMT)
def test_sizes_around_tiles(backend, sizes):
    for case, dtype in ((margin_cosine, torch.float32), (margin_softmax, torch.bfloat16)):
        for reduction in ("mean", "none"):
            problem = draw(*sizes, dtype=dtype, margin=-0.3, scale=5.0, label_smoothing=0.1, reduction=reduction)
            assert_equals_reference(case, backend, problem)


def relative_error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


# Long sums in the products, in each of the gradients, and in both; with terms of one sign tensor cores would drift.
@pytest.mark.parametrize("sizes", ((40, 64, 640), (9, 7, 4096), (2048, 6, 8), (8, 1500, 36)), ids=str)
@pytest.mark.parametrize("one_sign", (False, True))
@pytest.mark.parametrize("sums", (0, 1))
def test_matrix_instructions_err_as_float32_does(sizes, one_sign, sums):
    for case in (margin_cosine, margin_softmax):
        options = {"scale": 10.0 if case is margin_cosine else 1 / sizes[2]}
        problem = draw(*sizes, dtype=torch.float32, margin=-0.3, reduction="sum", **options)
        if one_sign:
            for name in NAMES:
                problem.tensors[name] = problem.tensors[name].abs()
        of_float32 = evaluate(case.reference, problem, NAMES)
        expected = evaluate(case.reference, problem.to(torch.float64), NAMES)
        with emulated("one_launch", sums=sums):
            found = evaluate(case.function, problem, NAMES)
        for name in NAMES:
            bound = 4 * relative_error(of_float32[1][name], expected[1][name])
            assert relative_error(found[1][name], expected[1][name]) <= bound, name
        torch.testing.assert_close(found[0][0].double(), expected[0][0], rtol=1e-6, atol=0)


@on_backends(SIMT)
def test_logits_far_below_zero(backend):
    """The four that the last class is in has others, whose logit of 0 would have an infinite probability."""
    problem = draw(40, 33, 9, dtype=torch.float32, margin=-0.3, scale=64.0)
    problem.tensors["features"].abs_()
    problem.tensors["weight"].abs_().neg_()
    assert_equals_reference(margin_softmax, backend, problem)


# (chunk_samples, chunk_products): one chunk, and several of classes, whose products wait in the weight's gradient or,
# with more samples than dimensions, are computed again; several of samples; several of both.
@pytest.mark.parametrize("chunks", ((4096, 1 << 22), (4096, 1), (13, 1 << 22), (13, 1)), ids=str)
@pytest.mark.parametrize("sizes", ((40, 150, 50), (40, 150, 20)), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16), ids=str)
def test_chunks(dtype, sizes, chunks):
    samples, products = chunks
    chunked = next(backend for backend in SIMT if backend.name == "simt-chunked")
    backend = Backend(
        "simt-chunked",
        activate=lambda: emulated("chunked", chunk_samples=samples, chunk_products=products),
        operand_errors=chunked.operand_errors,
    )
    for case in (margin_cosine, margin_softmax):
        for reduction in ("mean", "none"):
            problem = draw(*sizes, dtype=dtype, margin=-0.3, scale=5.0, label_smoothing=0.1, reduction=reduction)
            assert_equals_reference(case, backend, problem)


# Rows of less than a step of their block: by ones, by some with a rest, all at once. Of one step of a short row's
# block; as many as it takes, and one more; of one step of a long row's block, of three and a class.
@pytest.mark.parametrize(
    "sizes, rows",
    (
        *(((7, 151, 50), 1), ((7, 151, 50), 3), ((7, 151, 50), 100)),
        *(((5, 512, 3), 100), ((4, 2048, 3), 100), ((4, 2049, 3), 100)),
        *(((5, 4096, 3), 100), ((4, 12289, 6), 100)),
    ),
    ids=str,
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16), ids=str)
def test_complete_rows(dtype, sizes, rows):
    one_pass = next(backend for backend in SIMT if backend.name == "simt-one_pass")
    row = (sizes[1] + 31) // 32 * 32 * (8 if dtype == torch.float64 else 4)
    backend = Backend(
        "simt-one_pass",
        activate=lambda: emulated("one_pass", row_bytes=rows * row),
        operand_errors=one_pass.operand_errors,
    )
    for case, smoothing in ((margin_cosine, 0.0), (margin_softmax, 0.1)):
        for reduction in REDUCTIONS:
            problem = draw(
                *sizes,
                dtype=dtype,
                margin=-0.3,
                scale=5.0,
                label_smoothing=smoothing,
                reduction=reduction,
                return_prediction=reduction == "mean",
            )
            problem.tensors["target"][:2] = torch.tensor([0, sizes[1] - 1])
            assert_equals_reference(case, backend, problem)


def _with_tf32(problem, allowed, monkeypatch):
    """Loss and gradients of one launch, as a GPU gives them whose torch allows TF32 or does not."""
    monkeypatch.setattr(fewshot_ext.ops.margin_softmax, "allows_tf32", lambda features: allowed)
    with emulated("one_launch", sums=0):
        (loss,), gradients = evaluate(margin_cosine_loss, problem, NAMES)
    return {"loss": loss, **gradients}


def test_one_launch_rounds_float32_where_tf32_is_allowed(monkeypatch):
    """To the 11 bits of TF32: more than float32's error, and no more than a few of those roundings."""
    problem = draw(70, 40, 90, dtype=torch.float64, margin=-0.3, scale=10.0)
    exact = _with_tf32(problem, False, monkeypatch)
    single = problem.to(torch.float32)
    for allowed, least, most in ((False, 0, 2e-6), (True, 1e-5, 3e-3)):
        found = _with_tf32(single, allowed, monkeypatch)
        for name in NAMES:
            error = (found[name] - exact[name]).norm() / exact[name].norm()
            assert least <= error <= most, (allowed, name, error)
    assert_same(_with_tf32(problem, True, monkeypatch), exact)


@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_backward_pass_goes_by_what_tf32_was_in_the_forward_pass(reduction, monkeypatch):
    """Its logits have to be those that the row's sums were formed from."""
    allow = fewshot_ext.ops.margin_softmax
    problem = draw(40, 20, 90, dtype=torch.float32, margin=-0.3, scale=30.0, reduction=reduction).with_grad(NAMES)
    wanted, gradients = [problem.tensors[name] for name in NAMES], []
    for after in (True, False):
        monkeypatch.setattr(allow, "allows_tf32", lambda features: True)
        with emulated("one_launch", sums=0):
            loss = margin_cosine_loss(**problem.tensors, **problem.options).sum()
            monkeypatch.setattr(allow, "allows_tf32", lambda features, after=after: after)
            gradients.append(dict(zip(NAMES, torch.autograd.grad(loss, wanted), strict=True)))
    assert_same(*gradients)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_types_do_not_depend_on_tf32(dtype, monkeypatch):
    problem = draw(40, 20, 90, dtype=dtype, scale=10.0)
    assert_same(*(_with_tf32(problem, allowed, monkeypatch) for allowed in (False, True)))


@pytest.mark.parametrize("kernel", ("one_pass", "chunked"))
def test_float16_takes_losses_that_all_count_negatively(kernel):
    """Entries are lifted into float16's range by the largest, whatever its sign."""
    problem = draw(6, 40, 20, dtype=torch.float16, scale=5.0, reduction="none")
    found = []
    for upstream in (-1e-4, 1e-4):
        tensors = problem.with_grad(NAMES).tensors
        with emulated(kernel):
            (margin_cosine_loss(**tensors, **problem.options) * upstream).sum().backward()
        found.append([tensors[name].grad for name in NAMES])
    for negative, positive in zip(*found, strict=True):
        assert positive.any() and torch.equal(negative, -positive)


def test_memory_for_complete_rows_is_checked():
    bytes_of = kernels().margin_softmax_bytes
    assert bytes_of("64", 10**6) == 64 << 20
    assert bytes_of("4", 2**20) == 4 << 20
    for text in ("", "-1", "0", "1.5", "64 MiB", "9" * 30):
        with pytest.raises(
            RuntimeError, match="FEWSHOT_EXT_MARGIN_SOFTMAX_MIB: expected a number of MiB .*, got " + text
        ):
            bytes_of(text, 1000)
    with pytest.raises(RuntimeError, match="expected at least 5, which one row of 1048577 classes takes, got 4"):
        bytes_of("4", 2**20 + 1)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_one_pass_of_all_rows_takes_eight_launches(dtype):
    """Besides three products, and with the one that scales the gradients, at any number of classes."""
    problem = draw(70, 5000, 20, dtype=dtype, scale=5.0).with_grad(NAMES)
    with emulated("one_pass", row_bytes=1 << 24):
        before = kernels().launches()
        (2 * margin_cosine_loss(**problem.tensors, **problem.options)).backward()
        after = kernels().launches()
    found = {name: count - before.get(name, 0) for name, count in after.items() if count > before.get(name, 0)}
    assert sum(found.values()) == 8, found


@pytest.mark.parametrize("label", (-1, 5, 2**40, -(2**40)))
@pytest.mark.parametrize("reduction", REDUCTIONS)
@on_backends(ON_A_GPU)
def test_label_out_of_range_poisons_its_row(backend, reduction, label):
    """No host looks at the labels of a GPU unless asked to; what depends on a wrong one is not a number."""
    problem = draw(40, 5, 9, dtype=torch.float32, reduction=reduction, label_smoothing=0.1, return_prediction=True)
    problem.tensors["target"][17] = label
    with backend.activate():
        (loss, prediction), gradients = evaluate(margin_cosine_loss, problem.to(device=backend.device), NAMES)
    if reduction == "none":
        assert loss.isnan().nonzero().tolist() == [[17]]
    else:
        assert loss.isnan()
    assert gradients["features"].isnan().any(dim=1).nonzero().tolist() == [[17]]
    assert gradients["weight"].isnan().all()
    assert ((prediction >= 0) & (prediction < 5)).all()


@on_backends(ON_A_GPU)
def test_label_out_of_range_is_found_where_asked_for(backend):
    tensors = draw(40, 5, 9).to(device=backend.device).tensors
    tensors["target"][17] = 5
    with backend.activate(), pytest.raises(ValueError, match=r"target: expected labels in \[0, 5\).*got 5 at index 17"):
        margin_cosine_loss(**tensors, check=True)


@on_backends(ON_A_GPU)
def test_rows_ignored_by_a_label_out_of_range_count_for_nothing(backend):
    problem = draw(40, 5, 9, dtype=torch.float32, ignore_index=2**40, margin=-0.3, scale=5.0)
    problem.tensors["target"][::3] = 2**40
    with backend.activate():
        (loss,), gradients = evaluate(margin_cosine_loss, problem.to(device=backend.device), NAMES)
    assert math.isfinite(loss) and gradients["weight"].isfinite().all()
    assert (gradients["features"][::3] == 0).all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("factor", (1.0, -0.5, math.inf))
@pytest.mark.parametrize("device", ("cpu", "simt"))
def test_scale_gradients(device, factor, dtype):
    backend = Backend("cpu") if device == "cpu" else SIMT[0]
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    scale = torch.ops.fewshot_ext.scale_gradients_
    for sizes in ((0, 7), (5, 0), (2051, 4096)):
        # From an odd element on, so that not all are aligned for wide accesses.
        first, second = (torch.randn(size + 1, dtype=torch.float64).to(dtype)[1:] for size in sizes)
        expected = [(x.to(accumulate) * factor).to(dtype) for x in (first, second)]
        with backend.activate():
            scale(first, second, torch.tensor(factor, dtype=accumulate))
        torch.testing.assert_close([first, second], expected, rtol=0, atol=0, equal_nan=True)


def test_every_kernel_has_run():
    """On a problem for each: a kernel that nothing here launches would count as tested on the emulator."""
    declared = set()
    for source in (CHECKOUT / "csrc").rglob("*.cuh"):
        declared |= set(re.findall(r"__global__ void (?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(", source.read_text()))
    for backend in SIMT:
        with backend.activate():  # with several chunks of samples and of classes
            loss = margin_cosine_loss(**draw(70, 70, 20, dtype=torch.float32).with_grad(NAMES).tensors)
            (2 * loss).backward()
            for n, m in ((3, 3), (40, 40), (2, 300)):  # by a warp, by a block, without a look at it in double
                masses = torch.full((1, n), 1 / n), torch.full((1, m), 1 / m)
                *_, basis, _ = torch.ops.fewshot_ext.emd(torch.rand(1, n, m), *masses)
                torch.ops.fewshot_ext.emd_flow_backward(torch.ones(1, n, m), basis)
            features, target = torch.rand(1, 4, 3), torch.arange(4)[None] % 2
            finetune_episodes(features, target, features, steps=1)
    launched = {name.rpartition("::")[2] for name in (name.partition("<")[0] for name in kernels().launches())}
    assert declared and launched == declared


@pytest.mark.slow
@pytest.mark.parametrize(
    "chosen",
    [
        "test_simt and (chunks and bfloat16 or complete and bfloat16 and 151 or poison or scale_gradients"
        " or sizes and not (one_pass and (257 or 300)))",
        "test_emd_simt and (not_left_to_the_exact_kernel or ends_of_the_range or poisoned_alone or reads_nothing)",
    ],
    ids=["margin_softmax", "emd"],
)
def test_sanitizers_find_nothing(chosen):
    """Global memory and arithmetic, which the emulator does not follow, on problems for every branch of the kernels."""
    command = [sys.executable, "-m", "pytest", str(Path(__file__).parent), "-k", chosen, "-p", "no:cacheprovider", "-q"]
    done = subprocess.run(command, cwd=CHECKOUT, env=build.sanitizer_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
