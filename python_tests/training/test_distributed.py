import json
import subprocess
import sys

import pytest
import torch
from torchrun import TORCHRUN, run_script

from fewshot_ext.cli import main
from fewshot_ext.data import ShuffledBatches
from fewshot_ext.training.distributed import RankBatches

pytestmark = pytest.mark.usefixtures("one_thread")

HEAD = """
import sys
from dataclasses import replace
import torch
from torch import nn
from fewshot_ext.data import Split, load_digits
from fewshot_ext.training import (
    BackboneConfig, MetaTrainingConfig, MetaTrainingRun, PreTrainingConfig, PreTrainingRun, ValidationConfig
)

torch.set_num_threads(1)
directory, devices = sys.argv[1], int(sys.argv[2])
digits = load_digits()
base, novel = digits.subset(Split.BASE), digits.subset(Split.NOVEL)
backbone = BackboneConfig(width=6, pooled_blocks=2)
validation = ValidationConfig(epochs=1, episodes=20, way=3, shot=1, queries=3)
"""

# 75 images in batches of 16 leave a ragged rest of 11, of which one process has 6 and the other 5.
PRE_TRAINING = """
base = replace(base, images=base.images[:75], labels=base.labels[:75])
config = PreTrainingConfig(
    epochs=3, batch_size=16, precision="64-true", backbone=backbone, validation=validation
)
run = PreTrainingRun(config, base, directory, validation=novel, devices=devices)
"""

# Four episodes a step, of which each process has two.
META_TRAINING = """
config = MetaTrainingConfig(
    way=3, queries=4, steps=3, episodes_per_step=4, epochs=2, learning_rate=0.01, precision="64-true",
    backbone=backbone, validation=validation,
)
run = MetaTrainingRun(config, base, directory, checkpoint=None, validation=novel, devices=devices)
"""

# Batch normalization takes its statistics over a process's own share on CPUs, and augmentation draws other numbers in
# each process; without the two, several processes must compute what one computes.
TAIL = """
for block in run.module.backbone.blocks:
    block[1] = nn.Identity()
seen, step = [], run.module.training_step

def training_step(batch, batch_idx):
    seen.append(batch[0].flatten(1).sum(1).tolist())
    return step(batch, batch_idx)

run.module.training_step = training_step
module = run.train()
found = {"weights": module.state_dict(), "results": run.results(), "seen": seen}
torch.save(found, f"{directory}-{run.module.global_rank}.pt")
"""


def check_two_processes_train_as_one(source, tmp_path):
    """Returns the images of every batch that one process sees, and those that each of two sees."""
    script, source = tmp_path / "script.py", HEAD + source + TAIL
    script.write_text(source)
    one = subprocess.run([sys.executable, str(script), str(tmp_path / "one"), "1"], capture_output=True, text=True)
    assert one.returncode == 0, one.stderr
    run_script(tmp_path / "processes.py", source, str(tmp_path / "two"), "2")
    single, first, second = (torch.load(tmp_path / name) for name in ("one-0.pt", "two-0.pt", "two-1.pt"))
    torch.testing.assert_close(first["weights"], single["weights"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(second["weights"], first["weights"], rtol=0, atol=0)
    assert first["results"] == pytest.approx(single["results"], rel=1e-6)
    assert second["results"] == pytest.approx(first["results"], rel=1e-6)
    # One process writes: a second one would leave a log of its own.
    assert len(list((tmp_path / "two").glob("events.out.tfevents*"))) == 1
    return single["seen"], first["seen"], second["seen"]


def test_two_processes_pre_train_as_one(tmp_path):
    single, first, second = check_two_processes_train_as_one(PRE_TRAINING, tmp_path)
    assert [len(batch) for batch in first[:5]] == [8, 8, 8, 8, 6]
    for mine, theirs, both in zip(first, second, single, strict=True):
        assert mine + theirs == both


def test_two_processes_meta_train_as_one(tmp_path):
    single, first, second = check_two_processes_train_as_one(META_TRAINING, tmp_path)
    assert single[::2] == first
    assert single[1::2] == second


@pytest.mark.slow
def test_the_command_under_torchrun_speaks_once(tmp_path):
    output = tmp_path / "out"
    command = ["-m", "fewshot_ext.cli", "pretrain", "--data", "digits", "--output", str(output), "--margin", "-0.1"]
    command += ["--epochs", "2", "--threads", "1", "--backbone.pooled_blocks", "2", "--backbone.width", "4"]
    done = subprocess.run([*TORCHRUN, *command, "--devices", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained 2 epochs") == 1
    assert done.stderr.count("epoch 2/2: loss") == 1
    assert "Initializing distributed" not in done.stderr
    assert json.loads((output / "run.json").read_text())["devices"] == 2


def test_a_count_that_torchrun_did_not_start_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["pretrain", "--data", "digits", "--output", str(tmp_path), "--margin", "-0.1"]) == 2
    error = capsys.readouterr().err
    assert "devices times num_nodes: expected 2, the processes that torchrun started, got 1 x 1" in error


@pytest.mark.parametrize(("length", "batch_size", "world_size"), [(75, 16, 2), (64, 16, 3), (54, 16, 4), (33, 16, 2)])
def test_the_processes_share_the_batches_of_one(length, batch_size, world_size):
    whole = ShuffledBatches(length, batch_size, seed=3)
    shares = [RankBatches(ShuffledBatches(length, batch_size, seed=3), rank, world_size) for rank in range(world_size)]
    for sampler in (whole, *shares):
        sampler.set_epoch(2)
    for index, (batch, *parts) in enumerate(zip(whole, *shares, strict=True)):
        assert torch.equal(torch.cat(parts), batch)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert shares[0].total(index) == len(batch)
    assert len(whole) == len(shares[0])


def test_a_rest_too_small_for_all_processes_is_dropped():
    whole = ShuffledBatches(19, 8, seed=0)
    shares = [RankBatches(ShuffledBatches(19, 8, seed=0), rank, 4) for rank in range(4)]
    assert (len(whole), len(shares[0])) == (3, 2)
    assert [[len(batch) for batch in share] for share in shares] == [[2, 2]] * 4


def test_a_batch_too_small_for_all_processes_is_refused():
    with pytest.raises(ValueError, match="batch_size 6 is shared by 4 processes: it has to be at least 8"):
        RankBatches(ShuffledBatches(20, 6, seed=0), 0, 4)
