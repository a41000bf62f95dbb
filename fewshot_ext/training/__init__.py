"""Training of networks; the trainings themselves need the extra ``train``, their settings do not."""

from importlib import import_module
from typing import TYPE_CHECKING

from fewshot_ext import _extras
from fewshot_ext.training.config import BackboneConfig, PreTrainingConfig, ValidationConfig
from fewshot_ext.training.meta_config import MetaTrainingConfig
from fewshot_ext.training.metric_config import AntiCollapseConfig, MeasurementConfig, MetricTrainingConfig
from fewshot_ext.training.schedule import warmup_cosine

if TYPE_CHECKING:
    from fewshot_ext.training.meta_training import MetaTraining, MetaTrainingRun, meta_train
    from fewshot_ext.training.metric_training import MetricTraining, MetricTrainingRun
    from fewshot_ext.training.pretraining import PreTraining, PreTrainingRun, pretrain

__all__ = [
    "AntiCollapseConfig",
    "BackboneConfig",
    "MeasurementConfig",
    "MetaTraining",
    "MetaTrainingConfig",
    "MetaTrainingRun",
    "MetricTraining",
    "MetricTrainingConfig",
    "MetricTrainingRun",
    "PreTraining",
    "PreTrainingConfig",
    "PreTrainingRun",
    "ValidationConfig",
    "meta_train",
    "pretrain",
    "warmup_cosine",
]

# By the module that each comes from: Lightning takes seconds to import, and who only reads settings, as `--help` does,
# should not wait for it.
_LAZY = {
    **dict.fromkeys(("MetaTraining", "MetaTrainingRun", "meta_train"), "meta_training"),
    **dict.fromkeys(("MetricTraining", "MetricTrainingRun"), "metric_training"),
    **dict.fromkeys(("PreTraining", "PreTrainingRun", "pretrain"), "pretraining"),
}


def __getattr__(name: str):
    if name in _LAZY:
        _extras.require("train", "lightning", "tensorboard")
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
