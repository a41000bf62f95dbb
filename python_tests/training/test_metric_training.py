import csv
import json
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from metric_cases import TINY_METRIC

from fewshot_ext import _extras, coding_rate
from fewshot_ext.data import AugmentationConfig, Split, load_digits
from fewshot_ext.evaluation import FrozenBackbone, extract_features
from fewshot_ext.losses import AntiCollapseLoss
from fewshot_ext.models import load_network
from fewshot_ext.retrieval import retrieval_metrics
from fewshot_ext.training import (
    AntiCollapseConfig,
    BackboneConfig,
    MeasurementConfig,
    MetricTraining,
    MetricTrainingConfig,
    MetricTrainingRun,
    PreTraining,
    pretrain,
)
from fewshot_ext.training.metric_callbacks import evenly

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def digits():
    return load_digits()


@pytest.fixture(scope="module")
def trained(archive, validation_archive, digits, tmp_path_factory):
    folder, threads = tmp_path_factory.mktemp("metric"), torch.get_num_threads()
    torch.set_num_threads(1)
    unseen = digits.subset(Split.NOVEL)
    run = MetricTrainingRun(TINY_METRIC, archive, folder, validation=validation_archive, unseen=unseen)
    run.train()
    torch.set_num_threads(threads)
    return run


@pytest.mark.parametrize(
    ("loss", "variant"),
    [
        ("proxy_anchor", "none"),
        ("proxy_anchor", "batch_proxy"),
        ("proxy_anchor", "all_proxy"),
        ("proxy_nca", "pair"),
        ("contrastive", "none"),
        ("contrastive", "pair"),
        ("triplet", "pair"),
    ],
)
def test_every_loss_learns_to_retrieve_digits_that_it_has_seen(loss, variant, archive, tmp_path):
    config = replace(TINY_METRIC, loss=loss, anti_collapse=AntiCollapseConfig(variant, weight=0.01), epochs=6)
    run = MetricTrainingRun(config, archive, tmp_path)
    before = retrieval_metrics(extract_features(run.module, archive.images), archive.labels, ks=(1,)).map_at_r
    module = run.train()
    embeddings = module(archive.images).detach()
    assert retrieval_metrics(embeddings, archive.labels, ks=(1,)).map_at_r > before + 0.05
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(len(archive)))


def test_the_term_raises_the_coding_rate(archive, tmp_path):
    rates = {}
    terms = {"with": AntiCollapseConfig("pair", weight=1.0), "without": AntiCollapseConfig("none")}
    for name, term in terms.items():
        config = replace(TINY_METRIC, loss="triplet", anti_collapse=term, epochs=8)
        run = MetricTrainingRun(config, archive, tmp_path / name)
        run.train()
        rates[name] = run.history.rows[-1]
    assert rates["with"]["coding_rate"] > rates["without"]["coding_rate"] + 0.5
    assert rates["with"]["effective_rank"] > rates["without"]["effective_rank"]


def test_the_loss_of_a_step_is_that_of_the_modules(archive, tmp_path):
    module = MetricTrainingRun(TINY_METRIC, archive, tmp_path).module
    images, target = archive[torch.arange(40)]
    step = module.training_step((images, target), 0)
    embeddings = module(images)
    assert isinstance(module.criterion, AntiCollapseLoss)
    terms = module.criterion.terms(embeddings, target)
    # Batch normalization takes the batch's statistics, so both passes give the same.
    torch.testing.assert_close(step["loss"], terms.loss)
    torch.testing.assert_close(step["base_loss"], terms.base.detach())
    torch.testing.assert_close(step["coding_rate"], coding_rate(embeddings.detach()))


def test_proxies_have_their_own_rate_and_both_fall_at_the_milestone(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained.directory)).Reload()
    for name, rate in (("backbone", 1e-3), ("proxies", 0.02)):
        logged = [event.value for event in events.Scalars(f"train/learning_rate_{name}")]
        assert logged == pytest.approx([rate, rate, rate, rate / 2])
    groups = trained.module.configure_optimizers()["optimizer"].param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(trained.module.parameters()))
    assert [group["weight_decay"] for group in groups] == [4e-4, 0.0]


