"""The words in which an operator describes itself to the contract tests, test_contract*.py."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import settings
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from ..simt import build
from .simt_backend import emulated

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


# How far products with factors in half types may be off: cuBLAS takes the softmax gradient in the type of the features.
# float16 has no range for gradients of vectors of any length, so there the vectors are normalized and rounded too.
HALF_OPERANDS = {
    torch.bfloat16: torch.finfo(torch.bfloat16).eps / 2,
    torch.float16: 3 * torch.finfo(torch.float16).eps / 2,
}


@dataclass(frozen=True)
class Backend:
    """A set of kernels. ``activate`` makes the operators use them on tensors of ``device``."""

    name: str
    device: str = "cpu"
    activate: Callable[[], AbstractContextManager] = nullcontext
    missing: str | None = None  # why this machine cannot run it
    # Relative error of what enters the products that give the gradients, for dtypes where there is any.
    operand_errors: dict[torch.dtype, float] = field(default_factory=dict, hash=False)
    max_examples: int = settings().max_examples  # of property tests
    takes_large: bool = True  # problems of many logits


@contextmanager
def _environment(variable: str, value: str) -> Iterator[None]:
    before = os.environ.get(variable)
    os.environ[variable] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def _cpu_backend(name: str, torch_names: Sequence[str]) -> Backend:
    found = torch.backends.cpu.get_cpu_capability()
    missing = None if not torch_names or found in torch_names else f"this processor has no {name}"
    return Backend(f"cpu-{name}", activate=lambda: _environment("FEWSHOT_EXT_CPU_CAPABILITY", name), missing=missing)


def _cuda_backend(kernel: str | None = None, **facts: object) -> Backend:
    return Backend(
        "cuda" if kernel is None else f"cuda-{kernel}",
        device="cuda",
        activate=lambda: nullcontext() if kernel is None else _environment("FEWSHOT_EXT_MARGIN_SOFTMAX_KERNEL", kernel),
        missing=None if torch.cuda.is_available() else "no CUDA device",
        **facts,
    )


def _simt_backend(kernel: str, **facts: object) -> Backend:
    missing = None if shutil.which(build.CXX) else f"no compiler {build.CXX} for the emulator"
    return Backend(
        f"simt-{kernel}",
        activate=lambda: emulated(kernel),
        missing=missing,
        max_examples=12,
        takes_large=False,
        **facts,
    )


# One for each device, with the kernels it prefers: for what lies above kernels (dispatch, autograd, tracing).
DEVICES = (Backend("cpu"), _cuda_backend())
# Every version of every kernel: for what the kernels compute.
BACKENDS = (
    _cpu_backend("baseline", ()),
    _cpu_backend("avx2", ("AVX2", "AVX512")),
    _cpu_backend("avx512", ("AVX512",)),
    _simt_backend("one_launch"),
    _simt_backend("one_pass", operand_errors=HALF_OPERANDS),
    _simt_backend("chunked", operand_errors=HALF_OPERANDS),
    _cuda_backend("one_launch", takes_large=False),
    _cuda_backend("one_pass", operand_errors=HALF_OPERANDS),
    _cuda_backend("chunked", operand_errors=HALF_OPERANDS),
)
LARGE_BACKENDS = tuple(backend for backend in BACKENDS if backend.takes_large)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def skip_if_missing(reason: str | None) -> pytest.MarkDecorator:
    return pytest.mark.skipif(reason is not None, reason=reason or "")


def on_backends(backends: Sequence[Backend]) -> pytest.MarkDecorator:
    """Runs a test, which takes ``backend``, on each; the report says why one is missing."""
    return pytest.mark.parametrize(
        "backend",
        [pytest.param(backend, id=backend.name, marks=skip_if_missing(backend.missing)) for backend in backends],
    )


@dataclass(frozen=True)
class Problem:
    """Arguments of one call: tensors by name, and the rest by name."""

    tensors: dict[str, Tensor]
    options: dict[str, object] = field(default_factory=dict)

    def _repr_pretty_(self, printer, cycle: bool) -> None:
        # Hypothesis prints its counterexamples: thousands of random numbers say less than shapes and strides.
        tensors = [f"{name} {t.dtype} {list(t.shape)} stride {t.stride()}" for name, t in self.tensors.items()]
        printer.text(f"Problem({', '.join(tensors)}, {self.options})")

    def to(self, dtype: torch.dtype | None = None, device: str | None = None) -> "Problem":
        """Floating tensors in ``dtype``, all on ``device``; tensors already there keep their strides."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)

        return replace(self, tensors={name: move(tensor) for name, tensor in self.tensors.items()})

    def with_grad(self, names: Sequence[str]) -> "Problem":
        """Fresh leaves, of which those named want gradients; values, strides and memory are shared."""
        return replace(
            self,
            tensors={name: tensor.detach().requires_grad_(name in names) for name, tensor in self.tensors.items()},
        )

    def with_options(self, **options: object) -> "Problem":
        return replace(self, options={**self.options, **options})

    def arguments(self) -> dict[str, object]:
        return {**self.tensors, **self.options}


