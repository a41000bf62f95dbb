"""Pictures of a match: the strongest flows between the regions of two images, and how much each region counts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fewshot_ext import _extras
from fewshot_ext._validation import check_count
from fewshot_ext.models.local_features import pooled_regions
from fewshot_ext.models.matching import (
    Match,
    Weighting,
    check_finite_maps,
    check_floating,
    checked_maps,
    match_flows,
)

# Okabe and Ito's colors that stand out on photographs and stay apart for every common kind of color blindness; the
# number at both ends of a line tells the flows apart without them.
_COLORS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#D55E00", "#0072B2")
_WIDTH = 3.4  # inches of a column
_SHARED_WIDTH = 2.35  # of a pair among others: three fill a page


def square_regions(nodes: int, height: int, width: int) -> Tensor:
    """The regions behind the positions of a square feature map, ``[nodes, 4]`` (left, top, right, bottom) in pixels.

    Raises:
        ValueError: a number that is no square.

    Example:
        >>> square_regions(4, 8, 8)[1]
        tensor([4., 0., 8., 4.], dtype=torch.float64)
    """
    side = math.isqrt(nodes)
    if side * side != nodes or nodes == 0:
        raise ValueError(f"regions: expected a value for {nodes} local features, which form no square map")
    return pooled_regions((side, side), (side, side), (height, width))


def plot_match(
    query_image: Tensor,
    support_image: Tensor,
    query_map: Tensor,
    support_map: Tensor,
    path: str | Path,
    *,
    query_regions: Tensor | None = None,
    support_regions: Tensor | None = None,
    weighting: Weighting = "cross_reference",
    flows: int = 5,
    titles: tuple[str, str] = ("query", "support"),
) -> Match:
    """Draws the strongest flows between two images above, and the weights of their regions as heat maps below.

    A line's width, and the number in per cent at its ends, is the share of the whole mass that it moves. A weight of 1
    is the average. Where regions overlap, a pixel shows the mean of those that cover it.

    Args:
        query_image: ``[C, H, W]`` uint8, or floating in [0, 1]; one or three channels.
        support_image: likewise.
        query_map: ``[N, C']`` local features.
        support_map: ``[M, C']``.
        path: where the picture goes; the suffix names the format.
        query_regions: ``[N, 4]`` (left, top, right, bottom) in pixels; those of a square feature map where None.
        support_regions: ``[M, 4]``, likewise.
        weighting: as in ``fewshot_ext.models.emd_logits``.
        flows: how many lines, at most; those that move nothing are left out.
        titles: above the two images.

    Returns:
        The match that was drawn; see ``fewshot_ext.models.match_flows``.

    Raises:
        ImportError: matplotlib is missing.
        TypeError: maps that are not floating-point tensors, or images or regions that are no tensors.
        ValueError: images, maps or regions of another shape, features that are not finite, or fewer than one flow.
        OSError: the file cannot be written.

    Example:
        >>> image, features = torch.rand(3, 32, 32), torch.rand(16, 8)
        >>> plot_match(image, image.flip(2), features, features, "match.png").flow.shape
        torch.Size([16, 16])
    """
    check_count("flows", flows, 1)
    _extras.require("train", "matplotlib")
    pair = MatchedPair(query_image, support_image, query_map, support_map, query_regions, support_regions, titles)
    drawn = _checked_pair(pair, weighting)
    _draw([drawn], flows, 1, path)
    return drawn.match


@dataclass(frozen=True)
class MatchedPair:
    """Two images to be drawn by :func:`plot_matches`; see :func:`plot_match` for the arguments.

    Args:
        title: above both images.
    """

    query_image: Tensor
    support_image: Tensor
    query_map: Tensor
    support_map: Tensor
    query_regions: Tensor | None = None
    support_regions: Tensor | None = None
    titles: tuple[str, str] = ("query", "support")
    title: str = ""


def plot_matches(
    pairs: Sequence[MatchedPair],
    path: str | Path,
    *,
    weighting: Weighting = "cross_reference",
    flows: int = 5,
    columns: int = 3,
) -> list[Match]:
    """Draws several matches side by side, as :func:`plot_match` draws one, the weights of all on one scale.

    Args:
        pairs: at least one.
        path, weighting, flows: as in :func:`plot_match`.
        columns: pairs next to each other; three fill the width of a page.

    Returns:
        The matches that were drawn.

    Raises:
        As :func:`plot_match`, before anything is written.
        ValueError: no pairs, or fewer than one column.

    Example:
        >>> pair = MatchedPair(torch.rand(3, 32, 32), torch.rand(3, 32, 32), torch.rand(16, 8), torch.rand(16, 8))
        >>> len(plot_matches([pair, pair], "matches.png"))
        2
    """
    check_count("flows", flows, 1)
    check_count("columns", columns, 1)
    if not pairs:
        raise ValueError("pairs: expected at least one pair, got none")
    _extras.require("train", "matplotlib")
    drawn = [_checked_pair(pair, weighting) for pair in pairs]
    _draw(drawn, flows, columns, path)
    return [pair.match for pair in drawn]


class _Drawn(NamedTuple):
    images: list[Tensor]  # [H, W, 3] each
    regions: list[Tensor]  # [N, 4], [M, 4]
    match: Match
    titles: tuple[str, str]
    title: str


def _checked_pair(pair: MatchedPair, weighting: Weighting) -> _Drawn:
    images, regions = [], []
    for name in ("query", "support"):
        image, maps, boxes = (getattr(pair, f"{name}_{part}") for part in ("image", "map", "regions"))
        images.append(_checked_image(f"{name}_image", image))
        check_floating(**{f"{name}_map": maps})
        if maps.dim() != 2:
            raise ValueError(f"{name}_map: expected shape [N, C], got {list(maps.shape)}")
        height, width = image.shape[1:]
        boxes = square_regions(len(maps), height, width) if boxes is None else boxes
        if not isinstance(boxes, Tensor):
            raise TypeError(f"{name}_regions: expected a tensor, got {type(boxes).__name__}")
        if boxes.shape != (len(maps), 4):
            raise ValueError(f"{name}_regions: expected shape [{len(maps)}, 4], got {list(boxes.shape)}")
        empty = ~(boxes[:, 2:] > boxes[:, :2]).all(1)  # of NaN too
        if empty.any():
            raise ValueError(f"{name}_regions: expected an area, got {boxes[empty][0].tolist()}")
        regions.append(boxes.double().cpu())
    query_map, support_map = pair.query_map, pair.support_map
    checked_maps(query_map=query_map[None, None], support_map=support_map[None, None])
    check_finite_maps(query_map=query_map, support_map=support_map)
    match = Match(*(part.cpu() for part in match_flows(query_map, support_map, weighting=weighting)))
    return _Drawn(images, regions, match, pair.titles, pair.title)


def _checked_image(name: str, image: Tensor) -> Tensor:
    """``[H, W, 3]`` in [0, 1]."""
    if not isinstance(image, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(image).__name__}")
    if image.dim() != 3 or image.shape[0] not in (1, 3) or image.numel() == 0:
        raise ValueError(f"{name}: expected shape [C, H, W] with one or three channels, got {list(image.shape)}")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise TypeError(f"{name}: expected uint8 or floating-point, got {image.dtype}")
    pixels = image.detach().cpu().float()
    if image.dtype == torch.uint8:
        pixels = pixels / 255
    elif not ((pixels >= 0) & (pixels <= 1)).all():
        raise ValueError(f"{name}: expected a number in [0, 1], got {pixels.min().item():g} to {pixels.max().item():g}")
    return pixels.expand(3, -1, -1).permute(1, 2, 0)


def _draw(pairs: Sequence[_Drawn], flows: int, columns: int, path: str | Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    weights = [
        [_heat_map(*part) for part in zip(pair.images, pair.regions, pair.match[1:], strict=True)] for pair in pairs
    ]
    covered = torch.cat([part[part.isfinite()] for maps in weights for part in maps])
    low, high = float(covered.min()), float(covered.max())
    # Equal weights are a range too.
    scale = ScalarMappable(Normalize(low if high - low > 1e-6 else 0.0, high), "viridis")

    alone = len(pairs) == 1
    rows, columns = -(-len(pairs) // columns), min(columns, len(pairs))
    width = _WIDTH if alone else _SHARED_WIDTH
    # A Figure without pyplot leaves the caller's backend and open figures alone.
    size = (width * columns, (0.98 * width + (0 if alone else 0.35)) * rows + 0.75)
    figure = Figure(figsize=size, dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("strongest flows, in % of the mass", fontsize=8)
    if alone:
        blocks, bar_axes = [figure], None
    else:
        above, below = figure.subfigures(2, 1, height_ratios=(size[1] - 0.5, 0.5))
        blocks = above.subfigures(rows, columns, squeeze=False, wspace=0.03, hspace=0.03).flatten().tolist()
        bar_axes = below.add_axes((0.3, 0.72, 0.4, 0.14))
    for block, pair, maps in zip(blocks, pairs, weights, strict=False):
        axes = _draw_pair(block, pair, maps, scale, flows)
    place = {"cax": bar_axes} if bar_axes else {"ax": axes[1], "fraction": 0.05, "pad": 0.04, "aspect": 40}
    bar = (figure if alone else below).colorbar(scale, orientation="horizontal", ticks=MaxNLocator(5), **place)
    bar.set_label("weight of the region (1 is the average)", fontsize=7)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
    figure.savefig(path)


def _draw_pair(block, pair: _Drawn, weights: Sequence[Tensor], scale, flows: int):
    """Two images above and their weights below, on a figure or a part of one; returns the axes."""
    axes = block.subplots(2, 2)
    if pair.title:
        block.suptitle(pair.title, fontsize=8)
    for column, (image, weight, title) in enumerate(zip(pair.images, weights, pair.titles, strict=True)):
        axes[0, column].imshow(image.numpy(), interpolation="nearest")
        axes[0, column].set_title(title, fontsize=8 if not pair.title else 7)
        # Color for the weight and brightness for the picture: a layer that shines through would blur both.
        brightness = 0.5 + 0.5 * image.mean(-1, keepdim=True).numpy()
        axes[1, column].imshow(scale.to_rgba(weight.numpy())[..., :3] * brightness, interpolation="nearest")
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    _draw_flows(block, axes[0], pair.regions, pair.match.flow, flows)
    return axes


def strongest_flows(flow: Tensor, flows: int) -> list[tuple[float, int, int]]:
    """The largest entries of a flow ``[N, M]``, the largest first, as (share of the mass, row, column).

    Those that move nothing are left out.

    Example:
        >>> strongest_flows(torch.tensor([[0.0, 3.0], [1.0, 0.0]]), 3)
        [(0.75, 0, 1), (0.25, 1, 0)]
    """
    shares = (flow / flow.sum()).flatten()
    strongest = shares.topk(min(flows, shares.numel()))
    ranked = zip(*(part.tolist() for part in strongest), strict=True)
    return [(share, *divmod(place, flow.shape[1])) for share, place in ranked if share > 0]


def _draw_flows(figure, axes, regions: list[Tensor], flow: Tensor, flows: int) -> None:
    from matplotlib.patches import ConnectionPatch, Rectangle
    from matplotlib.text import Text

    moved = strongest_flows(flow, flows)
    for rank, (share, *places) in reversed(list(enumerate(moved))):  # the strongest last, on top
        color = _COLORS[rank % len(_COLORS)]
        boxes = [boxes[index] for boxes, index in zip(regions, places, strict=True)]
        centers = [((box[:2] + box[2:]) / 2 - 0.5).tolist() for box in boxes]  # pixel i is drawn around i
        width = 0.8 + 2.2 * share / moved[0][0]
        for axis, box in zip(axes, boxes, strict=True):
            left, top, right, bottom = box.tolist()
            corner, size = (left - 0.5, top - 0.5), (right - left, bottom - top)
            axis.add_patch(Rectangle(corner, *size, fill=False, edgecolor=color, linewidth=1.2))
        # Lines bent apart: between regions of one row they would lie on top of each other.
        bend = (-1) ** rank * (0.08 + 0.05 * (rank // 2))
        line = {"coordsA": "data", "coordsB": "data", "axesA": axes[0], "axesB": axes[1]}
        for under, extra in (("black", 0.8), (color, 0.0)):  # a dark edge, for light pictures
            curve = ConnectionPatch(*centers, **line, connectionstyle=f"arc3,rad={bend}", capstyle="round")
            curve.set(color=under, linewidth=width + extra)
            figure.add_artist(curve)
        for axis, center in zip(axes, centers, strict=True):
            label = {"facecolor": color, "edgecolor": "black", "linewidth": 0.4, "boxstyle": "round,pad=0.15"}
            style = {"fontsize": 5.5, "ha": "center", "va": "center", "bbox": label}
            # Of the figure, as the lines are: what belongs to an axis lies below them.
            figure.add_artist(Text(*center, f"{100 * share:.0f}", transform=axis.transData, zorder=9, **style))


def _heat_map(image: Tensor, regions: Tensor, weight: Tensor) -> Tensor:
    """``[H, W]``, the mean weight of the regions over each pixel, in average weights; NaN where there is none."""
    height, width = image.shape[:2]
    centers = [torch.arange(size, dtype=regions.dtype) + 0.5 for size in (width, height)]
    inside = [
        (center >= regions[:, axis, None]) & (center < regions[:, axis + 2, None])
        for axis, center in enumerate(centers)
    ]
    over = torch.einsum("nh,nw->nhw", inside[1].double(), inside[0].double())
    return torch.einsum("nhw,n->hw", over, weight.double() / weight.mean()) / over.sum(0)