def test_what_is_logged_is_what_the_embeddings_give(trained, validation_archive, digits):
    """The last measurement of a run is that of the module in last.ckpt."""
    module = MetricTraining.from_checkpoint(trained.directory / "last.ckpt")
    rows = json.loads((trained.directory / "history.json").read_text())["rows"]
    assert [(row["epoch"], row["classes"]) for row in rows] == [
        (epoch, name) for epoch in (2, 4) for name in ("seen", "validation", "unseen")
    ]
    for name, archive in (("validation", validation_archive), ("unseen", digits.subset(Split.NOVEL))):
        row = next(row for row in rows if (row["epoch"], row["classes"]) == (4, name))
        embeddings = module(archive.images).detach()
        found = retrieval_metrics(embeddings, archive.labels, ks=(1, 2))
        assert row["images"] == len(archive)
        assert (row["recall_at_1"], row["recall_at_2"]) == pytest.approx((found.recall[1], found.recall[2]))
        assert row["map_at_r"] == pytest.approx(found.map_at_r)
        assert row["r_precision"] == pytest.approx(found.r_precision)
        assert row["coding_rate"] == pytest.approx(coding_rate(F.normalize(embeddings.double())).item(), rel=1e-5)
        singular = torch.linalg.svdvals(embeddings.double()) / len(embeddings) ** 0.5
        assert row["spectrum"] == pytest.approx(singular.tolist(), abs=1e-6)
    with (trained.directory / "history.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert float(lines[-1]["recall_at_1"]) == rows[-1]["recall_at_1"]
    assert "spectrum" not in lines[0]


def test_the_log_has_the_measurements(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained.directory)).Reload()
    logged = [(event.step, event.value) for event in events.Scalars("unseen/recall_at_1")]
    rows = [row for row in trained.history.rows if row["classes"] == "unseen"]
    assert [value for _, value in logged] == pytest.approx([row["recall_at_1"] for row in rows])
    assert {"train/loss", "train/base_loss", "train/coding_rate", "seen/coding_rate"} <= set(events.Tags()["scalars"])
    assert "unseen/spectrum" in events.Tags()["histograms"]


def test_validation_classes_choose_the_best_epoch(trained, weights):
    rows = [row for row in trained.history.rows if row["classes"] == "validation"]
    best = max(rows, key=lambda row: (row["recall_at_1"], -row["epoch"]))
    results = trained.results()
    assert (results["best_epoch"], results["best_validation_accuracy"]) == (best["epoch"], best["recall_at_1"])
    assert results["unseen"]["recall_at_1"] == trained.history.rows[-1]["recall_at_1"]
    loaded = MetricTraining.from_checkpoint(trained.directory / "best.ckpt")
    assert torch.equal(weights(loaded), weights(trained.module))


def test_without_validation_classes_the_last_epoch_is_the_best(archive, tmp_path, weights):
    module = MetricTrainingRun(replace(TINY_METRIC, epochs=1), archive, tmp_path).train()
    for name in ("last.ckpt", "best.ckpt"):
        assert torch.equal(weights(MetricTraining.from_checkpoint(tmp_path / name)), weights(module))


@pytest.mark.parametrize("stop_after", [1, 3])
def test_an_interrupted_run_resumes_to_the_same_weights_and_history(
    archive, validation_archive, tmp_path, stop_after, weights
):
    # Triplets are mined at random, and images are turned at random: both must go on where they were.
    config = replace(
        TINY_METRIC,
        loss="triplet",
        anti_collapse=AntiCollapseConfig("pair"),
        augmentation=AugmentationConfig(rotation=10),
        measurement=replace(TINY_METRIC.measurement, epochs=1),
    )

    def interrupt(epoch, loss):
        if epoch > stop_after:
            raise KeyboardInterrupt

    unbroken = MetricTrainingRun(config, archive, tmp_path / "unbroken", validation=validation_archive, seed=1)
    unbroken.train()
    broken = MetricTrainingRun(
        config, archive, tmp_path / "broken", validation=validation_archive, seed=1, on_epoch=interrupt
    )
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    epochs = []
    resumed = MetricTrainingRun(
        config,
        archive,
        tmp_path / "broken",
        validation=validation_archive,
        seed=1,
        resume=True,
        on_epoch=lambda epoch, loss: epochs.append(epoch),
    )
    resumed.train()
    assert epochs[0] == stop_after
    assert torch.equal(weights(resumed.module), weights(unbroken.module))
    assert resumed.history.rows == unbroken.history.rows
    assert resumed.results() == unbroken.results()
    assert (tmp_path / "broken" / "history.json").read_text() == (tmp_path / "unbroken" / "history.json").read_text()


# 21
def test_a_finished_run_goes_on_for_more_epochs(archive, tmp_path, weights):
    config = replace(TINY_METRIC, augmentation=AugmentationConfig(rotation=10), milestones=(2,))
    unbroken = MetricTrainingRun(replace(config, epochs=3), archive, tmp_path / "unbroken", seed=1)
    unbroken.train()
    MetricTrainingRun(replace(config, epochs=1), archive, tmp_path / "more", seed=1).train()
    longer = MetricTrainingRun(replace(config, epochs=3), archive, tmp_path / "more", seed=1, resume=True)
    assert longer.epochs_done == 1
    longer.train()
    assert torch.equal(weights(longer.module), weights(unbroken.module))
    with pytest.raises(ValueError, match=r"cannot resume .*: its config\.epochs is 3, not 2"):
        MetricTrainingRun(replace(config, epochs=2), archive, tmp_path / "more", seed=1, resume=True)


