"""Classifiers of few-shot episodes on feature maps: DeepEMD and what its paper compares it with."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fewshot_ext._episodes import check_support_target, class_means
from fewshot_ext._precision import normalize
from fewshot_ext._validation import check_choice, check_count, check_positive, plain_numbers
from fewshot_ext.heads.vectors import FineTuning, Head, MatchingNet, ProtoNet
from fewshot_ext.models import StructuredClassifierConfig, class_prototypes, emd_logits
from fewshot_ext.models.matching import TEMPERATURE, Weighting, check_finite_maps, checked_maps

_BYTES_AT_ONCE = 2**28
_CLASSIFIER = StructuredClassifierConfig()


class MapHead(Head):
    """A head whose features are maps: N local features an image, in place of one.

    Args (of a call):
        support: ``[E, S, N, C]`` local features of any floating dtype; half types are computed in float32.
        query: ``[E, Q, N, C]``, dtype and device of ``support``.

    The other arguments, the scores and the errors are those of :class:`Head`, but that ``base_mean`` is ignored and
    features that are not finite raise a ValueError. ``episode_accuracies`` takes maps ``[images, N, C]`` for such a
    head.
    """

    takes_maps: ClassVar[bool] = True

    def _checked(self, support: Tensor, target: Tensor, query: Tensor, way: int) -> tuple[Tensor, Tensor]:
        support, query = checked_maps(support=support, query=query)
        check_support_target(target, support, way)
        check_finite_maps(support=support, query=query)
        return support, query

    def condense(
        self, support: Tensor, support_target: Tensor, way: int, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """A support set that scores every query as the given one does, and costs a call no fit.

        Args:
            support, support_target, way, generator: as in a call.

        Returns:
            Maps ``[E, S', N, C]`` and their classes ``[E, S']``; the given ones for a head that fits nothing to maps.

        Raises:
            As a call.
        """
        return support, support_target

    def condense_queries(self, query: Tensor) -> Tensor:
        """Queries that score as the given ones do against what ``condense`` gives, in less memory where that can be.

        Args:
            query: ``[..., N, C]``.

        Returns:
            ``[..., N', C]``; the given ones for a head that looks at every region.
        """
        return query

    def check_regions(self, regions: int) -> None:
        """Raises ValueError where a class with this many local features, of all its images, has too few."""


@dataclass(frozen=True)
class DeepEMDHead(MapHead):
    """Optimal matching with the one support map of each class, or with prototypes fitted to several.

    The scores are the logits of the paper; gradients reach the features as in ``fewshot_ext.models.DeepEMD``.

    Args:
        temperature: temperature of the logits.
        weighting: "cross_reference" or "uniform"; see ``fewshot_ext.models.emd_logits``.
        classifier: settings of the structured layer; see ``fewshot_ext.models.StructuredClassifierConfig``.
        detach_weights: stop the gradient through the weights of the regions; the scores are the same.

    Reference:
        Zhang et al., DeepEMD, CVPR 2020.

    Example:
        >>> support, target = torch.rand(3, 5, 9, 16), torch.arange(5).expand(3, 5)
        >>> DeepEMDHead()(support, target, support, way=5).argmax(-1)
        tensor([[0, 1, 2, 3, 4],
                [0, 1, 2, 3, 4],
                [0, 1, 2, 3, 4]])
    """

    temperature: float = TEMPERATURE
    weighting: Weighting = "cross_reference"
    classifier: StructuredClassifierConfig = _CLASSIFIER
    detach_weights: bool = False
    _temperature_field: ClassVar[str] = "temperature"

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_positive("temperature", self.temperature)
        check_choice("weighting", self.weighting, "cross_reference", "uniform")
        if not isinstance(self.classifier, StructuredClassifierConfig):
            kind = type(self.classifier).__name__
            raise TypeError(f"classifier: expected a StructuredClassifierConfig, got {kind}")

    def condense(self, support, support_target, way, *, generator=None):
        prototypes = class_prototypes(
            support, support_target, way, self.classifier, self.temperature, self.weighting, generator
        )
        return prototypes, torch.arange(way, device=support.device).expand(len(support), -1)

    def _scores(self, support, target, query, way, generator):
        prototypes, _ = self.condense(support, target, way, generator=generator)
        return emd_logits(
            query,
            prototypes,
            temperature=self.temperature,
            weighting=self.weighting,
            detach_weights=self.detach_weights,
        )


@dataclass(frozen=True)
class LocalNearestNeighbors(MapHead):
    """Each local feature of the query takes its nearest among all those of a class; the cosines are summed.

    Args:
        neighbors: how many are taken, k; at most the local features of the class with the fewest.
        scale: of ``probabilities``.

    Raises (a call):
        ValueError: more neighbors than a class has local features, besides those of :class:`MapHead`.

    Reference:
        Li et al., Revisiting Local Descriptor Based Image-to-Class Measure for Few-Shot Learning (DN4), CVPR 2019,
        with their k = 3.

    Example:
        >>> support, target = torch.eye(4).view(1, 2, 2, 4), torch.tensor([[0, 1]])
        >>> LocalNearestNeighbors(neighbors=1)(support, target, support, way=2)
        tensor([[[2., 0.],
                 [0., 2.]]])
    """

    neighbors: int = 3
    scale: float = 1.0

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_count("neighbors", self.neighbors, 1)
        check_positive("scale", self.scale)

    def check_regions(self, regions: int) -> None:
        if regions < self.neighbors:
            raise ValueError(
                f"neighbors: expected at most {regions}, the local features of the class with the fewest, "
                f"got {self.neighbors}"
            )

    def _scores(self, support, target, query, way, generator):
        nodes = support.shape[2]
        member = F.one_hot(target, way).mT  # [E, way, S]
        counts = member.sum(-1)
        if counts.numel():
            self.check_regions(int(counts.min()) * nodes)
        # Every class gets room for the images of the largest; what is left over must never be near.
        present, images = member.topk(int(counts.max()) if counts.numel() else support.shape[1], -1)  # [E, way, K]
        rows = torch.arange(len(support), device=support.device)[:, None, None]
        points = normalize(support)[rows, images].flatten(1, 3)  # [E, way K N, C]
        missing = (present == 0).repeat_interleave(nodes, -1)[:, None]  # [E, 1, way, K N]
        units = normalize(query)
        scores = []
        for part in units.split(_queries_at_once(units, points.shape[1]), 1):
            cosines = torch.bmm(part.flatten(1, 2), points.mT).unflatten(-1, missing.shape[2:])
            nearest = cosines.masked_fill(missing, float("-inf")).topk(self.neighbors, -1).values.sum(-1)
            scores.append(nearest.unflatten(1, part.shape[1:3]).sum(2))
        return torch.cat(scores, 1)


@dataclass(frozen=True)
class PredictionFusion(MapHead):
    """Each local feature of the query is classified by itself, and the predictions are averaged.

    A local feature is compared by cosine with the mean local feature of each class; the scores are the logarithms of
    the averaged probabilities, so that ``probabilities`` gives them back.

    Args:
        local_scale: multiplies the cosines before the softmax over the classes.

    Reference:
        The dense classification of Lifchitz et al., Dense Classification and Implanting for Few-Shot Learning, CVPR
        2019, as a baseline of Zhang et al., DeepEMD, CVPR 2020. Neither gives the scale of a classifier
        without training; 10 is usual for cosines.

    Example:
        >>> support, target = torch.eye(2).view(1, 2, 1, 2), torch.tensor([[0, 1]])
        >>> query = torch.tensor([[[[1.0, 0.0], [1.0, 1.0]]]])
        >>> PredictionFusion(local_scale=100.0)(support, target, query, way=2).exp()
        tensor([[[0.7500, 0.2500]]])
    """

    local_scale: float = 10.0
    _temperature_field: ClassVar[str] = "local_scale"

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_positive("local_scale", self.local_scale)

    def _scores(self, support, target, query, way, generator):
        means = normalize(class_means(support.mean(2), target, way))  # [E, way, C]
        cosines = torch.einsum("eqnc,ewc->eqnw", normalize(query), means)
        logarithms = torch.log_softmax(self.local_scale * cosines, -1)
        return logarithms.logsumexp(2) - math.log(query.shape[2])


@dataclass(frozen=True)
class Pooled(MapHead):
    """A head for single features, on the mean of each image's local features.

    Args:
        head: such as ``ProtoNet()``, without need of a ``base_mean``; its scores and probabilities are this one's.

    Raises:
        TypeError: a head for maps, or one that needs a ``base_mean``.

    Example:
        >>> support, target = torch.tensor([[[[0.0], [2.0]], [[4.0], [6.0]]]]), torch.tensor([[0, 1]])
        >>> Pooled(ProtoNet())(support, target, support, way=2)
        tensor([[[ -0., -16.],
                 [-16.,  -0.]]])
    """

    head: Head

    def __post_init__(self) -> None:
        if not isinstance(self.head, Head) or self.head.takes_maps or self.head.needs_base_mean:
            raise TypeError(
                f"head: expected a head for single features that needs no mean of the base classes, got {self.head!r}"
            )

    @property
    def fits(self) -> bool:
        return self.head.fits

    @property
    def sums_images(self) -> bool:
        return self.head.sums_images

    @property
    def scale(self) -> float:
        return self.head.scale

    @property
    def logit_scale(self) -> float:
        return self.head.logit_scale

    def with_logit_scale(self, value: float) -> "Pooled":
        return Pooled(self.head.with_logit_scale(value))

    def condense(self, support, support_target, way, *, generator=None):
        return self.condense_queries(support), support_target

    def condense_queries(self, query: Tensor) -> Tensor:
        return query.to(torch.promote_types(query.dtype, torch.float32)).mean(-2, keepdim=True)

    def _scores(self, support, target, query, way, generator):
        return self.head(support.mean(2), target, query.mean(2), way, generator=generator)


MAP_HEADS: Mapping[str, MapHead] = MappingProxyType(
    {
        "deepemd": DeepEMDHead(),
        "deepemd_uniform": DeepEMDHead(weighting="uniform"),
        "deepemd_mean": DeepEMDHead(classifier=StructuredClassifierConfig(passes=0)),
        "knn": LocalNearestNeighbors(),
        "prediction_fusion": PredictionFusion(),
        "protonet": Pooled(ProtoNet()),
        "protonet_cosine": Pooled(ProtoNet("cosine", scale=10.0)),
        "matchingnet": Pooled(MatchingNet()),
        "fc_dot": Pooled(FineTuning(similarity="dot")),
        "fc_cosine": Pooled(FineTuning(similarity="cosine")),
    }
)
"""The heads for feature maps by name: the rows of the comparison in the DeepEMD paper."""


def find_map_head(name: str) -> MapHead:
    """The head called ``name`` in ``MAP_HEADS``.

    Raises:
        ValueError: there is none; the message lists those there are.

    Example:
        >>> find_map_head("knn")
        LocalNearestNeighbors(neighbors=3, scale=1.0)
    """
    if name not in MAP_HEADS:
        raise ValueError(f"head: expected one of {', '.join(MAP_HEADS)}, got {name!r}")
    return MAP_HEADS[name]


def _queries_at_once(query: Tensor, points: int) -> int:
    """So many queries of every episode that their similarities to ``points`` local features, twice, fit."""
    bytes_a_query = 2 * query.element_size() * len(query) * query.shape[2] * points
    return max(1, _BYTES_AT_ONCE // max(1, bytes_a_query))
