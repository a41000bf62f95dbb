"""The op contract: every operator of cases.py is held to the same list, on every backend there is."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from .cases import OPERATORS, each_differentiable, each_operator
from .contract import (
    BACKENDS,
    DEVICES,
    DTYPES,
    as_tuple,
    assert_equals_reference,
    assert_same,
    evaluate,
    floating,
    problem_function,
    skip_if_missing,
    threads,
)

# torch.amp.GradScaler starts at 2^16, to lift float16 gradients above the smallest number that there is.
LOSS_SCALES = (1.0, 2.0**16)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@each_operator(BACKENDS)
def test_equals_float64_reference(case, backend, dtype):
    @settings(max_examples=min(backend.max_examples, settings().max_examples))
    @given(problem=case.problems(dtype), loss_scale=st.sampled_from(LOSS_SCALES), retain_graph=st.booleans())
    def check(problem, loss_scale, retain_graph):
        assert_equals_reference(case, backend, problem, loss_scale, retain_graph)

    check()


@pytest.mark.parametrize("retain_graph", (False, True))
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@each_differentiable(BACKENDS)
def test_loss_scaling_keeps_small_gradients(case, backend, dtype, retain_graph):
    for loss_scale in LOSS_SCALES:
        assert_equals_reference(case, backend, case.large.to(dtype), loss_scale, retain_graph)


@each_operator(BACKENDS)
def test_empty_input(case, backend):
    for problem in case.empty:
        assert_equals_reference(case, backend, problem)


@each_differentiable(BACKENDS)
def test_value_does_not_depend_on_gradients(case, backend):
    with backend.activate():
        for problem in (*case.examples, case.large):
            problem = problem.to(device=backend.device)
            plain = as_tuple(case.function(**problem.arguments()))
            for names in (case.differentiable, *((name,) for name in case.differentiable)):
                results, _ = evaluate(case.function, problem, names)
                assert_same(dict(enumerate(plain)), dict(enumerate(results)))


@each_differentiable(BACKENDS)
def test_each_gradient_by_itself(case, backend):
    with backend.activate():
        for problem in case.examples:
            problem = problem.to(device=backend.device)
            _, together = evaluate(case.function, problem, case.differentiable)
            for name in case.differentiable:
                _, alone = evaluate(case.function, problem, (name,))
                torch.testing.assert_close(alone[name], together[name])


@each_operator(DEVICES[:1])
def test_meta_tensors_give_shapes_and_dtypes(case, backend):
    for problem in (*case.examples, *case.empty):
        found, gradients = evaluate(case.function, problem.to(device="meta"), case.differentiable)
        expected, expected_gradients = evaluate(case.function, problem, case.differentiable)
        for meta, real in zip((*found, *gradients.values()), (*expected, *expected_gradients.values()), strict=True):
            assert meta.is_meta
            assert (meta.shape, meta.dtype) == (real.shape, real.dtype)


@each_operator(BACKENDS)
def test_deterministic(case, backend):
    with backend.activate():
        problem = case.large.to(device=backend.device)
        results, gradients = evaluate(case.function, problem, case.differentiable)
        again, again_gradients = evaluate(case.function, problem, case.differentiable)
    assert_same(dict(enumerate(results)), dict(enumerate(again)))
    assert_same(gradients, again_gradients)


@pytest.mark.parametrize("count", (1, 2, 3))
@each_operator(BACKENDS)
def test_thread_count(case, backend, count):
    with threads(count):
        assert_equals_reference(case, backend, case.large)


@each_operator(DEVICES)
def test_concurrent_calls(case, backend):
    """Python threads of one process share the kernels, as DataParallel and inference servers do."""
    problems = [problem.to(device=backend.device) for problem in (*case.examples, case.large)]
    expected = [evaluate(case.function, problem, case.differentiable) for problem in problems]

    def repeat(index):
        return [evaluate(case.function, problems[index], case.differentiable) for _ in range(20)]

    with ThreadPoolExecutor(len(problems)) as pool:
        for index, repetitions in enumerate(pool.map(repeat, range(len(problems)))):
            for found in repetitions:
                # Another thread may have another number of threads to sum over.
                torch.testing.assert_close(found, expected[index])


@each_operator(BACKENDS)
def test_inputs_are_not_modified(case, backend):
    with backend.activate():
        for problem in (*case.examples, case.large):
            problem = problem.to(device=backend.device)
            before = {name: tensor.clone() for name, tensor in problem.tensors.items()}
            versions = {name: tensor._version for name, tensor in problem.tensors.items()}
            evaluate(case.function, problem, case.differentiable)
            assert_same(problem.tensors, before)
            assert {name: tensor._version for name, tensor in problem.tensors.items()} == versions


@each_operator(DEVICES)
def test_opcheck(case, backend):
    for names in (case.differentiable, ()):
        problem = case.examples[0].to(torch.float32, backend.device).with_grad(names)
        for overload, arguments in case.overloads(problem):
            torch.library.opcheck(overload, arguments)


@each_differentiable(BACKENDS)
def test_gradcheck(case, backend):
    with backend.activate():
        for problem in case.examples:
            function, inputs = problem_function(case, problem.to(device=backend.device))
            assert torch.autograd.gradcheck(lambda *tensors: floating(function(*tensors)), inputs)  # noqa: B023


@each_differentiable(DEVICES)
def test_second_derivatives_are_right_or_refused(case, backend):
    for problem in case.examples:
        function, inputs = problem_function(case, problem.to(device=backend.device))
        if case.no_second_derivative is None:
            assert torch.autograd.gradgradcheck(lambda *tensors: floating(function(*tensors)), inputs)  # noqa: B023
            continue

        def total(*tensors):
            return sum(output.square().sum() for output in floating(function(*tensors)))  # noqa: B023

        def mixed(*tensors):
            return total(*tensors) * sum(tensor.square().sum() for tensor in tensors)

        for loss in (total, mixed):
            gradients = torch.autograd.grad(loss(*inputs), inputs, create_graph=True)
            for gradient in gradients:
                with pytest.raises(RuntimeError, match=case.no_second_derivative):
                    gradient.sum().backward(retain_graph=True)
        assert all(tensor.grad is None for tensor in inputs)


@each_differentiable(DEVICES)
def test_retain_graph_accumulates(case, backend):
    for problem in case.examples:
        problem = problem.to(device=backend.device)
        _, once = evaluate(case.function, problem, case.differentiable)
        leaves = problem.with_grad(case.differentiable)
        outputs = floating(case.function(**leaves.arguments()))
        # Factors that are powers of 2 make every sum exact.
        for calls, factor in enumerate((1.0, 2.0, 4.0), start=1):
            upstream = [torch.full_like(output, factor) for output in outputs]
            torch.autograd.backward(outputs, upstream, retain_graph=calls < 3)
            for name, gradient in once.items():
                torch.testing.assert_close(leaves.tensors[name].grad, (2**calls - 1) * gradient)


@each_differentiable(DEVICES)
def test_changed_gradients_do_not_reach_the_next_backward(case, backend):
    for problem in case.examples:
        problem = problem.to(device=backend.device)
        _, once = evaluate(case.function, problem, case.differentiable)
        leaves = problem.with_grad(case.differentiable)
        outputs = floating(case.function(**leaves.arguments()))
        for keep in (True, True, False):
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs], retain_graph=keep)
            for name, gradient in once.items():
                tensor = leaves.tensors[name]
                torch.testing.assert_close(tensor.grad, gradient)
                tensor.grad.fill_(float("nan"))
                tensor.grad = None


@each_differentiable(DEVICES)
def test_inputs_changed_before_backward_are_noticed_or_harmless(case, backend):
    problem = case.examples[0].to(device=backend.device)
    _, expected = evaluate(lambda **arguments: floating(case.function(**arguments))[0], problem, case.differentiable)
    for name in case.differentiable:
        leaves = problem.with_grad(case.differentiable)
        with torch.no_grad():
            leaves.tensors[name] = leaves.tensors[name].clone().requires_grad_()
        outputs = floating(case.function(**leaves.arguments()))
        with torch.no_grad():
            leaves.tensors[name].zero_()
        try:
            outputs[0].sum().backward()
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
        else:
            for other, gradient in expected.items():
                torch.testing.assert_close(leaves.tensors[other].grad, gradient)


def trim(problem, case, samples):
    """The first ``samples`` of every tensor that has a dimension N."""
    tensors = {
        name: tensor[:samples] if "N" in case.dynamic[name].values() else tensor
        for name, tensor in problem.tensors.items()
    }
    return type(problem)(tensors, problem.options)


@pytest.mark.parametrize("compiler", ("aot_eager", "inductor"))
@each_operator(DEVICES)
def test_compile_fullgraph_dynamic(case, backend, compiler):
    # Inductor compiles C++ for minutes of a test run; the cheaper backend goes through all examples.
    for problem in case.examples if compiler == "aot_eager" else case.examples[:1]:
        torch._dynamo.reset()
        problem = problem.to(device=backend.device)
        compiled = torch.compile(case.function, fullgraph=True, dynamic=True, backend=compiler)
        for samples in (5, 3):
            part = trim(problem, case, samples)
            results, gradients = evaluate(compiled, part, case.differentiable)
            expected, expected_gradients = evaluate(case.function, part, case.differentiable)
            torch.testing.assert_close(results, expected)
            torch.testing.assert_close(gradients, expected_gradients)
    torch._dynamo.reset()


class _Module(torch.nn.Module):
    def __init__(self, function, options):
        super().__init__()
        self.function, self.options = function, options

    def forward(self, tensors):
        return self.function(**tensors, **self.options)


@each_operator(DEVICES)
def test_export_dynamic(case, backend):
    names = {name for dimensions in case.dynamic.values() for name in dimensions.values()}
    open_sizes = {name: torch.export.Dim(name, min=2) for name in names}
    shapes = {
        name: {dimension: open_sizes[size] for dimension, size in dimensions.items()}
        for name, dimensions in case.dynamic.items()
    }
    for problem in case.examples[:2]:
        problem = problem.to(device=backend.device)
        module = _Module(case.function, problem.options)
        program = torch.export.export(module, (problem.tensors,), dynamic_shapes=(shapes,))
        assert any("fewshot_ext" in str(node.target) for node in program.graph.nodes)
        for samples in (5, 3):
            part = trim(problem, case, samples)
            torch.testing.assert_close(program.module()(part.tensors), case.function(**part.arguments()))


@each_operator(DEVICES)
def test_autocast(case, backend):
    """Mixed dtypes give the result of one common dtype, and gradients in the dtypes that came."""
    for problem in case.examples:
        problem = problem.to(torch.float32, backend.device)
        first = next(iter(problem.tensors))
        problem.tensors[first] = problem.tensors[first].to(torch.bfloat16)
        with torch.autocast(backend.device, dtype=torch.bfloat16):
            results, gradients = evaluate(case.function, problem, case.differentiable)
        common = torch.float32 if backend.device == "cpu" or case.autocast_to_float32 else torch.bfloat16
        expected, expected_gradients = evaluate(case.function, problem.to(common), case.differentiable)
        torch.testing.assert_close(results, expected)
        for name, gradient in gradients.items():
            dtype = problem.tensors[name].dtype
            assert gradient.dtype == dtype
            torch.testing.assert_close(gradient, expected_gradients[name].to(dtype))


BAD_INPUTS = [
    pytest.param(
        case,
        bad,
        backend,
        id=f"{backend.name}-{case.name}-{bad.name.replace(' ', '_')}",
        marks=skip_if_missing(case.missing_on(backend)),
    )
    for backend in DEVICES
    for case in OPERATORS
    for bad in case.bad_inputs
]


@pytest.mark.parametrize("case, bad, backend", BAD_INPUTS)
def test_bad_input_raises_and_changes_nothing(case, bad, backend):
    if bad.reads_values and backend.device != "cpu":
        pytest.skip("found without waiting on the CPU alone")
    problem = case.examples[0].to(device=backend.device).with_grad(case.differentiable)
    for name in case.differentiable:
        problem.tensors[name].grad = torch.full_like(problem.tensors[name], 7.0)
    before = {name: tensor.detach().clone() for name, tensor in problem.tensors.items()}
    with pytest.raises(bad.error) as raised:
        case.function(**{**problem.arguments(), **bad.change(problem.tensors)})
    assert type(raised.value) is bad.error
    assert bad.message in str(raised.value)
    for name, tensor in problem.tensors.items():
        assert torch.equal(tensor, before[name])
        assert tensor.grad is None or (tensor.grad == 7.0).all()


def _masked(tensor):
    return torch.masked.masked_tensor(tensor, torch.ones_like(tensor, dtype=torch.bool))


# By what the error calls it, a tensor that no kernel can read in the place of a dense one.
NOT_DENSE = {
    "tensor of layout torch.sparse_coo": lambda tensor: tensor.to_sparse(),
    "tensor of layout torch.sparse_csr": lambda tensor: torch.ones_like(tensor).to_sparse_csr(),
    "tensor of layout torch._mkldnn": lambda tensor: tensor.float().to_mkldnn(),
    "nested tensor": lambda tensor: torch.nested.nested_tensor(list(tensor)),
    "nested tensor of ragged rows": lambda tensor: torch.nested.nested_tensor(list(tensor), layout=torch.jagged),
    "MaskedTensor": _masked,
    "DTensor": lambda tensor: distribute_tensor(tensor, init_device_mesh("cpu", (1,)), [Replicate()]),
}
NEED_ROWS = [kind for kind in NOT_DENSE if kind.startswith("nested") or "csr" in kind or "mkldnn" in kind]


@pytest.fixture(scope="module")
def one_process():
    """A process group without a network."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*(prototype|beta)")
