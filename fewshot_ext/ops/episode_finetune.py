"""Fine-tuning of a linear classifier for every episode of a few-shot protocol.

Operator contract: each episode ends where ``torch.optim.SGD`` ends on the same initial classifier and in the same
order, to rounding; the scores carry no gradient, and asking for one raises. The native operator takes episodes
[E, S, D]; what is not given is drawn by a native operator too, from one number of the generator and the same on every
device, because to sort random numbers torch takes about as long as the training.
"""

import torch
from torch import Tensor

from fewshot_ext._native_errors import explaining
from fewshot_ext._precision import accumulate_dtype
from fewshot_ext._validation import (
    check_at_least,
    check_count,
    check_device,
    check_flag,
    check_floating,
    check_integer,
    check_integers,
    check_number,
    check_positive,
    check_similarity,
    check_tensor,
    float32_under_autocast,
    is_traced,
)
from fewshot_ext.ops._autograd import differentiable, one_by_one

_NO_GRADIENT = (
    "fewshot_ext.finetune_episodes offers no gradient: its scores come out of a whole run of SGD. Detach {} or call it "
    "under torch.no_grad()."
)

_finetune_op = torch.ops.fewshot_ext.finetune_episodes.default
_draw_op = torch.ops.fewshot_ext.draw_episodes.default


@torch.library.register_fake("fewshot_ext::finetune_episodes")
def _(support, support_target, query, weight, order, *settings):
    return support.new_empty([support.shape[0], query.shape[1], weight.shape[1]], dtype=accumulate_dtype(support.dtype))


@torch.library.register_fake("fewshot_ext::draw_episodes")
def _(support, seed, way, steps):
    episodes, size, dimension = support.shape
    return (
        support.new_empty([episodes, way, dimension], dtype=accumulate_dtype(support.dtype)),
        support.new_empty([episodes, steps, size], dtype=torch.int64),
    )


def _refuse_derivative(*unused) -> None:
    raise RuntimeError(_NO_GRADIENT.format("its inputs"))


_call_finetune = differentiable(
    _finetune_op, lambda ctx, inputs, output: None, _refuse_derivative, jvp=_refuse_derivative, dimensions=2
)
torch.library.register_vmap(_draw_op, one_by_one(_draw_op))
_call_draw = explaining(_draw_op)


def _refuse_gradients(**tensors: Tensor | None) -> None:
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(f"{name}: {_NO_GRADIENT.format('it')}")


def _checked_features(support: object, query: object, weight: object) -> dict[str, Tensor]:
    """The floating tensors, in the dtypes that the operator takes."""
    check_tensor("support", support, "[E, S, D]", 3)
    check_tensor("query", query, "[E, Q, D]", 3)
    given = {"support": support, "query": query}
    if weight is not None:
        check_tensor("weight", weight, "[E, way, D]", 3)
        given["weight"] = weight
    for name, tensor in given.items():
        check_floating(name, tensor)
    # A step of SGD is far below the resolution of half types.
    tensors = float32_under_autocast(given)
    dtype = tensors["support"].dtype
    if tensors["query"].dtype != dtype:
        raise TypeError(f"query: expected dtype {dtype} as support has, got {tensors['query'].dtype}")
    if weight is not None:
        accumulate = accumulate_dtype(dtype)
        if tensors["weight"].dtype not in (dtype, accumulate):
            taken = f"{dtype} as support has" + (f" or {accumulate}" if accumulate != dtype else "")
            raise TypeError(f"weight: expected dtype {taken}, got {tensors['weight'].dtype}")
        tensors["weight"] = tensors["weight"].to(accumulate)
    return tensors


def _check_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if value.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(value.shape)}")


