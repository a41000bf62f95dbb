import math
from dataclasses import replace
from statistics import fmean

import pytest
import torch

from fewshot_ext.training import (
    BackboneConfig,
    PreTraining,
    PreTrainingConfig,
    PreTrainingRun,
    pretrain,
)
from fewshot_ext.training.schedule import sgd_in_steps

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_training_lowers_the_loss_and_reports_each_epoch(tiny, archive, tmp_path, similarity):
    epochs, losses = [], []
    pretrain(
        replace(tiny, similarity=similarity, scale=5.0, margin=0.0),
        archive,
        tmp_path,
        on_epoch=lambda epoch, loss: (epochs.append(epoch), losses.append(loss)),
    )
    assert epochs == [1, 2, 3, 4]
    assert losses[-1] < losses[0]
    assert list(tmp_path.glob("events.out.tfevents*"))


def test_same_seed_same_weights(tiny, archive, tmp_path, weights):
    first, again, other = (pretrain(tiny, archive, tmp_path / str(k), seed=seed) for k, seed in enumerate((5, 5, 6)))
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))


def test_the_global_generator_is_left_alone(tiny, archive, tmp_path):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    pretrain(replace(tiny, epochs=1), archive, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("stop_after", [1, 3])
def test_an_interrupted_run_resumes_to_the_same_weights(tiny, archive, tmp_path, stop_after, weights):
    def interrupt(epoch, loss):
        if epoch > stop_after:
            raise KeyboardInterrupt

    unbroken = pretrain(tiny, archive, tmp_path / "unbroken", seed=1)
    with pytest.raises(KeyboardInterrupt):
        pretrain(tiny, archive, tmp_path / "broken", seed=1, on_epoch=interrupt)
    epochs = []
    resumed = pretrain(
        tiny,
        archive,
        tmp_path / "broken",
        seed=1,
        resume=True,
        on_epoch=lambda epoch, loss: epochs.append(epoch),
    )
    assert epochs[0] == stop_after
    assert torch.equal(weights(resumed), weights(unbroken))


# 21
def test_more_epochs_where_their_number_does_not_decide_the_rates(tiny, archive, tmp_path, weights):
    config = in_steps(tiny)
    unbroken = pretrain(replace(config, epochs=3), archive, tmp_path / "unbroken", seed=1)
    pretrain(replace(config, epochs=1), archive, tmp_path / "sgd", seed=1)
    longer = pretrain(replace(config, epochs=3), archive, tmp_path / "sgd", seed=1, resume=True)
    assert torch.equal(weights(longer), weights(unbroken))
    pretrain(replace(tiny, epochs=1), archive, tmp_path / "adam", seed=1)
    with pytest.raises(ValueError, match=r"its config\.epochs is 1, not 3"):
        pretrain(replace(tiny, epochs=3), archive, tmp_path / "adam", seed=1, resume=True)


def test_a_finished_run_resumes_without_training(tiny, archive, tmp_path, weights):
    finished = pretrain(tiny, archive, tmp_path, seed=1)
    again = pretrain(tiny, archive, tmp_path, seed=1, resume=True)
    assert torch.equal(weights(again), weights(finished))


def test_a_checkpoint_gives_the_module_back(tiny, archive, tmp_path):
    module = pretrain(tiny, archive, tmp_path)
    loaded = PreTraining.from_checkpoint(tmp_path / "last.ckpt")
    assert loaded.config == tiny
    torch.testing.assert_close(loaded(archive.images), module(archive.images))


def logged_rates(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return [event.value for event in events.Scalars("train/learning_rate")]


def official_rates(total, warmup, peak, minimum, multiplier):
    """The loop of the official negative-margin code: a step of the optimizer, then that step's rate is set."""
    rates, rate = [], peak / multiplier
    for step in range(total):
        rates.append(rate)
        if step <= warmup:
            rate = peak / multiplier * (1 + (multiplier - 1) * step / warmup)
        else:
            rate = minimum + (peak - minimum) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
    return rates


def test_every_step_has_the_official_rate_and_the_log_their_means(tiny, archive, tmp_path, monkeypatch):
    found = []
    watch = lambda module, optimizer: found.append(optimizer.param_groups[0]["lr"])  # noqa: E731
    monkeypatch.setattr(PreTraining, "on_before_optimizer_step", watch)
    pretrain(tiny, archive, tmp_path)
    steps = math.ceil(len(archive) / tiny.batch_size)
    assert steps > 1
    # The warm-up is the first of the four epochs.
    rates = official_rates(4 * steps, steps, tiny.learning_rate, 1e-6, 16)
    assert found == pytest.approx(rates, rel=1e-9)
    assert logged_rates(tmp_path) == pytest.approx(
        [fmean(rates[epoch * steps : (epoch + 1) * steps]) for epoch in range(4)]
    )


def in_steps(config, **changes):
    return replace(config, optimizer="sgd", learning_rate=0.05, decay_epochs=2, weight_decay=1e-3, **changes)


def test_sgd_falls_in_steps(tiny, archive, tmp_path, monkeypatch):
    rates, losses = {}, []

    def watch(module, optimizer):
        rates.setdefault(module.current_epoch, set()).add(optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(PreTraining, "on_before_optimizer_step", watch)
    config = in_steps(tiny, epochs=5, decay=0.5)
    pretrain(config, archive, tmp_path, on_epoch=lambda epoch, loss: losses.append(loss))
    assert rates == {0: {0.05}, 1: {0.05}, 2: {0.025}, 3: {0.025}, 4: {0.0125}}
    assert logged_rates(tmp_path) == pytest.approx([0.05, 0.05, 0.025, 0.025, 0.0125])
    assert losses[-1] < losses[0]


def test_the_published_schedule_of_deepemd():
    config = PreTrainingConfig(optimizer="sgd", learning_rate=0.1, epochs=120)
    made = sgd_in_steps([torch.nn.Parameter(torch.zeros(1))], config)
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    group = optimizer.param_groups[0]
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, True, 0.0)
    rates = []
    for _ in range(config.epochs):
        rates.append(group["lr"])
        optimizer.step()
        schedule.step()
    expected = {0: 0.1, 29: 0.1, 30: 0.02, 59: 0.02, 60: 4e-3, 89: 4e-3, 90: 8e-4, 119: 8e-4}
    assert {epoch: rates[epoch] for epoch in expected} == pytest.approx(expected)
    assert made["lr_scheduler"]["interval"] == "epoch"


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.0, "nesterov": False}])
def test_sgd_trains_by_its_settings(settings, tiny, archive, tmp_path):
    """Two steps of a run against the rule written out."""
    config = in_steps(tiny, epochs=1, batch_size=len(archive) // 2, precision="64-true", **settings)
    kept, step = [], PreTraining.training_step

    class Watched(PreTraining):
        def training_step(self, batch, batch_index):
            kept.append((next(self.head.parameters()).detach().clone(),))
            return step(self, batch, batch_index)

        def on_before_optimizer_step(self, optimizer):
            kept[-1] += (next(self.head.parameters()).grad.clone(),)

    run = PreTrainingRun(config, archive, tmp_path)
    run.module.__class__ = Watched
    final = next(run.train().head.parameters()).detach()
    velocity = 0
    for index, (weight, gradient) in enumerate(kept):
        gradient = gradient + 1e-3 * weight
        velocity = config.momentum * velocity + gradient
        move = gradient + config.momentum * velocity if config.nesterov else velocity
        after = kept[index + 1][0] if index + 1 < len(kept) else final
        torch.testing.assert_close(after, weight - 0.05 * move)
    assert len(kept) >= 2


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_an_interrupted_run_of_sgd_resumes_to_the_same_weights(tiny, archive, tmp_path, stop_after, weights):
    """Before, at and after the epoch whose end lowers the rate."""
    config = in_steps(tiny)

    def interrupt(epoch, loss):
        if epoch > stop_after:
            raise KeyboardInterrupt

    unbroken = pretrain(config, archive, tmp_path / "unbroken", seed=1)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config, archive, tmp_path / "broken", seed=1, on_epoch=interrupt)
    resumed = pretrain(config, archive, tmp_path / "broken", seed=1, resume=True)
    assert torch.equal(weights(resumed), weights(unbroken))


