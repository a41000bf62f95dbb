"""Classifiers of few-shot episodes on frozen features, every episode of a batch at once."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fewshot_ext._episodes import check_support_target, class_means
from fewshot_ext._precision import full_precision, normalize
from fewshot_ext._validation import (
    check_at_least,
    check_choice,
    check_count,
    check_fraction,
    check_like,
    check_number,
    check_positive,
    check_similarity,
    plain_numbers,
)
from fewshot_ext.ops import finetune_episodes


class Head(ABC):
    """Scores the queries of E episodes from their support sets; called as ``head(support, target, query, way)``.

    A head is a frozen dataclass: its fields are its settings. The classes of an episode may have different
    numbers of support images. Scores carry gradients to the features, but those of ``FineTuning`` do not.

    Args (of a call):
        support: ``[E, S, D]`` features of any floating dtype; half types are computed in float32.
        support_target: ``[E, S]`` int64 in ``[0, way)``; every class of every episode occurs.
        query: ``[E, Q, D]`` features, dtype and device of ``support``.
        way: classes an episode, at least 2.
        base_mean: ``[D]``, the mean feature of the base classes; needed where ``needs_base_mean`` is true,
            ignored elsewhere.
        generator: CPU generator for what is random (the weights and the order of ``FineTuning``).

    Returns:
        ``[E, Q, way]`` scores, float32 or float64; the largest is the prediction, and ``probabilities`` turns
        them into shares.

    Raises (a call):
        TypeError: an argument that is not a tensor of the dtype above.
        ValueError: shapes or devices that do not fit each other, fewer than 2 classes, a target out of range, a class
            without a support image, or no ``base_mean`` where one is needed.
    """

    scale: float = 1.0
    takes_maps: ClassVar[bool] = False
    """Whether features are maps, ``[E, images, N, C]`` with N local features an image; see ``MapHead``."""
    _temperature_field: ClassVar[str] = "scale"

    @property
    def fits(self) -> bool:
        """Whether a call trains on the support set, which costs the same for one query as for thousands."""
        return False

    @property
    def sums_images(self) -> bool:
        """Whether a score is the logarithm of a sum over the images of a class, larger for more images."""
        return False

    @property
    def needs_base_mean(self) -> bool:
        """Whether a call needs ``base_mean``."""
        return False

    @property
    def logit_scale(self) -> float:
        """What the similarities are multiplied by before the softmax: the temperature of a training with this head."""
        return getattr(self, self._temperature_field)

    def with_logit_scale(self, value: float) -> "Head":
        """The same head with another ``logit_scale``.

        Example:
            >>> MatchingNet().with_logit_scale(10.0)
            MatchingNet(attention_scale=10.0)
        """
        return replace(self, **{self._temperature_field: value})

    @full_precision()
    def __call__(
        self,
        support: Tensor,
        support_target: Tensor,
        query: Tensor,
        way: int,
        *,
        base_mean: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        support, query = self._checked(support, support_target, query, way)
        if self.needs_base_mean:
            if base_mean is None:
                raise ValueError(
                    f"base_mean: expected a value, got none: {type(self).__name__} subtracts it from every feature"
                )
            if base_mean.shape != support.shape[2:]:
                raise ValueError(f"base_mean: expected shape [{support.shape[2]}], got {list(base_mean.shape)}")
            support, query = (x - base_mean.to(x) for x in (support, query))
        return self._scores(support, support_target, query, way, generator)

    def probabilities(self, scores: Tensor, temperature: float = 1.0) -> Tensor:
        """``softmax(scale * scores / temperature)`` over the classes.

        With the temperature 1 they are those of the head's paper, and not calibrated: use them to rank and to compare.
        ``fewshot_ext.evaluation.fit_temperature`` finds the temperature that calibrates them.

        Raises:
            ValueError: a temperature that is not above 0.
        """
        return torch.softmax(scores * (self.scale / check_positive("temperature", temperature)), -1)

    def _checked(self, support: Tensor, target: Tensor, query: Tensor, way: int) -> tuple[Tensor, Tensor]:
        """Support and query in float32 or float64, once all arguments are right."""
        _check_episodes(support, target, query, way)
        return tuple(x.to(torch.promote_types(x.dtype, torch.float32)) for x in (support, query))

    @abstractmethod
    def _scores(
        self, support: Tensor, target: Tensor, query: Tensor, way: int, generator: torch.Generator | None
    ) -> Tensor:
        """The scores of episodes that have been checked, in float32 or float64."""


@dataclass(frozen=True)
class FineTuningConfig:
    """Fine-tuning of the episode's classifier, by default the official protocol; see ``finetune_episodes``.

    Args:
        scale: factor that the similarities are multiplied by before the softmax.
        margin: number subtracted from the similarity with the true class (the paper's Fig. 9 varies it).
        steps: number of passes over the support set.
        batch_size: number of support images in a step.
        lr: learning rate of SGD.
        momentum: momentum of SGD.
        dampening: dampening of SGD.
        weight_decay: weight decay of SGD.

    Raises:
        ValueError: a value out of range; the message names it.
    """

    scale: float = 5.0
    margin: float = 0.0
    steps: int = 100
    batch_size: int = 4
    lr: float = 0.01
    momentum: float = 0.9
    dampening: float = 0.9
    weight_decay: float = 1e-3

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_positive("scale", self.scale)
        check_number("margin", self.margin)
        check_count("steps", self.steps, 1)
        check_count("batch_size", self.batch_size, 1)
        check_positive("lr", self.lr)
        check_fraction("momentum", self.momentum)
        check_fraction("dampening", self.dampening)
        check_at_least("weight_decay", self.weight_decay, 0)


@dataclass(frozen=True)
class FineTuning(FineTuningConfig, Head):
    """A fresh linear classifier for each episode, trained by SGD on its support set: the official protocol.

    Args:
        similarity: that of the pre-training, "cosine" or "dot" (the inner product).

    The other settings are those of ``FineTuningConfig``. Scores are similarities without scale and margin, and
    carry no gradient.

    Reference:
        Liu et al., Negative Margin Matters, ECCV 2020, section 3.5; Chen et al., A Closer Look at Few-shot
        Classification, ICLR 2019 (Baseline++ for the cosine).

    Example:
        >>> support, target = torch.eye(2).unsqueeze(0), torch.tensor([[0, 1]])
        >>> generator = torch.Generator().manual_seed(0)
        >>> FineTuning(lr=0.5)(support, target, support, way=2, generator=generator).argmax(-1)
        tensor([[0, 1]])
    """

    similarity: Literal["cosine", "dot"] = "cosine"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "similarity", check_similarity(self.similarity))

    @classmethod
    def from_config(cls, config: FineTuningConfig, similarity: Literal["cosine", "dot"]) -> "FineTuning":
        """The head of these settings for a backbone that was pre-trained with ``similarity``."""
        settings = {field.name: getattr(config, field.name) for field in fields(FineTuningConfig)}
        return cls(**settings, similarity=similarity)

    @property
    def fits(self) -> bool:
        return True

    @torch.no_grad()
    def _scores(self, support, target, query, way, generator):
        return finetune_episodes(support, target, query, way=way, generator=generator, **asdict(self))


@dataclass(frozen=True)
class ProtoNet(Head):
    """Nearest class mean: minus the squared Euclidean distance, or the cosine, to the mean support feature.

    Args:
        metric: "euclidean" as in the paper, or "cosine".
        scale: of ``probabilities``; the paper has 1 for distances, and 10 is usual for cosines.

    Reference:
        Snell et al., Prototypical Networks for Few-shot Learning, NeurIPS 2017, eq. 1 and 2. The cosine form is
        the classifier of Chen et al., Meta-Baseline, ICCV 2021, eq. 2.

    Example:
        >>> support, target = torch.tensor([[[0.0], [2.0], [5.0]]]), torch.tensor([[0, 0, 1]])
        >>> ProtoNet()(support, target, torch.tensor([[[2.0]]]), way=2)
        tensor([[[-1., -9.]]])
    """

    metric: Literal["euclidean", "cosine"] = "euclidean"
    scale: float = 1.0

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_choice("metric", self.metric, "euclidean", "cosine")
        check_positive("scale", self.scale)

    def _scores(self, support, target, query, way, generator):
        return _similarities(query, class_means(support, target, way), self.metric)


@dataclass(frozen=True)
class MatchingNet(Head):
    """Attention of the query over the support images by cosine; a class collects the attention of its images.

    The scores are the logarithms of these sums, so that ``probabilities`` gives the sums back. Full-context
    embeddings (the paper's section 2.1.2) are trained layers and not part of it.

    Args:
        attention_scale: multiplies the cosines before the softmax over the support; the paper has none, that is
            1, and Chen et al. (ICLR 2019) take 100.

    Reference:
        Vinyals et al., Matching Networks for One Shot Learning, NeurIPS 2016, eq. 1 and section 2.1.1.

    Example:
        >>> support, target = torch.eye(2).unsqueeze(0), torch.tensor([[0, 1]])
        >>> MatchingNet()(support, target, torch.ones(1, 1, 2), way=2).exp()
        tensor([[[0.5000, 0.5000]]])
    """

    attention_scale: float = 1.0
    _temperature_field: ClassVar[str] = "attention_scale"

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_positive("attention_scale", self.attention_scale)

    @property
    def sums_images(self) -> bool:
        return True

    def _scores(self, support, target, query, way, generator):
        attention = torch.softmax(self.attention_scale * _similarities(query, support, "cosine"), -1)  # [E, Q, S]
        shares = torch.bmm(attention, F.one_hot(target, way).to(attention.dtype))
        return shares.clamp_min(torch.finfo(shares.dtype).tiny).log()


@dataclass(frozen=True)
class NearestNeighbor(Head):
    """The class of the nearest support image; a class's score is that of its nearest image.

    Args:
        metric: "cosine", or "euclidean" for minus the squared distance.
        scale: of ``probabilities``.

    Reference:
        Cover and Hart, Nearest Neighbor Pattern Classification, IEEE Transactions on Information Theory 1967.

    Example:
        >>> support, target = torch.tensor([[[0.0], [2.0], [5.0]]]), torch.tensor([[0, 0, 1]])
        >>> NearestNeighbor("euclidean")(support, target, torch.tensor([[[3.0]]]), way=2)
        tensor([[[-1., -4.]]])
    """

    metric: Literal["cosine", "euclidean"] = "cosine"
    scale: float = 10.0

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_choice("metric", self.metric, "cosine", "euclidean")
        check_positive("scale", self.scale)

    def _scores(self, support, target, query, way, generator):
        similarities = _similarities(query, support, self.metric)  # [E, Q, S]
        scores = similarities.new_full((*query.shape[:2], way), float("-inf"))
        return scores.scatter_reduce(2, target.unsqueeze(1).expand_as(similarities), similarities, "amax")


@dataclass(frozen=True)
class SimpleShot(Head):
    """Nearest class mean by Euclidean distance after a fixed transformation of the features.

    Args:
        transform: "cl2n" subtracts the mean feature of the base classes and scales to unit length, "l2n" only
            scales, "un" leaves the features as they are.
        scale: of ``probabilities``.

    Reference:
        Wang et al., SimpleShot: Revisiting Nearest-Neighbor Classification for Few-Shot Learning, 2019
        (arXiv:1911.04623), section 3.

    Example:
        >>> support, target = torch.tensor([[[2.0, 1.0], [1.0, 2.0]]]), torch.tensor([[0, 1]])
        >>> SimpleShot()(support, target, support, way=2, base_mean=torch.ones(2))
        tensor([[[-0., -2.],
                 [-2., -0.]]])
    """

    transform: Literal["cl2n", "l2n", "un"] = "cl2n"
    scale: float = 1.0

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_choice("transform", self.transform, "cl2n", "l2n", "un")
        check_positive("scale", self.scale)

    @property
    def needs_base_mean(self) -> bool:
        return self.transform == "cl2n"

    def _scores(self, support, target, query, way, generator):
        if self.transform != "un":
            support, query = (normalize(x) for x in (support, query))
        return _similarities(query, class_means(support, target, way), "euclidean")


HEADS: Mapping[str, Head] = MappingProxyType(
    {
        "finetune": FineTuning(),
        "protonet": ProtoNet(),
        "protonet_cosine": ProtoNet("cosine", scale=10.0),
        "matchingnet": MatchingNet(),
        "nearest_neighbor": NearestNeighbor(),
        "nearest_neighbor_euclidean": NearestNeighbor("euclidean", scale=1.0),
        "simpleshot": SimpleShot(),
        "simpleshot_l2n": SimpleShot("l2n"),
    }
)
"""The heads by name, with the settings of their papers; the similarity of "finetune" is the backbone's."""


def find_head(name: str) -> Head:
    """The head called ``name`` in ``HEADS``.

    Raises:
        ValueError: there is none; the message lists those there are.

    Example:
        >>> find_head("protonet")
        ProtoNet(metric='euclidean', scale=1.0)
    """
    if name not in HEADS:
        raise ValueError(f"head: expected one of {', '.join(HEADS)}, got {name!r}")
    return HEADS[name]


def _check_episodes(support: Tensor, support_target: Tensor, query: Tensor, way: int) -> None:
    for name, value in (("support", support), ("query", query)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            came = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name}: expected a floating-point tensor, got {came}")
    if support.dim() != 3:
        raise ValueError(f"support: expected shape [E, S, D], got {list(support.shape)}")
    episodes, _, dimension = support.shape
    check_support_target(support_target, support, way)
    if query.dim() != 3 or query.shape[0] != episodes or query.shape[2] != dimension:
        raise ValueError(f"query: expected shape [{episodes}, Q, {dimension}], got {list(query.shape)}")
    check_like("support", support, "query", query)


def _similarities(query: Tensor, points: Tensor, metric: Literal["cosine", "euclidean"]) -> Tensor:
    """``[E, Q, P]``, the cosine or minus the squared distance of each query to each point ``[E, P, D]``."""
    if metric == "cosine":
        return torch.bmm(normalize(query), normalize(points).mT)
    # |q|^2 - 2 q.p + |p|^2 cancels badly far from the origin, and distances do not depend on it.
    center = points.mean(1, keepdim=True)
    query, points = query - center, points - center
    squares = query.square().sum(-1, keepdim=True) + points.square().sum(-1).unsqueeze(1)
    return -torch.baddbmm(squares, query, points.mT, alpha=-2).clamp_min(0)