@dataclass(frozen=True)
class Bounds:
    """How far rounding may carry results and gradients from the reference: tensors of their shapes."""

    results: tuple[Tensor, ...]  # of the floating-point results
    gradients: dict[str, Tensor]


Change = Callable[[dict[str, Tensor]], dict[str, object]]  # tensors -> the arguments that go wrong


@dataclass(frozen=True)
class BadInput:
    name: str
    change: Change
    error: type[Exception]
    message: str  # text that the error contains: the argument, what came, what is taken
    reads_values: bool = False  # of tensors, which goes without waiting on the CPU alone


def replaced(name: str, change: Callable[[Tensor], object]) -> Change:
    """What ``change`` makes of a tensor, in its place."""
    return lambda tensors: {name: change(tensors[name].detach())}


def entry(name: str, index: int | tuple[int, ...], value: float, **options: object) -> Change:
    """A tensor with one entry of another value, and options beside it."""

    def change(tensors: dict[str, Tensor]) -> dict[str, object]:
        tensor = tensors[name].detach().clone()
        tensor[index] = value
        return {name: tensor, **options}

    return change


def option(name: str, value: object) -> Change:
    return lambda tensors: {name: value}


@dataclass(frozen=True)
class OperatorCase:
    """All that the contract needs to know about an operator."""

    name: str
    function: Callable[..., Tensor | tuple[Tensor, ...]]
    reference: Callable[..., Tensor | tuple[Tensor, ...]]
    differentiable: tuple[str, ...]  # tensors that gradients reach; empty where there are none
    # Problems of a dtype, of every shape, stride, value and option that the operator takes.
    problems: Callable[[torch.dtype], SearchStrategy[Problem]]
    # problem, upstream gradients of the floating-point results, Backend.operand_errors of the dtype -> bounds
    bounds: Callable[[Problem, Sequence[Tensor], float], Bounds]
    # Small float64 problems that together go through every path of autograd.
    examples: tuple[Problem, ...]
    # A float32 problem big enough for the kernels to use several threads.
    large: Problem
    # Legal problems without samples.
    empty: tuple[Problem, ...]
    # Overloads with arguments for torch.library.opcheck.
    overloads: Callable[[Problem], list[tuple[torch._ops.OpOverload, tuple]]]
    # By tensor, the dimensions that torch.export may leave open, each with its name.
    dynamic: dict[str, dict[int, str]]
    bad_inputs: tuple[BadInput, ...]
    # What the error of a second derivative says; None where there are second derivatives.
    no_second_derivative: str | None = None
    # What the error of a forward-mode derivative says; None where there are such derivatives.
    no_forward_mode: str | None = "offers no forward-mode derivatives"
    # Checks results that are not floating point: rounding may turn an arg max that nearly ties.
    check_discrete: Callable[[Problem, tuple[Tensor, ...]], None] | None = None
    # Tensors that vmap maps over; empty where batching makes no sense.
    batched: tuple[str, ...] = ()
    # The backends that have its kernels, by name ("simt-chunked") or by what the names begin with ("simt"); empty where
    # torch's own do all the work.
    kernels: tuple[str, ...] = ("cpu", "simt", "cuda")
    # Whether autocast brings it to float32 on every device, instead of to the lower dtype where that buys speed.
    autocast_to_float32: bool = False

    def backends(self, offered: Sequence[Backend]) -> Sequence[Backend]:
        """Those of the backends ``offered`` that tell its results apart: without kernels of its own, the devices."""
        if self.kernels:
            return offered
        devices = {backend.device for backend in offered}
        return tuple(backend for backend in DEVICES if backend.device in devices)

    def missing_on(self, backend: Backend) -> str | None:
        """Why it cannot run on ``backend``; None where it can."""
        if self.kernels and not any(f"{backend.name}-".startswith(f"{kernels}-") for kernels in self.kernels):
            return f"{self.name} has no kernels of the backend {backend.name}"
        return backend.missing