def without_optimizer(path):
    """Makes a checkpoint one of a release that knew Adam alone."""
    checkpoint = torch.load(path, weights_only=True)
    config = checkpoint["hyper_parameters"]["config"]
    for name in ("optimizer", "momentum", "nesterov", "decay", "decay_epochs"):
        del config[name]
    torch.save(checkpoint, path)


def test_a_run_older_than_the_choice_of_optimizer_resumes_as_adam(tiny, archive, tmp_path, weights):
    def interrupt(epoch, loss):
        if epoch > 2:
            raise KeyboardInterrupt

    unbroken = pretrain(tiny, archive, tmp_path / "unbroken")
    with pytest.raises(KeyboardInterrupt):
        pretrain(tiny, archive, tmp_path / "broken", on_epoch=interrupt)
    without_optimizer(tmp_path / "broken" / "last.ckpt")
    assert PreTraining.from_checkpoint(tmp_path / "broken" / "last.ckpt").config == tiny
    with pytest.raises(ValueError, match=r"config\.decay_epochs is 30, not 2"):
        pretrain(in_steps(tiny), archive, tmp_path / "broken", resume=True)
    with pytest.raises(ValueError, match=r"config\.optimizer is adam, not sgd"):
        pretrain(replace(tiny, optimizer="sgd"), archive, tmp_path / "broken", resume=True)
    resumed = pretrain(tiny, archive, tmp_path / "broken", resume=True)
    assert torch.equal(weights(resumed), weights(unbroken))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"momentum": 0.5}, "momentum is an option of optimizer sgd, got 0.5 for adam"),
        ({"nesterov": False}, "nesterov is an option of optimizer sgd, got False for adam"),
        ({"decay": 0.5}, "decay is an option of optimizer sgd, got 0.5 for adam"),
        ({"decay_epochs": 5}, "decay_epochs is an option of optimizer sgd, got 5 for adam"),
        ({"optimizer": "sgd", "warmup": 0.0}, "warmup is an option of optimizer adam, got 0.0 for sgd"),
        ({"optimizer": "sgd", "warmup_multiplier": 2.0}, "warmup_multiplier is an option of optimizer adam, got 2.0"),
        (
            {"optimizer": "sgd", "minimum_learning_rate": 0.0},
            "minimum_learning_rate is an option of optimizer adam, got 0.0 for sgd",
        ),
        ({"optimizer": "sgd", "momentum": 0.0}, "nesterov: expected false without momentum, got momentum 0"),
        ({"optimizer": "lion"}, "optimizer: expected one of adam, sgd, got 'lion'"),
        ({"optimizer": "sgd", "momentum": 1.0}, r"momentum: expected a number in \[0, 1\), got 1.0"),
        ({"optimizer": "sgd", "decay": 0.0}, "decay: expected a number above 0, got 0.0"),
        ({"optimizer": "sgd", "decay_epochs": 0}, "decay_epochs: expected at least 1, got 0"),
    ],
)
def test_settings_of_the_other_optimizer_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PreTrainingConfig(**settings)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("similarity", "euclidean"),
        ("margin", float("nan")),
        ("scale", 0.0),
        ("label_smoothing", 1.0),
        ("epochs", 0),
        ("batch_size", 1),
        ("learning_rate", -1.0),
        ("warmup", 1.0),
        ("warmup_multiplier", 0.5),
    ],
)
def test_bad_settings_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        PreTrainingConfig(**{field: value})


