from dataclasses import replace

import pytest
import torch

from fewshot_ext.data import AugmentationConfig, Split, load_digits
from fewshot_ext.training import BackboneConfig, PreTraining, PreTrainingConfig, pretrain

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = PreTrainingConfig(
    epochs=4,
    batch_size=32,
    checkpoint_epochs=1,
    backbone=BackboneConfig(width=8, pooled_blocks=2),
    augmentation=AugmentationConfig(rotation=10, translation=0.1),
)


@pytest.fixture(scope="module")
def archive():
    base = load_digits().subset(Split.BASE)
    return base.hold_out(0.2, torch.Generator().manual_seed(0))[1]


def weights(module):
    return torch.cat([value.flatten().double() for value in module.state_dict().values()])


@pytest.mark.parametrize("similarity", ["cosine", "softmax"])
def test_training_lowers_the_loss_and_reports_each_epoch(archive, tmp_path, similarity):
    epochs, losses = [], []
    pretrain(
        replace(TINY, similarity=similarity, scale=5.0, margin=0.0),
        archive,
        tmp_path,
        on_epoch=lambda epoch, loss: (epochs.append(epoch), losses.append(loss)),
    )
    assert epochs == [1, 2, 3, 4]
    assert losses[-1] < losses[0]
    assert list(tmp_path.glob("events.out.tfevents*"))


def test_same_seed_same_weights(archive, tmp_path):
    first, again, other = (pretrain(TINY, archive, tmp_path / str(k), seed=seed) for k, seed in enumerate((5, 5, 6)))
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))


def test_the_global_generator_is_left_alone(archive, tmp_path):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    pretrain(replace(TINY, epochs=1), archive, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("stop_after", [1, 3])
def test_an_interrupted_run_resumes_to_the_same_weights(archive, tmp_path, stop_after):
    def interrupt(epoch, loss):
        if epoch > stop_after:
            raise KeyboardInterrupt

    unbroken = pretrain(TINY, archive, tmp_path / "unbroken", seed=1)
    with pytest.raises(KeyboardInterrupt):
        pretrain(TINY, archive, tmp_path / "broken", seed=1, on_epoch=interrupt)
    epochs = []
    resumed = pretrain(
        TINY,
        archive,
        tmp_path / "broken",
        seed=1,
        resume=True,
        on_epoch=lambda epoch, loss: epochs.append(epoch),
    )
    assert epochs[0] == stop_after
    assert torch.equal(weights(resumed), weights(unbroken))


def test_a_finished_run_resumes_without_training(archive, tmp_path):
    finished = pretrain(TINY, archive, tmp_path, seed=1)
    again = pretrain(TINY, archive, tmp_path, seed=1, resume=True)
    assert torch.equal(weights(again), weights(finished))


def test_a_checkpoint_gives_the_module_back(archive, tmp_path):
    module = pretrain(TINY, archive, tmp_path)
    loaded = PreTraining.from_checkpoint(tmp_path / "last.ckpt")
    assert loaded.config == TINY
    torch.testing.assert_close(loaded(archive.images), module(archive.images))


def test_learning_rate_follows_the_schedule(archive, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pretrain(TINY, archive, tmp_path)
    events = EventAccumulator(str(tmp_path)).Reload()
    rates = [event.value for event in events.Scalars("train/learning_rate")]
    assert len(rates) == 4
    # The warm-up is the first of the four epochs; the rate after the last step is the minimum.
    assert rates[0] == pytest.approx(TINY.learning_rate, rel=1e-6)
    assert rates[-1] == pytest.approx(TINY.minimum_learning_rate, rel=1e-3)


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
