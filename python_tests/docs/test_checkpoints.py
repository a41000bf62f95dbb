"""The page of other code's checkpoints: each command of it, on small files of each origin."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_cases import bn_inception, libfewshot, meta_baseline, negative_margin, resnet12, torchvision

from fewshot_ext.cli import main
from fewshot_ext.models import ResNet12, load_network
from fewshot_ext.models.layouts import LAYOUTS
from fewshot_ext.models.network import default_file

PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not PAGE.exists(), reason="the pages are not part of a source distribution"),
]


def test_each_command_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "best_model.tar": negative_margin("resnet18")[1],
        "max_acc.pth": {"params": resnet12("module.encoder.").state},
        "resnet50.pth": torchvision(50).state,
        "bn_inception.pth": bn_inception().state,
        "model_best.pth": libfewshot("resnet12").state,
        "max-va.pth": meta_baseline("resnet12")[1],
        "weights.pth": ResNet12(width=4).state_dict(),
    }.items():
        torch.save(content, name)
    shutil.copy(default_file(), "efficientnet-lite0.pth")
    commands = re.findall(r"^fewshot-ext (convert .*)$", PAGE.read_text(), re.MULTILINE)
    origins = set()
    for command in commands:
        arguments = shlex.split(command, comments=True)
        assert main(arguments) == 0
        if "--to" not in arguments:
            load_network(arguments[2])
            settings = torch.load(arguments[2], weights_only=True)["hyper_parameters"]
            origins.add(settings["origin"]["layout"])
    assert origins == LAYOUTS.keys(), "each origin has its command"
