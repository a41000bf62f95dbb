"""Files that are neither checkpoints nor classifiers are refused by every reader, without advice to run their code."""

import pickle

import pytest
import torch
from torch import nn

from fewshot_ext import FewShotClassifier
from fewshot_ext.evaluation.backbones import FrozenBackbone
from fewshot_ext.models import as_network, load_network, network

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "content", [b"no checkpoint", b"hello\n", b"", b"\x80\x02cos\nsystem\n(S'true'\ntR.", b"PK\x03\x04cut"]
)
def test_no_message_gives_the_advice_to_run_code(tmp_path, content):
    (tmp_path / "file.ckpt").write_bytes(content)
    for read in (FewShotClassifier.load, load_network, FewShotClassifier):
        with pytest.raises(ValueError, match=r"file\.ckpt (does not hold|is not the checkpoint)") as caught:
            read(tmp_path / "file.ckpt")
        assert "weights_only" not in str(caught.value)
        assert not str(caught.value).rpartition(" ")[2].isdigit(), "the number of a byte tells nobody anything"


def test_torch_does_not_ask_users_to_report_pickles(tmp_path, recwarn):
    (tmp_path / "file.ckpt").write_bytes(pickle.dumps(print))
    with pytest.raises(ValueError, match="it holds something that is not weights and settings"):
        FewShotClassifier(tmp_path / "file.ckpt")
    assert not recwarn.list


@pytest.mark.filterwarnings("ignore")  # torch deprecates what writes the first of them
@pytest.mark.parametrize("kind", ["torchscript", "object"])
def test_files_of_torch_that_are_no_checkpoints(tmp_path, kind):
    path = tmp_path / "file.ckpt"
    if kind == "torchscript":
        torch.jit.script(nn.Linear(2, 2)).save(path)
    else:
        torch.save(nn.Linear(2, 2), path)
    for read in (FewShotClassifier.load, load_network):
        with pytest.raises(ValueError, match=r"file\.ckpt (does not hold|is not the checkpoint)") as caught:
            read(path)
        assert "weights_only" not in str(caught.value)


def test_a_folder_does_not_stand_in_the_way_of_a_model_of_the_same_name(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(network, "timm_network", lambda name, *_: asked.append(name) or as_network(nn.Flatten()))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resnet18").mkdir()
    FrozenBackbone.open("resnet18")
    assert asked == ["resnet18"]
    with pytest.raises(OSError, match="checkpoint cannot be read"):
        FrozenBackbone.open("./resnet18/")
