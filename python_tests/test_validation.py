"""Settings are refused where they are made, and not in the first call that uses them."""

from dataclasses import replace

import numpy as np
import pytest
from torch import nn

from fewshot_ext import FewShotClassifier
from fewshot_ext.evaluation import ProtocolConfig
from fewshot_ext.heads import FineTuningConfig
from fewshot_ext.models import BackboneConfig
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
    make(np.int64(3))
    for value in (3.0, "3", True):
        with pytest.raises(TypeError, match=f"{name}: expected an integer, got {type(value).__name__}"):
            make(value)
