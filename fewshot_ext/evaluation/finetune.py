"""The official fine-tuning protocol, all episodes at once."""

import math
from typing import Literal

import torch
from torch import Tensor


def finetune_episodes(
    support: Tensor,
    support_target: Tensor,
    query: Tensor,
    *,
    similarity: Literal["cosine", "softmax"] = "cosine",
    scale: float = 5.0,
    margin: float = 0.0,
    steps: int = 100,
    batch_size: int = 4,
    lr: float = 0.01,
    momentum: float = 0.9,
    dampening: float = 0.9,
    weight_decay: float = 1e-3,
    weight: Tensor | None = None,
    order: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Trains a fresh linear classifier for every episode on frozen features and scores the episode's queries.

    Each classifier makes ``steps`` passes over its support set in random order, in minibatches of
    ``batch_size`` (the last one ragged), under the margin softmax of the paper's eq. 1 and SGD as
    ``torch.optim.SGD`` does it.
    The episodes are independent, so they advance together: a step is two batched products, and the softmax
    gradient is written out rather than recorded.

    Args:
        support: ``[E, S, D]`` float32 or float64 features.
        support_target: ``[E, S]`` int64, classes 0 .. way - 1 of the episode.
        query: ``[E, Q, D]`` features.
        similarity: "cosine", or "softmax" for the inner product.
        scale, margin: of the margin softmax; the protocol has 5 and 0.
        steps: passes over the support set.
        batch_size: support images a minibatch.
        lr, momentum, dampening, weight_decay: of SGD.
        weight: ``[E, way, D]`` initial classifiers; drawn by kaiming_uniform(a = sqrt 5), that is uniformly
            in +-1 / sqrt(D), where None. It is not changed.
        order: ``[E, steps, S]`` int64, each row a permutation of the support; drawn where None.
        generator: CPU generator for ``weight`` and ``order``.

    Returns:
        ``[E, Q, way]`` similarities, without scale and margin.

    Raises:
        ValueError: shapes that do not fit each other, or an unknown similarity.

    Reference:
        Liu et al., Negative Margin Matters, ECCV 2020, section 3.5; the protocol is that of Chen et al., A
        Closer Look at Few-shot Classification, ICLR 2019.

    Example:
        >>> support, query = torch.randn(600, 25, 64), torch.randn(600, 80, 64)
        >>> target = torch.arange(5).repeat_interleave(5).expand(600, 25)
        >>> finetune_episodes(support, target, query, steps=1).shape
        torch.Size([600, 80, 5])
    """
    if similarity not in ("cosine", "softmax"):
        raise ValueError(f"similarity must be 'cosine' or 'softmax', got {similarity!r}")
    episodes, shots, dimension = _check_shapes(support, support_target, query)
    way = int(support_target.max()) + 1 if weight is None else weight.shape[1]
    if weight is None:
        bound = 1 / math.sqrt(dimension)
        weight = torch.empty(episodes, way, dimension).uniform_(-bound, bound, generator=generator)
    if order is None:
        order = torch.rand(episodes, steps, shots, generator=generator).argsort(-1)
    if weight.shape != (episodes, way, dimension):
        raise ValueError(f"weight must be {[episodes, way, dimension]}, got {list(weight.shape)}")
    if order.shape != (episodes, steps, shots):
        raise ValueError(f"order must be {[episodes, steps, shots]}, got {list(order.shape)}")

    cosine = similarity == "cosine"
    if cosine:
        support, query = (torch.nn.functional.normalize(x, dim=-1) for x in (support, query))
    weight = weight.to(support, copy=True)
    order = order.to(support.device)
    one_hot = torch.nn.functional.one_hot(support_target, way).to(support.dtype)  # [E, S, way]
    rows = torch.arange(episodes, device=support.device).unsqueeze(1)
    velocity = torch.zeros_like(weight)
    # torch.optim.SGD takes the first gradient into the velocity whole: dampening starts with the second step.
    kept, taken = 0.0, 1.0
    for minibatch in (batch for batches in order.unbind(1) for batch in batches.split(batch_size, dim=1)):
        images, truth = support[rows, minibatch], one_hot[rows, minibatch]  # [E, B, D], [E, B, way]
        scores = torch.bmm(images, weight.mT)  # [E, B, way]
        if cosine:
            inverse_norm = weight.norm(dim=-1).clamp_min(1e-12).reciprocal()  # [E, way]
            scores *= inverse_norm.unsqueeze(1)
        error = torch.softmax(scale * (scores - margin * truth), -1).sub_(truth).mul_(scale / images.shape[1])
        shrink = weight_decay
        if cosine:
            # d cos(w, x) / d w = (x - cos(w, x) w / |w|) / |w| for unit x: its second part decays w.
            error *= inverse_norm.unsqueeze(1)
            shrink = weight_decay - (error * scores).sum(1).mul_(inverse_norm).unsqueeze(-1)  # [E, way, 1]
        velocity.baddbmm_(error.mT, images, beta=kept, alpha=taken).add_(weight * shrink, alpha=taken)
        weight.sub_(velocity, alpha=lr)
        kept, taken = momentum, 1 - dampening
    if cosine:
        weight = torch.nn.functional.normalize(weight, dim=-1)
    return torch.bmm(query, weight.mT)


def _check_shapes(support: Tensor, support_target: Tensor, query: Tensor) -> tuple[int, int, int]:
    if support.dim() != 3:
        raise ValueError(f"support must be [E, S, D], got {list(support.shape)}")
    episodes, shots, dimension = support.shape
    if support_target.shape != (episodes, shots):
        raise ValueError(f"support_target must be {[episodes, shots]}, got {list(support_target.shape)}")
    if query.dim() != 3 or query.shape[0] != episodes or query.shape[2] != dimension:
        raise ValueError(f"query must be [{episodes}, Q, {dimension}], got {list(query.shape)}")
    return episodes, shots, dimension
