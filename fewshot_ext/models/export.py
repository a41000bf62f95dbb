"""Checkpoints of ours, written as other code reads them."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewshot_ext._validation import check_choice
from fewshot_ext.models.checkpoint import META_TRAINING
from fewshot_ext.models.config import BackboneConfig
from fewshot_ext.models.foreign import BACKBONE, COUNTER, HEAD
from fewshot_ext.models.layouts import LAYOUTS, names_of

# The layout of each target, and that of what belongs to DeepEMD.
TARGETS = {"official": ("negative-margin", "deepemd"), "torchvision": ("torchvision", "torchvision")}


class Exported(NamedTuple):
    """A checkpoint of ours as other code writes it.

    Attributes:
        content: for ``torch.save``.
        title: of the layout.
    """

    content: dict[str, Any]
    title: str


def export(checkpoint: Mapping[str, Any], target: str) -> Exported:
    """The network and the classifier over base classes of a checkpoint of ours, as other code writes them.

    Args:
        checkpoint: as ``read_checkpoint`` gives it.
        target: "torchvision", or "official" for the official code of the paper that the checkpoint belongs to: DeepEMD
            for what that wrote or what was meta-trained, and otherwise Negative Margin Matters.

    Raises:
        ValueError: another target, or a backbone that this code does not have.
    """
    check_choice("to", target, *TARGETS)
    own = checkpoint["hyper_parameters"]
    is_deepemd = own["stage"] == META_TRAINING or own.get("origin", {}).get("layout") == "deepemd"
    layout = TARGETS[target][is_deepemd]
    state, wrapper = _state_by_names_of(layout, checkpoint), LAYOUTS[layout].wrappers[0]
    content = state if wrapper is None else {wrapper: state}
    if layout == "negative-margin":
        content = {"epoch": -1, **content, "acc": 0.0, "best_acc": 0.0, "optimizer": _fresh_optimizer(state)}
    return Exported(content, LAYOUTS[layout].title)


def _state_by_names_of(layout: str, checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    target, backbone = LAYOUTS[layout], checkpoint["hyper_parameters"]["network"]["backbone"]
    name = backbone.get("name", BackboneConfig.name)
    if name not in target.backbones:
        raise ValueError(f"to: {target.title} has {', '.join(target.backbones)}, and this is a {name}")
    if backbone.get("embedding") is not None:
        raise ValueError(f"to: {target.title} has no projection behind the backbone, and this one has it")
    source, written = checkpoint["state_dict"], {}
    names = {BACKBONE + own: target.prefixes[0] + other for own, other in names_of(layout, name).items()}
    if target.head is not None:
        names |= {HEAD + leaf: target.head + leaf for leaf in ("weight", "bias") if HEAD + leaf in source}
    for own, other in names.items():
        written[other] = source[own]
        for pattern, copy in target.copies.items():
            if re.match(pattern, other):
                written[re.sub(pattern, copy, other)] = source[own]
    parallel = "module." if name in target.parallel else ""
    return {parallel + other: value for other, value in written.items()}


def _fresh_optimizer(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What Adam has of these parameters before its first step, which the official code loads even to evaluate."""
    buffers = ("running_mean", "running_var", COUNTER)
    # Weights that stand in the file twice are one parameter.
    count = len({id(value) for name, value in state.items() if not name.endswith(buffers)})
    return torch.optim.Adam([torch.zeros(()) for _ in range(count)]).state_dict()
