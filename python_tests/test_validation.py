"""Settings are refused where they are made, and not in the first call that uses them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fewshot_ext import FewShotClassifier
from fewshot_ext.evaluation import ProtocolConfig, extract_features
from fewshot_ext.heads import FineTuning, FineTuningConfig
from fewshot_ext.models import BackboneConfig
from fewshot_ext.retrieval import nearest_neighbors, rerank, retrieval_metrics
from fewshot_ext.training import MetaTrainingConfig, MetricTrainingConfig, PreTrainingConfig


# 21
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda value: FewShotClassifier(nn.Flatten(), batch_size=value), "batch_size"),
        (lambda value: replace(ProtocolConfig(), way=value), "way"),
        (lambda value: replace(FineTuningConfig(), steps=value), "steps"),
        (lambda value: replace(BackboneConfig(), width=value), "width"),
        (lambda value: replace(PreTrainingConfig(), epochs=value), "epochs"),
        (lambda value: replace(MetaTrainingConfig(), shot=value), "shot"),
        (lambda value: replace(MetricTrainingConfig(), classes_per_batch=value), "classes_per_batch"),
    ],
)
def test_counts_are_integers_of_python_or_numpy(make, name):
    made = make(np.int64(3))
    assert type(getattr(made, name)) is int  # files hold no numbers of numpy
    for value in (3.0, "3", True):
        with pytest.raises(TypeError, match=f"{name}: expected an integer, got {type(value).__name__}"):
            make(value)
    with pytest.raises(ValueError, match=f"{name}: expected an integer of 64 bits, got {2**63}"):
        make(2**63)


# 21
def test_numbers_in_tuples_and_others_than_counts_are_pythons_too():
    config = PreTrainingConfig(margin=np.float32(0.5), mean=(np.float64(0.5),), std=(np.float64(0.25),))
    assert [type(value) for value in (config.margin, *config.mean, *config.std)] == [float] * 3
    assert type(ProtocolConfig(shots=(np.int64(1), 5)).shots[0]) is int


# 21
def test_what_was_made_with_numbers_of_numpy_is_saved_and_read(tmp_path):
    images = torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8)
    head = FineTuning(steps=np.int64(3), margin=np.float32(0.25))
    classifier = FewShotClassifier(nn.Flatten(), head, batch_size=np.int64(3), image_size=np.int32(8), seed=np.int64(1))
    classifier.fit(images, ["a", "b", "a", "b"]).save(tmp_path / "a.pt")
    assert FewShotClassifier.load(tmp_path / "a.pt", nn.Flatten()).predict(images) == classifier.predict(images)


# 21
def test_functions_take_integers_of_numpy():
    one, images = np.int64(1), torch.randint(256, (3, 1, 8, 8), dtype=torch.uint8)
    features = extract_features(nn.Flatten(), images, batch_size=one)
    assert features.shape == (3, 64)
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        extract_features(nn.Flatten(), images, batch_size=0)
    maps = torch.rand(3, 4, 8)
    rerank(maps, maps, nearest_neighbors(features, k=one), bytes_at_once=one)
    found = retrieval_metrics(features, torch.zeros(3, dtype=torch.int64), ks=(one,), chunk_size=one)
    assert json.loads(json.dumps(found.recall)) == {"1": 1.0}
