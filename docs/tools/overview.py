"""Draws docs/overview.png, the picture at the top of the README: one panel for each of the three papers.

The first panel reads docs/demo/margins.csv (``make demo``), the second solves a transport problem, the third reads
docs/anti_collapse/omniglot28/collapse.json (``fewshot-ext analyze collapse``). Run it from anywhere, with the extra
``train`` installed: ``python docs/tools/overview.py``.
"""

import csv
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import fewshot_ext

DOCS = Path(__file__).resolve().parents[1]
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"  # of Okabe and Ito: apart for every common color blindness


def draw_margins(axis: Axes) -> None:
    accuracies = defaultdict(lambda: defaultdict(list))
    with (DOCS / "demo" / "margins.csv").open() as file:
        for row in csv.DictReader(file):
            if row["shot"] == "1":
                accuracies[row["classes"]][float(row["margin"])].append(float(row["accuracy"]))
    for classes, label, color, marker in (
        ("base", "classes of the training", BLUE, "o"),
        ("novel", "new classes", ORANGE, "s"),
    ):
        margins = sorted(accuracies[classes])
        means = [np.mean(accuracies[classes][margin]) for margin in margins]
        axis.plot(margins, means, color=color, marker=marker, markersize=4, label=label)
    axis.set(title="Negative margins", xlabel="margin of the pre-training", ylabel="5-way 1-shot accuracy (%)")
    axis.legend(frameon=False, fontsize=8)


def draw_transport(axis: Axes) -> None:
    torch.manual_seed(3)
    angle = torch.linspace(0, torch.pi, 16)
    supply = torch.stack([angle.cos(), angle.sin() + 0.25], 1)  # two interlocked half circles
    demand = torch.stack([1 - angle.cos(), -angle.sin() - 0.25], 1)[:12]
    weights = torch.rand(16) + 0.2
    cost = (supply[:, None] - demand).square().sum(-1)
    flow = fewshot_ext.emd(cost, weights, torch.ones(12), normalize=True).flow
    for i, j in flow.nonzero().tolist():
        axis.plot(*zip(supply[i], demand[j], strict=True), color="0.6", linewidth=float(25 * flow[i, j]), zorder=1)
    axis.scatter(*supply.T, s=110 * weights, color=BLUE, zorder=2)
    axis.scatter(*demand.T, s=70, color=ORANGE, zorder=2)
    axis.set(title="Earth Mover's Distance", xticks=[], yticks=[], xlabel="exact, batched, differentiable")


def draw_collapse(axis: Axes) -> None:
    rows = json.loads((DOCS / "anti_collapse" / "omniglot28" / "collapse.json").read_text())["rows"]
    last = max(row["epoch"] for row in rows)
    for variant, label, color, line in (
        ("none", "ProxyAnchor", BLUE, "-"),
        ("pair", "with Anti-Collapse", GREEN, "--"),
    ):
        spectra = [
            row["spectrum"]
            for row in rows
            if (row["loss"], row["variant"], row["classes"], row["epoch"]) == ("proxy_anchor", variant, "unseen", last)
        ]
        axis.semilogy(np.arange(1, len(spectra[0]) + 1), np.mean(spectra, 0), color=color, linestyle=line, label=label)
    axis.set(title="Anti-Collapse", xlabel="direction of the embedding", ylabel="singular value, new classes")
    axis.legend(frameon=False, fontsize=8)


figure = Figure(figsize=(10, 2.9), dpi=120, layout="constrained")
FigureCanvasAgg(figure)
for axis, draw in zip(figure.subplots(1, 3), (draw_margins, draw_transport, draw_collapse), strict=True):
    draw(axis)
    axis.spines[["top", "right"]].set_visible(False)
figure.savefig(DOCS / "overview.png")
