"""Metric learning that goes on from a network of ImageNet, as the official Anti-Collapse scripts do."""

import sys
import types
from dataclasses import replace

import pytest
import torch
from checkpoint_cases import torchvision

from fewshot_ext.models import BackboneConfig, CheckpointSettings, load_network
from fewshot_ext.models.network import own_network
from fewshot_ext.retrieval import clustering_metrics, retrieval_metrics
from fewshot_ext.training import (
    AntiCollapseConfig,
    MeasurementConfig,
    MetricTraining,
    MetricTrainingConfig,
    MetricTrainingRun,
)

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = MetricTrainingConfig(
    epochs=2,
    classes_per_batch=3,
    samples_per_class=2,
    optimizer="adam",
    warmup_epochs=1,
    freeze_batch_norm=True,
    image_size=32,
    anti_collapse=AntiCollapseConfig("batch_proxy", "official", weight=1.0, base_weight=0.0035),
    backbone=BackboneConfig("resnet50", embedding=16, pooling="average_max"),
    measurement=MeasurementConfig(ks=(1,), map_ks=(10, 1000), clusters=True),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("imagenet") / "resnet50.pth"
    torch.save(torchvision(50).state, path)
    return path


def test_it_starts_from_the_backbone_of_the_checkpoint(checkpoint, images32, tmp_path):
    module = MetricTrainingRun(CONFIG, images32, tmp_path, checkpoint=checkpoint).module
    peer = load_network(checkpoint)
    assert module.backbone.projection.weight.shape == (16, 128)
    for name, value in peer.backbone.state_dict().items():
        assert torch.equal(module.backbone.backbone.state_dict()[name], value), name
    for name in ("mean", "std"):
        assert torch.equal(getattr(module.network.preprocessing, name), getattr(peer.preprocessing, name))
    fresh = MetricTrainingRun(
        replace(CONFIG, mean=(0.5,) * 3, std=(0.25,) * 3), images32, tmp_path, checkpoint=checkpoint
    )
    assert fresh.module.network.preprocessing.mean.flatten().tolist() == [0.5] * 3


@pytest.mark.parametrize("epochs", [1, 2])
def test_what_is_trained_in_each_epoch(checkpoint, images32, tmp_path, epochs):
    """The projection and the proxies in the first, then everything but the statistics of batch normalization."""
    run = MetricTrainingRun(replace(CONFIG, epochs=epochs), images32, tmp_path, checkpoint=checkpoint)
    before = {name: value.clone() for name, value in run.module.state_dict().items()}
    run.train()
    after = run.module.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(after[name], value)}
    inner = {name for name in before if name.startswith("network.backbone.backbone.")}
    statistics = {name for name in inner if "running" in name or "num_batches" in name}
    expected = {"network.backbone.projection.weight", "network.backbone.projection.bias", "criterion.base.proxies"}
    assert changed == (expected if epochs == 1 else expected | inner - statistics)
    embeddings, row = run.module(images32.images), run.history.rows[-1]
    found = retrieval_metrics(embeddings, images32.labels, ks=(1,), map_ks=(10, 1000))
    clusters = clustering_metrics(embeddings, images32.labels)
    assert [row[name] for name in ("map_at_10", "map_at_1000", "nmi", "f1")] == pytest.approx(
        [*found.map_at.values(), *clusters]
    )
    loaded = load_network(tmp_path / "last.ckpt")
    assert torch.equal(loaded.eval()(images32.images), load_network(tmp_path / "best.ckpt")(images32.images))


def test_without_freezing_statistics_move(checkpoint, images32, tmp_path):
    config = replace(CONFIG, freeze_batch_norm=False, warmup_epochs=0, epochs=1)
    run = MetricTrainingRun(config, images32, tmp_path, checkpoint=checkpoint)
    before = run.module.backbone.backbone.stem[0][1].running_mean.clone()
    assert not torch.equal(run.train().backbone.backbone.stem[0][1].running_mean, before)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_weight_decay_is_a_penalty_with_adam_and_decoupled_with_adamw(name, checkpoint, images32, tmp_path):
    config = replace(CONFIG, optimizer=name, weight_decay=0.1)
    module = MetricTrainingRun(config, images32, tmp_path, checkpoint=checkpoint).module
    optimizer = module.configure_optimizers()["optimizer"]
    weight = module.backbone.projection.weight
    before = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    # Of a penalty alone Adam's first step takes the sign, but for its epsilon.
    penalty = 0.1 * before
    step = config.learning_rate * (penalty / (penalty.abs() + 1e-8) if name == "adam" else penalty)
    torch.testing.assert_close(weight.detach(), before - step, rtol=1e-5, atol=1e-8)


