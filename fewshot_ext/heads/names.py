"""The registry of heads: classifiers of both kinds by name, and the features that they take."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from fewshot_ext.heads.maps import MAP_HEADS, DeepEMDHead
from fewshot_ext.heads.vectors import HEADS, FineTuning, FineTuningConfig, Head
from fewshot_ext.models import LocalFeaturesConfig

REGIONS = ("fcn", "grid", "sampling")

HEAD_GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "deepemd_table": (
            "protonet@fcn",
            "matchingnet@fcn",
            "fc_dot",
            "fc_cosine",
            "knn",
            "prediction_fusion",
            "deepemd_uniform",
            "deepemd_mean",
            "deepemd",
            "deepemd@grid",
            "deepemd@sampling",
        ),
    }
)
"""Several heads under one name; "deepemd_table" is the comparison in the DeepEMD paper."""


@dataclass(frozen=True)
class HeadSettings:
    """Settings of the heads that have some, beyond their names.

    Args:
        finetuning: of "finetune"; see ``FineTuningConfig``.
        deepemd: of the heads that begin with "deepemd", but that "deepemd_uniform" has its own weighting and
            "deepemd_mean" no passes.
        local_features: of the regions that a map head looks at; its ``name`` is for heads that are called without one.
    """

    finetuning: FineTuningConfig = field(default_factory=FineTuningConfig)
    deepemd: DeepEMDHead = field(default_factory=DeepEMDHead)
    local_features: LocalFeaturesConfig = field(default_factory=LocalFeaturesConfig)


@dataclass(frozen=True)
class HeadChoice:
    """A head and the features that it takes; :func:`choose_head` makes one of a name.

    Attributes:
        head: the classifier.
        local_features: which maps it takes; None for the backbone's feature vectors.
    """

    head: Head
    local_features: LocalFeaturesConfig | None = None


def expand_heads(names: Sequence[str]) -> tuple[str, ...]:
    """The names with every group of ``HEAD_GROUPS`` replaced by its members; what a group repeats is left out.

    Example:
        >>> expand_heads(["deepemd", "finetune", "deepemd_table"])[:4]
        ('deepemd', 'finetune', 'protonet@fcn', 'matchingnet@fcn')
    """
    own = [name for name in names if name not in HEAD_GROUPS]
    members = [HEAD_GROUPS.get(name, (name,)) for name in names]
    whole = [name for group in members for name in group if len(group) == 1 or name not in own]
    # A name given twice stays, for the caller to refuse.
    return tuple(whole)


def choose_head(
    name: str, settings: HeadSettings = HeadSettings(), similarity: Literal["cosine", "dot"] = "cosine"
) -> HeadChoice:
    """The head called ``name``: "protonet" takes feature vectors, "deepemd" maps, "deepemd@grid" those of crops.

    Args:
        name: one of ``HEADS``; or one of ``MAP_HEADS``, followed by "@fcn", "@grid" or "@sampling" where the regions
            are not those of ``settings``. What is in both, such as "protonet", is the one for vectors unless regions
            are named.
        settings: see :class:`HeadSettings`.
        similarity: of the backbone's pre-training, with which "finetune" goes on.

    Raises:
        ValueError: no such head or regions, or regions for a head that takes vectors; the message lists what there is.

    Example:
        >>> choose_head("knn@grid")
        HeadChoice(head=LocalNearestNeighbors(neighbors=3, scale=1.0), local_features=LocalFeaturesConfig(name='grid', \
pyramid=(), grids=(2, 3), ratio=2.0, regions=9, horizontal_flip=True, seed=0))
    """
    plain, at, regions = name.partition("@")
    if plain not in HEADS and plain not in MAP_HEADS:
        names = ", ".join([*HEADS, *(known for known in MAP_HEADS if known not in HEADS)])
        raise ValueError(f"head: expected one of {names}, got {plain!r}")
    if not at and plain in HEADS:
        head = FineTuning.from_config(settings.finetuning, similarity) if plain == "finetune" else HEADS[plain]
        return HeadChoice(head)
    if at and regions not in REGIONS:
        raise ValueError(f"regions after @: expected one of {', '.join(REGIONS)}, got {regions!r} in head {name!r}")
    if plain not in MAP_HEADS:
        raise ValueError(
            f"head {name!r} asks for maps, but {plain} takes feature vectors; the heads for maps are "
            f"{', '.join(MAP_HEADS)}"
        )
    local_features = replace(settings.local_features, name=regions) if at else settings.local_features
    return HeadChoice(_with_settings(plain, settings.deepemd), local_features)


def features_record(config: LocalFeaturesConfig) -> dict[str, Any]:
    """The settings that decide the features of an image in evaluation.

    Example:
        >>> features_record(LocalFeaturesConfig("grid"))
        {'name': 'grid', 'grids': [2, 3], 'ratio': 2.0}
    """
    deciding = {"fcn": ("pyramid",), "grid": ("grids", "ratio"), "sampling": ("regions", "horizontal_flip", "seed")}
    values = {name: getattr(config, name) for name in ("name", *deciding[config.name])}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def crops_an_image(config: LocalFeaturesConfig) -> int:
    """How many pictures go through the backbone for one image."""
    return {"fcn": 1, "grid": sum(side * side for side in config.grids), "sampling": config.regions}[config.name]


def _with_settings(name: str, deepemd: DeepEMDHead) -> Head:
    if name == "deepemd_uniform":
        return replace(deepemd, weighting="uniform")
    if name == "deepemd_mean":
        return replace(deepemd, classifier=replace(deepemd.classifier, passes=0))
    return deepemd if name == "deepemd" else MAP_HEADS[name]
