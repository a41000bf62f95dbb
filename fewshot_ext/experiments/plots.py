"""Figures of the few-shot evaluation."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from fewshot_ext import _extras

# Okabe and Ito's blue and vermilion stay apart for every common kind of color blindness; line and marker
# tell the curves apart in gray print.
_STYLES = (("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "^", "-."), ("#CC79A7", "D", ":"))


def plot_accuracy_over_margin(
    curves: Mapping[str, Mapping[str, Sequence[tuple[float, float, float]]]],
    path: str | Path,
    *,
    way: int = 5,
) -> None:
    """Draws accuracy over the pre-training margin, one panel a group of classes (the paper's Fig. 1).

    Args:
        curves: for each panel, by title, the curves by label; a curve is a sequence of (margin, accuracy in
            percent, half-width of the 95 % interval in percent).
        path: where the picture goes; the suffix names the format.
        way: classes an episode, for the axis.

    Raises:
        ImportError: matplotlib is missing.

    Example:
        >>> curves = {"novel": {"1-shot": [(-0.3, 62.0, 0.6), (0.0, 58.0, 0.7)]}}
        >>> plot_accuracy_over_margin(curves, "accuracy_over_margin.png")
    """
    _extras.require("train", "matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A Figure without pyplot leaves the caller's backend and open figures alone.
    figure = Figure(figsize=(3.4, 1.9 * len(curves) + 0.3), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(curves), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (title, panel) in zip(axes, curves.items(), strict=True):
        for (label, points), (color, marker, line) in zip(panel.items(), _STYLES * len(panel), strict=False):
            margins, accuracies, intervals = zip(*sorted(points), strict=True)
            axis.errorbar(
                margins,
                accuracies,
                yerr=intervals,
                label=label,
                color=color,
                marker=marker,
                linestyle=line,
                markersize=3.5,
                linewidth=1.3,
                capsize=2.5,
                elinewidth=1,
            )
        axis.set_title(title, fontsize=8, loc="left")
        axis.set_ylabel(f"{way}-way accuracy (%)", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25, linewidth=0.5)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=7, frameon=False)
    axes[-1].set_xlabel("margin m", fontsize=8)
    axes[-1].set_xticks(
        sorted({point[0] for panel in curves.values() for points in panel.values() for point in points})
    )
    figure.savefig(path)
