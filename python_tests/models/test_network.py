"""Networks and their checkpoints, of this version and of 0.1, whose files in ``fixtures`` were written by it."""

import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fewshot_ext import FewShotClassifier
from fewshot_ext.data import ImageInput, Split, load_digits
from fewshot_ext.models import BackboneConfig, NetworkConfig, as_network, build_network, load_network
from fewshot_ext.models.network import read_checkpoint, rebuild_network
from fewshot_ext.training import MeasurementConfig, MetaTrainingConfig, MetricTrainingConfig, PreTrainingConfig

OLD = Path(__file__).parents[1] / "fixtures" / "version_0_1"
BACKBONE = BackboneConfig(width=4, pooled_blocks=1)
CONFIG = NetworkConfig(BACKBONE, image_shape=(1, 8, 8), mean=(0.5,), std=(0.25,))

pytestmark = pytest.mark.usefixtures("one_thread")


def novel():
    return load_digits().subset(Split.NOVEL).images


@pytest.mark.parametrize("name", ["cosine", "softmax", "metric", "meta"])
def test_checkpoints_of_version_0_1_give_the_features_that_it_gave(name):
    network = load_network(OLD / f"{name}.ckpt")
    expected = torch.load(OLD / "expected.pt", weights_only=True)[name]
    torch.testing.assert_close(network(novel()[:4]), expected)
    assert network.similarity == ("dot" if name == "softmax" else "cosine")
    assert (network.channels, network.image_size) == (1, 8)


def test_a_checkpoint_that_says_nothing_of_resizing_has_the_old_one():
    values = asdict(replace(CONFIG, image_size=20))
    del values["resize"], values["resize_mode"]
    network = build_network(NetworkConfig.from_dict(values))
    assert (network.preprocessing.resize, network.preprocessing.resize_mode) == (23, "stretch")
    assert (network.image_size, network.resize_mode) == (23, None)
    kept = rebuild_network(build_network(replace(CONFIG, image_size=20, resize=21, resize_mode="crop")).content())
    assert (kept.preprocessing.resize, kept.image_size, kept.resize_mode) == (21, 21, "crop")


def test_a_classifier_of_version_0_1_gives_the_scores_that_it_gave(tmp_path):
    classifier = FewShotClassifier.load(OLD / "classifier.pt")
    expected = torch.load(OLD / "expected.pt", weights_only=True)["classifier"]
    torch.testing.assert_close(classifier.decision_function(novel()[:4]), expected)
    classifier.save(tmp_path / "again.pt")
    again = FewShotClassifier.load(tmp_path / "again.pt")
    assert torch.equal(again.decision_function(novel()[:4]), classifier.decision_function(novel()[:4]))


def run_of_version_0_1(name, archive, directory):
    from fewshot_ext.training import MetaTrainingRun, MetricTrainingRun, PreTrainingRun

    options = {"seed": 3, "resume": True}
    if name == "metric":
        config = MetricTrainingConfig(
            loss="proxy_anchor",
            epochs=2,
            classes_per_batch=4,
            samples_per_class=4,
            backbone=replace(BACKBONE, embedding=3),
            measurement=MeasurementConfig(ks=(1,)),
        )
        return MetricTrainingRun(config, archive, directory, **options)
    if name == "meta":
        config = MetaTrainingConfig(way=3, queries=2, steps=3, epochs=2)
        return MetaTrainingRun(config, archive, directory, checkpoint=OLD / "metric.ckpt", **options)
    config = PreTrainingConfig(
        similarity="dot" if name == "softmax" else "cosine",
        margin=-0.1,
        scale=10.0,
        epochs=2,
        batch_size=32,
        backbone=BACKBONE,
        label_smoothing=0.1,
    )
    return PreTrainingRun(config, archive, directory, **options)


@pytest.mark.parametrize("name", ["cosine", "softmax", "metric", "meta"])
def test_a_run_of_version_0_1_goes_on(name, tmp_path):
    base = load_digits().subset(Split.BASE)
    archive = replace(base, images=base.images[:60], labels=base.labels[:60])
    shutil.copy(OLD / f"{name}_broken.ckpt", tmp_path / "last.ckpt")
    run = run_of_version_0_1(name, archive, tmp_path)
    assert run.epochs_done == 1
    run.train()
    found, expected = (read_checkpoint(path)["state_dict"] for path in (tmp_path / "last.ckpt", OLD / f"{name}.ckpt"))
    assert found.keys() == expected.keys()
    # A bias before a batch normalization has no gradient but rounding errors, of which Adam makes steps of full length:
    # they are another processor's, and the running mean follows them.
    noise = re.compile(r"blocks\.\d\.(0\.bias|1\.running_mean)")
    for key, value in expected.items():
        bounds = {"atol": 5e-3, "rtol": 0} if noise.search(key) else {}
        torch.testing.assert_close(found[key], value, **bounds, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"loss": "triplet"}, "triplets were drawn by another rule"),
        ({"image_size": 6, "augmentation": {"crop_scale": 0.5}}, "random crops were not antialiased"),
        ({"image_size": 6, "local_features": {"name": "grid"}}, "regions were cut from resized images"),
    ],
)
def test_a_run_of_version_0_1_that_would_go_on_otherwise_is_refused(changes, difference, tmp_path):
    base = load_digits().subset(Split.BASE)
    content = torch.load(OLD / "cosine_broken.ckpt", weights_only=True)
    content["hyper_parameters"]["config"] |= changes
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=f"began with an earlier version, in which {difference}: take another output"):
        run_of_version_0_1("cosine", base, tmp_path).train()


def test_content_makes_the_network_again():
    network = build_network(replace(CONFIG, image_size=16, similarity="dot")).eval()
    again = rebuild_network(network.content())
    images = novel()[:3]
    assert torch.equal(again(images), network(images))
    assert torch.equal(again.feature_map(images), network.feature_map(images))
    assert (again.similarity, again.image_size) == ("dot", 18)


def test_a_module_of_ones_own():
    images = novel()[:3]
    network = as_network(nn.Flatten())
    torch.testing.assert_close(network(images), images.flatten(1) / 255)
    assert network.content() == {}
    with pytest.raises(TypeError, match="Flatten has no method feature_map"):
        network.feature_map(images)
    with pytest.raises(ValueError, match="preprocessing: expected none for 'Network', which brings its own"):
        as_network(network, ImageInput((0.5,), (0.25,)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_shape": (8, 8)}, r"image_shape: expected \(channels, height, width\)"),
        ({"image_shape": (3, 8, 8)}, r"image_shape: expected .* and a mean and std for each channel"),
        ({"image_shape": (1, 0, 8)}, "image_shape: expected"),
        ({"similarity": "euclidean"}, "similarity: expected one of cosine, dot, got 'euclidean'"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


def test_images_too_small_for_the_backbone():
    with pytest.raises(ValueError, match="at least 16 x 16, got 8 x 8"):
        build_network(replace(CONFIG, backbone=BackboneConfig(pooled_blocks=4)))


def test_the_layout_of_a_later_version_is_refused(tmp_path):
    content = torch.load(OLD / "cosine.ckpt", weights_only=True)
    content = {**read_checkpoint(OLD / "cosine.ckpt"), **{"state_dict": content["state_dict"]}}
    content["hyper_parameters"]["format_version"] = 3
    torch.save(content, tmp_path / "later.ckpt")
    with pytest.raises(ValueError, match=r"later\.ckpt has the layout 3 of a later fewshot_ext"):
        load_network(tmp_path / "later.ckpt")