def _check_values(support_target: Tensor, order: Tensor, way: int) -> None:
    """Raises for the first label or order that is none; waits for the device. Looks at nothing while tracing."""
    if support_target.is_meta or is_traced(support_target) or is_traced(order):
        return
    outside = (support_target < 0) | (support_target >= way)
    if outside.any():
        index = tuple(outside.nonzero()[0].tolist())
        raise ValueError(
            f"support_target: expected labels in [0, {way}), got {int(support_target[index])} at {list(index)}"
        )
    size = order.shape[-1]
    wrong = (order.sort(-1).values != torch.arange(size, device=order.device)).any(-1)
    if wrong.any():
        index = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"order: expected rows that are permutations of 0 .. {size - 1}, got {order[index].tolist()} at "
            f"{list(index)}"
        )


def _classes(way: int | None, weight: Tensor | None, support_target: Tensor) -> int:
    if way is not None:
        way = check_integer("way", way)
        if weight is not None and weight.shape[1] != way:
            raise ValueError(f"weight: expected {way} classes as way says, got shape {list(weight.shape)}")
    elif weight is not None:
        way = weight.shape[1]
    elif support_target.numel() == 0 or support_target.is_meta or is_traced(support_target):
        raise ValueError(
            "way: expected the number of classes, got None, where there are no labels to read it from: no episodes, "
            "meta tensors, compiled code or vmap"
        )
    else:
        way = int(support_target.max()) + 1
    if way < 2:
        raise ValueError(f"way: expected at least 2 classes, got {way}")
    return way


