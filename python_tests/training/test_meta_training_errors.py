"""Every mistake is found before the first step, and named."""

from dataclasses import replace

import pytest
import torch

from fewshot_ext.data import ImageArchive, Split, load_digits
from fewshot_ext.models import LocalFeaturesConfig, StructuredClassifierConfig
from fewshot_ext.models.network import read_checkpoint
from fewshot_ext.training import (
    BackboneConfig,
    MetaTraining,
    MetaTrainingConfig,
    MetaTrainingRun,
    PreTraining,
    ValidationConfig,
    meta_train,
    pretrain,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def settings():
    return MetaTrainingConfig(way=3, shot=1, queries=3, steps=2, epochs=2, learning_rate=0.01)


@pytest.fixture(scope="module")
def digits():
    return load_digits().subset(Split.BASE)


@pytest.fixture(scope="module")
def folder(tiny, settings, archive, digits, tmp_path_factory):
    """A pre-training and a meta-training from it."""
    folder = tmp_path_factory.mktemp("trained")
    pretrain(replace(tiny, epochs=1), archive, folder / "pre")
    meta_train(settings, digits, folder / "meta", checkpoint=folder / "pre" / "last.ckpt")
    return folder


@pytest.fixture(scope="module")
def checkpoint(folder):
    return folder / "pre" / "last.ckpt"


def refused(message, config, archive, checkpoint, tmp_path, error=ValueError, **options):
    with pytest.raises(error, match=message):
        MetaTrainingRun(config, archive, tmp_path / "out", checkpoint=checkpoint, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"way": 1}, "way: expected at least 2, got 1"),
        *(
            ({name: 0}, f"{name}: expected at least 1, got 0")
            for name in ("shot", "queries", "episodes_per_step", "steps", "epochs", "decay_epochs", "checkpoint_epochs")
        ),
        *(({name: 0.0}, f"{name}: expected a number above 0") for name in ("learning_rate", "decay", "temperature")),
        ({"head": "svm"}, "head: expected one of finetune, protonet, .*, got 'svm'"),
        ({"head": "deepemd@patches"}, "regions after @: expected one of fcn, grid, sampling, got 'patches'"),
        ({"head": "simpleshot@fcn"}, "simpleshot takes feature vectors; the heads for maps are deepemd"),
        *(
            (
                {"head": name},
                f"head: expected one of protonet, .*, deepemd, .*, got '{name}', which trains a classifier",
            )
            for name in ("finetune", "fc_dot", "fc_cosine@grid")
        ),
        ({"head": "simpleshot"}, "got 'simpleshot', which needs the mean feature of the base classes"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a finite number"),
        ({"momentum": 1.0}, r"momentum: expected a number in \[0, 1\)"),
        ({"momentum": 0.0}, "nesterov: expected false without momentum, got momentum 0"),
        ({"weight_decay": -1.0}, "weight_decay: expected at least 0"),
        ({"precision": "8-bit"}, "precision: expected .* got '8-bit'"),
        ({"mean": (0.5,)}, "mean and std: expected both or neither"),
        ({"image_size": 0}, "image_size: expected at least 1"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        MetaTrainingConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"way": 6}, "base classes: way 6 asks for more classes than there are: 5"),
        ({"queries": 200}, r"base classes: 1 shots and 200 queries need 201 images a class, but class \d holds 1\d\d"),
        ({"shot": 190}, r"base classes: 190 shots and 3 queries need 193 images a class"),
    ],
)
def test_episodes_that_cannot_be_drawn(settings, digits, checkpoint, tmp_path, changes, message):
    refused(message, replace(settings, **changes), digits, checkpoint, tmp_path)


def test_validation_episodes_that_cannot_be_drawn(settings, digits, checkpoint, validation_archive, tmp_path):
    config = replace(settings, validation=ValidationConfig(way=6))
    message = "validation classes: way 6 asks for more classes than there are: 5"
    refused(message, config, digits, checkpoint, tmp_path, validation=validation_archive)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (
            LocalFeaturesConfig(pyramid=(1, 3)),
            "local_features.pyramid: expected sides of at most 2, for the feature map is 2 x 2, got 3",
        ),
        (
            LocalFeaturesConfig("grid", grids=(2, 5)),
            "images: expected at least 10 x 10 pixels for a grid of 5 x 5, got 8 x 8",
        ),
    ],
)
def test_regions_without_area(settings, digits, checkpoint, tmp_path, features, message):
    refused(message, replace(settings, local_features=features), digits, checkpoint, tmp_path)


