"""Directions of two-dimensional features of base and novel classes over the margin: the paper's Fig. 3."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from fewshot_ext._validation import check_count, plain_numbers
from fewshot_ext.data.fonts import figure_text
from fewshot_ext.experiments.accuracies import Row, select, values
from fewshot_ext.experiments.figures import COLUMN, STYLES, figure
from fewshot_ext.experiments.measurements import TrainedRun
from fewshot_ext.experiments.measures import (
    angle_histogram,
    count_peaks,
    intra_class_variance,
    measure_discriminability,
)
from fewshot_ext.experiments.runs import SweepImages, SweepRun
from fewshot_ext.experiments.tables import writer

NAME = "angles"
_CLASSES = ("base", "novel")


@dataclass(frozen=True)
class AngleMeasurement:
    """Histograms of the directions of two-dimensional features, class by class.

    Args:
        bins: of the histogram.

    Returns (a call):
        One row a class, with columns classes, class, peaks, intra (its part of D_intra) and histogram (a list of
        shares); inter and ratio (D_inter and phi) are those of the set of classes.

    Raises (a call):
        ValueError: features that are not two-dimensional.
    """

    bins: int = 180

    name: ClassVar[str] = "angles"

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_count("bins", self.bins, 1)

    def settings(self) -> dict[str, Any]:
        return {"bins": self.bins}

    def check(self, run: SweepRun, images: SweepImages) -> None:
        if run.pretraining.backbone.embedding != 2:
            raise ValueError(
                f"backbone.embedding: expected 2 for directions in a plane, got {run.pretraining.backbone.embedding}"
            )
        for classes in _CLASSES:
            if images.test[classes].num_classes < 3:
                raise ValueError(
                    f"{classes} classes of {run.data}: D_inter needs at least 3 classes for its interval, "
                    f"got {images.test[classes].num_classes}"
                )

    def __call__(self, trained: TrainedRun, report: Callable[[str], None]) -> list[dict[str, Any]]:
        backbone, rows = trained.backbone(), []
        for classes in _CLASSES:
            report(classes)
            archive = trained.images.test[classes]
            features = trained.features(backbone, archive).cpu()
            if features.shape[1] != 2:
                raise ValueError(f"features: expected two dimensions for their directions, got {features.shape[1]}")
            whole = measure_discriminability(features, archive.labels)
            for label, name in enumerate(archive.class_names):
                own = features[archive.labels == label]
                histogram = angle_histogram(own, self.bins)
                rows.append(
                    {
                        "classes": classes,
                        "class": name,
                        "peaks": count_peaks(histogram),
                        "intra": intra_class_variance(own, torch.zeros(len(own), dtype=torch.int64)).item(),
                        "inter": whole.inter,
                        "ratio": whole.ratio,
                        "histogram": [round(share, 6) for share in histogram.tolist()],
                    }
                )
        return rows


def plot_angles(rows: Sequence[Row], path: str | Path) -> None:
    """Draws the histograms of one seed: base classes above, novel classes below, the margin rising to the right."""
    rows = select(rows, seed=values(rows, "seed")[0])
    margins = values(rows, "margin")
    with figure(path, rows=2, columns=len(margins), width=COLUMN * 2, height=1.7, sharex=True) as axes:
        for i, classes in enumerate(_CLASSES):
            for j, margin in enumerate(margins):
                of_panel, axis = select(rows, classes=classes, margin=margin), axes[i, j]
                for row, style in zip(of_panel, STYLES * len(of_panel), strict=False):
                    shares = 100 * torch.tensor(row["histogram"])
                    angles = torch.linspace(-180, 180, len(shares) + 1)[:-1] + 180 / len(shares)
                    axis.fill_between(angles, shares, alpha=0.25, color=style["color"], linewidth=0)
                    axis.plot(
                        angles,
                        shares,
                        color=style["color"],
                        linestyle=style["linestyle"],
                        linewidth=0.9,
                        label=figure_text(row["class"]),
                    )
                axis.set_title(f"{classes}, $m$ = {margin:g}\n$\\phi$ = {of_panel[0]['ratio']:.3g}", fontsize=8)
                axis.set_ylim(0)
                if not j:
                    axis.set_ylabel("images (%)", fontsize=8)
            axes[i, -1].legend(fontsize=7, frameon=False, handlelength=1.5, loc="center left", bbox_to_anchor=(1, 0.5))
        for axis in axes[-1]:
            axis.set_xlabel("angle (degrees)", fontsize=8)
            axis.set_xticks([-180, 0, 180])


write_angles = writer(NAME, plot_angles)


def angles_table(rows: Sequence[Row]) -> str:
    """Spread and peaks as text, a line a margin."""
    lines = [f"{'':<14}{'base classes':^30}{'novel classes':^30}"]
    heads = "".join(f"{head:>10}" for head in ("phi", "D_intra", "peaks"))
    lines.append(f"{'':<14}{heads}{heads}")
    for margin in values(rows, "margin"):
        cells = ""
        for classes in _CLASSES:
            own = select(rows, margin=margin, classes=classes)
            for name, layout in (("ratio", ">10.2f"), ("intra", ">10.3f"), ("peaks", ">10.2f")):
                cells += format(sum(row[name] for row in own) / len(own), layout)
        lines.append(f"{f'margin {margin:+g}':<14}{cells}")
    return "\n".join(lines)
