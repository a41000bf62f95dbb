"""The few-shot protocol (features, episodes, classification heads, accuracy with intervals), retrieval, and figures."""

from fewshot_ext.evaluation.angles import angle_histogram, count_peaks
from fewshot_ext.evaluation.backbones import FrozenBackbone
from fewshot_ext.evaluation.comparison import Comparison, ComparisonConfig
from fewshot_ext.evaluation.discriminability import (
    Discriminability,
    class_centers,
    discriminative_function,
    inter_class_variance,
    intra_class_variance,
    measure_discriminability,
)
from fewshot_ext.evaluation.features import FeatureCache
from fewshot_ext.evaluation.head_choice import HEAD_GROUPS, HeadChoice, HeadSettings, choose_head, expand_heads
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
from fewshot_ext.evaluation.label_distribution import (
    MarginMeasures,
    PropositionCheck,
    base_class_probabilities,
    check_proposition,
    same_class_probability,
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
from fewshot_ext.evaluation.match_plots import (
    MatchedPair,
    plot_match,
    plot_matches,
    square_regions,
    strongest_flows,
)
from fewshot_ext.evaluation.plots import plot_accuracy_over_margin
from fewshot_ext.evaluation.protocol import (
    ProtocolConfig,
    episode_accuracies,
    extract_features,
    mean_and_interval,
)
from fewshot_ext.evaluation.reranking import RerankedRetrieval, rerank, retrieve_and_rerank
from fewshot_ext.evaluation.results import ComparisonResults, HeadAccuracy, csv_of_rows, json_with_rows
from fewshot_ext.evaluation.retrieval import (
    RetrievalMetrics,
    check_retrieval,
    clustering_nmi,
    nearest_neighbors,
    retrieval_metrics,
)
from fewshot_ext.evaluation.spectrum import (
    EmbeddingSpread,
    effective_rank,
    measure_spread,
    singular_spectrum,
    spectral_decay,
)

__all__ = [
    "HEADS",
    "HEAD_GROUPS",
    "MAP_HEADS",
    "Comparison",
    "ComparisonConfig",
    "ComparisonResults",
    "DeepEMDHead",
    "Discriminability",
    "EmbeddingSpread",
    "FeatureCache",
    "FineTuning",
    "FineTuningConfig",
    "FrozenBackbone",
    "Head",
    "HeadAccuracy",
    "HeadChoice",
    "HeadSettings",
    "LocalNearestNeighbors",
    "MapHead",
    "MarginMeasures",
    "MatchedPair",
    "MatchingNet",
    "NearestNeighbor",
    "Pooled",
    "PredictionFusion",
    "PropositionCheck",
    "ProtoNet",
    "ProtocolConfig",
    "RerankedRetrieval",
    "RetrievalMetrics",
    "SimpleShot",
    "angle_histogram",
    "base_class_probabilities",
    "check_proposition",
    "check_retrieval",
    "choose_head",
    "class_centers",
    "clustering_nmi",
    "count_peaks",
    "csv_of_rows",
    "discriminative_function",
    "effective_rank",
    "episode_accuracies",
    "expand_heads",
    "extract_features",
    "find_head",
    "find_map_head",
    "inter_class_variance",
    "intra_class_variance",
    "json_with_rows",
    "mean_and_interval",
    "measure_discriminability",
    "measure_spread",
    "nearest_neighbors",
    "plot_accuracy_over_margin",
    "plot_match",
    "plot_matches",
    "rerank",
    "retrieval_metrics",
    "retrieve_and_rerank",
    "same_class_probability",
    "singular_spectrum",
    "spectral_decay",
    "square_regions",
    "strongest_flows",
]
