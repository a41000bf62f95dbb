"""A training run as a user would start one: torchrun, optimizers, memory."""

import re
import subprocess
import sys

import pytest
import torch
from torch import nn
from torchrun import run_script

from .problems import Problem
from .ranks import ROOT

PAGE = ROOT / "docs" / "many_classes.md"


@pytest.mark.skipif(not PAGE.exists(), reason="the pages are not part of a source distribution")
def test_example_of_the_page_runs_under_torchrun(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    run = run_script(tmp_path / "train.py", example)
    reports = re.findall(r"step (\d+): loss ([\d.]+), accuracy ([\d.]+)", run.stdout)
    assert [step for step, *_ in reports] == ["0", "50", "100"]
    assert float(reports[-1][1]) < 0.5 * float(reports[0][1]) and float(reports[-1][2]) > 0.5


def optimizer_step(rank, problem, optimizer_class, options):
    features, target = (tensor[problem.own(rank)] for tensor in problem.tensors())
    found = []
    for in_groups in (False, True):
        torch.manual_seed(0)
        backbone, loss = nn.Linear(6, 6, dtype=problem.dtype), problem.module()
        if in_groups:
            groups = [{"params": module.parameters()} for module in (backbone, loss)]
            optimizer = optimizer_class(groups, lr=0.1, **options)
        else:
            optimizer = optimizer_class([*backbone.parameters(), *loss.parameters()], lr=0.1)
        loss(backbone(features), target).backward()
        nn.utils.clip_grad_norm_(loss.parameters(), 0.1)
        assert abs(loss.weight.grad.full_tensor().norm() - 0.1) < 1e-6
        optimizer.step()
        found.append(loss.weight.full_tensor().detach())
    assert not torch.equal(found[0], problem.module().weight.full_tensor())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    "optimizer, options",
    ((torch.optim.SGD, {"foreach": True}), (torch.optim.AdamW, {"fused": True})),
    ids=("SGD foreach", "AdamW fused"),
)
def test_optimizer_beside_plain_parameters(two_ranks, optimizer, options):
    two_ranks.run(optimizer_step, Problem((3, 5)), optimizer, options)


def overflow(rank, problem):
    features, target = (tensor[problem.own(rank)] for tensor in problem.tensors())
    loss = problem.module()
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    kept = loss.weight.full_tensor().detach()
    scaler.scale(loss(features, target)).backward()
    if rank == 1:
        loss.weight.grad.to_local()[0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(loss.weight.full_tensor(), kept)
    assert scaler.get_scale() == 4.0


def test_overflow_in_one_shard_holds_back_all(two_ranks):
    two_ranks.run(overflow, Problem((3, 5), dtype=torch.float32))


def compiled(rank, problem):
    """The loss breaks the graph; what stands around it is compiled."""
    features, target = (tensor[problem.own(rank)] for tensor in problem.tensors())
    loss = problem.module()
    function = torch.compile(lambda x, y: 2 * loss(x.tanh(), y), backend="aot_eager")
    torch.testing.assert_close(function(features, target), 2 * loss(features.tanh(), target))


@pytest.mark.slow
def test_compiled_training_step(two_ranks):
    two_ranks.run(compiled, Problem((3, 5)))


MEMORY = """
import torch, torch.distributed as dist
from fewshot_ext.parallel import ClassParallelMarginLoss
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

def peak():  # kB
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

def step(classes):
    loss = ClassParallelMarginLoss(64, classes)
    features, target = torch.randn(512, 64, requires_grad=True), torch.randint(classes, (512,))
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts at what is resident now
    before = peak()
    loss(features, target).backward()
    return peak() - before

step(100)  # autograd and the thread pool allocate on first use
print(step(100_000))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_memory_stays_far_below_the_logits():
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    gradient_kib = 100_000 * 64 * 4 / 1024
    assert int(run.stdout) - gradient_kib <= 32 * 1024  # the logits would take 200 MiB
    assert int(run.stdout) >= 0.9 * gradient_kib  # or nothing was measured


def test_repr_shows_every_setting(one_rank):
    text = repr(Problem((8,)).module(sample_rate=0.5, seed=3))
    assert text == (
        "ClassParallelMarginLoss(in_features=6, num_classes=11, margin=-0.3, scale=30.0, label_smoothing=0.0, "
        "ignore_index=-100, similarity='cosine', reduction='mean', sample_rate=0.5, backbone_gradients='mean', seed=3, "
        "check=True, classes=0..11 of rank 0)"
    )