def test_measuring_leaves_the_training_as_it_was(archive, digits, tmp_path, weights):
    often = replace(TINY_METRIC, measurement=MeasurementConfig(epochs=1, ks=(1,)))
    measured = MetricTrainingRun(often, archive, tmp_path / "a", unseen=digits.subset(Split.NOVEL))
    rarely = MetricTrainingRun(replace(often, measurement=MeasurementConfig(epochs=9)), archive, tmp_path / "b")
    assert torch.equal(weights(measured.train()), weights(rarely.train()))


def test_the_seed_decides_the_weights(archive, tmp_path, weights):
    config = replace(TINY_METRIC, epochs=1)
    first, again, other = (
        MetricTrainingRun(config, archive, tmp_path / str(k), seed=seed).train() for k, seed in enumerate((5, 5, 6))
    )
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))


def test_bfloat16_trains_and_its_loss_is_in_full_precision(archive, tmp_path):
    run = MetricTrainingRun(replace(TINY_METRIC, precision="bf16-mixed", epochs=2), archive, tmp_path)
    seen = []
    criterion = run.module.criterion
    criterion.base.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    criterion.base.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    run.train()
    assert set(seen) == {torch.float32, False}


def test_the_checkpoint_is_one_of_a_backbone(trained, digits):
    extractor = load_network(trained.directory / "best.ckpt")
    expected = trained.module.eval()(digits.images[:20])
    torch.testing.assert_close(F.normalize(extractor(digits.images[:20]), dim=1), expected)
    frozen = FrozenBackbone.from_checkpoint(trained.directory / "best.ckpt")
    assert (frozen.network.similarity, frozen.network.channels) == ("cosine", 1)