def test_each_epoch_of_every_backbone_resumes_to_the_same_weights(images32, tmp_path, weights):
    """Dropout draws, and DropBlock's ramp moves; both must go on where they were."""
    config = PreTrainingConfig(
        epochs=3,
        batch_size=8,
        channels_last=True,
        backbone=BackboneConfig("resnet12", width=4, drop_rate=0.5, drop_block_size=2, drop_ramp_steps=6),
    )

    def interrupt(epoch, loss):
        if epoch == 2:
            raise KeyboardInterrupt

    unbroken = pretrain(config, images32, tmp_path / "unbroken")
    with pytest.raises(KeyboardInterrupt):
        pretrain(config, images32, tmp_path / "broken", on_epoch=interrupt)
    resumed = pretrain(config, images32, tmp_path / "broken", resume=True)
    assert torch.equal(weights(resumed), weights(unbroken))
    assert resumed.backbone.stages[3].dropout.steps.item() == 9


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"epochs": 3}, {}, "config.epochs is 4, not 3"),
        ({"margin": 0.0}, {}, "config.margin is -0.3, not 0.0"),
        ({}, {"seed": 1}, "seed is 0, not 1"),
    ],
)
def test_resume_refuses_other_settings(tiny, archive, tmp_path, changes, options, message):
    pretrain(tiny, archive, tmp_path)
    with pytest.raises(ValueError, match=message):
        pretrain(replace(tiny, **changes), archive, tmp_path, resume=True, **options)


def test_resume_may_change_how_often_checkpoints_are_written(tiny, archive, tmp_path):
    pretrain(tiny, archive, tmp_path)
    pretrain(replace(tiny, checkpoint_epochs=2), archive, tmp_path, resume=True)


def test_resume_refuses_a_file_that_is_no_checkpoint(tiny, archive, tmp_path):
    (tmp_path / "last.ckpt").write_text("nothing")
    with pytest.raises(ValueError, match=r"last\.ckpt is not the checkpoint of a pre-training"):
        pretrain(tiny, archive, tmp_path, resume=True)


def test_without_validation_the_last_epoch_is_the_best(tiny, archive, tmp_path, weights):
    module = pretrain(tiny, archive, tmp_path)
    for name in ("last.ckpt", "best.ckpt"):
        assert torch.equal(weights(PreTraining.from_checkpoint(tmp_path / name)), weights(module))


