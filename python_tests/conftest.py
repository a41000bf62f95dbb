import pytest
import torch


@pytest.fixture
def one_thread():
    """For tests on tensors so small that threads mostly wait for each other, and long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
