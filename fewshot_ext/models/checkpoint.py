"""The checkpoint of a training: its layout, reading it without running code in it, those of version 0.1 and of others.

Lightning puts the weights into ``state_dict`` and what the module was made from into ``hyper_parameters``. There, and
under ``network.`` among the weights, the network stands apart from the training that made it; ``config`` has the
settings of that training, ``stage`` says which it is, and each stage adds what it alone needs.
"""

import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from fewshot_ext._files import as_text
from fewshot_ext._formats import check_schema, misfits_named, read_weights
from fewshot_ext.models.foreign import BringsItsOwn, CheckpointSettings, adopt

FORMAT_VERSION = 2
PRE_TRAINING, META_TRAINING, METRIC_TRAINING = "pre-training", "meta-training", "metric training"
# What a checkpoint of other code becomes; its ``origin`` tells whose it was, and what was assumed.
CONVERSION = "conversion"
_NOTHING_GIVEN = CheckpointSettings()
_logger = logging.getLogger(__name__)

NETWORK_SCHEMA = {
    "backbone": dict,
    "image_shape": [int],
    "mean": [float],
    "std": [float],
    "image_size": (int, type(None)),
    "channels_last": bool,
    "similarity": str,
    # As version 0.1 did it, where they are missing.
    "resize?": (int, type(None)),
    "resize_mode?": (str, type(None)),
}
_SCHEMA = {
    "hyper_parameters": {
        "format_version": int,
        "stage": str,
        "network": NETWORK_SCHEMA,
        "config": dict,
        "num_classes?": int,
        "origin?": dict,
    },
    "state_dict": {str: Tensor},
}
# Of version 0.1, where the settings of pre-training or metric learning described the network. It is also what that
# version's FewShotClassifier saved of a backbone.
SCHEMA_0_1 = {
    "hyper_parameters": {
        "config": dict,
        "image_size": [int],
        "mean": [float],
        "std": [float],
        "stage?": str,
        "num_classes?": int,
        "meta_training?": dict,
    },
    "state_dict": {str: Tensor},
}


def upgraded(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a checkpoint in today's layout; one that is already in it comes back as it is."""
    if "format_version" in checkpoint["hyper_parameters"]:
        return dict(checkpoint)
    own = dict(checkpoint["hyper_parameters"])
    made, stage = own.pop("config"), own.pop("stage", PRE_TRAINING)
    network = {
        "backbone": made.get("backbone", {}),
        "image_shape": tuple(own.pop("image_size")),
        "mean": tuple(map(float, own.pop("mean"))),
        "std": tuple(map(float, own.pop("std"))),
        "image_size": made.get("image_size"),
        "channels_last": made.get("channels_last", False),
        # Metric training knew cosines alone.
        "similarity": "dot" if made.get("similarity") == "softmax" else "cosine",
    }
    if network["similarity"] == "dot":
        made = {**made, "similarity": "dot"}
    config = own.pop("meta_training") if stage == META_TRAINING else made
    names = {"extractor.input.": "network.preprocessing.", "extractor.": "network."}
    state = {}
    for key, value in checkpoint["state_dict"].items():
        old = next((old for old in names if key.startswith(old)), "")
        state[names.get(old, "") + key.removeprefix(old)] = value
    settings = {"format_version": FORMAT_VERSION, "stage": stage, "network": network, "config": config, **own}
    return {**checkpoint, "hyper_parameters": settings, "state_dict": state}


@cache
def tell_once(sentence: str) -> None:
    """Logs a warning, the first time that it is asked to."""
    # A command may look at a file, and read it again when its turn comes.
    _logger.warning(sentence)


def _adopted(content: Any, path: str | Path, given: CheckpointSettings) -> dict[str, Any]:
    """The content of a file that no training of ours wrote, in our layout; what it was taken for is told."""
    settings, state, sentence = adopt(content, given)
    settings["origin"]["file"] = as_text(Path(path).name)
    tell_once(as_text(f"{path} is {sentence}"))
    return {
        "hyper_parameters": {"format_version": FORMAT_VERSION, "stage": CONVERSION, **settings},
        "state_dict": state,
    }


def read_layout(
    path: str | Path, stage: str | None = None, given: CheckpointSettings = _NOTHING_GIVEN
) -> dict[str, Any]:
    """As ``fewshot_ext.models.network.read_checkpoint``, which also sees whether the weights fit the network."""
    kind = stage or f"{PRE_TRAINING} or of another training"
    try:
        checkpoint = read_weights(Path(path), scalars=True)
    except OSError as error:
        # Alone, errno and path do not tell which of many settings is meant.
        raise type(error)(error.errno, f"checkpoint cannot be read: {error.strerror}", str(path)) from error
    except ValueError as error:
        raise ValueError(f"{path} is not the checkpoint of a {kind}, or is damaged: {error}") from error
    if stage is None and not (isinstance(checkpoint, dict) and "hyper_parameters" in checkpoint):
        with misfits_named(f"{path} is not the checkpoint of a {kind}"):
            checkpoint = _adopted(checkpoint, path, given)
    else:
        BringsItsOwn.check(given, "beside a checkpoint")
    with misfits_named(f"{path} is not the checkpoint of a {kind}"):
        check_schema(checkpoint, {"hyper_parameters": dict, "state_dict": {str: Tensor}}, "the file")
        if "format_version" not in checkpoint["hyper_parameters"]:
            check_schema(checkpoint, SCHEMA_0_1, "the file")
            checkpoint = upgraded(checkpoint)
        check_schema(checkpoint, _SCHEMA, "the file")
    arguments = checkpoint["hyper_parameters"]
    if arguments["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"{path} has the layout {arguments['format_version']} of a later fewshot_ext; this one reads up to "
            f"{FORMAT_VERSION}"
        )
    if stage not in (None, arguments["stage"]):
        raise ValueError(f"{path} is not the checkpoint of a {kind}: it is that of a {arguments['stage']}")
    if arguments.get("num_classes", 0) > sum(value.numel() for value in checkpoint["state_dict"].values()):
        raise ValueError(f"{path} does not fit this version of fewshot_ext: it names more classes than it has weights")
    return checkpoint
