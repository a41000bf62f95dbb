"""Test settings that hold everywhere."""

import os
import re
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# The same examples on every run: a gate that sometimes closes by itself stops being believed. Search for new
# failures with --hypothesis-profile=explore.
settings.register_profile(
    "repeatable",
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=True,
    database=None,
)
settings.register_profile(
    "explore", settings.get_profile("repeatable"), max_examples=1000, derandomize=False, print_blob=True
)
settings.load_profile("repeatable")


# A shell starts what it puts into the background with Ctrl-C ignored, and every process below inherits that: tests that
# press it would wait for nothing.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Workers of pytest-xdist share the cores.
torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


@pytest.fixture
def one_thread():
    """For tests on tensors so small that threads mostly wait for each other, and long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def real_data(monkeypatch):
    """Gives the path of a file of real data by name, or skips; known sets are looked for beside it."""
    folder = Path(os.environ.get("FEWSHOT_EXT_DATA") or Path(__file__).parents[1] / "../shared/data").resolve()
    monkeypatch.setenv("FEWSHOT_EXT_DATA", str(folder))

    def find(name: str) -> Path:
        if not (folder / name).exists():
            pytest.skip(f"no real data: {folder / name} is missing; set FEWSHOT_EXT_DATA to its folder")
        return folder / name

    return find


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Two checkpoints of one epoch on the digits: small, real, and different."""
    from fewshot_ext.data import Split, load_digits
    from fewshot_ext.training import BackboneConfig, PreTrainingConfig, pretrain

    folder, threads = tmp_path_factory.mktemp("checkpoints"), torch.get_num_threads()
    torch.set_num_threads(1)
    config = PreTrainingConfig(epochs=1, batch_size=64, backbone=BackboneConfig(width=8, pooled_blocks=3))
    for seed in (0, 1):
        pretrain(config, load_digits().subset(Split.BASE), folder / f"seed_{seed}", seed=seed)
    torch.set_num_threads(threads)
    return [folder / f"seed_{seed}" / "last.ckpt" for seed in (0, 1)]


def pytest_terminal_summary(terminalreporter):
    """How many tests ran the CUDA kernels, and on what: a green run without any would look the same."""
    outcomes = {outcome: terminalreporter.getreports(outcome) for outcome in ("passed", "failed")}
    # Names of other tests have the word too: "device: expected auto, cpu or cuda".
    for backend, meaning in (("simt", "CUDA kernels on the CPU, by the emulator"), ("cuda", "CUDA kernels on a GPU")):
        named = re.compile(rf"/ops/test_(\w+_)?{backend}\.py|\[(.*-)?{backend}(-.*)?\]")
        counts = {
            name: sum(bool(named.search(report.nodeid)) for report in reports) for name, reports in outcomes.items()
        }
        told = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        terminalreporter.write_line(f"backend {backend} ({meaning}): {told or 'no test ran'}")
