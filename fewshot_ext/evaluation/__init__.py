"""The few-shot protocol: features, episodes, classification heads, accuracy with intervals, figures."""

from fewshot_ext.evaluation.finetune import finetune_episodes
from fewshot_ext.evaluation.heads import (
    HEADS,
    FineTuning,
    FineTuningConfig,
    Head,
    MatchingNet,
    NearestNeighbor,
    ProtoNet,
    SimpleShot,
    find_head,
)
from fewshot_ext.evaluation.plots import plot_accuracy_over_margin
from fewshot_ext.evaluation.protocol import (
    ProtocolConfig,
    episode_accuracies,
    extract_features,
    mean_and_interval,
)

__all__ = [
    "HEADS",
    "FineTuning",
    "FineTuningConfig",
    "Head",
    "MatchingNet",
    "NearestNeighbor",
    "ProtoNet",
    "ProtocolConfig",
    "SimpleShot",
    "episode_accuracies",
    "extract_features",
    "find_head",
    "finetune_episodes",
    "mean_and_interval",
    "plot_accuracy_over_margin",
]
