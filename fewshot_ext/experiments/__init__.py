"""Whole experiments of the papers, from training to tables and figures."""

from fewshot_ext.experiments.margin_sweep import MarginSweep, MarginSweepConfig
from fewshot_ext.experiments.results import Accuracy, SweepResults

__all__ = ["Accuracy", "MarginSweep", "MarginSweepConfig", "SweepResults"]
