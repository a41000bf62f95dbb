"""The operators as their formulas read, in plain PyTorch: documentation, and the oracle of tests and benchmarks."""

from fewshot_ext.reference.margin_softmax import margin_cosine_loss, margin_softmax_loss

__all__ = ["margin_cosine_loss", "margin_softmax_loss"]
