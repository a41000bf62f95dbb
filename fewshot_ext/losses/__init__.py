"""Losses as modules that own their parameters."""

from fewshot_ext.losses.margin_softmax import MarginCosineLoss, MarginSoftmaxLoss

__all__ = ["MarginCosineLoss", "MarginSoftmaxLoss"]
