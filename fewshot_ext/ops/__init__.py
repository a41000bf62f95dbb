"""The operators: one module each, with validation, fake, autograd and vmap rules, and the public functions."""

from fewshot_ext import _library

_library.load()

from fewshot_ext.ops.margin_softmax import margin_cosine_loss, margin_softmax_loss  # noqa: E402

__all__ = ["margin_cosine_loss", "margin_softmax_loss"]
