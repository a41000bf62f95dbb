import json
from dataclasses import replace

import pytest
from experiments_cases import FEW, TINY

from fewshot_ext.data import AugmentationConfig
from fewshot_ext.experiments.accuracies import difference
from fewshot_ext.experiments.sweep import Sweep
from fewshot_ext.experiments.variants import (
    label_smoothing_configs,
    regularizer_configs,
    summarize,
    variant_runs,
    variants_table,
    variants_writer,
)
from fewshot_ext.models import BackboneConfig
from fewshot_ext.training import PreTrainingConfig

pytestmark = pytest.mark.usefixtures("one_thread")

AUGMENTED = replace(TINY, augmentation=AugmentationConfig(translation=0.1))


def changes(config, other):
    return {name for name in vars(config) if getattr(config, name) != getattr(other, name)}


def test_each_regularizer_stands_alone():
    config = PreTrainingConfig(backbone=BackboneConfig("resnet12"), augmentation=AugmentationConfig(zoom=0.1))
    configs = regularizer_configs(
        config, -0.1, weight_decay=1e-4, drop_rate=0.1, label_smoothing=0.1, without_augmentation=True
    )
    plain, margin, *rest = configs.values()
    assert changes(plain, margin) == {"margin"}
    assert [changes(margin, one) for one in rest] == [
        {"weight_decay"},
        {"backbone"},
        {"label_smoothing"},
        {"augmentation"},
    ]
    assert len(regularizer_configs(config, -0.1)) == 2


def test_label_smoothing_and_margin_stand_apart():
    plain, smooth, margin = label_smoothing_configs(replace(TINY, label_smoothing=0.3), -0.3, 0.05).values()
    assert changes(plain, smooth) == {"label_smoothing"}
    assert changes(plain, margin) == {"margin"}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: regularizer_configs(TINY, 0.0), "margin: expected another value than 0"),
        (lambda: regularizer_configs(TINY, -0.1, weight_decay=0.0), "weight_decay: expected a number above 0"),
        (lambda: regularizer_configs(TINY, -0.1, drop_rate=0.1), "drop_rate: expected 0 for conv4"),
        (
            lambda: regularizer_configs(TINY, -0.1, label_smoothing=1.0),
            r"label_smoothing: expected a number in \[0, 1\)",
        ),
        (lambda: regularizer_configs(TINY, -0.1, without_augmentation=True), "has the settings of 'margin -0.1'"),
        (lambda: label_smoothing_configs(TINY, 0.0, 0.1), "margin: expected another value than 0"),
        (lambda: label_smoothing_configs(TINY, -0.1, 0.0), "label_smoothing: expected a number above 0"),
        (lambda: variant_runs("digits", {"plain": TINY}, [], 0.2), "seeds: expected at least one seed"),
    ],
)
def test_bad_settings_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_variants_are_trained_compared_and_drawn(digits, tmp_path):
    configs = regularizer_configs(AUGMENTED, -0.1, without_augmentation=True)
    sweep = Sweep(variant_runs("digits", configs, [0, 1], 0.2), digits, tmp_path, measurement=FEW)
    rows = sweep.run()
    assert len(rows) == 3 * 2 * (2 * 2 + 1)
    summary = summarize(rows)
    assert [row["variant"] for row in summary[:3]] == list(configs)
    assert "difference" not in summary[0]
    gain = summary[1]["accuracy"] - summary[0]["accuracy"]
    assert summary[1]["difference"] == pytest.approx(gain, abs=1e-3)
    written = variants_writer("regularizers")(tmp_path, rows, versions={})
    assert written[-1].stat().st_size > 1000
    assert json.loads((tmp_path / "regularizers.json").read_text())["summary"] == summary
    text = variants_table(rows)
    assert "difference to margin 0 in points" in text
    assert text.count("no augmentation") == 2
    # The run without a variant's name is the same training.
    plain = Sweep([replace(sweep.tasks[0].run, variant="")], digits, tmp_path, measurement=FEW)
    assert plain.tasks[0].is_trained


def test_differences_need_a_common_seed():
    ours, theirs = ({"seed": seed, "correct": [1, 2], "queries": 3} for seed in (0, 1))
    with pytest.raises(ValueError, match="rows and others: expected a shared seed, got none"):
        difference([ours], [theirs])
