"""Files of FewShotClassifier: their layout, their schema, and heads as plain containers."""

from collections.abc import Hashable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewshot_ext._files import replace_file
from fewshot_ext._formats import check_schema, misfits_named, read_weights, typed
from fewshot_ext._version import __version__
from fewshot_ext.heads.maps import MAP_HEADS
from fewshot_ext.heads.vectors import HEADS, Head
from fewshot_ext.models import StructuredClassifierConfig
from fewshot_ext.models.checkpoint import SCHEMA_0_1
from fewshot_ext.models.network import CONTENT_SCHEMAS

_FORMAT = "fewshot_ext.FewShotClassifier"
_FORMAT_VERSION = 2
_HEAD_TYPES = {type(head).__name__: type(head) for head in (*HEADS.values(), *MAP_HEADS.values())}
# What else a head may have among its settings.
_SETTING_TYPES = {**_HEAD_TYPES, "StructuredClassifierConfig": StructuredClassifierConfig}
# Passes over the support set that a file may ask for: their order is drawn first, and fills memory.
_MOST_PASSES = 1_000_000
# A file of ``save``, and what it may hold of a backbone: always with weights, for a name alone would be downloaded.
_SCHEMA = {
    "head": dict,
    "local_features?": (dict, type(None)),
    "classes": [object],
    "features": Tensor,
    "target": Tensor,
    "base_mean": (Tensor, type(None)),
    "image_size": (int, type(None)),
    "batch_size": int,
    "seed": int,
    "temperature?": float,
    "backbone": dict,
}
_ORIGINS: dict[str, dict[str, Any]] = {
    "sha256": {"sha256": str},
    **CONTENT_SCHEMAS,
    "checkpoint": {"checkpoint": SCHEMA_0_1},
}


def check_label(label: Hashable) -> None:
    """Raises TypeError unless a file can hold the label."""
    if isinstance(label, tuple):
        for part in label:
            check_label(part)
    elif not (label is None or type(label) in (str, int, float, bool)):
        raise TypeError(
            f"labels: expected texts, numbers, booleans, None or tuples of these for a file, got {type(label).__name__}"
        )


def check_learned(support: Tensor, target: Tensor, classes: tuple[Hashable, ...], layout: str) -> None:
    """Raises ValueError, or TypeError for a label, unless a file's features, classes and labels fit each other."""
    if support.dim() != len(layout.split(",")) or not support.is_floating_point() or not support.numel():
        raise ValueError(f"features: expected floats {layout}, got {support.dtype} {list(support.shape)}")
    if not support.isfinite().all():
        raise ValueError("features: expected finite entries")
    if target.dtype != torch.int64 or target.shape != support.shape[:1]:
        raise ValueError(f"target: expected int64 [{len(support)}], got {target.dtype} {list(target.shape)}")
    for label in classes:
        check_label(label)
    if len(set(classes)) != len(classes) or set(target.tolist()) != set(range(len(classes))):
        raise ValueError(f"target: expected every one of {len(classes)} classes, all different, and no other")


def _is_ours(head: Head) -> bool:
    """Whether a head, and the one in it, is of a class that ``load`` can make again."""
    parts = (getattr(head, field.name) for field in fields(head)) if is_dataclass(head) else ()
    return type(head) is _HEAD_TYPES.get(type(head).__name__) and all(
        _is_ours(part) for part in parts if isinstance(part, Head)
    )


def head_content(head: Head) -> dict[str, Any]:
    """A head in containers and numbers, with the names of the classes that it is made of.

    Raises:
        TypeError: it is of a class that ``rebuild_head`` does not know.
    """
    if not _is_ours(head):
        raise TypeError(f"head: expected one of {', '.join(_HEAD_TYPES)} to be saved, got {type(head).__name__}")
    return _to_plain(head)


def _to_plain(value: Any) -> Any:
    if not is_dataclass(value):
        return value
    settings = {field.name: _to_plain(getattr(value, field.name)) for field in fields(value)}
    return {"type": type(value).__name__, "settings": settings}


def rebuild_head(value: Any) -> Any:
    """The head of ``head_content``, and anything else as it is."""
    if not isinstance(value, dict):
        return value
    check_schema(value, {"type": str, "settings": {str: object}}, "head")
    if value["type"] not in _SETTING_TYPES:
        raise ValueError(f"there is no head {value['type'][:40]!r}")
    settings = {name: rebuild_head(part) for name, part in value["settings"].items()}
    if settings.get("similarity") == "softmax":  # of version 0.1
        settings["similarity"] = "dot"
    head = typed(_SETTING_TYPES[value["type"]], settings)
    for name in ("steps", "passes"):
        if getattr(head, name, 0) > _MOST_PASSES:
            raise ValueError(f"{name}: expected at most {_MOST_PASSES:,} in a file, got {getattr(head, name):,}")
    return head


def write_classifier(path: Path, content: dict[str, Any]) -> None:
    """Writes ``content``, as ``_SCHEMA`` has it, whole or not at all."""
    content = {"format": _FORMAT, "format_version": _FORMAT_VERSION, "fewshot_ext": __version__, **content}
    replace_file(path, lambda temporary: torch.save(content, temporary))


def read_classifier(path: Path) -> dict[str, Any]:
    """The content of the file, of which every part is of its type."""
    with misfits_named(f"{path} does not hold a FewShotClassifier that this version reads"):
        content = read_weights(path)
        check_schema(content, {"format": str, "format_version": int}, "the file")
        if content["format"] != _FORMAT or not 1 <= content["format_version"] <= _FORMAT_VERSION:
            raise ValueError(f"it holds {content['format'][:40]!r} version {content['format_version']}")
        check_schema(content, _SCHEMA, "the file")
        origin = content["backbone"]
        kind = next((kind for kind in _ORIGINS if kind in origin), None)
        if kind is None or origin.keys() - {name.removesuffix("?") for name in _ORIGINS[kind]}:
            raise ValueError("the file['backbone']: expected a checksum, a checkpoint or a model of timm")
        check_schema(origin, _ORIGINS[kind], "the file['backbone']")
    return content