def test_bfloat16_trains_close_to_float32(tiny, archive, tmp_path):
    losses = {}
    for precision in ("32-true", "bf16-mixed"):
        found = []
        pretrain(
            replace(tiny, precision=precision),
            archive,
            tmp_path / precision,
            on_epoch=lambda epoch, loss, found=found: found.append(loss),
        )
        losses[precision] = found
    assert losses["bf16-mixed"] != losses["32-true"]
    assert losses["bf16-mixed"] == pytest.approx(losses["32-true"], rel=0.2, abs=0.01)


def test_channels_last_trains_to_the_same_weights_up_to_rounding(tiny, archive, tmp_path, weights):
    double = replace(tiny, precision="64-true", epochs=2)
    plain = pretrain(double, archive, tmp_path / "plain")
    channels_last = pretrain(replace(double, channels_last=True), archive, tmp_path / "channels_last")
    assert channels_last.backbone.blocks[1][0].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(weights(channels_last), weights(plain))


def test_compile_compiles_the_backbone_and_nothing_else(tiny, archive, tmp_path, monkeypatch, weights):
    compiled, compile_function = [], torch.compile

    def compile_eagerly(function, **options):
        compiled.append(function.__self__)
        return compile_function(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    config = replace(tiny, epochs=1)
    module = pretrain(replace(config, compile=True), archive, tmp_path / "compiled")
    assert compiled == [module.backbone]
    assert torch.equal(weights(module), weights(pretrain(config, archive, tmp_path / "eager")))
    assert torch.equal(weights(PreTraining.from_checkpoint(tmp_path / "compiled" / "last.ckpt")), weights(module))


def test_a_loss_that_is_no_number_ends_the_run(tiny, archive, tmp_path):
    with pytest.raises(FloatingPointError, match=r"the loss of epoch \d is (nan|inf)"):
        pretrain(replace(tiny, learning_rate=1e30, warmup=0.0), archive, tmp_path)


def test_given_mean_and_deviation_are_used(tiny, archive, tmp_path):
    module = pretrain(replace(tiny, epochs=1, mean=(0.25,), std=(0.5,)), archive, tmp_path)
    assert (module.network.preprocessing.mean.item(), module.network.preprocessing.std.item()) == (0.25, 0.5)
    with pytest.raises(ValueError, match="one number a channel: the images have 1 channels"):
        pretrain(replace(tiny, mean=(0.25,) * 3, std=(0.5,) * 3), archive, tmp_path)


@pytest.mark.parametrize("name", ["devices", "num_nodes"])
def test_counts_of_processes_are_checked(tiny, archive, tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        pretrain(tiny, archive, tmp_path, **{name: 0})


@pytest.mark.parametrize(
    ("loss", "options", "similarity", "margin", "scale"),
    [
        ("neg-cosine", {"margin": -0.02}, "cosine", -0.02, 30.0),
        ("neg-softmax", {"margin": -0.3}, "dot", -0.3, 5.0),
        ("neg-softmax", {"margin": -0.3, "backbone": BackboneConfig("resnet12")}, "dot", -0.3, 10.0),
        ("cosine", {}, "cosine", 0.0, 30.0),
        ("softmax", {"margin": 0.0, "scale": 7.0}, "dot", 0.0, 7.0),
    ],
)
def test_losses_by_name(loss, options, similarity, margin, scale):
    config = PreTrainingConfig.for_loss(loss, **options)
    assert (config.similarity, config.margin, config.scale) == (similarity, margin, scale)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": "hinge"}, "loss: expected one of neg-cosine, .*, got 'hinge'"),
        ({"loss": "softmax", "margin": -0.1}, "margin: expected 0 for loss 'softmax', got -0.1; loss 'neg-softmax'"),
    ],
)
def test_margins_that_do_not_go_with_the_loss(arguments, message):
    with pytest.raises(ValueError, match=message):
        PreTrainingConfig.for_loss(**arguments)


def test_a_head_may_have_classes_without_images(tiny, archive, tmp_path):
    """The softmax then has columns that are never right, and are pushed away."""
    config = replace(tiny, head_classes=9, epochs=1)
    run = PreTrainingRun(config, archive, tmp_path, validation=None)
    images, labels = archive.images[:32], archive.labels[:32]
    weight = run.module.head.weight.detach()
    assert weight.shape == (9, run.module.network.out_features)
    with torch.no_grad():
        features = run.module.eval()(images)
        loss = run.module.train().head(features, labels)
        logits = torch.nn.functional.normalize(features) @ torch.nn.functional.normalize(weight).T
        logits -= config.margin * torch.nn.functional.one_hot(labels, 9)
        torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(config.scale * logits, labels))
    run.train()
    assert PreTraining.from_checkpoint(tmp_path / "best.ckpt").head.weight.shape == weight.shape
    with pytest.raises(ValueError, match="head_classes: expected at least 5, got 4"):
        PreTrainingRun(replace(tiny, head_classes=4), archive, tmp_path / "few")
