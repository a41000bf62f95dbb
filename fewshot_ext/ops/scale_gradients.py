"""The operator that multiplies stored gradients by the upstream gradient of a scalar loss."""

import torch
from torch import Tensor

from fewshot_ext._validation import is_traced

_scale_op = torch.ops.fewshot_ext.scale_gradients_.default


@torch.library.register_fake("fewshot_ext::scale_gradients_")
def _(first, second, factor):
    return None


def scaled(first: Tensor | None, second: Tensor | None, factor: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """``factor`` times each gradient, in the gradient's own memory where this backward pass is its last reader.

    With 100,000 classes the gradient of the weight is as large as all else together: a copy would cost a tenth of the
    whole call. Called from a backward pass.
    """
    given = [gradient for gradient in (first, second) if gradient is not None]
    if not given or is_traced(factor) or torch._C._autograd._get_current_graph_task_keep_graph():
        return tuple(None if gradient is None else gradient * factor for gradient in (first, second))
    nothing = given[0].new_empty(0) if len(given) == 1 else None
    _scale_op(nothing if first is None else first, nothing if second is None else second, factor)
    return first, second
