"""Losses whose classes are divided among the ranks of ``torch.distributed``.

``fewshot_ext`` does not import this package by itself: it brings ``torch.distributed.tensor``, which takes seconds.
"""

import torch.distributed

if not torch.distributed.is_available():
    raise ImportError("fewshot_ext.parallel: this build of torch has no torch.distributed")

from fewshot_ext.parallel.margin_softmax import ClassParallelMarginLoss

__all__ = ["ClassParallelMarginLoss"]
