"""Does the Anti-Collapse term flatten the spectrum, and does that help retrieval? Trainings with and without it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fewshot_ext import _extras
from fewshot_ext.data import ImageArchive
from fewshot_ext.experiments.accuracies import Row, select, values
from fewshot_ext.experiments.figures import Curve, curve_styles, draw_curves, figure
from fewshot_ext.experiments.metric_runs import (
    LOSS_TITLES,
    WITHOUT,
    Arm,
    MetricRun,
    TrainEmbedding,
    class_sets,
)
from fewshot_ext.experiments.sweep import TaskSweep
from fewshot_ext.experiments.tables import writer
from fewshot_ext.losses.base_losses import require_packages
from fewshot_ext.models import build_backbone

NAME = "collapse"
CLASSES = ("seen", "validation", "unseen")

# Columns of the table, with a factor and a layout; the first is a share, drawn and told in percent.
QUANTITIES = {
    "recall_at_1": ("Recall@1 (%)", 100.0, ".2f"),
    "map_at_r": ("MAP@R (%)", 100.0, ".2f"),
    "coding_rate": ("coding rate (nats)", 1.0, ".2f"),
    "effective_rank": ("effective rank", 1.0, ".1f"),
}


class CollapseSweep(TaskSweep):
    """Metric trainings with and without the Anti-Collapse term; see ``metric_runs``.

    Finished runs are taken over as they are and interrupted ones go on from their last epoch.

    Args:
        runs: of ``metric_runs``, so that they share all settings but loss, arm and seed.
        archive: the images of ``data`` that all runs name, with base and novel classes.
        output: existing folder.
        device: "cpu" or "cuda".
        checkpoints: folder of the trained runs, which several sweeps may share; ``output / "runs"`` where None.

    Raises:
        ImportError: a package is missing, of the extra ``train`` or, for contrastive and triplet loss, of ``metric``.
        ValueError: images too small for the backbone, classes that do not make P x K batches or that retrieval cannot
            be measured on, or a folder that holds a run of other settings.
    """

    def __init__(
        self,
        runs: Sequence[MetricRun],
        archive: ImageArchive,
        output: str | Path,
        *,
        device: str = "cpu",
        checkpoints: str | Path | None = None,
    ) -> None:
        _extras.require("train", "lightning", "tensorboard", "kornia", "matplotlib", "tqdm", "scipy")
        for run in runs:
            require_packages(run.training.loss)
        from fewshot_ext.training.metric_callbacks import EmbeddingHistory
        from fewshot_ext.training.metric_training import check_batches

        sets, config = class_sets(archive), runs[0].training
        if 1 not in config.measurement.ks:
            raise ValueError(
                f"measurement.ks: expected 1 among them, which the table shows, got {list(config.measurement.ks)}"
            )
        channels, *size = archive.images.shape[1:]
        with torch.device("meta"):
            build_backbone(config.backbone, channels).feature_size(*size)
        check_batches(config, sets["seen"])
        self.output = Path(output)
        EmbeddingHistory(config.measurement, sets, self.output, self.output, runs[0].seed)
        self.checkpoints = Path(checkpoints or self.output / "runs")
        self.data = archive.record(runs[0].data)
        self.checksum = self.data["sha256"]
        super().__init__([TrainEmbedding(run, self.checkpoints, self.checksum, device) for run in runs])


@dataclass(frozen=True)
class SeedMean:
    """A mean over seeds.

    Attributes:
        mean: over the seeds.
        interval: half-width of its 95 % t interval; NaN for a single seed, which says nothing about the others.
        by_seed: the values themselves.
    """

    mean: float
    interval: float
    by_seed: tuple[float, ...]

    @classmethod
    def of(cls, by_seed: Sequence[float]) -> "SeedMean":
        """Of one value a seed.

        Example:
            >>> round(SeedMean.of([1.0, 2.0, 3.0]).interval, 3)
            2.484
        """
        from scipy.stats import t

        count = len(by_seed)
        mean = math.fsum(by_seed) / count
        if count < 2:
            return cls(mean, math.nan, tuple(by_seed))
        variance = math.fsum((value - mean) ** 2 for value in by_seed) / (count - 1)
        return cls(mean, float(t.ppf(0.975, count - 1)) * math.sqrt(variance / count), tuple(by_seed))

    def text(self, layout: str, factor: float = 1.0) -> str:
        """ "mean ± interval", or the mean alone where there is no interval."""
        mean = format(factor * self.mean, layout)
        if math.isnan(self.interval):
            return mean
        return f"{mean} ± {format(factor * self.interval, layout.removeprefix('+'))}"


def last_epoch(rows: Sequence[Row]) -> list[Row]:
    """The rows of each run's last measurement."""
    last: dict[Any, int] = {}
    for row in rows:
        last[_run(row)] = max(last.get(_run(row), 0), row["epoch"])
    return [row for row in rows if row["epoch"] == last[_run(row)]]


