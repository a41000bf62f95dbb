from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fewshot_ext.training import PreTraining, PreTrainingRun, ValidationConfig, pretrain
from fewshot_ext.training.callbacks import Validation

pytestmark = pytest.mark.usefixtures("one_thread")


class Pixels(nn.Module):
    def forward(self, images):
        return images.flatten(1).double()


def test_accuracy_is_that_of_the_nearest_mean_by_cosine(validation_archive, tmp_path):
    config = ValidationConfig(epochs=1, episodes=15, way=4, shot=2, queries=5)
    validation = Validation(config, validation_archive, tmp_path / "best.ckpt", seed=3)
    features = validation_archive.images.flatten(1).double()
    right = []
    for support, query in zip(validation.episodes.support, validation.episodes.query, strict=True):
        means = F.normalize(torch.stack([features[images].mean(0) for images in support]), dim=1)
        for label, images in enumerate(query):
            for image in images:
                right.append((means @ features[image]).argmax().item() == label)
    assert validation._measure(Pixels())[0] == pytest.approx(sum(right) / len(right))
    assert 0.5 < sum(right) / len(right) < 1


def test_the_best_checkpoint_is_that_of_the_best_epoch(
    tiny, archive, validation_archive, tmp_path, monkeypatch, weights
):
    found, states = iter([0.4, 0.7, 0.7, 0.5]), []

    def measure(self, module):
        states.append(weights(module))
        return next(found), 0.01

    monkeypatch.setattr(Validation, "_measure", measure)
    run = PreTrainingRun(tiny, archive, tmp_path, validation=validation_archive)
    module = run.train()
    assert (run.validation.best_accuracy, run.validation.best_epoch) == (0.7, 2)
    assert torch.equal(weights(module), states[1])
    assert torch.equal(weights(PreTraining.from_checkpoint(tmp_path / "best.ckpt")), states[1])
    assert torch.equal(weights(PreTraining.from_checkpoint(tmp_path / "last.ckpt")), states[3])
    assert run.results()["best_epoch"] == 2
    assert run.results()["best_validation_interval"] == 0.01


def test_validation_leaves_the_training_as_it_was(tiny, archive, validation_archive, tmp_path, weights):
    pretrain(tiny, archive, tmp_path / "with", validation=validation_archive)
    without = pretrain(tiny, archive, tmp_path / "without")
    validated = PreTraining.from_checkpoint(tmp_path / "with" / "last.ckpt")
    assert torch.equal(weights(validated), weights(without))


def test_every_second_epoch_and_the_last_are_validated(tiny, archive, validation_archive, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = replace(tiny, epochs=5, validation=replace(tiny.validation, epochs=2))
    pretrain(config, archive, tmp_path, validation=validation_archive)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert len(events.Scalars("train/loss")) == 5
    steps = [event.step for event in events.Scalars("train/loss")]
    assert [event.step for event in events.Scalars("validation/accuracy")] == [steps[1], steps[3], steps[4]]


def test_a_resumed_run_remembers_the_best_epoch(tiny, archive, validation_archive, tmp_path, monkeypatch, weights):
    monkeypatch.setattr(Validation, "_measure", lambda self, module: (0.9, 0.01))

    def interrupt(epoch, loss):
        if epoch == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(tiny, archive, tmp_path, validation=validation_archive, on_epoch=interrupt)
    best = (tmp_path / "best.ckpt").read_bytes()
    monkeypatch.setattr(Validation, "_measure", lambda self, module: (0.8, 0.02))
    run = PreTrainingRun(tiny, archive, tmp_path, validation=validation_archive, resume=True)
    run.train()
    assert (run.validation.best_accuracy, run.validation.best_epoch) == (0.9, 1)
    assert run.validation.best_interval == 0.01
    assert (tmp_path / "best.ckpt").read_bytes() == best


def test_impossible_episodes_are_found_before_training(tiny, archive, validation_archive, tmp_path):
    for changes, message in (
        ({"way": 6}, "validation classes: way 6 asks for more classes than there are: 5"),
        ({"shot": 100}, "validation classes: 100 shots and 3 queries need 103 images a class"),
    ):
        config = replace(tiny, validation=replace(tiny.validation, **changes))
        with pytest.raises(ValueError, match=message):
            pretrain(config, archive, tmp_path / "out", validation=validation_archive)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "value"), [("epochs", 0), ("episodes", 0), ("way", 1), ("shot", 0), ("queries", 0)])
def test_bad_settings_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected at least"):
        ValidationConfig(**{name: value})
