"""What is particular to the margin softmax losses; test_contract.py has what every operator promises."""

import functools
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import fewshot_ext
from fewshot_ext import margin_cosine_loss, margin_softmax_loss
from fewshot_ext.ops.margin_softmax import allows_tf32

from .contract import (
    BACKENDS,
    DTYPES,
    LARGE_BACKENDS,
    Problem,
    assert_equals_reference,
    assert_within,
    evaluate,
    on_backends,
    threads,
)
from .margin_softmax_case import (
    SPECIAL_ROWS,
    draw,
    logit_error,
    margin_cosine,
    margin_softmax,
    with_special_rows,
)

LOSSES = pytest.mark.parametrize("case", (margin_cosine, margin_softmax), ids=lambda case: case.name)
NAMES = ("features", "weight")


def row_losses(case, problem):
    return case.function(**problem.with_options(reduction="none").arguments())


@LOSSES
@pytest.mark.parametrize("margin", (-0.5, -0.1, 0.2, 0.6))
def test_margin_identity(case, margin):
    """L_m = log1p(e^{bm} expm1(L_0)): a margin's loss from the plain one, an oracle without logits."""
    problem = draw(33, 17, 31, scale=5.0, reduction="none", margin=0.0)
    plain, ones = row_losses(case, problem), [torch.ones(33, dtype=torch.float64)]
    plain_error = case.bounds(problem, ones).results[0]
    growth = math.exp(5.0 * margin)
    expected = torch.log1p(growth * torch.expm1(plain))
    slope = growth * plain.exp() / (1 + growth * torch.expm1(plain))

    with_margin = problem.with_options(margin=margin)
    bound = case.bounds(with_margin, ones).results[0] + slope * plain_error
    assert ((row_losses(case, with_margin) - expected).abs() <= bound).all()


@LOSSES
def test_loss_grows_with_the_margin(case):
    problem = draw(33, 17, 31, scale=5.0)
    losses = [row_losses(case, problem.with_options(margin=margin)) for margin in (-1, -0.3, 0, 0.3, 1)]
    assert (torch.stack(losses).diff(dim=0) > 0).all()


@pytest.mark.parametrize("margin", (-1.0, 0.0, 1.0))
def test_gradient_pulls_to_the_target_and_pushes_from_the_others(margin):
    # With the identity as weight the gradient to the features is the one to the scores.
    features = draw(9, 6, 6).tensors["features"].requires_grad_()
    target = torch.arange(9) % 6
    loss = margin_softmax_loss(features, torch.eye(6, dtype=torch.float64), target, margin, 2.0, reduction="sum")
    loss.backward()
    is_target = F.one_hot(target, 6).bool()
    assert (features.grad[is_target] < 0).all() and (features.grad[~is_target] > 0).all()
    # The sum cancels 6 terms, none above the scale.
    assert features.grad.sum(dim=1).abs().max() < 6 * 2.0 * torch.finfo(torch.float64).eps


