"""Accuracy over the number of support images, for a few margins: the paper's Fig. 8."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from fewshot_ext.experiments.accuracies import Row, difference, mean_accuracy, select, values
from fewshot_ext.experiments.figures import CLASS_TITLES, curve_styles, draw_curves, figure
from fewshot_ext.experiments.tables import writer

NAME = "shots"


def plot_shots(rows: Sequence[Row], path: str | Path) -> None:
    """Draws accuracy over shots, a curve a margin; below, the differences to margin 0, where accuracies hide them."""
    margins, shots, classes = values(rows, "margin"), values(rows, "shot"), rows[0]["classes"]
    others = [margin for margin in margins if margin] if 0.0 in margins else []
    with figure(path, rows=1 + bool(others), sharex=True) as axes:
        accuracies = {
            f"margin {margin:g}": [(shot, *mean_accuracy(select(rows, margin=margin, shot=shot))) for shot in shots]
            for margin in margins
        }
        way = rows[0]["way"]
        styles = curve_styles(accuracies)
        draw_curves(axes[0, 0], accuracies, title=CLASS_TITLES[classes], y=f"{way}-way accuracy (%)")
        if others:
            gains = {}
            for margin in others:
                found = [
                    difference(select(rows, margin=margin, shot=shot), select(rows, margin=0.0, shot=shot))
                    for shot in shots
                ]
                gains[f"margin {margin:g}"] = [
                    (shot, one.mean, one.interval) for shot, one in zip(shots, found, strict=True)
                ]
            draw_curves(axes[1, 0], gains, y="gain over margin 0 (points)", styles=styles, legend=False)
            axes[1, 0].axhline(0, color="0.5", linewidth=0.8)
        axes[-1, 0].set_xscale("log")
        axes[-1, 0].set_xticks(shots, _tick_labels(sorted(shots)))
        axes[-1, 0].minorticks_off()
        axes[-1, 0].set_xlabel("shots", fontsize=8)


write_shots = writer(NAME, plot_shots)


def _tick_labels(shots: Sequence[int]) -> list[str]:
    """The numbers in rising order, but those that would run into the next one on a logarithmic axis are left out."""
    room = 0.09 * math.log(shots[-1] / shots[0])
    written = [math.log(after / shot) >= room for shot, after in itertools.pairwise(shots)]
    return [str(shot) if write else "" for shot, write in zip(shots, [*written, True], strict=True)]
