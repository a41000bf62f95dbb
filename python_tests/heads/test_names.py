"""Names of heads: what they stand for, and what is said to a wrong one."""

import pytest

from fewshot_ext.heads import (
    HEAD_GROUPS,
    HEADS,
    MAP_HEADS,
    DeepEMDHead,
    FineTuning,
    FineTuningConfig,
    HeadSettings,
    Pooled,
    ProtoNet,
    choose_head,
    expand_heads,
)
from fewshot_ext.heads.names import crops_an_image, features_record
from fewshot_ext.models import LocalFeaturesConfig, StructuredClassifierConfig

SETTINGS = HeadSettings(
    FineTuningConfig(steps=7),
    DeepEMDHead(temperature=3.0, classifier=StructuredClassifierConfig(passes=4, lr=0.5)),
    LocalFeaturesConfig("grid", grids=(2,)),
)


@pytest.mark.parametrize(
    ("name", "head", "regions"),
    [
        ("protonet", ProtoNet(), None),
        ("protonet@fcn", Pooled(ProtoNet()), "fcn"),
        ("finetune", FineTuning(steps=7, similarity="dot"), None),
        ("fc_dot", MAP_HEADS["fc_dot"], "grid"),
        ("knn@sampling", MAP_HEADS["knn"], "sampling"),
        ("deepemd", SETTINGS.deepemd, "grid"),
        ("deepemd@fcn", SETTINGS.deepemd, "fcn"),
        ("deepemd_uniform", DeepEMDHead(3.0, "uniform", SETTINGS.deepemd.classifier), "grid"),
        ("deepemd_mean", DeepEMDHead(3.0, classifier=StructuredClassifierConfig(passes=0, lr=0.5)), "grid"),
    ],
)
def test_a_name_stands_for_a_head_and_its_features(name, head, regions):
    choice = choose_head(name, SETTINGS, "dot")
    assert choice.head == head
    if regions is None:
        assert choice.local_features is None
    else:
        assert choice.local_features == LocalFeaturesConfig(regions, grids=(2,))
        assert choice.head.takes_maps


@pytest.mark.parametrize("name", [*HEADS, *(f"{name}@fcn" for name in MAP_HEADS)])
def test_without_settings_the_head_is_the_one_of_its_table(name):
    plain, at, _ = name.partition("@")
    assert choose_head(name).head == (MAP_HEADS if at else HEADS)[plain]


def test_groups_are_expanded_in_place_and_repeat_nothing_that_is_named():
    members = HEAD_GROUPS["deepemd_table"]
    assert expand_heads(["finetune", "deepemd_table"]) == ("finetune", *members)
    assert sorted(expand_heads(["deepemd_table", "knn"])) == sorted(members)
    assert expand_heads(["knn", "knn"]) == ("knn", "knn")
    for name in members:
        assert choose_head(name).local_features is not None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("svm", r"head: expected one of finetune, .*, deepemd, .*, fc_cosine, got 'svm'"),
        ("svm@fcn", "got 'svm'"),
        (
            "deepemd@patches",
            r"regions after @: expected one of fcn, grid, sampling, got 'patches' in head 'deepemd@pat",
        ),
        ("deepemd@", "got '' in head 'deepemd@'"),
        (
            "finetune@fcn",
            "head 'finetune@fcn' asks for maps, but finetune takes feature vectors; the heads for",
        ),
        ("simpleshot@grid", "simpleshot takes feature vectors"),
    ],
)
def test_a_wrong_name_is_told_what_there_is(name, message):
    with pytest.raises(ValueError, match=message):
        choose_head(name)


def test_records_hold_what_decides_the_features_and_no_more():
    assert features_record(LocalFeaturesConfig(pyramid=(2, 3))) == {"name": "fcn", "pyramid": [2, 3]}
    assert features_record(LocalFeaturesConfig("grid", seed=3)) == features_record(LocalFeaturesConfig("grid"))
    assert features_record(LocalFeaturesConfig("sampling", seed=3))["seed"] == 3
    counts = [crops_an_image(LocalFeaturesConfig(name, regions=5)) for name in ("fcn", "grid", "sampling")]
    assert counts == [1, 13, 5]


@pytest.mark.parametrize("name", [*HEADS, *(f"{name}@fcn" for name in MAP_HEADS)])
def test_the_temperature_of_every_head_can_be_set(name):
    head = choose_head(name).head
    assert head.with_logit_scale(head.logit_scale) == head
    changed = head.with_logit_scale(3.0)
    assert changed != head
    assert (type(changed), changed.logit_scale) == (type(head), 3.0)