@pytest.mark.parametrize("kind", NOT_DENSE)
@each_operator(DEVICES)
def test_what_is_not_dense_is_refused_by_name(case, backend, kind, one_process):
    problem = case.examples[0].to(device=backend.device)
    tried = 0
    for name, tensor in problem.tensors.items():
        if tensor.dim() < 2 and not kind.startswith(("MaskedTensor", "DTensor")) and "coo" not in kind:
            continue
        with pytest.raises(
            TypeError, match=rf"^{name}: expected a dense tensor \[.*\], got a {kind.split(' of ragged')[0]}$"
        ):
            case.function(**{**problem.arguments(), name: NOT_DENSE[kind](tensor)})
        tried += 1
    assert tried


@each_operator(DEVICES[:1])
def test_errors_of_kernels_name_the_problem_and_no_folder(case, backend):
    """Under vmap and in compiled code, where Python cannot look at the values, the kernel raises by itself."""
    values = [bad for bad in case.bad_inputs if bad.reads_values]
    if not values:
        pytest.skip(f"{case.name} takes every value")
    for bad in values:
        problem = case.examples[0]
        arguments = {**problem.arguments(), "check": False, **bad.change(problem.tensors)}
        tensors = {name: arguments.pop(name) for name in problem.tensors}
        compiled = torch.compile(case.function, fullgraph=True, backend="eager")
        mapped = torch.func.vmap(lambda t: case.function(**t, **arguments))  # noqa: B023
        for call in (
            lambda: compiled(**tensors, **arguments),  # noqa: B023
            lambda: mapped({name: torch.stack([tensor, tensor]) for name, tensor in tensors.items()}),  # noqa: B023
        ):
            with pytest.raises((RuntimeError, ValueError), match=r"(problem|index|episode) \(?\d") as raised:
                call()
            assert not re.search(r"(^|\s)/", str(raised.value)), raised.value
    torch._dynamo.reset()
