"""Small runs of the commands that train, and what all of them do with a mistake."""

from pathlib import Path

import torch

from fewshot_ext.cli import main
from fewshot_ext.models.network import read_checkpoint

PRETRAIN = ["pretrain", "--threads", "1", "--margin", "-0.1", "--batch_size", "64"]
PRETRAIN += ["--backbone.width", "4", "--backbone.pooled_blocks", "2"]
PRETRAIN += ["--validation.epochs", "1", "--validation.episodes", "10", "--validation.way", "2"]
PRETRAIN += ["--validation.shot", "1"]

# Needs a checkpoint too.
METATRAIN = ["meta-train", "--threads", "1", "--way", "3", "--queries", "3", "--steps", "2", "--learning_rate", "0.01"]
METATRAIN += ["--validation.episodes", "10", "--validation.way", "2", "--validation.queries", "3"]

METRIC_TRAIN = ["metric-train", "--threads", "1", "--classes_per_batch", "3", "--samples_per_class", "8"]
METRIC_TRAIN += ["--backbone.width", "4", "--backbone.pooled_blocks", "2", "--backbone.embedding", "6"]
METRIC_TRAIN += ["--measurement.epochs", "1", "--measurement.seen_images", "60"]


def check_refused(arguments, message, capsys):
    """One line that names the mistake, exit code 2, and nothing in the folder ``out``."""
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1, printed.err
    assert printed.err.startswith(f"fewshot-ext {arguments[0]}: error: ")
    assert message in printed.err
    assert not list(Path("out").glob("*"))


def same_weights(first, second):
    """Whether two runs, given by their folders, ended with the same weights."""
    a, b = (read_checkpoint(folder / "last.ckpt")["state_dict"] for folder in (first, second))
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())
