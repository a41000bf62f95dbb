"""Meta-training of DeepEMD on digits: that it learns, what it leaves, and that it goes on where it was."""

import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from fewshot_ext.data import AugmentationConfig, Episodes, ImageArchive, Split, load_digits
from fewshot_ext.evaluation import FrozenBackbone, episode_accuracies, extract_features
from fewshot_ext.heads import DeepEMDHead
from fewshot_ext.models import LocalFeaturesConfig, StructuredClassifierConfig, load_network
from fewshot_ext.training import (
    BackboneConfig,
    MetaTraining,
    MetaTrainingConfig,
    MetaTrainingRun,
    MetricTrainingConfig,
    MetricTrainingRun,
    ValidationConfig,
    meta_train,
    pretrain,
)
from fewshot_ext.training.callbacks import _groups
from fewshot_ext.training.episodic import EpisodeBatches

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def settings():
    """Settings that meta-train a small network from scratch in a second."""
    return MetaTrainingConfig(
        way=3,
        shot=1,
        queries=5,
        episodes_per_step=2,
        steps=4,
        epochs=4,
        learning_rate=0.01,
        backbone=BackboneConfig(width=8, pooled_blocks=2),
        augmentation=AugmentationConfig(rotation=10, translation=0.1),
        classifier=StructuredClassifierConfig(passes=3),
        validation=ValidationConfig(epochs=1, episodes=12, way=3, shot=1, queries=3),
    )


@pytest.fixture(scope="module")
def digits():
    return load_digits().subset(Split.BASE)