def test_a_config_survives_plain_containers():
    config = replace(TINY_METRIC, mean=(0.5,), std=(0.25,))
    assert MetricTrainingConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "triplet", "miner": "hard"}, "miner: expected one of distance, .*, softhard, got 'hard'"),
        ({"miner": "random"}, "miner is an option of contrastive and triplet, got 'random' for proxy_anchor"),
        ({"loss": "hinge"}, "loss: expected one of proxy_anchor, .*, got 'hinge'"),
        (
            {"classes_per_batch": 1},
            "classes_per_batch: expected at least 2, got 1: a batch of one class has no negatives",
        ),
        ({"samples_per_class": 0}, "samples_per_class: expected at least 1, got 0"),
        ({"loss": "triplet", "samples_per_class": 1}, "samples_per_class: expected at least 2 for triplet"),
        (
            {"loss": "contrastive", "anti_collapse": AntiCollapseConfig("all_proxy")},
            "anti_collapse.variant: expected 'pair' or 'none' for contrastive, which has no proxies, got 'all_proxy'",
        ),
        ({"proxy_learning_rate": 0.0}, "proxy_learning_rate: expected a number above 0"),
        ({"decay_factor": 0.0}, "decay_factor: expected a number above 0"),
        ({"milestones": (0,)}, "milestones: expected at least 1"),
        ({"epochs": 0}, "epochs: expected at least 1"),
        ({"learning_rate": -1.0}, "learning_rate: expected a number above 0"),
        ({"precision": "8-true"}, "precision: expected one of"),
        ({"mean": (0.5,)}, "mean and std: expected both or neither"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        MetricTrainingConfig(**changes)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (AntiCollapseConfig, {"variant": "proxy"}, "variant: expected one of"),
        (AntiCollapseConfig, {"convention": "mine"}, "convention: expected one of paper, official, got 'mine'"),
        (AntiCollapseConfig, {"weight": -1.0}, "weight: expected at least 0"),
        (AntiCollapseConfig, {"eps": 0.0}, "eps: expected a number above 0"),
        (AntiCollapseConfig, {"gamma1": float("nan")}, "gamma1"),
        (MeasurementConfig, {"epochs": 0}, "epochs: expected at least 1"),
        (MeasurementConfig, {"ks": ()}, "ks: expected at least one K"),
        (MeasurementConfig, {"ks": (1, 1)}, "none twice"),
        (MeasurementConfig, {"ks": (0,)}, "ks: expected at least 1"),
        (MeasurementConfig, {"seen_images": 1}, "seen_images: expected at least 2"),
    ],
)
def test_bad_parts_are_named(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        kind(**changes)


def test_more_classes_a_batch_than_there_are(archive, tmp_path):
    with pytest.raises(ValueError, match="classes_per_batch: expected at most 5, the classes to train on, got 45"):
        MetricTrainingRun(replace(TINY_METRIC, classes_per_batch=45), archive, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("where", ["seen", "unseen", "validation"])
def test_a_class_with_one_image_is_refused(where, archive, tmp_path):
    keep = torch.cat([(archive.labels == 0).nonzero()[:1, 0], (archive.labels != 0).nonzero()[:, 0]])
    lone = archive._select(keep)
    sets = {"seen": archive, "unseen": archive, "validation": archive} | {where: lone}
    message = "seen classes need at least 2 images each" if where == "seen" else f"{where} classes, .*got none for 1"
    with pytest.raises(ValueError, match=message):
        MetricTrainingRun(TINY_METRIC, sets["seen"], tmp_path, unseen=sets["unseen"], validation=sets["validation"])


def test_a_k_larger_than_the_gallery_is_refused(archive, tmp_path):
    config = replace(TINY_METRIC, measurement=MeasurementConfig(ks=(1, 100_000)))
    with pytest.raises(ValueError, match=r"seen classes, \d+ images: ks: expected K in \[1, \d+\].*got 100000"):
        MetricTrainingRun(config, archive, tmp_path)


def test_a_loss_that_is_no_number_ends_the_run(archive, tmp_path):
    config = replace(TINY_METRIC, learning_rate=1e30, loss="triplet", anti_collapse=AntiCollapseConfig("pair"))
    with pytest.raises(FloatingPointError, match="the embeddings are not finite in epoch 1: take a smaller"):
        MetricTrainingRun(config, archive, tmp_path).train()
    assert not (tmp_path / "last.ckpt").exists()


def test_embeddings_that_are_no_numbers_end_the_run(archive, tmp_path, monkeypatch):
    run = MetricTrainingRun(replace(TINY_METRIC, epochs=1), archive, tmp_path)
    monkeypatch.setattr(
        "fewshot_ext.training.metric_callbacks.extract_features",
        lambda module, images: torch.full((len(images), 6), float("nan")),
    )
    with pytest.raises(FloatingPointError, match="embeddings of seen classes are not finite after epoch 1"):
        run.train()


def test_resume_refuses_the_checkpoint_of_a_pretraining_and_the_other_way_round(tiny, archive, trained, tmp_path):
    pretrain(replace(tiny, epochs=1), archive, tmp_path)
    with pytest.raises(ValueError, match="not the checkpoint of a metric training: it is that of a pre-training"):
        MetricTrainingRun(TINY_METRIC, archive, tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"last\.ckpt is not the checkpoint of a metric training: it is that of"):
        MetricTraining.from_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="not the checkpoint of a pre-training: it is that of a metric training"):
        pretrain(replace(tiny, epochs=1), archive, trained.directory, resume=True)
    with pytest.raises(ValueError, match=r"last\.ckpt is not the checkpoint of a pre-training: it is that of"):
        PreTraining.from_checkpoint(trained.directory / "last.ckpt")


def test_resume_refuses_other_settings(archive, validation_archive, trained):
    with pytest.raises(ValueError, match=r"config\.anti_collapse\.variant is batch_proxy, not none"):
        MetricTrainingRun(
            replace(TINY_METRIC, anti_collapse=AntiCollapseConfig("none")), archive, trained.directory, resume=True
        )


def test_images_too_small_for_the_backbone(archive, tmp_path):
    with pytest.raises(ValueError, match="at least 16 x 16, got 8 x 8"):
        MetricTrainingRun(
            replace(TINY_METRIC, backbone=BackboneConfig(embedding=4, pooled_blocks=4)), archive, tmp_path
        )


def test_missing_pytorch_metric_learning_names_the_pip_line(archive, tmp_path, monkeypatch):
    is_installed = _extras.is_installed
    monkeypatch.setattr(_extras, "is_installed", lambda name: name != "pytorch_metric_learning" and is_installed(name))
    with pytest.raises(ImportError, match=r"pip install 'fewshot_ext\[metric\]'"):
        MetricTrainingRun(
            replace(TINY_METRIC, loss="contrastive", anti_collapse=AntiCollapseConfig("pair")), archive, tmp_path
        )


def test_seen_images_are_drawn_evenly_and_by_the_seed():
    labels = torch.tensor([0] * 50 + [1] * 3 + [2] * 20)
    chosen = evenly(labels, 30, torch.Generator().manual_seed(0))
    assert labels[chosen].bincount().tolist() == [10, 3, 10]
    assert len(chosen.unique()) == len(chosen)
    assert torch.equal(chosen, evenly(labels, 30, torch.Generator().manual_seed(0)))
    assert not torch.equal(chosen, evenly(labels, 30, torch.Generator().manual_seed(1)))
    assert torch.equal(evenly(labels, 73, torch.Generator()), torch.arange(73))
    # A class that is measured needs two images.
    assert labels[evenly(labels, 2, torch.Generator())].bincount().tolist() == [2, 2, 2]
