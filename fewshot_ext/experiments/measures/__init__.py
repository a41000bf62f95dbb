"""Measures of one paper: variances and angles of features, and the labels that unseen images get."""

from fewshot_ext.experiments.measures.angles import angle_histogram, count_peaks
from fewshot_ext.experiments.measures.discriminability import (
    Discriminability,
    class_centers,
    discriminative_function,
    inter_class_variance,
    intra_class_variance,
    measure_discriminability,
)
from fewshot_ext.experiments.measures.label_distribution import (
    MarginMeasures,
    PropositionCheck,
    base_class_probabilities,
    check_proposition,
    same_class_probability,
)

__all__ = [
    "Discriminability",
    "MarginMeasures",
    "PropositionCheck",
    "angle_histogram",
    "base_class_probabilities",
    "check_proposition",
    "class_centers",
    "count_peaks",
    "discriminative_function",
    "inter_class_variance",
    "intra_class_variance",
    "measure_discriminability",
    "same_class_probability",
]
