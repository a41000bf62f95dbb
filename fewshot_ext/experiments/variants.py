"""Variants of one training: four losses (Table 3), regularizers one at a time (4), label smoothing and margin (5)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fewshot_ext._validation import check_positive
from fewshot_ext.data import AugmentationConfig
from fewshot_ext.experiments.accuracies import Row, difference, mean_accuracy, select, setting, shots
from fewshot_ext.experiments.figures import CLASS_TITLES, STYLES, figure, shared_legend
from fewshot_ext.experiments.margins import with_loss
from fewshot_ext.experiments.runs import SweepRun
from fewshot_ext.experiments.tables import writer
from fewshot_ext.training import PreTrainingConfig

# What the first variant of Tables 4 and 5 is called: all others are compared with it.
PLAIN = "margin 0"
# The rows of Table 3, and what those with a margin are compared with.
LOSSES = ("softmax", "neg-softmax", "cosine", "neg-cosine")
WITHOUT_MARGIN = {"neg-softmax": "softmax", "neg-cosine": "cosine"}


def loss_configs(
    config: PreTrainingConfig, *, softmax_margin: float, cosine_margin: float
) -> dict[str, PreTrainingConfig]:
    """The trainings of Table 3: softmax and cosine softmax, each without and with a margin.

    Args:
        config: settings that all share, but for similarity, margin and scale: the scale is the paper's.
        softmax_margin, cosine_margin: of neg-softmax and of neg-cosine.

    Raises:
        ValueError: a margin of 0.

    Example:
        >>> configs = loss_configs(PreTrainingConfig(), softmax_margin=-1.0, cosine_margin=-0.1)
        >>> {name: (config.scale, config.margin) for name, config in configs.items()}
        {'softmax': (5.0, 0.0), 'neg-softmax': (5.0, -1.0), 'cosine': (30.0, 0.0), 'neg-cosine': (30.0, -0.1)}
    """
    margins = {"neg-softmax": softmax_margin, "neg-cosine": cosine_margin}
    for loss, margin in margins.items():
        if not margin:
            raise ValueError(
                f"margin of {loss}: expected another value than 0, which has a row of its own, got {margin}"
            )
    return {name: with_loss(config, name.removeprefix("neg-"), margins.get(name, 0.0)) for name in LOSSES}


def regularizer_configs(
    config: PreTrainingConfig,
    margin: float,
    *,
    weight_decay: float | None = None,
    drop_rate: float | None = None,
    drop_block_size: int = 5,
    label_smoothing: float | None = None,
    without_augmentation: bool = False,
) -> dict[str, PreTrainingConfig]:
    """The trainings of Table 4: margin 0, the margin alone, and the margin with one more regularizer at a time.

    The paper adds one to the other; one at a time shows what each does by itself.

    Args:
        config: settings that all share.
        margin: of all but the first.
        weight_decay, drop_rate, label_smoothing: of a variant each; none where None.
        drop_block_size: goes with ``drop_rate``.
        without_augmentation: whether there is a variant whose images are not augmented.

    Returns:
        Settings by the name of the variant.

    Raises:
        ValueError: a margin of 0, a value that is not positive, one that ``config`` has already, or a drop rate for a
            backbone without dropout.

    Example:
        >>> list(regularizer_configs(PreTrainingConfig(), -0.1, weight_decay=1e-4))
        ['margin 0', 'margin -0.1', 'margin -0.1, weight decay 0.0001']
    """
    if not margin:
        raise ValueError(f"margin: expected another value than 0, which is the first variant, got {margin}")
    with_margin, name = replace(config, margin=margin), f"margin {margin:g}"
    variants = {PLAIN: replace(config, margin=0.0), name: with_margin}
    if weight_decay is not None:
        check_positive("weight_decay", weight_decay)
        variants[f"{name}, weight decay {weight_decay:g}"] = replace(with_margin, weight_decay=weight_decay)
    if drop_rate is not None:
        check_positive("drop_rate", drop_rate)
        backbone = replace(config.backbone, drop_rate=drop_rate, drop_block_size=drop_block_size)
        variants[f"{name}, DropBlock {drop_rate:g}"] = replace(with_margin, backbone=backbone)
    if label_smoothing is not None:
        check_positive("label_smoothing", label_smoothing)
        variants[f"{name}, label smoothing {label_smoothing:g}"] = replace(with_margin, label_smoothing=label_smoothing)
    if without_augmentation:
        variants[f"{name}, no augmentation"] = replace(with_margin, augmentation=AugmentationConfig())
    for variant, settings in variants.items():
        if variant != name and settings == with_margin:
            raise ValueError(
                f"variant {variant!r} has the settings of {name!r}: take it out of the recipe or leave it out"
            )
    return variants


def label_smoothing_configs(
    config: PreTrainingConfig, margin: float, label_smoothing: float
) -> dict[str, PreTrainingConfig]:
    """The trainings of Table 5: neither, label smoothing, the margin.

    Args:
        config: settings that all share.
        margin: of the last.
        label_smoothing: of the second, the share of the target that is spread over all classes.

    Raises:
        ValueError: a margin of 0, or a share that is not in (0, 1).
    """
    if not margin:
        raise ValueError(f"margin: expected another value than 0, which is the first variant, got {margin}")
    check_positive("label_smoothing", label_smoothing)
    plain = replace(config, margin=0.0, label_smoothing=0.0)
    return {
        PLAIN: plain,
        f"label smoothing {label_smoothing:g}": replace(plain, label_smoothing=label_smoothing),
        f"margin {margin:g}": replace(plain, margin=margin),
    }


def variant_runs(
    data: str, configs: Mapping[str, PreTrainingConfig], seeds: Sequence[int], held_out: float
) -> list[SweepRun]:
    """The training runs, seed by seed; the arguments are those of ``SweepRun``.

    Raises:
        ValueError: no seeds.
    """
    if not seeds:
        raise ValueError("seeds: expected at least one seed, got none")
    return [SweepRun(data, config, seed, held_out, variant) for seed in seeds for variant, config in configs.items()]


def summarize(
    rows: Sequence[Row], against: Mapping[str, str] | None = None, by: str = "classes"
) -> list[dict[str, Any]]:
    """Accuracy of each variant and its difference to another, for each set of classes and number of shots.

    Args:
        rows: of the measurement, with the labels of their runs.
        against: which variant another is compared with; all others with the first where None.
        by: the column that parts the rows beside the shots, "classes" or "data".
    """
    found = []
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    against = against or dict.fromkeys(variants[1:], variants[0])
    for part in dict.fromkeys(row[by] for row in rows):
        for shot in shots(select(rows, **{by: part})):
            of_cell = select(rows, **{by: part}, shot=shot)
            for variant in variants:
                own = select(of_cell, variant=variant)
                if not own:
                    continue
                mean, interval = mean_accuracy(own)
                row = {"variant": variant, by: part, "way": own[0]["way"], "shot": shot, "accuracy": round(mean, 4)}
                row |= {"interval": round(interval, 4), "seeds": len(own)}
                plain = select(of_cell, variant=against.get(variant))
                if {row["seed"] for row in own} & {row["seed"] for row in plain}:
                    gain = difference(own, plain)
                    row |= {"difference": round(gain.mean, 4), "difference_interval": round(gain.interval, 4)}
                found.append(row)
    return found


def plot_variants(rows: Sequence[Row], path: str | Path, by: str = "classes") -> None:
    """Draws the accuracy of each variant with its interval, a panel a set of classes or of images."""
    summary = summarize(rows, by=by)
    variants = list(dict.fromkeys(row["variant"] for row in summary))
    panels = list(dict.fromkeys(row[by] for row in summary))
    with figure(path, rows=len(panels), height=0.9 + 0.22 * len(variants)) as axes:
        for axis, panel in zip(axes[:, 0], panels, strict=True):
            for shot, style in zip(shots(summary), STYLES, strict=False):
                own = {row["variant"]: row for row in select(summary, **{by: panel}, shot=shot)}
                if not own:
                    continue
                axis.errorbar(
                    [own[variant]["accuracy"] for variant in own],
                    [variants.index(variant) for variant in own],
                    xerr=[own[variant]["interval"] for variant in own],
                    color=style["color"],
                    marker=style["marker"],
                    linestyle="none",
                    markersize=4,
                    capsize=2.5,
                    elinewidth=1,
                    label=setting(next(iter(own.values())), way=True),
                )
            axis.set_yticks(range(len(variants)), variants)
            axis.set_ylim(len(variants) - 0.5, -0.5)
            axis.set_title(CLASS_TITLES.get(panel, panel), fontsize=8, loc="left")
            axis.grid(alpha=0.25, linewidth=0.5)
        shared_legend(axes[0, 0])
        axes[-1, 0].set_xlabel("accuracy (%)", fontsize=8)


def variants_writer(
    name: str, against: Mapping[str, str] | None = None, by: str = "classes"
) -> Callable[..., list[Path]]:
    """The function that writes the results of the analysis ``name``, see ``writer`` and ``summarize``."""
    return writer(name, partial(plot_variants, by=by), partial(summarize, against=against, by=by))


def variants_table(rows: Sequence[Row], against: Mapping[str, str] | None = None, by: str = "classes") -> str:
    """Accuracies and, in a second block, differences on the same episodes, as text; see ``summarize``."""
    summary = summarize(rows, against, by)
    variants = list(dict.fromkeys(row["variant"] for row in summary))
    columns = {(row[by], row["shot"]): f"  {row[by]} {setting(row)}" for row in summary}
    first, width = max(map(len, variants)) + 1, max(20, *map(len, columns.values()))
    head = " " * first + "".join(title.rjust(width) for title in columns.values())
    of_classes = "" if by == "classes" else f" on {rows[0]['classes']} classes"
    of_all = ", or over classes where all are told apart" if 0 in shots(rows) else ""
    title = f"{rows[0]['way']}-way accuracy (%){of_classes}, mean ± 95 % interval over episodes{of_all}"
    other = "the same loss without a margin" if against else variants[0]
    blocks = (
        (title, variants, "accuracy", "interval", ""),
        (f"difference to {other} in points", against or variants[1:], "difference", "difference_interval", "+"),
    )
    lines = []
    for title, names, value, interval, sign in blocks:
        lines += [title, head]
        for variant in names:
            cells = ""
            for part, shot in columns:
                row = next(iter(select(summary, variant=variant, **{by: part}, shot=shot)), {})
                cell = f"{row[value]:{sign}.2f} ± {row[interval]:.2f}" if value in row else ""
                cells += cell.rjust(width)
            lines.append(f"{variant:<{first}}{cells}")
        lines.append("")
    return "\n".join(lines[:-1])
