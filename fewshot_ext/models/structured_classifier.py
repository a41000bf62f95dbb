"""The structured fully connected layer of DeepEMD: class prototypes made of local features, fitted to each episode."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fewshot_ext._episodes import check_support_target, class_means
from fewshot_ext._precision import full_precision
from fewshot_ext._validation import (
    check_choice,
    check_count,
    check_fraction,
    check_integers,
    check_positive,
    plain_numbers,
)
from fewshot_ext.models.matching import (
    SMALLEST_LENGTH,
    TEMPERATURE,
    WEIGHT_FLOOR,
    Weighting,
    check_finite_maps,
    checked_maps,
    weights_of,
)
from fewshot_ext.ops import emd

# Of the episodes that advance together; more than a core's cache holds goes through main memory at every step.
_BYTES_AT_ONCE = 2**25


@dataclass(frozen=True)
class StructuredClassifierConfig:
    """SGD on the prototypes, by default as in the official training script.

    The right rate grows with the square of the features' length, because cosines do not feel it: a step turns a
    prototype p by something like lr / |p|^2. The official evaluation, which the published 5-shot accuracies are of,
    takes 100 for its ResNet-12; a small network with shorter features may want far less. Choose it on validation
    classes.

    Args:
        passes: number of passes over the support set; 0 leaves the means of the support maps as they are.
        batch_size: number of support images in a step.
        lr: learning rate: 0.1 in the official training, 100 in the official evaluation.
        momentum: momentum of SGD.
        dampening: dampening of SGD.
        detach_weights: hold the weights of the regions fixed in the gradient, as the official implementation does in
            every evaluation. Otherwise the prototypes also move to be weighted differently, as the paper's equations
            say.

    Raises:
        TypeError: a value of another type; the message names it.
        ValueError: a value out of range; likewise.
    """

    passes: int = 100
    batch_size: int = 4
    lr: float = 0.1
    momentum: float = 0.9
    dampening: float = 0.9
    detach_weights: bool = True

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_count("passes", self.passes, 0)
        check_count("batch_size", self.batch_size, 1)
        check_positive("lr", self.lr)
        check_fraction("momentum", self.momentum)
        check_fraction("dampening", self.dampening)


@torch.no_grad()
def fit_prototypes(
    support: Tensor,
    support_target: Tensor,
    way: int,
    *,
    config: StructuredClassifierConfig = StructuredClassifierConfig(),
    temperature: float = TEMPERATURE,
    weighting: Weighting = "cross_reference",
    order: Tensor | None = None,
    generator: torch.Generator | None = None,
    bytes_at_once: int = _BYTES_AT_ONCE,
) -> Tensor:
    """Class prototypes, each a set of local features, that classify the support images by optimal matching.

    They start at the mean of the support maps of each class and follow SGD on the cross-entropy of
    :func:`emd_logits`. Episodes are independent and advance together: a step is two batched products and one call of
    :func:`fewshot_ext.emd` for all its pairs. The gradient is written out, not recorded: the flow is that of the cost.
    Every transport problem is solved from scratch: the operator takes no basis to start from.

    Args:
        support: ``[E, S, N, C]`` local features, N an image; half types are computed in float32.
        support_target: ``[E, S]`` int64 in [0, way); every class of every episode occurs, as often as it likes.
        way: classes an episode, at least 2.
        config: see :class:`StructuredClassifierConfig`.
        temperature, weighting: as in :func:`emd_logits`.
        order: ``[E, passes, S]`` int64, each row a permutation of the support; drawn where None.
        generator: CPU generator for ``order``.
        bytes_at_once: bound on the support maps, prototypes and momenta of the episodes that advance together. The
            result does not depend on it, but for rounding.

    Returns:
        ``[E, way, N, C]`` prototypes without gradients, to be given to :func:`emd_logits` as its support.

    Raises:
        TypeError: features that are not floating-point, targets or an order that are not int64 tensors.
        ValueError: shapes that do not fit each other, a target out of range, a class without a support image, an order
            that leaves out an image, features that are not finite, or an option out of range.

    Reference:
        Zhang et al., "DeepEMD: Few-Shot Image Classification with Differentiable Earth Mover's Distance and Structured
        Classifiers", CVPR 2020, on the structured fully connected layer. The settings of SGD are those of the official
        training script; see :class:`StructuredClassifierConfig` on the rate.

    Example:
        >>> support, target = torch.rand(10, 25, 4, 8), torch.arange(5).repeat(5).expand(10, 25)
        >>> from fewshot_ext.models import emd_logits
        >>> prototypes = fit_prototypes(support, target, way=5, config=StructuredClassifierConfig(passes=2))
        >>> emd_logits(torch.rand(10, 75, 4, 8), prototypes).shape
        torch.Size([10, 75, 5])
    """
    check_positive("temperature", temperature)
    bytes_at_once = check_count("bytes_at_once", bytes_at_once, 1)
    check_choice("weighting", weighting, "cross_reference", "uniform")
    support, _ = checked_maps(support=support, prototypes=support)
    check_support_target(support_target, support, way)
    check_finite_maps(support=support)
    episodes, shots, nodes, channels = support.shape
    if order is None:
        order = torch.rand(episodes, config.passes, shots, generator=generator).argsort(-1)
    check_integers("order", order, "[E, passes, S]", 3)
    if order.shape != (episodes, config.passes, shots):
        raise ValueError(f"order: expected shape {[episodes, config.passes, shots]}, got {list(order.shape)}")
    if (order.sort(-1).values != torch.arange(shots, device=order.device)).any():
        raise ValueError(f"order: expected permutations of the {shots} support images")
    bytes_an_episode = support.element_size() * nodes * channels * (2 * shots + 2 * way)
    at_once = max(1, int(bytes_at_once // max(1, bytes_an_episode)))
    parts = zip(*(x.split(at_once) for x in (support, support_target, order.to(support.device))), strict=True)
    with full_precision():
        return torch.cat([_fit(*part, way, config, temperature, weighting) for part in parts])


class _Split(NamedTuple):
    """Local features as u = centered + level / sqrt(C) 1: the two parts are orthogonal, so SGD on u is SGD on both."""

    centered: Tensor  # [E, rows, C]
    level: Tensor  # [E, rows]

    @classmethod
    def of(cls, features: Tensor) -> "_Split":
        mean = features.mean(-1, keepdim=True)
        return cls(features - mean, mean.squeeze(-1) * math.sqrt(features.shape[-1]))

    def whole(self) -> Tensor:
        return self.centered + self.level.unsqueeze(-1) / math.sqrt(self.centered.shape[-1])


class _Images(NamedTuple):
    """Support images: u = length * unit + level / sqrt(C) 1."""

    unit: Tensor  # [E, S, N, C]
    length: Tensor  # [E, S, N]
    level: Tensor  # [E, S, N]
    truth: Tensor  # [E, S, way], one-hot

    def select(self, rows: Tensor, batch: Tensor) -> "_Images":
        return _Images(*(part[rows, batch] for part in self))


def _fit(
    support: Tensor,
    target: Tensor,
    order: Tensor,
    way: int,
    config: StructuredClassifierConfig,
    temperature: float,
    weighting: Weighting,
) -> Tensor:
    centered, level = _Split.of(support)
    length = torch.linalg.vector_norm(centered, dim=-1).clamp_min(SMALLEST_LENGTH)
    truth = F.one_hot(target, way).to(support.dtype)
    images = _Images(centered / length.unsqueeze(-1), length, level, truth)
    prototypes = _Split.of(class_means(support, target, way).flatten(1, 2))  # rows: way N
    velocity = _Split(*map(torch.zeros_like, prototypes))
    rows = torch.arange(len(support), device=support.device).unsqueeze(1)
    # torch.optim.SGD takes the first gradient into the velocity whole: dampening starts with the second step.
    kept, taken = 0.0, 1.0
    for batch in (part for one_pass in order.unbind(1) for part in one_pass.split(config.batch_size, 1)):
        chosen = images.select(rows, batch)
        gradient = _gradient(chosen, prototypes, temperature, weighting, config.detach_weights)
        velocity.centered.baddbmm_(gradient.of_units, chosen.unit.flatten(1, 2), beta=kept, alpha=taken)
        velocity.centered.addcmul_(prototypes.centered, gradient.of_centered.unsqueeze(-1), value=taken)
        prototypes.centered.sub_(velocity.centered, alpha=config.lr)
        if gradient.level is not None:
            velocity.level.mul_(kept).add_(gradient.level, alpha=taken)
            prototypes.level.sub_(velocity.level, alpha=config.lr)
        kept, taken = config.momentum, 1 - config.dampening
    return prototypes.whole().unflatten(1, (way, -1))


class _Gradient(NamedTuple):
    """Of the loss to the prototypes. To the centered part it is of_units @ units + of_centered * centered."""

    of_units: Tensor  # [E, way N, B N]
    of_centered: Tensor  # [E, way N]
    level: Tensor | None  # [E, way N]; None where it is zero


def _gradient(
    images: _Images, prototypes: _Split, temperature: float, weighting: Weighting, detach_weights: bool
) -> _Gradient:
    episodes, batch, nodes, _ = images.unit.shape
    way = images.truth.shape[-1]
    norm = torch.linalg.vector_norm(prototypes.centered, dim=-1).clamp_min_(SMALLEST_LENGTH)
    inverse = norm.reciprocal().view(episodes, 1, way, 1, nodes)
    products = torch.bmm(images.unit.flatten(1, 2), prototypes.centered.mT)
    # [E, B, way, regions of the image, regions of the prototype]
    products = products.view(episodes, batch, nodes, way, nodes).transpose(2, 3).contiguous()
    similarity = products * inverse

    length, image_level = images.length.unsqueeze(2), images.level.unsqueeze(2)  # [E, B, 1, N]
    relevances = ()
    if weighting == "uniform":
        weights = (torch.ones_like(similarity[..., 0]),) * 2
    else:
        # The inner product of two whole features is length * product + level * level.
        level = prototypes.level.view(episodes, 1, way, nodes)
        relevances = (
            length * products.mean(-1) + image_level * level.mean(-1, keepdim=True),
            (length.unsqueeze(-2) @ products).squeeze(-2) / nodes + image_level.mean(-1, keepdim=True) * level,
        )
        weights = tuple(weights_of(relevance, nodes) for relevance in relevances)

    solved = emd(1 - similarity, *weights)
    logits = temperature * (1 - solved.value / nodes)
    # d loss / d similarity is the flow times this; d loss / d weight is the dual times its negative.
    error = (torch.softmax(logits, -1) - images.truth) * (temperature / nodes / batch)
    flow = solved.flow.mul_(error[..., None, None])
    # d cos(q, p) / d p = (q - cos(q, p) p / |p|) / |p| for unit q.
    of_centered = (flow * similarity).sum((1, 3)).flatten(1) / -norm.square()
    of_products, of_level = flow.mul_(inverse), None
    if relevances and not detach_weights:
        of_image, of_prototype = (
            _through_weights(-error.unsqueeze(-1) * dual, relevance) / nodes
            for dual, relevance in zip((solved.supply_dual, solved.demand_dual), relevances, strict=True)
        )
        of_whole = of_image.unsqueeze(-1) + of_prototype.unsqueeze(-2)
        of_products += length.unsqueeze(-1) * of_whole
        of_level = (image_level.unsqueeze(-1) * of_whole).sum((1, 3)).flatten(1)
    of_units = of_products.permute(0, 2, 4, 1, 3).reshape(episodes, way * nodes, batch * nodes)
    return _Gradient(of_units, of_centered, of_level)


def _through_weights(grad: Tensor, relevance: Tensor) -> Tensor:
    """The gradient to the relevances that ``weights_of`` made weights of, from the gradient to the weights."""
    weights = relevance.relu() + WEIGHT_FLOOR
    total = weights.sum(-1, keepdim=True)
    mean = (grad * weights).sum(-1, keepdim=True) / total
    return (grad - mean) * (relevance.shape[-1] / total) * (relevance > 0)
