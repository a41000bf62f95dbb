"""Heads: classifiers on the features of a frozen network, of feature vectors and of maps."""

from fewshot_ext.heads.conformal import PValues, leave_one_out
from fewshot_ext.heads.maps import (
    MAP_HEADS,
    DeepEMDHead,
    LocalNearestNeighbors,
    MapHead,
    Pooled,
    PredictionFusion,
    find_map_head,
)
from fewshot_ext.heads.names import HEAD_GROUPS, HeadChoice, HeadSettings, choose_head, expand_heads
from fewshot_ext.heads.vectors import (
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

__all__ = [
    "HEADS",
    "HEAD_GROUPS",
    "MAP_HEADS",
    "DeepEMDHead",
    "FineTuning",
    "FineTuningConfig",
    "Head",
    "HeadChoice",
    "HeadSettings",
    "LocalNearestNeighbors",
    "MapHead",
    "MatchingNet",
    "NearestNeighbor",
    "PValues",
    "Pooled",
    "PredictionFusion",
    "ProtoNet",
    "SimpleShot",
    "choose_head",
    "expand_heads",
    "find_head",
    "find_map_head",
    "leave_one_out",
]