@pytest.fixture(scope="module")
def pretrained(tiny, archive, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    pretrain(replace(tiny, epochs=2), archive, folder)
    return folder / "best.ckpt"


@pytest.fixture(scope="module")
def from_checkpoint(settings):
    return replace(settings, backbone=None)


@pytest.fixture(scope="module")
def shades():
    """Noise about a gray that tells the class, in every part of the image."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat_interleave(12)
    gray = (30 + 60 * labels).view(-1, 1, 1, 1)
    noise = torch.randint(-25, 26, (len(labels), 1, 8, 8), generator=generator)
    return ImageArchive(
        images=(gray + noise).to(torch.uint8),
        labels=labels,
        class_names=("a", "b", "c", "d"),
        class_split=torch.zeros(4, dtype=torch.uint8),
    )


FEATURES = {
    "fcn": LocalFeaturesConfig(),
    "pyramid": LocalFeaturesConfig(pyramid=(1, 2)),
    "grid": LocalFeaturesConfig("grid", grids=(1, 2), horizontal_flip=False),
    "sampling": LocalFeaturesConfig("sampling", regions=4, horizontal_flip=False),
}


@pytest.mark.parametrize("kind", FEATURES)
@pytest.mark.parametrize("shot", [1, 2])
def test_the_loss_falls_and_reports_each_epoch(settings, shades, tmp_path, kind, shot):
    losses = []
    config = replace(settings, shot=shot, local_features=FEATURES[kind], augmentation=AugmentationConfig())
    run = MetaTrainingRun(config, shades, tmp_path, checkpoint=None, on_epoch=lambda epoch, loss: losses.append(loss))
    module = run.train()
    assert len(losses) == 4
    assert losses[-1] < 0.8 * losses[0]
    assert module.features_an_image == ({"fcn": 4, "pyramid": 9, "grid": 5, "sampling": 4}[kind], 8)
    assert list(tmp_path.glob("events.out.tfevents*"))


def test_it_learns_to_tell_classes_that_it_has_not_seen(settings, digits, validation_archive, tmp_path):
    run = MetaTrainingRun(
        # A dozen validation episodes tell accuracies apart to 0.1 alone.
        replace(
            settings,
            steps=25,
            augmentation=AugmentationConfig(),
            validation=replace(settings.validation, epochs=4, episodes=100),
        ),
        digits,
        tmp_path,
        checkpoint=None,
        validation=validation_archive,
        seed=1,
    )
    run.train()
    found = run.results()
    assert found["accuracy"] > 0.9
    assert found["best_validation_accuracy"] > found["start_validation_accuracy"] + 0.05
    assert 0 < found["best_validation_interval"] < 0.2


@pytest.mark.parametrize("shot", [1, 2])
def test_the_gradient_reaches_the_backbone_and_is_exact(settings, digits, tmp_path, shot):
    """It passes through costs and weights: every parameter's is what finite differences say."""
    config = replace(settings, shot=shot, classifier=StructuredClassifierConfig(passes=0))
    # In evaluation mode nothing is random.
    module = MetaTrainingRun(config, digits, tmp_path, checkpoint=None).module.double().eval()
    batch = digits[next(iter(EpisodeBatches(digits.labels, 1, way=3, shot=shot, queries=5, seed=3)))]
    module.training_step(batch, 0)["loss"].backward()
    generator = torch.Generator().manual_seed(0)
    for parameter in module.backbone.parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = []
        with torch.no_grad():
            for step in (1e-7, -2e-7):
                parameter.add_(direction, alpha=step)
                values.append(module.training_step(batch, 0)["loss"].item())
        derivative = (parameter.grad * direction).sum().item()
        assert abs(derivative) > 1e-4
        assert (values[0] - values[1]) / 2e-7 == pytest.approx(derivative, rel=1e-4)
        with torch.no_grad():
            parameter.add_(direction, alpha=1e-7)


def test_detached_weights_give_another_gradient(settings, digits, tmp_path):
    gradients = []
    for detach in (False, True):
        module = MetaTrainingRun(
            replace(settings, detach_weights=detach), digits, tmp_path, checkpoint=None
        ).module.eval()
        batch = digits[next(iter(EpisodeBatches(digits.labels, 1, way=3, shot=1, queries=5, seed=3)))]
        module.training_step(batch, 0)["loss"].backward()
        gradients.append(module.backbone.blocks[0][0].weight.grad)
    assert not torch.allclose(*gradients, rtol=1e-2)


def test_an_episode_has_batch_statistics_of_its_own(settings, digits, tmp_path):
    """In training the logits of an episode are those of its own images normalized together, support and query."""
    module = MetaTrainingRun(
        replace(settings, augmentation=AugmentationConfig()), digits, tmp_path, checkpoint=None
    ).module
    batch = digits[next(iter(EpisodeBatches(digits.labels, 1, way=3, shot=1, queries=5, seed=3)))]
    seen = []
    module.backbone.blocks[0][1].register_forward_hook(
        lambda norm, inputs, output: seen.append((norm.training, inputs[0]))
    )
    module.train().training_step(batch, 0)
    assert [(training, len(images)) for training, images in seen] == [(True, 18)]


def test_same_seed_same_weights(settings, digits, tmp_path, weights):
    runs = [
        meta_train(settings, digits, tmp_path / str(k), checkpoint=None, seed=seed) for k, seed in enumerate((5, 5, 6))
    ]
    first, again, other = map(weights, runs)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_global_generator_is_left_alone(settings, digits, tmp_path):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    meta_train(replace(settings, epochs=1), digits, tmp_path, checkpoint=None)
    assert torch.equal(torch.get_rng_state(), before)


def test_training_starts_from_the_checkpoint(from_checkpoint, pretrained, digits, tmp_path, weights):
    run = MetaTrainingRun(from_checkpoint, digits, tmp_path, checkpoint=pretrained, seed=3)
    assert torch.equal(weights(run.module.network), weights(load_network(pretrained)))
    trained = run.train()
    assert not torch.equal(weights(trained.network), weights(load_network(pretrained)))
    # Whatever takes the checkpoint of a pre-training takes this one.
    for name in ("last.ckpt", "best.ckpt"):
        extractor = load_network(tmp_path / name)
        assert torch.equal(extractor(digits.images[:5]), trained(digits.images[:5]))
        assert torch.equal(
            FrozenBackbone.open(tmp_path / name).network(digits.images[:5]), extractor(digits.images[:5])
        )
        assert torch.equal(weights(MetaTraining.from_checkpoint(tmp_path / name)), weights(trained))


def test_a_meta_training_goes_on_from_another(from_checkpoint, pretrained, digits, tmp_path, weights):
    one_shot = meta_train(from_checkpoint, digits, tmp_path / "one", checkpoint=pretrained)
    run = MetaTrainingRun(
        replace(from_checkpoint, shot=2), digits, tmp_path / "two", checkpoint=tmp_path / "one" / "best.ckpt"
    )
    assert torch.equal(weights(run.module), weights(one_shot))


def test_an_embedding_is_left_as_it_is(settings, digits, tmp_path, weights):
    config = replace(settings, backbone=replace(settings.backbone, embedding=4))
    run = MetaTrainingRun(config, digits, tmp_path, checkpoint=None)
    before = run.module.backbone.projection.weight.clone()
    assert torch.equal(run.train().backbone.projection.weight, before)


def test_the_state_has_every_weight_once(settings, digits, tmp_path):
    module = MetaTrainingRun(settings, digits, tmp_path, checkpoint=None).module
    assert {key.partition(".")[0] for key in module.state_dict()} == {"network"}
    module.train()
    assert module.features.training
    assert not module.eval().features.training


# Kills itself in the middle of the third epoch, as the machine would: nothing is flushed, no handler runs.
KILLED = """
import os, signal, sys
import torch
from killed_meta_settings import config, digits
from fewshot_ext.training import MetaTraining, meta_train

torch.set_num_threads(1)
step = MetaTraining.training_step
def training_step(self, batch, batch_index):
    if self.current_epoch == 2 and batch_index == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, batch_index)
MetaTraining.training_step = training_step
meta_train(config, digits, sys.argv[1], checkpoint=None, seed=1)
"""

SETTINGS = """
from fewshot_ext.data import AugmentationConfig, Split, load_digits
from fewshot_ext.models import LocalFeaturesConfig, StructuredClassifierConfig
from fewshot_ext.training import BackboneConfig, MetaTrainingConfig

digits = load_digits().subset(Split.BASE)
config = MetaTrainingConfig(
    way=3, shot=2, queries=4, steps=3, episodes_per_step=2, epochs=4, learning_rate=0.01, decay_epochs=2,
    image_size=16,
    local_features=LocalFeaturesConfig("sampling", regions=3, horizontal_flip=False),
    backbone=BackboneConfig("resnet18", width=4, drop_rate=0.3, drop_block_size=1, drop_ramp_steps=10),
    classifier=StructuredClassifierConfig(passes=2),
    augmentation=AugmentationConfig(rotation=10, translation=0.1),
)
"""


def test_a_killed_run_resumes_to_the_same_weights(tmp_path, monkeypatch, weights):
    """Momentum, the stepped rate, dropout's ramp, the order of the structured layer and random crops all go on."""
    (tmp_path / "killed_meta_settings.py").write_text(SETTINGS)
    (tmp_path / "killed.py").write_text(KILLED)
    command = [sys.executable, str(tmp_path / "killed.py"), str(tmp_path / "killed")]
    killed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    checkpoint = torch.load(tmp_path / "killed" / "last.ckpt", weights_only=True)
    assert checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"] == 2

    monkeypatch.syspath_prepend(tmp_path)
    from killed_meta_settings import config, digits

    resumed = meta_train(config, digits, tmp_path / "killed", checkpoint=None, seed=1, resume=True)
    unbroken = meta_train(config, digits, tmp_path / "unbroken", checkpoint=None, seed=1)
    assert torch.equal(weights(resumed), weights(unbroken))


# 21
def test_a_run_goes_on_for_more_epochs(settings, digits, tmp_path, weights):
    one, two = (replace(settings, epochs=epochs) for epochs in (1, 2))
    options = {"checkpoint": None, "seed": 1}
    meta_train(one, digits, tmp_path / "longer", **options)
    longer = meta_train(two, digits, tmp_path / "longer", **options, resume=True)
    assert torch.equal(weights(longer), weights(meta_train(two, digits, tmp_path / "unbroken", **options)))


def test_a_resumed_run_keeps_what_validation_found(settings, digits, validation_archive, tmp_path):
    def interrupt(epoch, loss):
        if epoch == 3:
            raise KeyboardInterrupt

    options = {"checkpoint": None, "validation": validation_archive}
    unbroken = MetaTrainingRun(settings, digits, tmp_path / "unbroken", **options)
    unbroken.train()
    with pytest.raises(KeyboardInterrupt):
        meta_train(settings, digits, tmp_path / "broken", **options, on_epoch=interrupt)
    resumed = MetaTrainingRun(settings, digits, tmp_path / "broken", **options, resume=True)
    assert resumed.epochs_done == 2
    resumed.train()
    assert resumed.results() == unbroken.results()


def test_the_rate_is_halved_by_steps(settings, digits, tmp_path):
    rates = []

    run = MetaTrainingRun(replace(settings, decay_epochs=2, decay=0.1), digits, tmp_path, checkpoint=None)
    step = run.module.training_step

    def training_step(batch, batch_idx):
        rates.append(run.module.trainer.optimizers[0].param_groups[0]["lr"])
        return step(batch, batch_idx)

    run.module.training_step = training_step
    run.train()
    assert rates == pytest.approx([0.01] * 16 + [0.001] * 16)


def test_several_episodes_a_step_average_their_gradients(settings, digits, tmp_path, weights):
    """Two episodes in one step are one step along the mean of their gradients."""
    config = replace(
        settings, epochs=1, steps=1, momentum=0.0, nesterov=False, weight_decay=0.0, augmentation=AugmentationConfig()
    )
    run = MetaTrainingRun(config, digits, tmp_path, checkpoint=None)
    expected = MetaTrainingRun(config, digits, tmp_path / "by_hand", checkpoint=None).module.train()
    for episode in EpisodeBatches(digits.labels, 2, way=3, shot=1, queries=5, seed=0):
        (expected.training_step(digits[episode], 0)["loss"] / 2).backward()
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.sub_(0.01 * parameter.grad)
    trained = run.train()
    for (name, value), other in zip(trained.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(value, other, msg=name)


def test_validation_is_that_of_the_classifier(settings, digits, validation_archive, tmp_path, monkeypatch):
    config = replace(settings, epochs=1, validation=ValidationConfig(epochs=1, episodes=15, way=4, shot=2, queries=5))
    run = MetaTrainingRun(config, digits, tmp_path, checkpoint=None, validation=validation_archive)
    module, validation = run.module, run.validation
    maps = extract_features(module.features, validation_archive.images)
    head = DeepEMDHead(classifier=settings.classifier)
    expected = episode_accuracies(maps, validation.episodes, head=head)
    assert torch.equal(validation._accuracies(module), expected)
    assert module.training
    mean, interval = validation._measure(module)
    assert mean == expected.mean().item()
    assert interval == pytest.approx(1.96 * expected.std(correction=0).item() / 15**0.5)


def test_one_shot_validation_does_not_depend_on_memory(settings, digits, validation_archive, tmp_path, monkeypatch):
    run = MetaTrainingRun(settings, digits, tmp_path, checkpoint=None, validation=validation_archive)
    whole = run.validation._accuracies(run.module)
    monkeypatch.setattr("fewshot_ext.training.callbacks._MAP_BYTES_AT_ONCE", 4 * 4 * 8 * 30)
    assert torch.equal(run.validation._accuracies(run.module), whole)


def test_groups_name_the_same_images_and_few_of_them():
    support, query = torch.randint(50, (7, 3, 1)), torch.randint(50, (7, 3, 4))
    episodes = Episodes(support=support, query=query, classes=torch.zeros(7, 3, dtype=torch.int64))
    groups = list(_groups(episodes, images_at_once=31))
    assert [len(group.episodes) for group in groups] == [2, 2, 2, 1]
    assert torch.equal(torch.cat([group.images[group.episodes.support] for group in groups]), support)
    assert torch.equal(torch.cat([group.images[group.episodes.query] for group in groups]), query)
    assert all(len(group.images) == len(group.images.unique()) <= 31 for group in groups)
    assert len(list(_groups(episodes, images_at_once=50))) == 1
    assert len(list(_groups(episodes, images_at_once=1))) == 7


def test_episodes_depend_on_seed_and_epoch_alone(digits):
    def drawn(seed, epoch):
        sampler = EpisodeBatches(digits.labels, 6, way=3, shot=2, queries=4, seed=seed)
        sampler.set_epoch(epoch)
        assert len(sampler) == 6
        return torch.stack(list(sampler))

    assert drawn(0, 0).shape == (6, 3, 6)
    assert torch.equal(drawn(1, 2), drawn(1, 2))
    assert not torch.equal(drawn(1, 2), drawn(1, 3))
    assert not torch.equal(drawn(1, 2), drawn(2, 2))
    for episode in drawn(0, 0):
        labels = digits.labels[episode]
        assert (labels == labels[:, :1]).all()
        assert len(labels[:, 0].unique()) == 3
        assert len(episode.unique()) == episode.numel()


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
@pytest.mark.parametrize("shot", [1, 2])
def test_other_precisions_train_close_to_float32(settings, digits, tmp_path, precision, shot):
    losses = []
    for name in ("32-true", precision):
        config = replace(
            settings, shot=shot, precision=name, augmentation=AugmentationConfig(), epochs=1, learning_rate=1e-3
        )
        run = MetaTrainingRun(config, digits, tmp_path / name, checkpoint=None)
        run.train()
        losses.append(run.results()["loss"])
    assert losses[1] != losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=0.2)


def test_channels_last_trains_to_the_same_weights_up_to_rounding(settings, digits, tmp_path, weights):
    double = replace(settings, precision="64-true", epochs=1)
    plain = meta_train(double, digits, tmp_path / "plain", checkpoint=None)
    channels_last = meta_train(replace(double, channels_last=True), digits, tmp_path / "last", checkpoint=None)
    assert channels_last.backbone.blocks[1][0].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(weights(channels_last), weights(plain))


def test_it_goes_on_from_a_metric_training(from_checkpoint, digits, tmp_path):
    backbone = BackboneConfig(width=8, pooled_blocks=2, embedding=4)
    trained = MetricTrainingConfig("triplet", epochs=1, classes_per_batch=3, image_size=8, backbone=backbone)
    module = MetricTrainingRun(trained, digits, tmp_path / "metric").train()
    config = replace(from_checkpoint, augmentation=AugmentationConfig())
    run = MetaTrainingRun(config, digits, tmp_path / "meta", checkpoint=tmp_path / "metric" / "best.ckpt")
    images = digits.images[:3]
    assert torch.equal(run.module.eval().network(images), module.eval().network(images))
    run.train()
    assert FrozenBackbone.from_checkpoint(tmp_path / "meta" / "last.ckpt").network(images).shape == (3, 4)
