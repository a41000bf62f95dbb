"""Accuracy on base, validation and novel classes over the pre-training margin: the paper's Fig. 1 and 6."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fewshot_ext._validation import check_choice, check_number
from fewshot_ext.experiments.accuracies import Row, difference, mean_accuracy, select, setting, shots, values
from fewshot_ext.experiments.figures import CLASS_TITLES, LOSS_TITLES, draw_grid
from fewshot_ext.experiments.runs import CLASSES, SweepRun
from fewshot_ext.experiments.tables import writer
from fewshot_ext.training import PreTrainingConfig

NAME = "margins"


def margin_runs(
    data: str,
    pretraining: PreTrainingConfig,
    margins: Mapping[str, Sequence[float]],
    seeds: Sequence[int],
    held_out: float = 0.2,
) -> list[SweepRun]:
    """The training runs of a margin sweep, seed by seed, so that the first seed is there early.

    Args:
        data: image set, as ``load_images`` takes it.
        pretraining: settings of every run, but for similarity, margin and scale: the scale is the paper's.
        margins: for each loss, "cosine" or "softmax", the margins to train with.
        seeds: each trains every margin.
        held_out: share of each base class's images that measures base accuracy.

    Raises:
        ValueError: no losses, margins or seeds, an unknown loss, or a margin that is not finite.

    Example:
        >>> [run.name for run in margin_runs("digits", PreTrainingConfig(), {"cosine": [-0.1, 0.0]}, [0])]
        ['cosine, margin -0.1, seed 0', 'cosine, margin +0, seed 0']
    """
    if not margins or not all(margins.values()):
        raise ValueError("margins: expected at least one margin for each loss, got none")
    if not seeds:
        raise ValueError("seeds: expected at least one seed, got none")
    configs = []
    for loss, of_loss in margins.items():
        check_choice("loss", loss, "cosine", "softmax")
        for margin in of_loss:
            check_number("margins", margin)
            configs.append(with_loss(pretraining, loss, margin))
    return [SweepRun(data, config, seed, held_out) for seed in seeds for config in configs]


def with_loss(config: PreTrainingConfig, loss: str, margin: float) -> PreTrainingConfig:
    """The same settings with another loss, "cosine" or "softmax", its margin and the paper's scale."""
    usual = PreTrainingConfig.for_loss(loss, backbone=config.backbone)
    return replace(config, similarity=usual.similarity, margin=margin, scale=usual.scale)


def summarize(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Mean accuracy and interval over seeds and episodes for each loss, set of classes, number of shots and margin."""
    keys = ("loss", "classes", "way", "shot", "margin")
    cells = {tuple(row[key] for key in keys) for row in rows}
    found = []
    for cell in sorted(cells, key=lambda cell: (cell[0], CLASSES.index(cell[1]), *cell[2:])):
        labels = dict(zip(keys, cell, strict=True))
        of_cell = select(rows, **labels)
        mean, interval = mean_accuracy(of_cell)
        labels |= {"accuracy": round(mean, 4), "interval": round(interval, 4), "seeds": len(of_cell)}
        found.append(labels)
    return found


def plot_margins(rows: Sequence[Row], path: str | Path) -> None:
    """Draws accuracy over the margin: a column of panels a loss, a row a set of classes, a curve a number of shots."""
    summary = summarize(rows)

    def curves(classes: str, loss: str) -> dict[str, list[tuple[float, float, float]]]:
        own = select(summary, classes=classes, loss=loss)
        names = {shot: setting(select(own, shot=shot)[0], way=True) for shot in shots(own)}
        return {
            name: [(row["margin"], row["accuracy"], row["interval"]) for row in select(own, shot=shot)]
            for shot, name in names.items()
        }

    draw_grid(
        path,
        [classes for classes in CLASSES if select(rows, classes=classes)],
        values(rows, "loss"),
        curves,
        x="margin $m$",
        y="accuracy (%)",
        titles={**CLASS_TITLES, **LOSS_TITLES},
    )


write_margins = writer(NAME, plot_margins, summarize)


def margins_table(rows: Sequence[Row]) -> str:
    """The accuracies as text: a block a loss, a line a margin; then the best margins, with their gain in every seed.

    Training runs differ by more than the interval over episodes says.
    """
    summary, width = summarize(rows), 20
    of_all = ", or over classes where all are told apart" if 0 in shots(rows) else ""
    seeds = len(values(rows, "seed"))
    lines = [f"{rows[0]['way']}-way accuracy (%), mean ± 95 % interval over episodes of {seeds} seeds{of_all}"]
    for loss in values(rows, "loss"):
        of_loss = select(summary, loss=loss)
        of_loss.sort(key=lambda row: (CLASSES.index(row["classes"]), not row["shot"]))
        columns = {(row["classes"], row["shot"]): f"{row['classes']} {setting(row)}" for row in of_loss}
        lines += ["", f"{LOSS_TITLES[loss]:<15}" + "".join(title.rjust(width) for title in columns.values())]
        for margin in values(of_loss, "margin"):
            cells = []
            for classes, shot in columns:
                found = select(of_loss, margin=margin, classes=classes, shot=shot)
                cells += [f"{row['accuracy']:.2f} ± {row['interval']:.2f}" for row in found] or [""]
            lines.append(f"{f'margin {margin:+g}':<15}" + "".join(cell.rjust(width) for cell in cells))
        lines += ["", *_best_margins(rows, loss, columns)]
    return "\n".join([*lines, "Intervals cover the draw of episodes, not that of initial weights and batches."])


def _best_margins(rows: Sequence[Row], loss: str, columns: Mapping[tuple[str, int], str]) -> Iterator[str]:
    for (classes, shot), title in columns.items():
        of_cell = select(rows, loss=loss, classes=classes, shot=shot)
        by_margin = {margin: select(of_cell, margin=margin) for margin in values(of_cell, "margin")}
        best = max(by_margin, key=lambda margin: mean_accuracy(by_margin[margin])[0])
        line = f"{title}: margin {best:+g} is best"
        if best and {row["seed"] for row in by_margin.get(0.0, ())} & {row["seed"] for row in by_margin[best]}:
            gains = ", ".join(f"{gain:+.2f}" for gain in difference(by_margin[best], by_margin[0.0]).by_seed)
            line += f"; against margin 0, seed by seed: {gains} points"
        yield line
