"""Training of backbones; ``PreTraining`` and ``pretrain`` need the extra ``train``, the rest does not."""

from typing import TYPE_CHECKING

from fewshot_ext.training.config import BackboneConfig, PreTrainingConfig, ValidationConfig
from fewshot_ext.training.features import FeatureExtractor, load_backbone
from fewshot_ext.training.schedule import warmup_cosine

if TYPE_CHECKING:
    from fewshot_ext.training.pretraining import PreTraining, PreTrainingRun, pretrain

__all__ = [
    "BackboneConfig",
    "FeatureExtractor",
    "PreTraining",
    "PreTrainingConfig",
    "PreTrainingRun",
    "ValidationConfig",
    "load_backbone",
    "pretrain",
    "warmup_cosine",
]


def __getattr__(name: str):
    # Lightning takes seconds to import: who only reads settings, as `--help` does, should not wait for it.
    if name in ("PreTraining", "PreTrainingRun", "pretrain"):
        from fewshot_ext.training import pretraining

        return getattr(pretraining, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