def test_images_too_small_for_the_backbone(settings, digits, tmp_path):
    config = replace(settings, backbone=BackboneConfig(width=4, pooled_blocks=4))
    refused("4 pooled blocks need images of at least 16 x 16, got 8 x 8", config, digits, None, tmp_path)


def test_images_of_other_channels(settings, images32, checkpoint, tmp_path):
    refused("takes images of 1 channels, as it was trained on, got 3", settings, images32, checkpoint, tmp_path)
    config = replace(settings, mean=(0.5,), std=(0.5,))
    refused("one number a channel: the images have 3 channels", config, images32, None, tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("backbone", BackboneConfig()), ("image_size", 16), ("resize_mode", "crop")],
)
def test_settings_of_a_network_beside_a_checkpoint(settings, digits, checkpoint, tmp_path, name, value):
    message = f"{name}: expected null beside a checkpoint, which brings its own, got"
    refused(message, replace(settings, **{name: value}), digits, checkpoint, tmp_path)


def test_files_that_are_no_checkpoints(settings, digits, checkpoint, tmp_path):
    refused("missing.ckpt", settings, digits, tmp_path / "missing.ckpt", tmp_path, error=FileNotFoundError)
    (tmp_path / "text.ckpt").write_text("nothing")
    refused(r"text\.ckpt is not the checkpoint of a", settings, digits, tmp_path / "text.ckpt", tmp_path)
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    refused(r"other\.ckpt is not the checkpoint of a", settings, digits, tmp_path / "other.ckpt", tmp_path)
    whole = checkpoint.read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    refused(r"cut\.ckpt is not the checkpoint of a .*damaged", settings, digits, tmp_path / "cut.ckpt", tmp_path)


def test_a_checkpoint_of_another_network(settings, digits, checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"].pop("network.backbone.blocks.0.0.weight")
    torch.save(content, tmp_path / "part.ckpt")
    refused(
        r"part\.ckpt does not fit this version of fewshot_ext: RuntimeError.*blocks\.0\.0\.weight",
        settings,
        digits,
        tmp_path / "part.ckpt",
        tmp_path,
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_checkpoint_that_is_not_finite(settings, digits, checkpoint, tmp_path, value):
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["network.backbone.blocks.1.0.bias"][2] = value
    torch.save(content, tmp_path / "nan.ckpt")
    message = r"nan\.ckpt holds NaN or infinity in network\.backbone\.blocks\.1\.0\.bias"
    refused(message, settings, digits, tmp_path / "nan.ckpt", tmp_path)


def test_stages_are_told_apart(folder):
    pre, meta = (folder / name / "last.ckpt" for name in ("pre", "meta"))
    with pytest.raises(ValueError, match="is not the checkpoint of a pre-training: it is that of a meta-training"):
        PreTraining.from_checkpoint(meta)
    with pytest.raises(ValueError, match="is not the checkpoint of a meta-training: it is that of a pre-training"):
        MetaTraining.from_checkpoint(pre)
    assert read_checkpoint(meta)["hyper_parameters"]["stage"] == "meta-training"


def test_one_stage_does_not_resume_another(tiny, settings, archive, digits, folder, checkpoint):
    with pytest.raises(ValueError, match="is not the checkpoint of a meta-training: it is that of a pre-training"):
        MetaTrainingRun(settings, digits, folder / "pre", checkpoint=checkpoint, resume=True)
    with pytest.raises(ValueError, match="is not the checkpoint of a pre-training: it is that of a meta-training"):
        pretrain(tiny, archive, folder / "meta", resume=True)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"queries": 4}, {}, "config.queries is 3, not 4"),
        ({"epochs": 1}, {}, "config.epochs is 2, not 1"),
        ({"head": "protonet"}, {}, "config.head is deepemd, not protonet"),
        ({"temperature": 3.0}, {}, "config.temperature is None, not 3.0"),
        ({"classifier": StructuredClassifierConfig(lr=0.5)}, {}, "config.classifier.lr is 0.1, not 0.5"),
        ({}, {"seed": 1}, "seed is 0, not 1"),
    ],
)
def test_resume_refuses_other_settings(settings, digits, folder, checkpoint, changes, options, message):
    config = replace(settings, **changes)
    with pytest.raises(ValueError, match=message):
        MetaTrainingRun(config, digits, folder / "meta", checkpoint=checkpoint, resume=True, **options)


