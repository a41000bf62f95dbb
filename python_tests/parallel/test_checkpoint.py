"""Checkpoints of torch.distributed.checkpoint reload at another number of ranks, and in one process."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from fewshot_ext import MarginCosineLoss

from .problems import Problem

SIZES = {1: (12,), 2: (6, 6), 4: (3, 3, 3, 3)}


def optimizer_of(module):
    return torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.9)


def train(rank, problem, module, optimizer, steps):
    features, target = (tensor[problem.own(rank)] for tensor in problem.tensors())
    for _ in range(steps):
        optimizer.zero_grad()
        module(features, target).backward()
        optimizer.step()


def states(module, optimizer):
    model, of_optimizer = get_state_dict(module, optimizer)
    return {"model": model, "optimizer": of_optimizer}


def train_and_save(rank, ranks, classes, load, save, steps):
    """Steps from ``load``, if any, on; returns the whole weight."""
    problem = Problem(SIZES[ranks], classes)
    module = problem.module(seed=ranks)
    optimizer = optimizer_of(module)
    if load:
        state = states(module, optimizer)
        dcp.load(state, checkpoint_id=load)
        set_state_dict(module, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    train(rank, problem, module, optimizer, steps)
    if save:
        dcp.save(states(module, optimizer), checkpoint_id=save)
    return module.weight.full_tensor().detach().tolist()


@pytest.mark.parametrize("classes", (11, 5))
def test_two_ranks_to_four_to_one(one_rank, two_ranks, four_ranks, tmp_path, classes):
    """Weight and momentum; 5 classes leave the last of four ranks without any."""
    first, second = (str(tmp_path / name) for name in ("first", "second"))
    two_ranks.run(train_and_save, 2, classes, None, first, 2)
    four_ranks.run(train_and_save, 4, classes, first, second, 2)
    found = train_and_save(0, 1, classes, second, None, 2)
    expected = two_ranks.run(train_and_save, 2, classes, None, None, 6)[0]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-6, atol=1e-9)


def load_plain(rank, path, classes):
    module = Problem((6, 6), classes, dtype=torch.float32).module()
    state = module.state_dict()
    dcp.load(state, checkpoint_id=path)
    module.load_state_dict(state)
    return module.weight.full_tensor().tolist()


def test_weight_of_the_one_process_loss(one_rank, two_ranks, tmp_path):
    head = MarginCosineLoss(6, 11)
    dcp.save(head.state_dict(), checkpoint_id=tmp_path / "plain")
    assert two_ranks.run(load_plain, str(tmp_path / "plain"), 11) == [head.weight.tolist()] * 2


def load_full(rank, weight):
    module = Problem((6, 6), len(weight), dtype=torch.float32).module()
    full = {"weight": torch.tensor(weight)} if rank == 0 else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(module, full, options=options)
    return module.weight.full_tensor().tolist()


def test_full_weight_from_the_first_rank(two_ranks):
    weight = torch.randn(11, 6, generator=torch.Generator().manual_seed(0)).tolist()
    assert two_ranks.run(load_full, weight) == [weight] * 2


def save_for_one_process(rank, path):
    module = Problem((6, 6), 11, dtype=torch.float32).module()
    dcp.save(module.state_dict(), checkpoint_id=path)
    return module.weight.full_tensor().tolist()


def test_one_process_loss_takes_the_weight(one_rank, two_ranks, tmp_path):
    expected, _ = two_ranks.run(save_for_one_process, str(tmp_path / "sharded"))
    head = MarginCosineLoss(6, 11)
    state = head.state_dict()
    dcp.load(state, checkpoint_id=tmp_path / "sharded")
    head.load_state_dict(state)
    assert head.weight.tolist() == expected


def save_sampling(rank, path, steps):
    problem = Problem((6, 6), 40)
    module = problem.module(sample_rate=0.2)
    train(rank, problem, module, optimizer_of(module), steps)
    dcp.save(module.state_dict(), checkpoint_id=path)


def test_number_of_the_step_is_part_of_the_state(one_rank, two_ranks, tmp_path):
    two_ranks.run(save_sampling, str(tmp_path / "sampling"), 3)
    module = Problem((6,), 40).module(sample_rate=0.2)
    state = module.state_dict()
    assert set(state) == {"weight", "sampling_step"}
    dcp.load(state, checkpoint_id=tmp_path / "sampling")
    module.load_state_dict(state)
    assert module.sampling_step == 3
