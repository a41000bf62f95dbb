"""The few-shot protocol: features, episodes, accuracies with intervals, and the comparison of networks and heads."""

from fewshot_ext.evaluation.backbones import FrozenBackbone
from fewshot_ext.evaluation.calibration import calibration_errors, fit_temperature, log_losses
from fewshot_ext.evaluation.comparison import Comparison, ComparisonConfig
from fewshot_ext.evaluation.features import FeatureCache
from fewshot_ext.evaluation.open_set import accuracy_over_rejection, auroc, open_set_measures
from fewshot_ext.evaluation.protocol import (
    ProtocolConfig,
    episode_accuracies,
    episode_scores,
    extract_features,
    mean_and_interval,
    query_target,
)
from fewshot_ext.evaluation.results import ComparisonResults, HeadAccuracy, csv_of_rows, json_with_rows

__all__ = [
    "Comparison",
    "ComparisonConfig",
    "ComparisonResults",
    "FeatureCache",
    "FrozenBackbone",
    "HeadAccuracy",
    "ProtocolConfig",
    "accuracy_over_rejection",
    "auroc",
    "calibration_errors",
    "csv_of_rows",
    "episode_accuracies",
    "episode_scores",
    "extract_features",
    "fit_temperature",
    "json_with_rows",
    "log_losses",
    "mean_and_interval",
    "open_set_measures",
    "query_target",
]