def as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def floating(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The results that gradients come from."""
    return tuple(result for result in as_tuple(results) if result.is_floating_point())


def problem_function(
    case: OperatorCase, problem: Problem, names: Sequence[str] | None = None
) -> tuple[Callable, list[Tensor]]:
    """The operator as a function of the tensors in ``names`` alone, and these tensors as leaves."""
    names = case.differentiable if names is None else names
    problem = problem.with_grad(names)

    def function(*tensors):
        replaced = dict(zip(names, tensors, strict=True))
        return case.function(**{**problem.arguments(), **replaced})

    return function, [problem.tensors[name] for name in names]


def evaluate(
    function: Callable,
    problem: Problem,
    names: Sequence[str],
    upstream: Sequence[Tensor] | Callable[[Sequence[Tensor]], Sequence[Tensor]] | None = None,
    retain_graph: bool = False,
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """All results, and the gradients to the tensors in ``names`` for upstream gradients (ones by default), which may be
    a function of the floating-point results."""
    problem = problem.with_grad(names)
    results = as_tuple(function(**problem.arguments()))
    outputs = floating(results)
    if upstream is None:
        upstream = [torch.ones_like(output) for output in outputs]
    elif callable(upstream):
        upstream = upstream(outputs)
    upstream = [part.to(output) for part, output in zip(upstream, outputs, strict=True)]
    leaves = [problem.tensors[name] for name in names]
    gradients = torch.autograd.grad(outputs, leaves, upstream, retain_graph=retain_graph) if leaves else ()
    detached = tuple(result.detach() for result in results)
    return detached, dict(zip(names, gradients, strict=True))


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor, what: str) -> None:
    """|actual - expected| <= bound, elementwise; beyond the range of the actual dtype infinity is right."""
    assert actual.shape == expected.shape, what
    limit = torch.finfo(actual.dtype).max
    got, expected = actual.double().cpu().clamp(-limit, limit), expected.clamp(-limit, limit)
    assert torch.equal(got.isnan(), expected.isnan()), f"{what}: NaN where the reference has none, or the reverse"
    excess = ((got - expected).abs() - bound).nan_to_num(nan=-1.0)
    if excess.numel() and excess.max() > 0:
        index = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
        raise AssertionError(
            f"{what}{list(index)}: {got[index]:.9g} differs from {expected[index]:.9g} by "
            f"{abs(got[index] - expected[index]):.3g}, bound {bound[index]:.3g}"
        )


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Bitwise, NaN included."""
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=0, atol=0, equal_nan=True)


def random_upstream(outputs: Sequence[Tensor], loss_scale: float) -> list[Tensor]:
    """Upstream gradients that are exact in float32, as every operator of half types returns its loss."""
    generator = torch.Generator().manual_seed(0)
    return [(loss_scale * torch.randn(output.shape, generator=generator)).to(torch.float64) for output in outputs]


def assert_equals_reference(
    case: OperatorCase,
    backend: Backend,
    problem: Problem,
    loss_scale: float = 1.0,
    retain_graph: bool = False,
) -> None:
    """Results and gradients on ``backend`` lie within the operator's bounds of the float64 reference's."""

    def draw_upstream(outputs: Sequence[Tensor]) -> list[Tensor]:
        return random_upstream(outputs, loss_scale)

    expected, expected_gradients = evaluate(
        case.reference, problem.to(torch.float64), case.differentiable, draw_upstream
    )
    upstream = draw_upstream(floating(expected))
    with backend.activate():
        placed = problem.to(device=backend.device)
        results, gradients = evaluate(case.function, placed, case.differentiable, upstream, retain_graph)
    operand_error = backend.operand_errors.get(next(iter(problem.tensors.values())).dtype, 0.0)
    bounds = case.bounds(problem, upstream, operand_error)
    for result, value, bound in zip(floating(results), floating(expected), bounds.results, strict=True):
        assert_within(result, value, bound, f"{case.name}")
    for name, gradient in gradients.items():
        dtype = problem.tensors[name].dtype
        assert gradient.dtype == dtype
        value = expected_gradients[name]
        # A gradient is rounded to the dtype of its tensor twice: as computed, and scaled by the upstream one.
        rounding = value.abs() * torch.finfo(dtype).eps + torch.finfo(dtype).smallest_normal
        assert_within(gradient, value, bounds.gradients[name] + rounding, f"{case.name}: gradient of {name}")
    if case.check_discrete is not None:
        case.check_discrete(problem, results)
