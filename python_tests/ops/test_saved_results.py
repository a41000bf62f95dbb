"""Results as files: what a process saves, another reads with the defaults of torch.load."""

import subprocess
import sys

import pytest
import torch

import fewshot_ext
from fewshot_ext.losses.anti_collapse import AntiCollapseTerms
from fewshot_ext.models import Match

READ = """
import sys
import torch
import {package}
result = torch.load(sys.argv[1])
print(type(result).__name__, *result._fields, *(part.sum().item() for part in result))
"""

RESULTS = {
    "EMD": ("fewshot_ext", lambda: fewshot_ext.emd(torch.eye(3))),
    "RateReduction": ("fewshot_ext", lambda: fewshot_ext.rate_reduction(torch.eye(4), torch.tensor([0, 0, 1, 1]))),
    "AntiCollapseTerms": ("fewshot_ext", lambda: AntiCollapseTerms(*torch.ones(4))),
    "Match": ("fewshot_ext.models", lambda: Match(torch.eye(2), *torch.ones(2, 2))),
}


@pytest.mark.parametrize("name", RESULTS)
def test_another_process_reads_a_saved_result(name, tmp_path):
    package, compute = RESULTS[name]
    result = compute()
    torch.save(result, tmp_path / "result.pt")
    command = [sys.executable, "-c", READ.format(package=package), tmp_path / "result.pt"]
    read = subprocess.run(command, capture_output=True, text=True, check=False)
    assert read.returncode == 0, read.stderr
    found = read.stdout.split()
    assert found[: 1 + len(result)] == [name, *result._fields]
    assert [float(part) for part in found[1 + len(result) :]] == [part.sum().item() for part in result]
