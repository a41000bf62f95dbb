"""Settings of trainings that ship with the package: the published ones, and small ones for a CPU."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from fewshot_ext.training.config import PreTrainingConfig
from fewshot_ext.training.meta_config import MetaTrainingConfig
from fewshot_ext.training.metric_config import MetricTrainingConfig

_FOLDER = Path(__file__).parent
RECIPE_FOLDERS = {"pretrain": _FOLDER, "meta-train": _FOLDER / "meta_train", "metric-train": _FOLDER / "metric_train"}
# DeepEMD has the same settings for all of these, where no file is for one alone.
_SHARED = "resnet12_"
_DATA_SETS = ("cifarfs", "cub", "fc100", "miniimagenet", "tieredimagenet")


@cache
def _files(command: str) -> dict[str, Path]:
    # Names that begin with an underscore are of files that are a base of others and no recipes.
    files = {path.stem: path for path in RECIPE_FOLDERS[command].glob("[!_]*.yaml")}
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
    """The settings that a recipe gives: those of its file over those of the file that it names as its base."""
    return _settings(recipe_path(name, command))


def _settings(path: Path) -> dict[str, Any]:
    import yaml

    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    if (base := settings.pop("base", None)) is None:
        return settings
    below = _settings(path.with_name(f"{base}.yaml"))
    nested = {key: below.get(key, {}) | part for key, part in settings.items() if isinstance(part, dict)}
    return below | settings | nested


def recipe_text(name: str, command: str = "pretrain") -> str:
    """The settings of :func:`read_recipe` as YAML."""
    import yaml

    return yaml.safe_dump(read_recipe(name, command), sort_keys=False)


def load_recipe(name: str, command: str = "pretrain") -> PreTrainingConfig | MetaTrainingConfig | MetricTrainingConfig:
    """The settings of a recipe, the defaults filled in.

    Args:
        name: one of ``recipe_names(command)``. For "pretrain" it is ``DATA_BACKBONE_LOSS``, with ``_1shot`` or
            ``_5shot`` where the paper tells them apart, or ``DATA_BACKBONE_deepemd``, the first stage of DeepEMD; for
            "meta-train" ``DATA_BACKBONE_deepemd_REGIONS_SHOT`` or ``DATA_BACKBONE_HEAD_SHOT``, for "metric-train"
            ``DATA_BACKBONE``, or ``DATA_anti_collapse`` for any network of ImageNet.
        command: what the recipe is for.

    Raises:
        ValueError: there is no recipe of that name.

    Example:
        >>> load_recipe("miniimagenet_resnet12_neg_cosine_5shot").margin
        -0.01
        >>> load_recipe("miniimagenet_resnet12_deepemd_grid_1shot", "meta-train").local_features.grids
        (2, 3)
    """
    settings = read_recipe(name, command)
    settings.pop("data", None)  # the image set that it names is no part of the training
    if command == "pretrain":
        return PreTrainingConfig.for_loss(**settings)
    return (MetaTrainingConfig if command == "meta-train" else MetricTrainingConfig).from_dict(settings)


# What tells recipes apart, by the heads of the columns.
_COLUMNS: dict[str, dict[str, Callable[[Any], object]]] = {
    "pretrain": {
        "backbone": lambda config: config.backbone.name,
        "loss": lambda config: f"neg-{config.loss}" if config.margin else config.loss,
        "margin": lambda config: f"{config.margin:g}",
        "optimizer": lambda config: config.optimizer,
        "weight decay": lambda config: f"{config.weight_decay:g}",
        "drop rate, block": lambda config: (
            f"{config.backbone.drop_rate:g}, {config.backbone.drop_block_size}" if config.backbone.drop_rate else "-"
        ),
        "epochs": lambda config: config.epochs,
        "pixels": lambda config: config.image_size or "as stored",
    },
    "meta-train": {
        "head": lambda config: config.head,
        "regions": lambda config: getattr(config.choice.local_features, "name", "-"),
        "episodes": lambda config: f"{config.way}-way {config.shot}-shot",
        "queries": lambda config: config.queries,
        "rate": lambda config: f"{config.learning_rate:g}",
        "epochs": lambda config: config.epochs,
        "episodes an epoch": lambda config: f"{config.epoch_episodes:,}",
    },
    "metric-train": {
        "backbone": lambda config: "checkpoint's" if config.freeze_batch_norm else config.backbone.name,
        "embedding": lambda config: config.backbone.embedding or "-",
        "P x K": lambda config: f"{config.classes_per_batch} x {config.samples_per_class}",
        "rate, of proxies": lambda config: f"{config.learning_rate:g}, {config.proxy_learning_rate:g}",
        "epochs": lambda config: config.epochs,
        "pixels": lambda config: config.image_size or "as stored",
    },
}


def recipe_table(command: str = "pretrain") -> str:
    """All recipes for a command, one a line, with what tells them apart."""
    columns = _COLUMNS[command]
    rows = [["recipe", *columns]]
    for name in recipe_names(command):
        config = load_recipe(name, command)
        rows.append([name, *(str(cell(config)) for cell in columns.values())])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