@on_backends(BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_cosine_is_invariant_to_the_length_of_vectors(backend, dtype):
    """Exactly, since powers of 2 scale without rounding; gradients shrink as vectors grow."""
    problem = draw(33, 17, 31, dtype=dtype, margin=-0.3, scale=10.0).to(device=backend.device)
    features, weight, target = problem.tensors.values()
    factors = [2.0 ** (torch.arange(len(rows), device=rows.device) % 9 - 4.0).to(dtype) for rows in (features, weight)]
    scaled = Problem(
        {
            "features": features * factors[0][:, None],
            "weight": weight * factors[1][:, None],
            "target": target,
        },
        problem.options,
    )
    with backend.activate():
        (loss,), gradients = evaluate(margin_cosine_loss, problem, NAMES)
        (scaled_loss,), scaled_gradients = evaluate(margin_cosine_loss, scaled, NAMES)
    assert torch.equal(loss, scaled_loss)
    for name, factor in zip(NAMES, factors, strict=True):
        torch.testing.assert_close(scaled_gradients[name] * factor[:, None], gradients[name])


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_cosine_gradient_is_orthogonal_to_its_vector(dtype):
    problem = draw(33, 17, 129, dtype=dtype, margin=-0.3, scale=10.0)
    _, gradients = evaluate(margin_cosine_loss, problem, NAMES)
    bounds = margin_cosine.bounds(problem, [torch.ones((), dtype=torch.float64)]).gradients
    for name, gradient in gradients.items():
        rows = problem.tensors[name].double()
        rounding = bounds[name] + gradient.double().abs() * torch.finfo(dtype).eps
        assert ((gradient.double() * rows).sum(dim=1).abs() <= (rounding * rows.abs()).sum(dim=1)).all()


@LOSSES
def test_order_of_classes_does_not_matter(case):
    problem = draw(33, 151, 31, margin=-0.3, scale=5.0, label_smoothing=0.1, return_prediction=True)
    order = torch.randperm(151, generator=torch.Generator().manual_seed(0))
    place = order.argsort()  # of an old class among the new ones
    tensors = problem.tensors
    shuffled = Problem(
        {**tensors, "weight": tensors["weight"][order], "target": place[tensors["target"]]}, problem.options
    )
    (loss, prediction), gradients = evaluate(case.function, problem, NAMES)
    (shuffled_loss, shuffled_prediction), shuffled_gradients = evaluate(case.function, shuffled, NAMES)
    torch.testing.assert_close(shuffled_loss, loss)
    assert torch.equal(shuffled_prediction, place[prediction])
    torch.testing.assert_close(shuffled_gradients["weight"], gradients["weight"][order])
    torch.testing.assert_close(shuffled_gradients["features"], gradients["features"])


@LOSSES
@on_backends(BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prediction_is_the_first_best_class_without_margin(case, backend, dtype):
    # Rows of one length with small integers: scores are exact or scaled alike, so that ties are ties. Several
    # threads have enough to do here, and ties cross their borders.
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 2, (7, 63), generator=generator) * 2 - 1
    weight = rows[torch.randint(7, (200,), generator=generator)].double()
    features = (torch.randint(0, 2, (33, 63), generator=generator) * 2 - 1).double()
    first_best = (features @ weight.t()).argmax(dim=1)
    target = torch.randint(200, (33,), generator=generator)
    problem = Problem({"features": features, "weight": weight, "target": target}, {"margin": 1.0})
    with backend.activate():
        problem = problem.to(dtype, backend.device).with_options(return_prediction=True)
        _, prediction = case.function(**problem.arguments())
    assert torch.equal(prediction.cpu(), first_best)


@on_backends(BACKENDS)
@pytest.mark.parametrize("margin", (-22 / 64, 0.0, 22 / 64))
def test_tiny_losses_keep_their_digits(backend, margin):
    """At scale 64 the losses of trained samples vanish in log-sum-exp minus logit, even in float64."""
    problem = draw(33, 64, 128, dtype=torch.float32, margin=margin, scale=64.0)
    tensors = problem.tensors
    tensors["features"] = tensors["weight"][tensors["target"]] + 0.2 * tensors["features"]
    with backend.activate():
        loss = row_losses(margin_cosine, problem.to(device=backend.device)).cpu().double()

    features, weight = (F.normalize(tensors[name].double(), dim=1) for name in NAMES)
    logits = 64 * features @ weight.t()
    is_target = F.one_hot(tensors["target"], 64).bool()
    gap = logits.masked_fill(is_target, -math.inf).logsumexp(dim=1) - (logits[is_target] - 64 * margin)
    exact = gap.exp().log1p()
    assert exact.max() < 1e-9
    # e^gap is as far off, relatively, as the gap is absolutely: once for the target, once for the others.
    relative = (2 * logit_error(problem, cosine=True)).expm1()
    assert relative.max() < 1e-3
    assert ((loss - exact).abs() <= relative * exact).all()


@on_backends(backend for backend in BACKENDS if backend.name == "simt-one_launch")
def test_long_sums_of_one_sign_do_not_drift(backend):
    """Tensor cores cut sums off, which thousands of terms of one sign would show."""
    features = torch.rand(2048, 32, generator=torch.Generator().manual_seed(0)) + 0.5
    # All logits are 0, so that each of 8 classes has an eighth of the probability.
    tensors = {"features": features, "weight": torch.zeros(8, 32), "target": torch.zeros(2048, dtype=torch.int64)}
    exact, errors = features.double().sum(0) / 8, []
    for _ in range(4):  # the emulator cuts off in two of four launches
        weight = tensors["weight"].requires_grad_()
        with backend.activate():
            loss = margin_softmax.function(**tensors, margin=0.0, scale=1.0, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, weight)
        errors.append(((gradient[1:].double() - exact).abs() / exact).max().item())
    assert max(errors) < 2**-21, errors


@LOSSES
@on_backends(BACKENDS)
@pytest.mark.parametrize(
    "sizes", ((1, 2, 1), (1, 2, 5), (129, 151, 372), (372, 129, 151), (151, 372, 129), (300, 2, 2)), ids=str
)
def test_odd_sizes(case, backend, sizes):
    problem = draw(*sizes, dtype=torch.float32, margin=-0.3, scale=5.0, return_prediction=True)
    assert_equals_reference(case, backend, problem)


@LOSSES
@on_backends(BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("kinds", [("plain", kind) for kind in SPECIAL_ROWS] + [("zero rows", "zero rows")], ids=str)
def test_special_rows(case, backend, kinds, dtype):
    problem = draw(33, 17, 31, margin=-0.3, scale=5.0, return_prediction=True)
    cosine = case is margin_cosine
    for first, second in (kinds, kinds[::-1]):
        features = with_special_rows(problem.tensors["features"].clone(), first, cosine)
        weight = with_special_rows(problem.tensors["weight"].clone(), second, cosine)
        tensors = {**problem.tensors, "features": features.to(dtype), "weight": weight.to(dtype)}
        assert_equals_reference(case, backend, Problem(tensors, problem.options))


@LOSSES
@on_backends(LARGE_BACKENDS)
@pytest.mark.parametrize("count", (1, 2, 3))
@pytest.mark.parametrize("sizes", ((600, 20, 450), (600, 500, 450), (40, 20, 2000), (40, 2000, 64)), ids=str)
def test_divisions_of_the_work(case, backend, sizes, count):
    """Features below and above what each thread packs for itself, fewer and more classes than dimensions."""
    problem = draw(*sizes, dtype=torch.float32, margin=-0.3, scale=5.0, label_smoothing=0.1)
    with threads(count):
        assert_equals_reference(case, backend, problem)


@functools.cache
def _many_logits(dtype, operand_error):
    """A problem of 26 MB of logits, the reference's gradients and their bounds."""
    problem = draw(320, 20000, 70, dtype=dtype, margin=-0.3, scale=30.0)
    _, expected = evaluate(margin_cosine.reference, problem.to(torch.float64), NAMES)
    bounds = margin_cosine.bounds(problem, [torch.ones((), dtype=torch.float64)], operand_error).gradients
    return problem, expected, bounds


@on_backends(LARGE_BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("wanted", (NAMES, ("features",), ("weight",)), ids="-".join)
def test_more_logits_than_memory_for_them(backend, dtype, wanted):
    """On the CPU the logits of the first samples wait in the memory of the weight's gradient, whose rows hold D of them
    (D / 2 for half types), the next in a workspace of 12 MiB, and the rest is computed twice."""
    problem, expected, bounds = _many_logits(dtype, backend.operand_errors.get(dtype, 0.0))
    with backend.activate():
        _, gradients = evaluate(margin_cosine_loss, problem.to(device=backend.device), wanted)
    for name in wanted:
        rounding = expected[name].abs() * torch.finfo(dtype).eps
        assert_within(gradients[name], expected[name], bounds[name] + rounding, name)


@LOSSES
@on_backends(BACKENDS)
def test_gradient_of_one_row_among_many(case, backend):
    """reduction="none": each row's upstream gradient reaches the gradients of this row alone."""
    problem = draw(40, 17, 31, dtype=torch.float64, margin=-0.3, scale=5.0, label_smoothing=0.1, reduction="none")
    tensors = problem.to(device=backend.device).tensors
    with backend.activate():
        for row in (0, 16, 39):
            alone = Problem({**tensors, **{name: tensors[name][row : row + 1] for name in ("features", "target")}})
            _, expected = evaluate(case.function, Problem(alone.tensors, problem.options), NAMES)
            upstream = [torch.eye(40, dtype=torch.float64)[row]]
            _, gradients = evaluate(case.function, Problem(tensors, problem.options), NAMES, upstream)
            torch.testing.assert_close(gradients["weight"], expected["weight"])
            torch.testing.assert_close(gradients["features"][row], expected["features"][0])
            gradients["features"][row] = 0
            assert (gradients["features"] == 0).all()


@LOSSES
def test_reductions_agree(case):
    problem = draw(40, 17, 31, scale=5.0, margin=-0.3, ignore_index=3)
    rows = row_losses(case, problem)
    counted = (problem.tensors["target"] != 3).sum()
    assert 0 < counted < 40
    total = case.function(**problem.with_options(reduction="sum").arguments())
    torch.testing.assert_close(total, rows.sum())
    torch.testing.assert_close(case.function(**problem.arguments()), rows.sum() / counted)


@LOSSES
@on_backends(BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ignored_rows_count_for_nothing(case, backend, dtype):
    # Logits from 0 to 2000 pass the exponent where an unguarded exponential turns infinite or NaN (88 in
    # float32, 709 in float64), which a factor of 0 does not undo.
    similarity = torch.linspace(0, 1, 8000, dtype=torch.float64)
    tensors = {
        "features": torch.tensor([[1.0, 0.0], [0.6, 0.8], [1.0, 0.0]]),
        "weight": torch.stack([similarity, (1 - similarity**2).sqrt()], dim=1),
        "target": torch.tensor([-100, 3, -100]),
    }
    problem = Problem(tensors, {"scale": 2000.0, "margin": -0.3, "reduction": "sum"}).to(dtype, backend.device)
    alone = Problem({**problem.tensors, **{name: problem.tensors[name][1:2] for name in ("features", "target")}})
    with backend.activate():
        (loss,), gradients = evaluate(case.function, problem, NAMES)
        (expected,), expected_gradients = evaluate(case.function, Problem(alone.tensors, problem.options), NAMES)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients["weight"], expected_gradients["weight"])
    torch.testing.assert_close(gradients["features"][1:2], expected_gradients["features"])
    assert (gradients["features"][::2] == 0).all()


@LOSSES
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_all_rows_ignored_as_in_cross_entropy(case, reduction):
    problem = draw(6, 5, 4, reduction=reduction, scale=5.0, margin=-0.3)
    problem.tensors["target"].fill_(-100)
    results, gradients = evaluate(case.function, problem, NAMES)
    expected, expected_gradients = evaluate(case.reference, problem, NAMES)
    torch.testing.assert_close(results, expected, equal_nan=True)
    torch.testing.assert_close(gradients, expected_gradients, equal_nan=True)
    assert results[0].isnan().all() == (reduction == "mean")


@LOSSES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_result_dtypes(case, dtype):
    problem = draw(6, 5, 4, dtype=dtype, return_prediction=True, margin=-0.3, scale=5.0)
    loss, prediction = case.function(**problem.arguments())
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.shape == () and prediction.shape == (6,) and prediction.dtype == torch.int64


@LOSSES
@on_backends(BACKENDS)
def test_nan_in_a_row_stays_in_the_row(case, backend):
    problem = draw(40, 17, 31, dtype=torch.float32, margin=-0.3, scale=5.0, reduction="none")
    problem.tensors["features"][20, 3] = math.nan
    with backend.activate():
        loss = row_losses(case, problem.to(device=backend.device))
        (value,), gradients = evaluate(case.function, problem.with_options(reduction="mean"), NAMES)
    assert loss.isnan().nonzero().tolist() == [[20]]
    assert value.isnan() and gradients["weight"].isnan().all()
    assert gradients["features"].isnan().any(dim=1).nonzero().tolist() == [[20]]


def test_defaults_are_those_of_the_paper():
    features, weight, target = draw(6, 5, 4).tensors.values()
    cosine = margin_cosine_loss(features, weight, target, margin=-0.3, scale=30.0)
    assert torch.equal(margin_cosine_loss(features, weight, target), cosine)
    product = margin_softmax_loss(features, weight, target, margin=-1.0, scale=5.0)
    assert torch.equal(margin_softmax_loss(features, weight, target), product)


@pytest.fixture
def tf32_setting():
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def test_tf32_follows_torchs_setting(tf32_setting):
    """By whatever name it is set, for float32 on CUDA alone, and in compiled code too."""

    class OnCuda:
        def __init__(self, dtype):
            self.dtype, self.device = dtype, torch.device("cuda")

    single = OnCuda(torch.float32)
    for allow, refuse in (
        (lambda: torch.set_float32_matmul_precision("high"), lambda: torch.set_float32_matmul_precision("highest")),
        *(
            (functools.partial(setattr, matmul, name, on), functools.partial(setattr, matmul, name, off))
            for matmul, name, on, off in (
                (torch.backends.cuda.matmul, "allow_tf32", True, False),
                (torch.backends.cuda.matmul, "fp32_precision", "tf32", "ieee"),
            )
        ),
    ):
        refuse()
        assert not allows_tf32(single)
        allow()
        assert allows_tf32(single)
        assert not allows_tf32(torch.ones(1)) and not allows_tf32(OnCuda(torch.float64))
        assert not allows_tf32(OnCuda(torch.bfloat16))
    compiled = torch.compile(lambda x: x + allows_tf32(single), fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)) == 1
    refuse()
    assert compiled(torch.zeros(1)) == 0


def test_kernel_refuses_labels_that_compiled_code_did_not_check():
    features, weight, target = draw(6, 5, 4).tensors.values()
    compiled = torch.compile(margin_cosine_loss, fullgraph=True, backend="aot_eager")
    compiled(features, weight, target)
    target[3] = 5
    with pytest.raises(RuntimeError, match=r"label 5 at index 3 is outside \[0, 5\)"):
        compiled(features, weight, target)


@pytest.mark.parametrize(
    "change",
    (
        lambda x, w, y: (x[0], w, y),
        lambda x, w, y: (x, w[:, :3], y),
        lambda x, w, y: (x, w[:1], y),
        lambda x, w, y: (x, w, y[:5]),
        lambda x, w, y: (x, w.float(), y),
        lambda x, w, y: (x, w, y.int()),
        lambda x, w, y: (x.long(), w.long(), y),
        lambda x, w, y: (x, w, y - 10),
        lambda x, w, y: (x[:, :0], w[:, :0], y),
    ),
)
def test_kernel_refuses_what_would_read_foreign_memory(change):
    arguments = change(*draw(6, 5, 4).tensors.values())
    with pytest.raises(RuntimeError):
        torch.ops.fewshot_ext.margin_softmax(*arguments, -0.3, 5.0, 0.0, -100, True, 0, 1, False, False, False)


@pytest.mark.parametrize("elsewhere", ("grad_loss", "row_statistics"))
def test_item_29_backward_refuses_tensors_of_another_device(elsewhere):
    """The meta device stands in for a GPU, and the CPU's kernel is named because dispatch would pass it over."""
    features, weight, target = draw(6, 5, 4).tensors.values()
    given = {"grad_loss": features.new_ones(6), "row_statistics": features.new_ones(4, 6)}
    given[elsewhere] = given[elsewhere].to("meta")
    with pytest.raises(RuntimeError, match="features, grad_loss and row_statistics are on different devices"):
        torch.ops.fewshot_ext.margin_softmax_backward.default.redispatch(
            torch._C.DispatchKeySet(torch._C.DispatchKey.CPU),
            given["grad_loss"],
            *(features, weight, target, given["row_statistics"], -0.3, 5.0, 0.0, -100, True, 0, True, True),
        )


MEMORY = """
import torch, fewshot_ext

def peak():  # kB
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

def step(classes):
    weight = torch.randn(classes, 64, requires_grad=True)
    features, target = torch.randn(512, 64, requires_grad=True), torch.randint(classes, (512,))
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts at what is resident now
    before = peak()
    fewshot_ext.margin_cosine_loss(features, weight, target).backward()
    return peak() - before

step(100)  # autograd and the thread pool allocate on first use
print(step(100_000))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_memory_stays_far_below_the_logits():
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    gradient_kib = 100_000 * 64 * 4 / 1024
    assert int(run.stdout) - gradient_kib <= 32 * 1024  # the logits would take 200 MiB
    assert int(run.stdout) >= 0.9 * gradient_kib  # or nothing was measured


def test_public_names():
    assert {"margin_cosine_loss", "margin_softmax_loss"} <= set(fewshot_ext.__all__)


@pytest.mark.parametrize("label_smoothing", (0.0, 0.1))
def test_5_rounding_does_not_grow_with_the_classes(one_thread, label_smoothing):
    """A running sum in float32 is off by 1.4e-3 over a million classes on one thread."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(4, 8, generator=generator)
    weight = torch.randn(1_000_000, 8, generator=generator)
    target = torch.randint(1_000_000, (4,), generator=generator)
    loss = fewshot_ext.margin_cosine_loss(features, weight, target, margin=-0.1, label_smoothing=label_smoothing)
    expected = fewshot_ext.reference.margin_cosine_loss(
        features.double(), weight.double(), target, margin=-0.1, label_smoothing=label_smoothing
    )
    assert loss.item() == pytest.approx(expected.item(), abs=4e-6)
