from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fewshot_ext.evaluation import episode_accuracies, extract_features
from fewshot_ext.heads import FineTuning
from fewshot_ext.models import emd_logits
from fewshot_ext.training import PreTraining, PreTrainingConfig, PreTrainingRun, ValidationConfig, pretrain
from fewshot_ext.training.callbacks import Validation

pytestmark = pytest.mark.usefixtures("one_thread")


class Pixels(nn.Module):
    def __init__(self, validation):
        super().__init__()
        self.config = PreTrainingConfig(validation=validation)

    def feature_shape(self, name, choice, shot):
        return (64,)

    def forward(self, images):
        return images.flatten(1).double()


def test_accuracy_is_that_of_the_nearest_mean_by_cosine(validation_archive, tmp_path):
    module = Pixels(ValidationConfig(epochs=1, episodes=15, way=4, shot=2, queries=5))
    validation = Validation(module, validation_archive, tmp_path / "best.ckpt", seed=3)
    features = validation_archive.images.flatten(1).double()
    right = []
    for support, query in zip(validation.episodes.support, validation.episodes.query, strict=True):
        means = F.normalize(torch.stack([features[images].mean(0) for images in support]), dim=1)
        for label, images in enumerate(query):
            for image in images:
                right.append((means @ features[image]).argmax().item() == label)
    assert validation._measure(module)[0] == pytest.approx(sum(right) / len(right))
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


@pytest.mark.parametrize("head", [None, "finetune", "deepemd", "protonet@sampling"])
def test_validation_leaves_the_training_as_it_was(tiny, archive, validation_archive, tmp_path, weights, head):
    config = replace(tiny, epochs=2, validation=replace(tiny.validation, head=head, shot=2))
    pretrain(config, archive, tmp_path / "with", validation=validation_archive)
    without = pretrain(replace(tiny, epochs=2), archive, tmp_path / "without")
    validated = PreTraining.from_checkpoint(tmp_path / "with" / "last.ckpt")
    assert torch.equal(weights(validated), weights(without))


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_validation_by_fine_tuning_goes_on_with_the_similarity(tiny, archive, validation_archive, tmp_path, similarity):
    config = replace(tiny, similarity=similarity, validation=replace(tiny.validation, head="finetune", shot=5))
    run = PreTrainingRun(config, archive, tmp_path, validation=validation_archive)
    features = extract_features(run.module, validation_archive.images)
    expected = episode_accuracies(features, run.validation.episodes, head=FineTuning(similarity=similarity))
    assert torch.equal(run.validation._accuracies(run.module), expected)


def test_validation_by_matching_solves_each_pair(tiny, archive, validation_archive, tmp_path):
    """As the official pre-training of DeepEMD validates: one image a class, no fit; here one pair after the other."""
    config = replace(tiny, validation=replace(tiny.validation, head="deepemd"))
    run = PreTrainingRun(config, archive, tmp_path, validation=validation_archive)
    accuracies = run.validation._accuracies(run.module)
    assert run.module.training and run.module.backbone.training
    network, right = run.module.network.eval(), []
    with torch.inference_mode():
        maps = network.feature_map(validation_archive.images).flatten(2).mT
        for support, query in zip(run.validation.episodes.support, run.validation.episodes.query, strict=True):
            for label, images in enumerate(query):
                for image in images:
                    scores = [emd_logits(maps[image][None, None], maps[one][None]).item() for one in support]
                    right.append(max(range(len(scores)), key=scores.__getitem__) == label)
    assert accuracies.mean().item() == pytest.approx(sum(right) / len(right))


def test_heads_that_cannot_validate_are_named(tiny, archive, validation_archive, tmp_path):
    with pytest.raises(ValueError, match=r"head: expected one of finetune, .*, got 'svm'"):
        ValidationConfig(head="svm")
    with pytest.raises(
        ValueError, match=r"^validation\.head: expected one without need of the mean .*, got 'simpleshot'"
    ):
        ValidationConfig(head="simpleshot")
    one = replace(
        tiny, backbone=replace(tiny.backbone, pooled_blocks=3), validation=ValidationConfig(head="knn", shot=2)
    )
    with pytest.raises(ValueError, match=r"validation\.head knn: neighbors: expected at most 2"):
        PreTrainingRun(one, archive, tmp_path / "out", validation=validation_archive)
    assert not (tmp_path / "out").exists()


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
