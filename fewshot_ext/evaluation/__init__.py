"""The few-shot protocol: features, episodes, fine-tuned classifiers, accuracy with intervals, figures."""

from fewshot_ext.evaluation.finetune import finetune_episodes
from fewshot_ext.evaluation.plots import plot_accuracy_over_margin
from fewshot_ext.evaluation.protocol import (
    FineTuningConfig,
    ProtocolConfig,
    episode_accuracies,
    extract_features,
    mean_and_interval,
)

__all__ = [
    "FineTuningConfig",
    "ProtocolConfig",
    "episode_accuracies",
    "extract_features",
    "finetune_episodes",
    "mean_and_interval",
    "plot_accuracy_over_margin",
]
