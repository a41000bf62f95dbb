"""Errors of memory and of torch's own calls arrive in torch's words and types, from native code too."""

import pytest
import torch

import fewshot_ext
from fewshot_ext._native_errors import explained
from fewshot_ext.ops.emd import _emd_op
from fewshot_ext.ops.episode_finetune import _call_draw
from fewshot_ext.ops.margin_softmax import _call_backward, _forward_op

CPU_REFUSES = r"DefaultCPUAllocator: can't allocate memory: you tried to allocate {} bytes"
KEEPS_TEXT = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)  # torch, of an error of its own
SETTINGS = (0.1, 1.0, 0.0, -100, True, 0)
LARGE = 1 << 50


def expanded(*shape, dtype=torch.float32):
    """A tensor of any size that takes no memory: all of it is one number, so that a dense copy is impossible."""
    return torch.zeros((), dtype=dtype).expand(shape)


def margin_softmax():
    return fewshot_ext.margin_cosine_loss(expanded(4, LARGE), expanded(3, LARGE), expanded(4, dtype=torch.int64))


def margin_softmax_backward():
    target, statistics = expanded(4, dtype=torch.int64), expanded(4, 4)
    return _call_backward(
        expanded(4), expanded(4, LARGE), expanded(3, LARGE), target, statistics, *SETTINGS, True, True
    )


def emd():
    return fewshot_ext.emd(expanded(LARGE, 2, 2), expanded(2), expanded(2))


def finetune_episodes():
    support, query = (
        expanded(2, 5, 3),
        torch.zeros(3).expand(2, LARGE, 3),
    )  # dense rows: it is the scores that are large
    return fewshot_ext.finetune_episodes(support, torch.arange(5).expand(2, 5), query, way=5, steps=1)


def draw_episodes():
    return _call_draw(expanded(2, 5, LARGE), torch.zeros(1, dtype=torch.int64), 5, 1)


@pytest.mark.parametrize(
    ("call", "size"),
    [
        (margin_softmax, 4 * 4 * LARGE),
        (margin_softmax_backward, 4 * 4 * LARGE),
        (emd, 4 * LARGE),
        (finetune_episodes, 4 * 2 * LARGE * 5),
        (draw_episodes, 4 * 2 * 5 * LARGE),
    ],
)
def test_memory_that_is_not_to_be_had_is_refused_in_torchs_words(call, size):
    with pytest.raises(RuntimeError, match=CPU_REFUSES.format(size)) as raised:
        call()
    assert "API call failed" not in str(raised.value)


@pytest.mark.parametrize("sizes", [(1 << 40, 1 << 30, 1 << 30), (1 << 22, 1 << 21, 1 << 21), (1 << 61, 2, 2)])
def test_size_that_no_number_tells_is_refused(sizes):
    batch, n, m = sizes
    with pytest.raises(RuntimeError, match=r"less than 2\^63 elements|overflow|can't allocate|allocation of \d+ bytes"):
        _emd_op(expanded(batch, n, m), expanded(batch, n), expanded(batch, m))


def test_compiled_calls_raise_what_the_native_code_says():
    """They go past the package's Python: the text survives where torch keeps it, the type nowhere."""

    def loss(features, weight, target):
        return _forward_op(features, weight, target, *SETTINGS, 1, False, False, False)[0]

    said = CPU_REFUSES if KEEPS_TEXT else r"allocation of {} bytes on cpu failed; torch printed why on standard error"
    with pytest.raises(RuntimeError, match=said.format(16 * LARGE)):
        torch.compile(loss, backend="eager")(expanded(4, LARGE), expanded(3, LARGE), expanded(4, dtype=torch.int64))


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 15.77 GiB.",
        "Allocation on device 0 would exceed allowed memory. (out of memory)\nCurrently allocated     : 1.00 GiB",
    ],
)
def test_gpu_without_memory_raises_the_type_that_handlers_know(text):
    error = explained(RuntimeError(text))
    assert type(error) is torch.OutOfMemoryError
    assert str(error) == text


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx`",
        "CUDA error: an illegal memory access was encountered",
        "mat1 and mat2 shapes cannot be multiplied (3x5 and 4x4)",
    ],
)
def test_other_errors_stay_what_they_are(text):
    error = RuntimeError(f"check, csrc/margin_softmax/tensors.h:12, {text}")
    assert explained(error) is error
    assert str(error) == text


class OutOfMemory:
    """torch.empty on a machine whose GPU has ``free`` bytes."""

    def __init__(self, free):
        self.free, self.asked = free, []

    def __call__(self, size, dtype, device):
        self.asked.append((size, dtype, device))
        if size > self.free:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes. GPU 1 has ...")


@pytest.mark.parametrize(("free", "said"), [(0, " GPU 1 has ..."), (1 << 40, " on cuda:1.")])
def test_torch_that_keeps_no_text_is_asked_for_the_memory_again(monkeypatch, free, said):
    """Where by now it is to be had, there was too little of it all the same."""
    torch_empty = OutOfMemory(free)
    monkeypatch.setattr(torch, "empty", torch_empty)
    error = explained(RuntimeError("allocation of 4096 bytes on cuda:1 failed; torch printed why on ..."))
    assert type(error) is torch.OutOfMemoryError
    assert str(error).startswith("CUDA out of memory. Tried to allocate 4096 bytes")
    assert str(error).endswith(said)
    assert torch_empty.asked == [(4096, torch.uint8, "cuda:1")]


def test_broken_gpu_is_not_one_without_memory(monkeypatch):
    def empty(size, dtype, device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "empty", empty)
    error = explained(RuntimeError("allocation of 4096 bytes on cuda:0 failed"))
    assert type(error) is RuntimeError
    assert "illegal memory access" in str(error)
