"""The operators: one module each, with validation, fake, autograd and vmap rules, and the public functions."""

import sys

from fewshot_ext import _library

try:
    _library.load()
except ImportError:
    # Python imports the package before it runs "python -m fewshot_ext.env", whose task is to explain just this.
    if sys.argv[0] == "-m" and "fewshot_ext.env" in sys.orig_argv:
        from fewshot_ext import env

        sys.exit(env.main())
    raise

from fewshot_ext.ops.coding_rate import coding_rate
from fewshot_ext.ops.emd import EMD, emd
from fewshot_ext.ops.episode_finetune import finetune_episodes
from fewshot_ext.ops.margin_softmax import margin_cosine_loss, margin_softmax_loss
from fewshot_ext.ops.rate_reduction import RateReduction, rate_reduction
from fewshot_ext.ops.wasserstein import wasserstein_distance

__all__ = [
    "EMD",
    "RateReduction",
    "coding_rate",
    "emd",
    "finetune_episodes",
    "margin_cosine_loss",
    "margin_softmax_loss",
    "rate_reduction",
    "wasserstein_distance",
]
