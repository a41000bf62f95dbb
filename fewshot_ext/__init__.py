"""Few-shot classification and metric learning operators for PyTorch, in C++ and CUDA."""

from fewshot_ext._version import __version__
from fewshot_ext.classifier import FewShotClassifier
from fewshot_ext.losses import AntiCollapseLoss, MarginCosineLoss, MarginSoftmaxLoss
from fewshot_ext.ops import (
    EMD,
    RateReduction,
    coding_rate,
    emd,
    finetune_episodes,
    margin_cosine_loss,
    margin_softmax_loss,
    rate_reduction,
    wasserstein_distance,
)

__all__ = [
    "EMD",
    "AntiCollapseLoss",
    "FewShotClassifier",
    "MarginCosineLoss",
    "MarginSoftmaxLoss",
    "RateReduction",
    "__version__",
    "coding_rate",
    "emd",
    "finetune_episodes",
    "margin_cosine_loss",
    "margin_softmax_loss",
    "rate_reduction",
    "wasserstein_distance",
]
