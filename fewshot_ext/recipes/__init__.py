"""Settings of trainings that ship with the package: the published ones, and small ones for a CPU."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from fewshot_ext.training.config import PreTrainingConfig
from fewshot_ext.training.meta_config import MetaTrainingConfig
from fewshot_ext.training.metric_config import MetricTrainingConfig

_FOLDER = Path(__file__).parent
_FOLDERS = {"pretrain": _FOLDER, "meta-train": _FOLDER / "meta_train", "metric-train": _FOLDER / "metric_train"}
# DeepEMD has the same settings for all of these, where no file is for one alone.
_SHARED = "resnet12_deepemd"
_DATA_SETS = ("cifarfs", "cub", "fc100", "miniimagenet", "tieredimagenet")


@cache
def _files(command: str) -> dict[str, Path]:
    files = {path.stem: path for path in _FOLDERS[command].glob("*.yaml")}
    shared = {stem: files.pop(stem) for stem in list(files) if stem.startswith(_SHARED)}
    return {f"{data}_{stem}": path for stem, path in shared.items() for data in _DATA_SETS} | files


def recipe_names(command: str = "pretrain") -> list[str]:
    """Names of all recipes for a command, "pretrain", "meta-train" or "metric-train", in alphabetical order."""
    return sorted(_files(command))


def recipe_path(name: str, command: str = "pretrain") -> Path:
    """The YAML file of a recipe; recipes of one method for several image sets may share it.

    Raises:
        ValueError: the command has no recipe of that name; the message lists all.
    """
    if name not in recipe_names(command):
        raise ValueError(f"there is no recipe {name!r}; the recipes are {', '.join(recipe_names(command))}")
    return _files(command)[name]


def read_recipe(name: str, command: str = "pretrain") -> dict[str, Any]:
    """The settings that a recipe gives, as its file has them."""
    import yaml

    return yaml.safe_load(recipe_path(name, command).read_text(encoding="utf-8"))


def load_recipe(name: str) -> PreTrainingConfig:
    """The settings of a recipe of pre-training, the defaults filled in.

    Args:
        name: one of ``recipe_names()``, ``DATA_BACKBONE_LOSS`` with ``_1shot`` or ``_5shot`` where the paper tells the
            two apart, or ``DATA_BACKBONE_deepemd``, the first stage of DeepEMD.

    Raises:
        ValueError: there is no recipe of that name.

    Example:
        >>> load_recipe("miniimagenet_resnet12_neg_cosine_5shot").margin
        -0.01
    """
    return PreTrainingConfig.for_loss(**_settings(name, "pretrain"))


def load_meta_recipe(name: str) -> MetaTrainingConfig:
    """The settings of a recipe of meta-training, the defaults filled in.

    Args:
        name: one of ``recipe_names("meta-train")``, ``DATA_BACKBONE_deepemd_REGIONS_SHOT``.

    Raises:
        ValueError: there is no recipe of that name.

    Example:
        >>> load_meta_recipe("miniimagenet_resnet12_deepemd_grid_1shot").local_features.grids
        (2, 3)
    """
    return MetaTrainingConfig.from_dict(_settings(name, "meta-train"))


def load_metric_recipe(name: str) -> MetricTrainingConfig:
    """The settings of a recipe of metric training, the defaults filled in.

    Args:
        name: one of ``recipe_names("metric-train")``, ``DATA_BACKBONE``.

    Raises:
        ValueError: there is no recipe of that name.

    Example:
        >>> load_metric_recipe("omniglot28_conv4").backbone.embedding
        64
    """
    return MetricTrainingConfig.from_dict(_settings(name, "metric-train"))


def _settings(name: str, command: str) -> dict[str, Any]:
    """What a recipe sets of the training; the image set that it names is no part of it."""
    return {key: value for key, value in read_recipe(name, command).items() if key != "data"}


def recipe_table(command: str = "pretrain") -> str:
    """All recipes for a command, one a line, with what tells them apart."""
    row = _ROWS[command]
    rows = [_HEADERS[command], *((name, *row(name)) for name in recipe_names(command))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _pre_training_row(name: str) -> tuple[str, ...]:
    config, backbone = load_recipe(name), load_recipe(name).backbone
    return (
        backbone.name,
        read_recipe(name)["loss"],
        f"{config.margin:g}",
        config.optimizer,
        f"{config.weight_decay:g}",
        f"{backbone.drop_rate:g}, {backbone.drop_block_size}" if backbone.drop_rate else "-",
        str(config.epochs),
        str(config.image_size or "as stored"),
    )


def _meta_training_row(name: str) -> tuple[str, ...]:
    config = load_meta_recipe(name)
    return (
        config.local_features.name,
        f"{config.way}-way {config.shot}-shot",
        str(config.queries),
        f"{config.learning_rate:g}",
        str(config.epochs),
        f"{config.epoch_episodes:,}",
    )


def _metric_training_row(name: str) -> tuple[str, ...]:
    config = load_metric_recipe(name)
    return (
        config.backbone.name,
        str(config.backbone.embedding or "-"),
        f"{config.classes_per_batch} x {config.samples_per_class}",
        f"{config.learning_rate:g}, {config.proxy_learning_rate:g}",
        str(config.epochs),
        str(config.image_size or "as stored"),
    )


_HEADERS = {
    "pretrain": (
        "recipe",
        "backbone",
        "loss",
        "margin",
        "optimizer",
        "weight decay",
        "drop rate, block",
        "epochs",
        "pixels",
    ),
    "meta-train": ("recipe", "regions", "episodes", "queries", "rate", "epochs", "episodes an epoch"),
    "metric-train": ("recipe", "backbone", "embedding", "P x K", "rate, of proxies", "epochs", "pixels"),
}
_ROWS: dict[str, Callable[[str], tuple[str, ...]]] = {
    "pretrain": _pre_training_row,
    "meta-train": _meta_training_row,
    "metric-train": _metric_training_row,
}
