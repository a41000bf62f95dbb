"""The few-shot protocol (features, episodes, classification heads, accuracy with intervals), retrieval, and figures."""

from fewshot_ext.evaluation.backbones import FrozenBackbone
from fewshot_ext.evaluation.comparison import Comparison, ComparisonConfig
from fewshot_ext.evaluation.features import FeatureCache
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
from fewshot_ext.evaluation.map_heads import (
    MAP_HEADS,
    DeepEMDHead,
    LocalNearestNeighbors,
    MapHead,
    Pooled,
    PredictionFusion,
    find_map_head,
)
from fewshot_ext.evaluation.match_plots import plot_match, square_regions
from fewshot_ext.evaluation.plots import plot_accuracy_over_margin
from fewshot_ext.evaluation.protocol import (
    ProtocolConfig,
    episode_accuracies,
    extract_features,
    mean_and_interval,
)
from fewshot_ext.evaluation.reranking import rerank
from fewshot_ext.evaluation.results import ComparisonResults, HeadAccuracy, json_with_rows
from fewshot_ext.evaluation.retrieval import RetrievalMetrics, clustering_nmi, retrieval_metrics

__all__ = [
    "HEADS",
    "MAP_HEADS",
    "Comparison",
    "ComparisonConfig",
    "ComparisonResults",
    "DeepEMDHead",
    "FeatureCache",
    "FineTuning",
    "FineTuningConfig",
    "FrozenBackbone",
    "Head",
    "HeadAccuracy",
    "LocalNearestNeighbors",
    "MapHead",
    "MatchingNet",
    "NearestNeighbor",
    "Pooled",
    "PredictionFusion",
    "ProtoNet",
    "ProtocolConfig",
    "RetrievalMetrics",
    "SimpleShot",
    "clustering_nmi",
    "episode_accuracies",
    "extract_features",
    "find_head",
    "find_map_head",
    "json_with_rows",
    "mean_and_interval",
    "plot_accuracy_over_margin",
    "plot_match",
    "rerank",
    "retrieval_metrics",
    "square_regions",
]