def test_runs_from_before_other_heads_go_on(settings, digits, folder, checkpoint, tmp_path):
    content = torch.load(folder / "meta" / "last.ckpt", weights_only=True)
    own = content["hyper_parameters"]["config"]
    del own["head"], own["validation"]["head"]
    for weighting, head in (("cross_reference", "deepemd"), ("uniform", "deepemd_uniform")):
        own |= {"temperature": 12.5, "weighting": weighting}
        torch.save(content, tmp_path / "last.ckpt")
        assert MetaTraining.from_checkpoint(tmp_path / "last.ckpt").config == replace(settings, head=head)
        config = replace(settings, head=head)
        assert MetaTrainingRun(config, digits, tmp_path, checkpoint=checkpoint, resume=True).epochs_done == 2
    with pytest.raises(ValueError, match=r"config\.head is deepemd_uniform, not deepemd"):
        MetaTrainingRun(settings, digits, tmp_path, checkpoint=checkpoint, resume=True)


def test_resume_refuses_another_start(settings, digits, folder, tiny, archive, tmp_path):
    pretrain(replace(tiny, epochs=1), archive, tmp_path, seed=1)
    with pytest.raises(ValueError, match=r"checkpoint_sha256 is [0-9a-f]{64}, not [0-9a-f]{64}"):
        MetaTrainingRun(settings, digits, folder / "meta", checkpoint=tmp_path / "last.ckpt", resume=True)


def test_resume_may_change_how_often_checkpoints_are_written(settings, digits, folder, checkpoint):
    config = replace(settings, checkpoint_epochs=2)
    assert MetaTrainingRun(config, digits, folder / "meta", checkpoint=checkpoint, resume=True).epochs_done == 2


def test_episodes_that_the_processes_cannot_share(settings, digits, checkpoint, tmp_path):
    message = "episodes_per_step 3 is shared by 2 processes: it has to be a multiple of them"
    refused(message, replace(settings, episodes_per_step=3), digits, checkpoint, tmp_path, devices=2)


@pytest.mark.parametrize("name", ["devices", "num_nodes"])
def test_counts_of_processes(settings, digits, checkpoint, tmp_path, name):
    refused(f"{name}: expected at least 1, got 0", settings, digits, checkpoint, tmp_path, **{name: 0})


def test_a_training_that_diverges_says_so(settings, digits, checkpoint, tmp_path):
    config = replace(settings, learning_rate=1e30, steps=10)
    with pytest.raises(FloatingPointError, match=r"epoch 1.*take a smaller learning_rate"):
        meta_train(config, digits, tmp_path, checkpoint=checkpoint)


def test_a_validation_that_diverges_says_so(settings, digits, checkpoint, validation_archive, tmp_path):
    """One step a run: its loss is still finite, what it leads to is not."""
    config = replace(settings, learning_rate=1e30, steps=1, epochs=1, validation=ValidationConfig(epochs=1, episodes=5))
    with pytest.raises(FloatingPointError, match=r"validation after epoch 1.*take a smaller learning_rate"):
        meta_train(config, digits, tmp_path, checkpoint=checkpoint, validation=validation_archive)


def test_an_archive_with_one_image_too_few(settings, checkpoint, digits, tmp_path):
    few = ImageArchive(
        digits.images[:12], torch.arange(3).repeat(4), ("a", "b", "c"), torch.zeros(3, dtype=torch.uint8)
    )
    MetaTrainingRun(settings, few, tmp_path, checkpoint=checkpoint)
    config = replace(settings, queries=4)
    refused("need 5 images a class, but class 0 holds 4", config, few, checkpoint, tmp_path)
