import pytest
import torch.distributed as dist

from .ranks import Ranks


@pytest.fixture(scope="session")
def two_ranks():
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def four_ranks():
    ranks = Ranks(4)
    yield ranks
    ranks.stop()


@pytest.fixture(params=(2, 4), ids=("2 ranks", "4 ranks"))
def ranks(request, two_ranks, four_ranks):
    return two_ranks if request.param == 2 else four_ranks


@pytest.fixture
def one_rank():
    """This process as a group of its own."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
