"""What others call the weights of backbones that are ours too: one table of layouts, and their names beside ours."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from fewshot_ext.models.config import BackboneConfig, build_backbone

# Pairs of a module of ours and of theirs, each with the dot behind it.
Names = Callable[[], Iterator[tuple[str, str]]]

_STAGES = range(4)
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_IMAGENET_MARGINS = {"resnet18": 256 / 224, "resnet50": 256 / 224}
_PUBLISHED_SIZES = {
    "conv4": 84,
    "resnet12": 84,
    "resnet12_narrow": 80,
    "resnet18": 224,
    "resnet50": 224,
    "wrn28_10": 80,
    "bn_inception": 224,
    "efficientnet_lite0": 224,
}


@dataclass(frozen=True)
class Layout:
    """How somebody's code writes checkpoints, and what its paper takes where the file says nothing.

    Args:
        title: what messages call it.
        backbones: by our name of a backbone, the names of its modules there.
        wrappers: keys that the weights may lie under; None for a file that is the weights themselves.
        prefixes: what may stand before the names of the backbone; the first is the one that is written.
        head: what stands before ``weight`` and ``bias`` of the classifier over the base classes; None without one.
        passed_over: a pattern of the names, besides the head's, that an evaluation does without.
        is_model: whether weights before which the prefix does not stand are those of a method, and passed over.
        mean, std: of each of three channels, for pixels in [0, 1].
        image_sizes: side of the images, by backbone; the published one where it is not here.
        whole: backbones that take images as they come; for the others they are resized and the middle is cut out, as
            ``ImageInput`` does it.
        margins: sides of the resized image over that of the middle, by backbone; 1.15 where it is not here.
        resize_mode: see ``ImageInput``.
        scales: of the loss, by similarity, and for one backbone by both; 1 for a linear classifier with a bias.
        linear_is_dot: whether a bias tells that the loss compared by inner products.
        copies: patterns of names that are written a second time, and what they are called there.
        unsaid: what else no file says, and no option gives.
        parallel: backbones whose names are written behind ``module.``, as ``DataParallel`` has them.
    """

    title: str
    backbones: Mapping[str, Names]
    wrappers: tuple[str | None, ...] = (None,)
    prefixes: tuple[str, ...] = ("",)
    head: str | None = None
    passed_over: str = r"(?!)"
    is_model: bool = False
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    image_sizes: Mapping[str, int] = field(default_factory=dict)
    whole: tuple[str, ...] = ()
    margins: Mapping[str, float] = field(default_factory=dict)
    resize_mode: Literal["crop", "stretch"] = "stretch"
    scales: Mapping[tuple[str, ...], float] = field(default_factory=lambda: {("cosine",): 30.0, ("dot",): 1.0})
    linear_is_dot: bool = False
    copies: Mapping[str, str] = field(default_factory=dict)
    unsaid: str = ""
    parallel: tuple[str, ...] = ()

    def image_size(self, backbone: str) -> int:
        return self.image_sizes.get(backbone, _PUBLISHED_SIZES[backbone])

    def resize(self, backbone: str, image_size: int) -> int:
        margin = self.margins.get(backbone)
        return int(1.15 * image_size) if margin is None else round(margin * image_size)

    def scale(self, backbone: str, similarity: str, has_bias: bool) -> float:
        if has_bias and similarity == "dot":
            return 1.0
        return self.scales.get((similarity, backbone), self.scales[(similarity,)])

    def is_passed_over(self, name: str, prefix: str) -> bool:
        """Whether a weight is neither of the backbone, whose names begin with ``prefix``, nor needed."""
        return (
            re.match(self.passed_over, name) is not None
            or bool(self.head and name.startswith(self.head))
            or (self.is_model and not name.startswith(prefix))
        )


def _itself(backbone: str) -> Names:
    return lambda: ((module, module) for module in {name.rpartition(".")[0] + "." for name in own_weights(backbone)})


def _conv4(block: Callable[[int], tuple[str, str]]) -> Names:
    """``block`` gives the convolution and the normalization of a block."""

    def names() -> Iterator[tuple[str, str]]:
        for number in _STAGES:
            for part, other in enumerate(block(number)):
                yield f"blocks.{number}.{part}.", other

    return names


def _resnet12(conv: str, norm: str, block: str = "0.") -> Names:
    def names() -> Iterator[tuple[str, str]]:
        for stage in _STAGES:
            own, other = f"stages.{stage}.", f"layer{stage + 1}.{block}"
            for part in range(3):
                yield f"{own}residual.{2 * part}.0.", f"{other}{conv}{part + 1}."
                yield f"{own}residual.{2 * part}.1.", f"{other}{norm}{part + 1}."
            for part in range(2):
                yield f"{own}shortcut.{part}.", f"{other}downsample.{part}."

    return names


def _resnet(
    blocks: tuple[int, ...], parts: int, stem: tuple[str, str], conv: str, norm: str, shortcut: tuple[str, str]
) -> Names:
    """A ResNet of ImageNet: blocks in each stage, convolutions in each block."""

    def names() -> Iterator[tuple[str, str]]:
        yield from zip(("stem.0.0.", "stem.0.1."), stem, strict=True)
        places = [(stage, block) for stage, count in enumerate(blocks) for block in range(count)]
        for number, (stage, block) in enumerate(places):
            own, other = f"blocks.{number}.", f"layer{stage + 1}.{block}."
            for part in range(parts):
                yield f"{own}residual.{2 * part}.0.", f"{other}{conv}{part + 1}."
                yield f"{own}residual.{2 * part}.1.", f"{other}{norm}{part + 1}."
            # Not every first block of a stage has one; what ours has not is not looked up.
            for part, name in enumerate(shortcut):
                yield f"{own}shortcut.{part}.", other + name

    return names


def _wrn(conv: str, norm: str) -> Names:
    def names() -> Iterator[tuple[str, str]]:
        yield from (("stem.", "conv1."), ("norm.", "bn1."))
        for number in range(12):
            own, other = f"blocks.{number}.", f"layer{number // 4 + 1}.{number % 4}."
            for part in (1, 2):
                yield f"{own}conv{part}.", f"{other}{conv}{part}."
                yield f"{own}norm{part}.", f"{other}{norm}{part}."
            yield f"{own}shortcut.", f"{other}convShortcut."

    return names


def _inception() -> Iterator[tuple[str, str]]:
    for own in {name.rpartition(".")[0] for name in own_weights("bn_inception", 2)}:
        place, *block, name, part = own.split(".")
        yield (
            f"{own}.",
            "_".join(["inception", *block] * (place == "blocks") + [name]) + ("_bn." if part == "1" else "."),
        )


def _efficientnet_lite() -> Iterator[tuple[str, str]]:
    yield from (("stem.0.", "_conv_stem."), ("stem.1.", "_bn0."), ("head.0.", "_conv_head."), ("head.1.", "_bn1."))
    for number in range(16):
        for norm, part in enumerate(("expand", "depthwise", "project")):
            own, other = f"blocks.{number}.{part}.", f"_blocks.{number}."
            yield from ((f"{own}0.", f"{other}_{part}_conv."), (f"{own}1.", f"{other}_bn{norm}."))


_STEM, _SHORTCUT = ("conv1.", "bn1."), ("downsample.0.", "downsample.1.")
_IMAGENET_RESNETS = {
    "resnet18": _resnet((2, 2, 2, 2), 2, _STEM, "conv", "bn", _SHORTCUT),
    "resnet50": _resnet((3, 4, 6, 3), 3, _STEM, "conv", "bn", _SHORTCUT),
}

# The weights of ours are those of theirs, tensor by tensor, and the functions are the same: the tests hold each against
# a forward pass by hand. What is not the same function is not here: LibFewShot's WRN takes the maximum of the map where
# ours takes the mean, which no shape tells. Its ResNet-18 is here for its names alone, so that an error can say that
# its stem of 3 x 3 has another shape.
LAYOUTS: dict[str, Layout] = {
    "fewshot_ext": Layout(
        "a state_dict of a backbone of this package",
        {name: _itself(name) for name in _PUBLISHED_SIZES},
        prefixes=("", "backbone.", "network.backbone."),
        passed_over=r".*\bdropout\.steps$",
        whole=tuple(_PUBLISHED_SIZES),
    ),
    "negative-margin": Layout(
        "the official code of Negative Margin Matters",
        {
            "conv4": _conv4(lambda number: (f"trunk.{number}.C.", f"trunk.{number}.BN.")),
            "resnet12": _resnet12("C", "BN"),
            "resnet18": _resnet((2, 2, 2, 2), 2, ("trunk.0.", "trunk.1."), "C", "BN", ("shortcut.", "BNshortcut.")),
            "wrn28_10": _wrn("C", "BN"),
        },
        wrappers=("state", None),
        prefixes=("feature.",),
        head="classifier.",
        # Each block of its Conv-4 has its convolution and normalization twice, once by name and once in a row.
        passed_over=r"feature\.trunk\.\d\.trunk\.[01]\.",
        mean=(0.507, 0.487, 0.441),
        std=(0.267, 0.257, 0.276),
        scales={("cosine",): 30.0, ("dot",): 5.0, ("dot", "resnet12"): 10.0},
        linear_is_dot=True,
        copies={r"(.*trunk\.\d\.)C\.": r"\1trunk.0.", r"(.*trunk\.\d\.)BN\.": r"\1trunk.1."},
        parallel=("wrn28_10",),
    ),
    "deepemd": Layout(
        "the official code of DeepEMD",
        {"resnet12": _resnet12("conv", "bn")},
        wrappers=("params",),
        # Bare after its pre-training, the whole model, often in DataParallel, after its meta-training.
        prefixes=("", "encoder."),
        head="fc.",
        mean=(125.3 / 255, 123.0 / 255, 113.9 / 255),
        std=(63.0 / 255, 62.1 / 255, 66.7 / 255),
        margins={"resnet12": 92 / 84},
    ),
    "torchvision": Layout(
        "torchvision or timm",
        _IMAGENET_RESNETS,
        wrappers=(None, "state_dict", "model"),
        head="fc.",
        margins=_IMAGENET_MARGINS,
        resize_mode="crop",
        **_IMAGENET,
    ),
    "pretrainedmodels": Layout(
        "Cadene's pretrainedmodels",
        {"bn_inception": _inception},
        wrappers=(None, "state_dict"),
        head="last_linear.",
        mean=(128 / 255, 117 / 255, 104 / 255),
        std=(1 / 255,) * 3,
        margins={"bn_inception": 256 / 224},
        resize_mode="crop",
    ),
    "efficientnet-lite": Layout(
        "efficientnet_lite_pytorch",
        {"efficientnet_lite0": _efficientnet_lite},
        head="_fc.",
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
        margins={"efficientnet_lite0": 256 / 224},
        resize_mode="crop",
    ),
    "libfewshot": Layout(
        "LibFewShot",
        {
            "conv4": _conv4(lambda number: (f"layer{number + 1}.0.", f"layer{number + 1}.1.")),
            "resnet12": _resnet12("conv", "bn"),
            "resnet18": _IMAGENET_RESNETS["resnet18"],
        },
        wrappers=(None, "model"),
        prefixes=("emb_func.", ""),
        is_model=True,
        mean=(120.39586422 / 255, 115.59361427 / 255, 104.54012653 / 255),
        std=(70.68188272 / 255, 68.27635443 / 255, 72.54505529 / 255),
        unsaid="options of the backbone that change no shape (leaky_relu, maxpool_last2) are taken as their defaults",
    ),
    "meta-baseline": Layout(
        "few-shot-meta-baseline",
        {
            "resnet12": _resnet12("conv", "bn", block=""),
            "resnet12_narrow": _resnet12("conv", "bn", block=""),
            **_IMAGENET_RESNETS,
        },
        wrappers=("model_sd",),
        prefixes=("encoder.",),
        head="classifier.linear.",
        is_model=True,
        image_sizes={"resnet12": 80},
        margins={"resnet12": 1.0, "resnet12_narrow": 1.0, **_IMAGENET_MARGINS},
        resize_mode="crop",
        **_IMAGENET,
    ),
}


@cache
def own_weights(backbone: str, width: int | None = None, in_channels: int = 3) -> Mapping[str, Tensor]:
    """Names and shapes of a backbone of this package, as tensors without memory."""
    with torch.device("meta"):
        return MappingProxyType(build_backbone(BackboneConfig(backbone, width), in_channels).state_dict())


@cache
def names_of(layout: str, backbone: str) -> Mapping[str, str]:
    """Their name of each weight of ours, without a prefix.

    Example:
        >>> names_of("negative-margin", "resnet18")["blocks.1.residual.2.1.bias"]
        'layer1.1.BN2.bias'
    """
    modules, found = dict(LAYOUTS[layout].backbones[backbone]()), {}
    for name in own_weights(backbone, 2):
        module, _, leaf = name.rpartition(".")
        found[name] = modules[f"{module}."] + leaf
    return MappingProxyType(found)