def test_an_interrupted_run_resumes_to_the_same_weights(checkpoint, images32, tmp_path, weights):
    def interrupt(epoch, loss):
        raise KeyboardInterrupt

    config = replace(CONFIG, epochs=3)
    unbroken = MetricTrainingRun(config, images32, tmp_path / "unbroken", checkpoint=checkpoint).train()
    with pytest.raises(KeyboardInterrupt):
        MetricTrainingRun(config, images32, tmp_path / "broken", checkpoint=checkpoint, on_epoch=interrupt).train()
    resumed = MetricTrainingRun(config, images32, tmp_path / "broken", checkpoint=checkpoint, resume=True)
    assert torch.equal(weights(resumed.train()), weights(unbroken))
    other = tmp_path / "other.pth"
    torch.save({name: value + 1 for name, value in torchvision(50).state.items()}, other)
    with pytest.raises(ValueError, match=r"cannot resume .*: its checkpoint_sha256 is"):
        MetricTrainingRun(config, images32, tmp_path / "broken", checkpoint=other, resume=True)


def test_a_metric_training_goes_on_from_another(checkpoint, images32, tmp_path):
    MetricTrainingRun(CONFIG, images32, tmp_path / "first", checkpoint=checkpoint).train()
    first = MetricTraining.from_checkpoint(tmp_path / "first" / "last.ckpt")
    wider = replace(CONFIG, backbone=BackboneConfig(embedding=24))  # the name is the checkpoint's
    second = MetricTrainingRun(wider, images32, tmp_path / "second", checkpoint=tmp_path / "first" / "last.ckpt").module
    assert second.backbone.projection.out_features == 24
    for name, value in first.backbone.backbone.state_dict().items():
        assert torch.equal(second.backbone.backbone.state_dict()[name], value)


def stand_in(state):
    """What stands for timm: a model with this state_dict."""
    model = torch.nn.Module()
    for name, value in state.items():
        *path, leaf = name.split(".")
        part = model
        for step in path:
            if not hasattr(part, step):
                part.add_module(step, torch.nn.Module())
            part = getattr(part, step)
        part.register_buffer(leaf, value)
    timm = types.ModuleType("timm")
    timm.is_model, timm.create_model = lambda name: name == "resnet50", lambda *_, **__: model
    config = {"input_size": (3, 224, 224), "mean": (0.5,) * 3, "std": (0.25,) * 3}
    timm.data = types.SimpleNamespace(resolve_model_data_config=lambda model: config)
    return timm


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"image_size": None}, (224, 256)),  # as torchvision evaluates
        ({"image_size": 32}, (32, 36)),
        ({"image_size": 32, "resize": 40}, (32, 40)),
    ],
)
def test_pictures_keep_their_shape_as_the_checkpoint_has_it(changes, expected, checkpoint, images32, tmp_path):
    module = MetricTrainingRun(replace(CONFIG, **changes), images32, tmp_path, checkpoint=checkpoint).module
    preprocessing = module.network.preprocessing
    assert (preprocessing.image_size, preprocessing.resize) == expected
    assert preprocessing.resize_mode == module.network.resize_mode == "crop"


def test_it_starts_from_a_model_of_timm(checkpoint, images32, tmp_path, monkeypatch):
    state = {name: value for name, value in torchvision(50).state.items() if not name.startswith("fc.")}
    monkeypatch.setitem(sys.modules, "timm", stand_in(state))
    monkeypatch.setattr("fewshot_ext._extras.is_installed", lambda name: True)
    module = MetricTrainingRun(CONFIG, images32, tmp_path, checkpoint="timm:resnet50").module
    expected = load_network(checkpoint).backbone.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in module.backbone.backbone.state_dict().items())
    assert module.network.preprocessing.std.flatten().tolist() == [0.25] * 3
    config = own_network("timm:resnet50", CheckpointSettings(image_size=64, resize=80)).made_from["network"]
    assert (config["image_size"], config["resize"], config["mean"]) == (64, 80, (0.5,) * 3)
    monkeypatch.setitem(sys.modules, "timm", stand_in({"patch.weight": torch.ones(2, 2)}))
    with pytest.raises(ValueError, match="timm:resnet50 is no backbone of this package: it fits no known layout"):
        MetricTrainingRun(CONFIG, images32, tmp_path, checkpoint="timm:resnet50")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": BackboneConfig("resnet18", embedding=4)}, r"backbone\.name: expected resnet50, as checkpoint"),
        ({"backbone": BackboneConfig(width=8, embedding=4)}, r"backbone\.width: expected 4, as checkpoint .*, got 8"),
    ],
)
def test_another_backbone_than_the_checkpoints_is_refused(changes, message, checkpoint, images32, tmp_path):
    with pytest.raises(ValueError, match=message):
        MetricTrainingRun(replace(CONFIG, **changes), images32, tmp_path, checkpoint=checkpoint)


def test_images_of_other_channels_are_refused(checkpoint, images32, tmp_path):
    gray = replace(images32, images=images32.images[:, :1])
    with pytest.raises(ValueError, match="takes images of 3 channels, as it was trained on, got 1"):
        MetricTrainingRun(CONFIG, gray, tmp_path, checkpoint=checkpoint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer: expected one of adam, adamw, got 'sgd'"),
        ({"warmup_epochs": -1}, "warmup_epochs: expected at least 0"),
        ({"warmup_epochs": 1, "backbone": BackboneConfig()}, r"warmup_epochs: expected 0 without backbone\.embedding"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        MetricTrainingConfig(**changes)
