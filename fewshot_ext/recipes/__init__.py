"""Settings of pre-training that ship with the package: the published ones, and small ones for a CPU."""

from pathlib import Path
from typing import Any

from fewshot_ext.training.config import PreTrainingConfig

_FOLDER = Path(__file__).parent


def recipe_names() -> list[str]:
    """Names of all recipes, in alphabetical order."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """The YAML file of a recipe.

    Raises:
        ValueError: there is no recipe of that name; the message lists all.
    """
    if name not in recipe_names():
        raise ValueError(f"there is no recipe {name!r}; the recipes are {', '.join(recipe_names())}")
    return _FOLDER / f"{name}.yaml"


def read_recipe(name: str) -> dict[str, Any]:
    """The settings that a recipe gives, as its file has them."""
    import yaml

    return yaml.safe_load(recipe_path(name).read_text(encoding="utf-8"))


def load_recipe(name: str) -> PreTrainingConfig:
    """The settings of a recipe, the defaults filled in.

    Args:
        name: one of ``recipe_names()``, ``DATA_BACKBONE_LOSS`` with ``_1shot`` or ``_5shot`` where the paper tells the
            two apart.

    Raises:
        ValueError: there is no recipe of that name.

    Example:
        >>> load_recipe("miniimagenet_resnet12_neg_cosine_5shot").margin
        -0.01
    """
    values = read_recipe(name)
    values.pop("data", None)
    return PreTrainingConfig.for_loss(**values)


def recipe_table() -> str:
    """All recipes, one a line, with what tells them apart."""
    rows = [("recipe", "backbone", "loss", "margin", "weight decay", "drop rate, block", "epochs", "pixels")]
    for name in recipe_names():
        config, backbone = load_recipe(name), load_recipe(name).backbone
        rows.append(
            (
                name,
                backbone.name,
                read_recipe(name)["loss"],
                f"{config.margin:g}",
                f"{config.weight_decay:g}",
                f"{backbone.drop_rate:g}, {backbone.drop_block_size}" if backbone.drop_rate else "-",
                str(config.epochs),
                str(config.image_size or "as stored"),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
