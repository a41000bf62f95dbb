"""Test settings that hold everywhere."""

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


@pytest.fixture
def one_thread():
    """For tests on tensors so small that threads mostly wait for each other, and long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
