"""Whole experiments of the papers, from training to tables and figures."""

from fewshot_ext.experiments.margins import margin_runs
from fewshot_ext.experiments.measurements import FewShotAccuracy, Measurement, TrainedRun
from fewshot_ext.experiments.runs import SweepRun
from fewshot_ext.experiments.sweep import Sweep

__all__ = [
    "FewShotAccuracy",
    "Measurement",
    "Sweep",
    "SweepRun",
    "TrainedRun",
    "margin_runs",
]
