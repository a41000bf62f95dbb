"""DeepEMD: few-shot classification by optimal matching between the regions of two images."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fewshot_ext._episodes import check_support_target, class_means
from fewshot_ext._precision import full_precision
from fewshot_ext._validation import (
    check_at_least,
    check_choice,
    check_count,
    check_like,
    check_positive,
    plain_numbers,
)
from fewshot_ext.models.backbone import Backbone
from fewshot_ext.models.local_features import FCN, Grid, LocalFeatures, Sampling
from fewshot_ext.models.matching import TEMPERATURE, Weighting, emd_logits
from fewshot_ext.models.structured_classifier import StructuredClassifierConfig, fit_prototypes

_CLASSIFIER = StructuredClassifierConfig()


@dataclass(frozen=True)
class LocalFeaturesConfig:
    """Which regions an image is described by; the defaults are the official ones.

    Args:
        name: kind of regions: fcn (positions of the feature map), grid (crops on grids) or sampling (random crops).
        pyramid: sides of coarser grids beside the map, such as [2,3] (fcn only).
        grids: sides of the grids (grid only).
        ratio: side of a region in evaluation, in sides of a cell (grid only).
        regions: number of crops of each image (sampling only).
        horizontal_flip: mirror half of the crops (grid and sampling only). Never do so with digits or letters.
        seed: seed of the crops in evaluation (sampling only).

    Raises:
        ValueError: an unknown name, or a value out of range.
    """

    name: Literal["fcn", "grid", "sampling"] = "fcn"
    pyramid: tuple[int, ...] = ()
    grids: tuple[int, ...] = (2, 3)
    ratio: float = 2.0
    regions: int = 9
    horizontal_flip: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_choice("name", self.name, "fcn", "grid", "sampling")
        for side in self.pyramid:
            check_count("pyramid", side, 1)
        if not self.grids:
            raise ValueError("grids: expected at least one side, got none")
        for side in self.grids:
            check_count("grids", side, 1)
        check_at_least("ratio", self.ratio, 1)
        check_count("regions", self.regions, 1)
        check_count("seed", self.seed, 0)


def build_local_features(
    config: LocalFeaturesConfig, backbone: Backbone | nn.Module, preprocessing: nn.Module | None = None
) -> LocalFeatures:
    """The module of these settings around ``backbone``.

    Example:
        >>> from fewshot_ext.models import BackboneConfig, build_backbone
        >>> backbone = build_backbone(BackboneConfig("resnet12", width=8)).eval()
        >>> build_local_features(LocalFeaturesConfig(pyramid=(2, 3)), backbone)(torch.rand(1, 3, 84, 84)).shape
        torch.Size([1, 38, 80])
    """
    if config.name == "fcn":
        return FCN(backbone, config.pyramid, preprocessing=preprocessing)
    flip = config.horizontal_flip
    if config.name == "grid":
        return Grid(backbone, config.grids, config.ratio, horizontal_flip=flip, preprocessing=preprocessing)
    return Sampling(backbone, config.regions, seed=config.seed, horizontal_flip=flip, preprocessing=preprocessing)


class DeepEMD(nn.Module):
    """Few-shot classification by the Earth Mover's Distance between sets of local features.

    With one support image a class, that image is the class's prototype, and the gradient reaches query and support.
    With more, the prototypes are those of the structured fully connected layer, fitted to the support maps and then
    held fixed: the gradient reaches the query alone, as in the official implementation. (With no passes they are the
    means of the support maps, which do carry gradients.)

    Where paper and official implementation differ, this follows the code that gave the published numbers, except that
    the gradient passes through the weights: see ``detach_weights`` of :func:`emd_logits`. The code also adds 1e-5 to
    the weights wherever OpenCV solves, on top of the 1e-3; here no solver needs that.

    Args:
        local_features: maps images ``[B, ...]`` to ``[B, N, C]``, such as :class:`FCN`, :class:`Grid` or
            :class:`Sampling`.
        temperature: of the logits.
        weighting: "cross_reference" or "uniform"; see :func:`emd_logits`.
        detach_weights: stop the gradient through the weights.
        classifier: of the structured fully connected layer; see :class:`StructuredClassifierConfig`.

    Raises:
        ValueError: an option out of range.

    Reference:
        Zhang et al., "DeepEMD: Few-Shot Image Classification with Differentiable Earth Mover's Distance and Structured
        Classifiers", CVPR 2020 (https://arxiv.org/abs/2003.06777).

    Example:
        >>> from fewshot_ext.models import conv4
        >>> model = DeepEMD(FCN(conv4(pooled_blocks=3)))
        >>> support, query = torch.rand(2, 5, 3, 32, 32), torch.rand(2, 10, 3, 32, 32)
        >>> logits = model(support, torch.arange(5).expand(2, 5), query, way=5)
        >>> logits.shape
        torch.Size([2, 10, 5])
        >>> torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.arange(20) % 5).backward()
    """

    def __init__(
        self,
        local_features: nn.Module,
        *,
        temperature: float = TEMPERATURE,
        weighting: Weighting = "cross_reference",
        detach_weights: bool = False,
        classifier: StructuredClassifierConfig = _CLASSIFIER,
    ) -> None:
        super().__init__()
        check_positive("temperature", temperature)
        check_choice("weighting", weighting, "cross_reference", "uniform")
        self.local_features = local_features
        self.temperature, self.weighting, self.detach_weights = temperature, weighting, detach_weights
        self.classifier = classifier

    def forward(
        self,
        support: Tensor,
        support_target: Tensor,
        query: Tensor,
        way: int,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Logits of the queries of E episodes.

        All images go through ``local_features`` together, so that in training they share their batch statistics.

        Args:
            support: ``[E, S, ...]`` images.
            support_target: ``[E, S]`` int64 in [0, way); every class of every episode occurs.
            query: ``[E, Q, ...]`` images of the same size.
            way: classes an episode, at least 2.
            generator: CPU generator for the order in which the structured layer sees its support.

        Returns:
            ``[E, Q, way]``, float32 or float64.

        Raises:
            TypeError: an argument of another type or dtype.
            ValueError: shapes that do not fit each other, a target out of range, a class without a support image, or
                features that are not finite.
        """
        for name, images in (("support", support), ("query", query)):
            if not isinstance(images, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(images).__name__}")
            if images.dim() < 3:
                raise ValueError(f"{name}: expected shape [E, images, ...], got {list(images.shape)}")
        if query.shape[0] != support.shape[0] or query.shape[2:] != support.shape[2:]:
            expected = ", ".join(map(str, (support.shape[0], "Q", *support.shape[2:])))
            raise ValueError(f"query: expected shape [{expected}] for these support images, got {list(query.shape)}")
        check_like("support", support, "query", query)
        check_support_target(support_target, support, way)
        maps = self.local_features(torch.cat([support, query], 1).flatten(0, 1))
        # The structured layer computes in float32 or better, and what it is compared with must have its dtype.
        with full_precision():
            images = [support.shape[1], query.shape[1]]
            maps = maps.to(torch.promote_types(maps.dtype, torch.float32)).unflatten(0, (len(support), sum(images)))
            support_maps, query_maps = maps.split(images, 1)
            return self.logits(query_maps, self.prototypes(support_maps, support_target, way, generator=generator))

    def prototypes(
        self, support: Tensor, support_target: Tensor, way: int, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """``[E, way, N, C]`` of support maps ``[E, S, N, C]``; see the class."""
        return class_prototypes(
            support, support_target, way, self.classifier, self.temperature, self.weighting, generator
        )

    def logits(self, query: Tensor, prototypes: Tensor) -> Tensor:
        """``[E, Q, way]`` of query maps ``[E, Q, N, C]``; see :func:`emd_logits`."""
        return emd_logits(
            query,
            prototypes,
            temperature=self.temperature,
            weighting=self.weighting,
            detach_weights=self.detach_weights,
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, weighting={self.weighting!r}, detach_weights={self.detach_weights}, "
            f"classifier={self.classifier}"
        )


def class_prototypes(
    support: Tensor,
    support_target: Tensor,
    way: int,
    classifier: StructuredClassifierConfig = _CLASSIFIER,
    temperature: float = TEMPERATURE,
    weighting: Weighting = "cross_reference",
    generator: torch.Generator | None = None,
) -> Tensor:
    """One set of local features a class: its support map where it has one, else that of the structured layer.

    Args:
        support, support_target, way, generator: as in :func:`fit_prototypes`.
        classifier, temperature, weighting: its ``config``, ``temperature`` and ``weighting``.

    Returns:
        ``[E, way, N, C]``; it carries gradients unless the structured layer made it.

    Raises:
        As :func:`fit_prototypes`.

    Example:
        >>> support = torch.rand(1, 2, 9, 4)
        >>> torch.equal(class_prototypes(support, torch.tensor([[1, 0]]), 2), support.flip(1))
        True
    """
    if support.shape[1] == way or classifier.passes == 0:
        check_support_target(support_target, support, way)
        return class_means(support, support_target, way)
    return fit_prototypes(
        support,
        support_target,
        way,
        config=classifier,
        temperature=temperature,
        weighting=weighting,
        generator=generator,
    )
