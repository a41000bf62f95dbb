"""Few-shot classification and metric learning operators for PyTorch, in C++ and CUDA."""

from fewshot_ext._version import __version__
from fewshot_ext.classifier import FewShotClassifier
from fewshot_ext.losses import MarginCosineLoss, MarginSoftmaxLoss
from fewshot_ext.ops import EMD, emd, finetune_episodes, margin_cosine_loss, margin_softmax_loss

__all__ = [
    "EMD",
    "FewShotClassifier",
    "MarginCosineLoss",
    "MarginSoftmaxLoss",
    "__version__",
    "emd",
    "finetune_episodes",
    "margin_cosine_loss",
    "margin_softmax_loss",
]
