"""The operators as their formulas read, in plain PyTorch or cvxpy: documentation, and the oracle of tests and
benchmarks."""

from fewshot_ext.reference.coding_rate import coding_rate
from fewshot_ext.reference.emd import emd
from fewshot_ext.reference.episode_finetune import finetune_episodes
from fewshot_ext.reference.margin_softmax import margin_cosine_loss, margin_softmax_loss
from fewshot_ext.reference.wasserstein import wasserstein_distance

__all__ = [
    "coding_rate",
    "emd",
    "finetune_episodes",
    "margin_cosine_loss",
    "margin_softmax_loss",
    "wasserstein_distance",
]
