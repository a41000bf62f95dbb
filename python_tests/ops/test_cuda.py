"""What only a GPU can show: streams, graphs, devices, sizes beyond the emulator's."""

import pytest
import torch

from fewshot_ext import margin_cosine_loss, reference

from .contract import BACKENDS, evaluate, on_backends
from .margin_softmax_case import draw

CUDA = tuple(backend for backend in BACKENDS if backend.device == "cuda")
NAMES = ("features", "weight")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def step(tensors, **options):
    """Loss and both gradients."""
    loss = margin_cosine_loss(**tensors, **options)
    return (loss, *torch.autograd.grad(loss.sum(), [tensors[name] for name in NAMES]))


def problem_on(device, **options):
    return draw(64, 200, 130, dtype=torch.float32, **options).to(device=device).with_grad(NAMES)


@on_backends(CUDA)
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_graph_capture(backend, reduction):
    """Replays on new values give what calls give: nothing on the way waits for the host or remembers it."""
    with backend.activate():
        tensors = problem_on("cuda").tensors
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # torch wants a warm-up on another stream before a capture
            for _ in range(3):
                step(tensors, reduction=reduction)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(tensors, reduction=reduction)
        for seed in (1, 2):
            with torch.no_grad():
                for name, value in problem_on("cuda", seed=seed).tensors.items():
                    tensors[name].copy_(value)
            graph.replay()
            torch.testing.assert_close(captured, step(tensors, reduction=reduction), rtol=0, atol=0)


@on_backends(CUDA)
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_the_host_does_not_wait(backend, reduction):
    with backend.activate():
        tensors = problem_on("cuda").tensors
        step(tensors, reduction=reduction)  # libraries may wait once, when they are loaded
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(tensors, reduction=reduction)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@on_backends(CUDA)
def test_runs_on_the_current_stream(backend):
    """The inputs of the call come into being on the stream that it has to wait for."""
    with backend.activate():
        expected = step(problem_on("cuda").tensors)
        waiting = problem_on("cuda").tensors
        values = {name: waiting[name].detach().clone() for name in NAMES}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            with torch.no_grad():
                for name in NAMES:
                    waiting[name].fill_(float("nan"))
                torch.cuda._sleep(50_000_000)
                for name in NAMES:
                    waiting[name].copy_(values[name])
            found = step(waiting)
        torch.cuda.current_stream().wait_stream(stream)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@on_backends(CUDA)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_runs_on_the_device_of_its_tensors(backend):
    with backend.activate(), torch.cuda.device(0):
        expected = step(problem_on("cuda:0").tensors)
        found = step(problem_on("cuda:1").tensors)
        assert torch.cuda.current_device() == 0
    assert all(tensor.device == torch.device("cuda:1") for tensor in found)
    torch.testing.assert_close([tensor.cpu() for tensor in found], [tensor.cpu() for tensor in expected])


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_tensors_on_two_gpus_are_refused():
    tensors = problem_on("cuda:0").tensors
    with pytest.raises(ValueError, match="weight: expected device cuda:0 as features is on, got cuda:1"):
        margin_cosine_loss(tensors["features"], tensors["weight"].to("cuda:1"), tensors["target"])


@needs_gpu
def test_tensors_on_cpu_and_gpu_are_refused():
    tensors = problem_on("cuda").tensors
    with pytest.raises(ValueError, match="target: expected device cuda:0 as features is on, got cpu"):
        margin_cosine_loss(tensors["features"], tensors["weight"], tensors["target"].cpu())


@needs_gpu
@pytest.mark.parametrize("kernel", ("one launch", "cublas"))
def test_unknown_kernel_is_refused(monkeypatch, kernel):
    monkeypatch.setenv("FEWSHOT_EXT_MARGIN_SOFTMAX_KERNEL", kernel)
    with pytest.raises(
        RuntimeError, match="FEWSHOT_EXT_MARGIN_SOFTMAX_KERNEL: expected one_launch, one_pass or chunked"
    ):
        margin_cosine_loss(**problem_on("cuda").tensors)


@needs_gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_tf32_and_half_types_at_many_classes(dtype):
    """With the chunks that a GPU gets, not the tests' small ones, and in TF32 where torch allows it."""
    problem = draw(512, 20_000, 256, dtype=dtype, scale=30.0).to(device="cuda")
    _, expected = evaluate(reference.margin_cosine_loss, problem.to(torch.float64), NAMES)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        _, gradients = evaluate(margin_cosine_loss, problem, NAMES)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    # Products of operands rounded to 8 bits (bfloat16) or 11; errors of single entries average out.
    tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-3
    for name in NAMES:
        error = (gradients[name].double() - expected[name]).norm() / expected[name].norm()
        assert error < tolerance, name


@needs_gpu
def test_more_logits_than_32_bits_count():
    """N x C = 2.3e9. The last rows are compared with the formula."""
    samples, classes, dimensions = 32_768, 70_000, 8
    generator = torch.Generator("cuda").manual_seed(0)
    features = torch.randn(samples, dimensions, generator=generator, device="cuda", requires_grad=True)
    weight = torch.randn(classes, dimensions, generator=generator, device="cuda", requires_grad=True)
    target = torch.randint(classes, (samples,), generator=generator, device="cuda")
    loss = margin_cosine_loss(features, weight, target, scale=5.0, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), features)
    last = features[-64:].detach().double().requires_grad_()
    expected = reference.margin_cosine_loss(last, weight.detach().double(), target[-64:], scale=5.0, reduction="none")
    (expected_gradient,) = torch.autograd.grad(expected.sum(), last)
    torch.testing.assert_close(loss[-64:].double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient[-64:].double(), expected_gradient, rtol=1e-3, atol=1e-4)


@needs_gpu
def test_memory_stays_far_below_the_logits():
    """512 x 100,000 logits take 205 MB in float32; beside the gradients there is room for a chunk of 64 MiB alone."""
    problem = draw(512, 100_000, 64, dtype=torch.float32).to(device="cuda").with_grad(NAMES)
    step(problem.tensors)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = step(problem.tensors)
    torch.cuda.synchronize()
    rise = torch.cuda.max_memory_allocated() - before
    assert rise - sum(tensor.nbytes for tensor in results) < 66 << 20


@needs_gpu
def test_memory_that_runs_out_is_torchs_error():
    target = torch.zeros(4, dtype=torch.int64, device="cuda")
    features, weight = (torch.zeros((), device="cuda").expand(rows, 1 << 44) for rows in (4, 3))
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        margin_cosine_loss(features, weight, target)
    assert margin_cosine_loss(**problem_on("cuda").tensors).isfinite(), "the GPU goes on"


@needs_gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_products_that_torch_tunes(monkeypatch, tmp_path, dtype):
    monkeypatch.setenv("FEWSHOT_EXT_MARGIN_SOFTMAX_KERNEL", "chunked")
    problem = draw(64, 200, 130, dtype=dtype).to(device="cuda")
    expected = evaluate(margin_cosine_loss, problem, NAMES)
    torch.cuda.tunable.set_filename(str(tmp_path / "tuned.csv"))
    torch.cuda.tunable.enable(True)
    try:
        tuned = evaluate(margin_cosine_loss, problem, NAMES)
    finally:
        torch.cuda.tunable.enable(False)
    torch.testing.assert_close(tuned, expected, rtol=1e-3, atol=1e-4)
