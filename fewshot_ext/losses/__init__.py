"""Losses as modules that own their parameters."""

from fewshot_ext.losses.anti_collapse import AntiCollapseLoss, AntiCollapseTerms
from fewshot_ext.losses.base_losses import base_loss
from fewshot_ext.losses.margin_softmax import MarginCosineLoss, MarginSoftmaxLoss

__all__ = ["AntiCollapseLoss", "AntiCollapseTerms", "MarginCosineLoss", "MarginSoftmaxLoss", "base_loss"]