def finetune_episodes(
    support: Tensor,
    support_target: Tensor,
    query: Tensor,
    *,
    similarity: str = "cosine",
    scale: float = 5.0,
    margin: float = 0.0,
    steps: int = 100,
    batch_size: int = 4,
    lr: float = 0.01,
    momentum: float = 0.9,
    dampening: float = 0.9,
    weight_decay: float = 1e-3,
    way: int | None = None,
    weight: Tensor | None = None,
    order: Tensor | None = None,
    generator: torch.Generator | None = None,
    check: bool = False,
) -> Tensor:
    r"""Trains a linear classifier for every episode on frozen features, and scores the episode's queries.

    The fine-tuning protocol of few-shot classification: a classifier makes ``steps`` passes over its support set in
    random order, in minibatches of which the last one may be smaller, under the softmax loss with a margin

    .. math::
        L_i = -\log \frac{e^{\beta (s(z_i, W_{y_i}) - m)}}
                         {e^{\beta (s(z_i, W_{y_i}) - m)} + \sum_{j \ne y_i} e^{\beta s(z_i, W_j)}}

    with SGD as :class:`torch.optim.SGD` has it: the first gradient enters the momentum whole, without momentum there is
    no dampening, weight decay is added to the gradient. Equations 7 and 8 of Liu et al., "Negative Margin Matters:
    Understanding Margin in Few-shot Classification", ECCV 2020; the protocol is that of Chen et al., "A Closer Look at
    Few-shot Classification", ICLR 2019. A vector of norm below 1e-12 is divided by 1e-12 instead, as
    :func:`torch.nn.functional.normalize` does. Given the same ``weight`` and ``order`` the scores are those of the loop
    of torch's optimizer steps, to the rounding of float32. On the CPU vectors may be as long as the dtype takes, but
    for classifiers that grow during the training; where the square of a norm overflows all the same, and on a GPU
    wherever it does (beyond 1e19, in float64 1e154), scores are NaN.

    Args:
        support: ``[E, S, D]``, the support features of E episodes; float32, float64, bfloat16 or float16. Half types
            are trained in float32.
        support_target: ``[E, S]`` int64, labels in [0, way).
        query: ``[E, Q, D]``, dtype and device of ``support``. Under autocast dtypes may differ.
        similarity: s, "cosine" or "dot" for the inner product.
        scale: :math:`\beta` > 0, the inverse temperature.
        margin: m, of either sign, in units of the similarity.
        steps: passes over the support set, at least 0.
        batch_size: support features a minibatch.
        lr, momentum, dampening, weight_decay: of SGD.
        way: number of classes; where None, that of ``weight``, or one more than the largest label. To read it from the
            labels makes the host wait for a GPU; compiled code cannot.
        weight: ``[E, way, D]`` initial classifiers, in the dtype of ``support`` or in float32 where that is a half
            type. Where None they are drawn by kaiming_uniform(a = sqrt 5), that is uniformly in +-1 / sqrt(D).
        order: ``[E, steps, S]`` int64, of which every row is a permutation of 0 .. S - 1; drawn where None.
        generator: CPU generator of which a call takes one number for ``weight`` and ``order``; torch's own where None.
            The same number gives the same draws on every device and with any number of threads.
        check: look at the values on every device. Labels out of range and rows of ``order`` that are no permutations
            raise on the CPU anyway; on a GPU, where a look would make the host wait, the scores of their episode are
            NaN unless this is set.

    Returns:
        ``[E, Q, way]`` scores: the similarities of queries and trained classifiers, without scale and margin; float64
        for float64 features and float32 otherwise.

    There are no gradients: where autograd would record one, inputs that require grad raise a RuntimeError. ``weight``
    and ``order`` are not changed.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: shapes that do not fit, no support, no dimensions, fewer than 2 classes, labels out of range or
            orders that are no permutations (see ``check``), settings out of range, an unknown similarity, tensors on
            different devices.
        RuntimeError: inputs that require grad; CUDA tensors where the package has no kernels for the GPU.

    Example:
        >>> import torch, fewshot_ext
        >>> support, query = torch.randn(600, 25, 64), torch.randn(600, 80, 64)  # 600 episodes, 5-way 5-shot
        >>> target = torch.arange(5).repeat_interleave(5).expand(600, 25)
        >>> generator = torch.Generator().manual_seed(0)
        >>> scores = fewshot_ext.finetune_episodes(support, target, query, generator=generator)
        >>> scores.shape, scores.argmax(-1).shape
        (torch.Size([600, 80, 5]), torch.Size([600, 80]))
    """
    similarity = check_similarity(similarity)
    scale = check_positive("scale", scale)
    margin = check_number("margin", margin)
    lr, momentum, weight_decay = (
        check_at_least(name, value, 0)
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay))
    )
    dampening = check_number("dampening", dampening)
    check_count("steps", steps, 0)
    check_count("batch_size", batch_size, 1)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(f"generator: expected one on the CPU, got one on {generator.device}")
    check_flag("check", check)

    features = _checked_features(support, query, weight)
    check_integers("support_target", support_target, "[E, S]", 2)
    if order is not None:
        check_integers("order", order, "[E, steps, S]", 3)
    others = {"support_target": support_target, "query": query, "weight": weight, "order": order}
    check_device("support", support, **{name: tensor for name, tensor in others.items() if tensor is not None})
    _refuse_gradients(support=support, query=query, weight=weight)
    episodes, size, dimension = support.shape
    if size == 0 or dimension == 0:
        raise ValueError(f"support: expected at least one image and one dimension, got shape {list(support.shape)}")
    _check_shape("support_target", support_target, (episodes, size))
    if query.shape[0] != episodes or query.shape[2] != dimension:
        raise ValueError(f"query: expected shape [{episodes}, Q, {dimension}], got {list(query.shape)}")
    way = _classes(way, weight, support_target)
    if weight is not None:
        _check_shape("weight", weight, (episodes, way, dimension))
    if order is not None:
        _check_shape("order", order, (episodes, steps, size))

    support, query, weight = (features.get(name) for name in ("support", "query", "weight"))
    if weight is None or order is None:
        seed = torch.randint(2**63 - 1, (1,), generator=generator)
        drawn_weight, drawn_order = _call_draw(support, seed, way, steps)
        weight = drawn_weight if weight is None else weight
        order = drawn_order if order is None else order
    if check:
        _check_values(support_target, order, way)
    settings = (similarity == "cosine", scale, margin, batch_size, lr, momentum, dampening, weight_decay)
    try:
        return _call_finetune(support, support_target, query, weight, order, *settings)
    except RuntimeError:
        # On the CPU the kernel looks at every value before it does anything: a look from here first costs more.
        if support.device.type == "cpu":
            _check_values(support_target, order, way)
        raise
