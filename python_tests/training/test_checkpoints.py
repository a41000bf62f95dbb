import errno
import json
import resource
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from fewshot_ext.data import ImageArchive
from fewshot_ext.models import load_network
from fewshot_ext.training import BackboneConfig, PreTraining, pretrain
from fewshot_ext.training.checkpoints import AtomicCheckpointIO

pytestmark = pytest.mark.usefixtures("one_thread")

# Kills itself in the middle of the third epoch, as the machine would: nothing is flushed, no handler runs.
KILLED = """
import os, signal, sys
import torch
from killed_settings import archive, config
from fewshot_ext.training.pretraining import PreTraining, pretrain

torch.set_num_threads(1)
step, count = PreTraining.training_step, 0
def training_step(self, batch, batch_index):
    if self.current_epoch == 2 and batch_index == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, batch_index)
PreTraining.training_step = training_step
pretrain(config, archive, sys.argv[1], seed=1)
"""

SETTINGS = """
import torch
from fewshot_ext.data import AugmentationConfig, Split, load_digits
from fewshot_ext.training import BackboneConfig, PreTrainingConfig

archive = load_digits().subset(Split.BASE).hold_out(0.2, torch.Generator().manual_seed(0))[1]
config = PreTrainingConfig(
    epochs=4,
    batch_size=32,
    backbone=BackboneConfig("resnet18", width=4, drop_rate=0.3, drop_block_size=2, drop_ramp_steps=10),
    augmentation=AugmentationConfig(rotation=10, translation=0.1),
)
"""


def test_a_killed_run_resumes_to_the_same_weights(tmp_path, monkeypatch, weights):
    (tmp_path / "killed_settings.py").write_text(SETTINGS)
    (tmp_path / "killed.py").write_text(KILLED)
    command = [sys.executable, str(tmp_path / "killed.py"), str(tmp_path / "killed")]
    killed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    checkpoint = torch.load(tmp_path / "killed" / "last.ckpt", weights_only=True)
    assert checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"] == 2

    monkeypatch.syspath_prepend(tmp_path)
    from killed_settings import archive, config

    resumed = pretrain(config, archive, tmp_path / "killed", seed=1, resume=True)
    unbroken = pretrain(config, archive, tmp_path / "unbroken", seed=1)
    assert torch.equal(weights(resumed), weights(unbroken))


def test_a_full_disk_leaves_the_checkpoint_before(tiny, archive, tmp_path):
    """A real limit on the size of files: the third checkpoint is cut short while it is written."""
    unbroken = pretrain(tiny, archive, tmp_path / "unbroken")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(epoch, loss):
        if epoch == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))

    try:
        with pytest.raises(OSError, match=r"cannot write the checkpoint .*last\.ckpt: .*before it is whole"):
            pretrain(tiny, archive, tmp_path / "full", on_epoch=limit)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in (tmp_path / "full").glob("*.ckpt")] == ["last.ckpt"]
    assert not list((tmp_path / "full").glob(".last*"))
    resumed = pretrain(tiny, archive, tmp_path / "full", resume=True)
    torch.testing.assert_close(resumed.state_dict(), unbroken.state_dict(), rtol=0, atol=0)


def test_a_failing_first_write_says_so(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", refuse)
    with pytest.raises(OSError, match=r"cannot write the checkpoint .*new\.ckpt: .*No space left on device$"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "new.ckpt")
    assert not list(tmp_path.iterdir())


def test_ctrl_c_while_a_checkpoint_is_written_is_ctrl_c(tmp_path, monkeypatch):
    """A real file object that is interrupted in the middle: torch's writer then raises an error of its own."""
    path = tmp_path / "last.ckpt"
    path.write_text("before")
    save = torch.save

    def interrupted(checkpoint, file):
        class Interrupting:
            def write(self, data):
                if file.tell() > 1000:
                    raise KeyboardInterrupt
                return file.write(data)

            flush = file.flush

        save(checkpoint, Interrupting())

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        AtomicCheckpointIO().save_checkpoint({"weight": torch.zeros(10_000)}, path)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    assert path.read_text() == "before"


@pytest.fixture(scope="module")
def trained(tiny, archive, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return pretrain(tiny, archive, folder), folder / "last.ckpt"


def test_load_network_gives_the_same_features(trained, archive):
    module, path = trained
    backbone = load_network(path)
    assert not backbone.training
    assert torch.equal(backbone(archive.images), module(archive.images))
    features = backbone.feature_map(archive.images[:2])
    assert features.shape == (2, backbone.backbone.out_channels, *backbone.backbone.map_size(8, 8))


def test_images_are_brought_to_the_size_of_the_training(tiny, archive, tmp_path):
    config = replace(tiny, epochs=1, image_size=20, backbone=BackboneConfig(width=4, pooled_blocks=4))
    module = pretrain(config, archive, tmp_path)
    backbone = load_network(tmp_path / "last.ckpt")
    assert torch.equal(backbone(archive.images), module(archive.images))
    larger = torch.randint(256, (2, 1, 31, 40), dtype=torch.uint8)
    assert backbone(larger).shape == (2, backbone.out_features) == (2, 4)
    assert backbone.feature_map(larger).shape == (2, 4, 1, 1)


def test_load_network_needs_neither_lightning_nor_kornia(trained, tmp_path):
    script = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {{"lightning", "kornia", "tensorboard", "tqdm", "jsonargparse"}}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import torch
from fewshot_ext.models import load_network
print(list(load_network({str(trained[1])!r})(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).shape))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [2, 32]


@pytest.mark.parametrize("read", [load_network, PreTraining.from_checkpoint])
def test_files_that_are_no_checkpoints_are_named(tmp_path, read):
    with pytest.raises(FileNotFoundError, match=r"checkpoint cannot be read: .*missing\.ckpt"):
        read(tmp_path / "missing.ckpt")
    with pytest.raises(IsADirectoryError, match=f"checkpoint cannot be read: .*{tmp_path.name}"):
        read(tmp_path)
    for name, content in (("tensor.ckpt", torch.zeros(2)), ("other.ckpt", {"state_dict": {}}), ("list.ckpt", [1])):
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} is not the checkpoint of a pre-training"):
            read(tmp_path / name)
    torch.save(
        {"hyper_parameters": {"config": {}, "image_size": (1, 8, 8)}, "state_dict": {}, "x": ImageArchive},
        tmp_path / "code.ckpt",
    )
    with pytest.raises(ValueError, match=r"code\.ckpt is not the checkpoint of a pre-training") as refused:
        read(tmp_path / "code.ckpt")
    assert "weights_only" not in str(refused.value), "nobody should be advised to run what is in the file"


@pytest.mark.parametrize("read", [load_network, PreTraining.from_checkpoint])
def test_a_checkpoint_cut_short_is_named(trained, tmp_path, read):
    whole = trained[1].read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.ckpt").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.ckpt is not the checkpoint of a pre-training"):
            read(tmp_path / "cut.ckpt")


def test_a_missing_extra_is_named(monkeypatch):
    """Before any module of the room imports Lightning by itself."""
    from fewshot_ext import _extras, training

    monkeypatch.setattr(_extras, "is_installed", lambda name: name != "lightning")
    for name in ("PreTraining", "MetaTrainingRun", "MetricTraining"):
        with pytest.raises(ImportError, match=r"'lightning' is missing; pip install 'fewshot_ext\[train\]'"):
            getattr(training, name)