def _run(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("loss", "variant", "weight", "seed"))


def arms_of(rows: Sequence[Row]) -> list[Arm]:
    """The arms that the rows are of, each once, the one without the term first."""
    return sorted({Arm(row["variant"], row["weight"]) for row in rows}, key=lambda arm: (arm != WITHOUT, arm))


def gain(rows: Sequence[Row], loss: str, arm: Arm, classes: str, quantity: str) -> SeedMean | None:
    """How far the training with the term lies above that without, paired by seed, in the last epoch.

    Args:
        rows: of ``CollapseSweep.run``.
        loss, arm, classes: which.
        quantity: a column.

    Returns:
        None where no seed has both.
    """
    ours, theirs = (
        {row["seed"]: row[quantity] for row in select(last_epoch(rows), loss=loss, classes=classes, **asdict(one))}
        for one in (arm, WITHOUT)
    )
    seeds = sorted(ours.keys() & theirs.keys())
    return SeedMean.of([ours[seed] - theirs[seed] for seed in seeds]) if seeds else None


def summarize(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Each quantity after the last epoch, over seeds, with its difference to the training without the term.

    Returns:
        One row a set of classes, loss, arm and quantity, with columns classes, loss, variant, weight, quantity, mean,
        interval, seeds and, with the term, difference and difference_interval; intervals are missing for one seed.
    """
    found = []
    for classes in CLASSES:
        for loss in sorted({row["loss"] for row in rows}):
            for arm in arms_of(select(rows, loss=loss)):
                cell = {"classes": classes, "loss": loss, **asdict(arm)}
                own = select(last_epoch(rows), **cell)
                for quantity in QUANTITIES if own else ():
                    mean = SeedMean.of([row[quantity] for row in own])
                    row = {**cell, "quantity": quantity, **_columns("", mean), "seeds": len(own)}
                    difference = gain(rows, loss, arm, classes, quantity) if arm.weight else None
                    found.append(row | (_columns("difference", difference) if difference else {}))
    return found


def _columns(name: str, value: SeedMean) -> dict[str, float]:
    prefix = f"{name}_" if name else ""
    columns = {name or "mean": round(value.mean, 6)}
    return columns if math.isnan(value.interval) else {**columns, f"{prefix}interval": round(value.interval, 6)}


def collapse_table(rows: Sequence[Row]) -> str:
    """The quantities as text: a block a set of classes, a line a loss and arm."""
    lines = [caption_of(rows)]
    width = 20
    for classes, block in blocks_of(rows).items():
        lines += ["", f"{f'{classes} classes':<44}" + "".join(title.rjust(width) for title, *_ in QUANTITIES.values())]
        lines += [f"{name:<44}" + "".join(cell.rjust(width) for cell in cells) for name, cells in block]
    return "\n".join(lines)


def caption_of(rows: Sequence[Row]) -> str:
    """What the numbers of the table are of."""
    seeds, epochs = len(values(rows, "seed")), max(row["epoch"] for row in rows)
    how = "mean ± 95 % t interval over" if seeds > 1 else "from"
    return f"After {epochs} epoch{'s' if epochs > 1 else ''}, {how} {seeds} seed{'s' if seeds > 1 else ''}"


def blocks_of(rows: Sequence[Row]) -> dict[str, list[tuple[str, list[str]]]]:
    """For each set of classes the lines of its table: a name, and a cell a quantity."""
    blocks: dict[str, list[tuple[str, list[str]]]] = {}
    for classes in CLASSES:
        for loss in sorted({row["loss"] for row in rows}):
            for arm in arms_of(select(rows, loss=loss)):
                own = select(last_epoch(rows), classes=classes, loss=loss, **asdict(arm))
                if not own:
                    continue
                name = f"{LOSS_TITLES[loss]}, {arm.title}"
                cells = [
                    SeedMean.of([row[quantity] for row in own]).text(layout, factor)
                    for quantity, (_, factor, layout) in QUANTITIES.items()
                ]
                blocks.setdefault(classes, []).append((name, cells))
    return blocks


def plot_collapse(rows: Sequence[Row], path: str | Path) -> None:
    """Draws the spectra after the last epoch, and Recall@1 and coding rate over the epochs, a column a loss.

    Lines are means over seeds and bars their 95 % t intervals.
    """
    losses = sorted({row["loss"] for row in rows})
    styles = curve_styles(arm.title for arm in arms_of(rows))
    panels = [("spectrum", classes) for classes in ("seen", "unseen")]
    panels += [("recall_at_1", "unseen"), ("coding_rate", "unseen")]
    with figure(path, rows=len(panels), columns=len(losses), height=1.9) as axes:
        for j, loss in enumerate(losses):
            of_loss = select(rows, loss=loss)
            for i, (quantity, classes) in enumerate(panels):
                own = select(of_loss, classes=classes)
                title = f"{LOSS_TITLES[loss]}, {classes} classes"
                if quantity == "spectrum":
                    _draw_spectra(axes[i, j], own, styles, title)
                else:
                    name, factor, _ = QUANTITIES[quantity]
                    draw_curves(
                        axes[i, j],
                        {arm.title: _over_epochs(select(own, **asdict(arm)), quantity, factor) for arm in arms_of(own)},
                        title=title,
                        x="epoch" if i == len(panels) - 1 else "",
                        y=name,
                        styles=styles,
                        legend=False,
                    )
                    axes[i, j].xaxis.get_major_locator().set_params(integer=True)
        shown = [axis.get_legend_handles_labels() for axis in axes[0]]
        lines = {label: handle for handles, labels in shown for handle, label in zip(handles, labels, strict=True)}
        legend = {"fontsize": 7, "frameon": False, "loc": "outside upper center", "ncols": 4}
        axes[0, 0].figure.legend(list(lines.values()), list(lines), **legend)


write_collapse = writer(NAME, plot_collapse, summarize)


def _draw_spectra(axis, rows: Sequence[Row], styles: Mapping[str, Mapping[str, str]], title: str) -> None:
    for arm in arms_of(rows):
        spectra = torch.tensor([row["spectrum"] for row in last_epoch(select(rows, **asdict(arm)))])
        # Zeros of a collapsed direction are rounding noise, and have no place on a logarithmic axis.
        mean = spectra.mean(0).clamp(min=1e-4)
        index = torch.arange(1, len(mean) + 1)
        every = max(1, len(mean) // 8)
        axis.plot(index, mean, label=arm.title, linewidth=1.3, markersize=3.5, markevery=every, **styles[arm.title])
    axis.set_yscale("log")
    axis.set_title(title, fontsize=8, loc="left")
    axis.set_xlabel("index", fontsize=8)
    axis.set_ylabel("singular value", fontsize=8)
    axis.grid(alpha=0.25, linewidth=0.5)


def _over_epochs(rows: Sequence[Row], quantity: str, factor: float) -> Curve:
    points = []
    for epoch in values(rows, "epoch"):
        mean = SeedMean.of([row[quantity] for row in select(rows, epoch=epoch)])
        points.append((epoch, factor * mean.mean, 0.0 if math.isnan(mean.interval) else factor * mean.interval))
    return points
