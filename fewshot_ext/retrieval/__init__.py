"""Retrieval: exact nearest neighbors and their measures, re-ranking by regions, spectrum, pictures."""

from fewshot_ext.retrieval.measures import (
    ClusteringMetrics,
    RetrievalMetrics,
    check_retrieval,
    clustering_metrics,
    nearest_neighbors,
    retrieval_metrics,
)
from fewshot_ext.retrieval.reranking import RerankedRetrieval, rerank, retrieve_and_rerank
from fewshot_ext.retrieval.spectrum import (
    EmbeddingSpread,
    effective_rank,
    measure_spread,
    singular_spectrum,
    spectral_decay,
)

__all__ = [
    "ClusteringMetrics",
    "EmbeddingSpread",
    "RerankedRetrieval",
    "RetrievalMetrics",
    "check_retrieval",
    "clustering_metrics",
    "effective_rank",
    "measure_spread",
    "nearest_neighbors",
    "rerank",
    "retrieval_metrics",
    "retrieve_and_rerank",
    "singular_spectrum",
    "spectral_decay",
]
