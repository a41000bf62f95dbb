"""A small trained sweep on the digits, which several analyses look at."""

import pytest
import torch
from experiments_cases import FEW, TINY

from fewshot_ext.data import load_digits
from fewshot_ext.experiments.margins import margin_runs
from fewshot_ext.experiments.sweep import Sweep


@pytest.fixture(scope="session")
def digits():
    return load_digits()


@pytest.fixture(scope="session")
def trained(tmp_path_factory, digits):
    """A finished sweep: cosine margins -0.2, 0 and 0.2, and a softmax, with two seeds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    runs = margin_runs("digits", TINY, {"cosine": [-0.2, 0.0, 0.2], "softmax": [0.0]}, [0, 1])
    sweep = Sweep(runs, digits, tmp_path_factory.mktemp("sweep"), measurement=FEW)
    sweep.write_plan()
    sweep.run()
    torch.set_num_threads(threads)
    return sweep
