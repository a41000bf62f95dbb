"""What the pictures of all analyses share: sizes, colors, markers, and curves with intervals over panels."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from fewshot_ext import _extras

# The width of a column in a two-column paper, in inches. Text of 7 points then prints as it is drawn.
COLUMN = 3.4

# Okabe and Ito's colors stay apart for every common kind of color blindness; marker and line tell the curves apart
# in gray print.
STYLES = (
    {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    {"color": "#009E73", "marker": "^", "linestyle": "-."},
    {"color": "#CC79A7", "marker": "D", "linestyle": ":"},
    {"color": "#E69F00", "marker": "v", "linestyle": "-"},
    {"color": "#56B4E9", "marker": "P", "linestyle": "--"},
    {"color": "#000000", "marker": "X", "linestyle": "-."},
)

# A curve is a sequence of points (x, y, half-width of the interval of y).
Curve = Sequence[tuple[float, float, float]]

CLASS_TITLES = {
    "base": "base classes, held-out images",
    "validation": "validation classes",
    "novel": "novel classes",
}
LOSS_TITLES = {"cosine": "cosine softmax", "softmax": "softmax"}


def curve_styles(names: Iterable[Hashable]) -> dict[Hashable, dict[str, str]]:
    """A style for each name. After the seventh the colors come again, with other markers and lines.

    Example:
        >>> first, *_, eighth = curve_styles(range(8)).values()
        >>> first["color"] == eighth["color"], first["marker"] == eighth["marker"]
        (True, False)
    """
    styles = {}
    for k, name in enumerate(dict.fromkeys(names)):
        turn = STYLES[(k + k // len(STYLES)) % len(STYLES)]
        styles[name] = {**turn, "color": STYLES[k % len(STYLES)]["color"]}
    return styles


@contextmanager
def figure(
    path: str | Path, *, rows: int = 1, columns: int = 1, width: float | None = None, height: float = 2.2, **grid
):
    """A grid of axes that is saved to ``path`` when the block is left; the suffix names the format.

    Args:
        path: the picture.
        rows, columns: of axes, which come as a ``[rows, columns]`` array.
        width: of the whole, in inches; a paper's column for each column of axes where None.
        height: of one row, in inches.
        grid: further arguments of ``Figure.subplots``.

    Raises:
        ImportError: matplotlib is missing.
    """
    _extras.require("train", "matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A Figure without pyplot leaves the caller's backend and open figures alone.
    size = (width or COLUMN * columns, height * rows)
    canvas = Figure(figsize=size, dpi=200, layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.subplots(rows, columns, squeeze=False, **grid)
    for axis in axes.flat:
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    yield axes
    canvas.savefig(path)


def draw_curves(
    axis,
    curves: Mapping[str, Curve],
    *,
    title: str = "",
    x: str = "",
    y: str = "",
    styles: Mapping[str, Mapping[str, str]] | None = None,
    legend: bool = True,
) -> None:
    """Curves with intervals, each with a style of its own.

    Args:
        axis: of matplotlib.
        curves: by label.
        title, x, y: texts.
        styles: by label, where curves of several panels belong together.
        legend: whether the labels are written into the panel, where there is more than one.
    """
    styles = styles or curve_styles(curves)
    for label, points in curves.items():
        xs, ys, intervals = zip(*sorted(points), strict=True)
        axis.errorbar(
            xs,
            ys,
            yerr=intervals,
            label=label,
            markersize=3.5,
            linewidth=1.3,
            capsize=2.5,
            elinewidth=1,
            **styles[label],
        )
    axis.set_title(title, fontsize=8, loc="left")
    axis.set_xlabel(x, fontsize=8)
    axis.set_ylabel(y, fontsize=8)
    axis.grid(alpha=0.25, linewidth=0.5)
    if legend and len(curves) > 1:
        axis.legend(fontsize=7, frameon=False)


def shared_legend(axis, loc: str = "outside upper center", *, columns: int = 4) -> None:
    """One legend beside all panels for curves that every panel has: inside, it would hide some of them."""
    handles, labels = axis.get_legend_handles_labels()
    if len(labels) > 1:
        axis.figure.legend(handles, labels, fontsize=7, frameon=False, loc=loc, ncols=columns)


def draw_grid(
    path: str | Path,
    rows: Sequence[str],
    columns: Sequence[str],
    curves: Callable[[str, str], Mapping[str, Curve]],
    *,
    x: str,
    y: str | Mapping[str, str],
    titles: Mapping[str, str],
    height: float = 1.9,
) -> None:
    """A grid of panels of curves over one common quantity a column.

    Args:
        path: the picture.
        rows, columns: what tells the panels apart.
        curves: the curves of the panel (row, column) by label.
        x: what the horizontal axes show.
        y: what the vertical axes show, the same everywhere or by row.
        titles: of rows and columns, where they differ from their names.
        height: of a row in inches.
    """
    with figure(path, rows=len(rows), columns=len(columns), height=height, sharex="col") as axes:
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                parts = [titles.get(row, row)] + ([titles.get(column, column)] if len(columns) > 1 else [])
                draw_curves(
                    axes[i, j],
                    curves(row, column),
                    title=", ".join(filter(None, parts)),
                    x=x if i == len(rows) - 1 else "",
                    y=y if isinstance(y, str) else y[row],
                    legend=False,
                )
        shared_legend(axes[0, 0])
