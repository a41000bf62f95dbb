"""Which base classes novel images fall into, and the accuracy of classes sorted by it: eq. 5, the paper's Fig. 4."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch

from fewshot_ext._files import replace_file
from fewshot_ext._validation import check_count, plain_numbers
from fewshot_ext.experiments.accuracies import Row, mean_accuracy, select, values
from fewshot_ext.experiments.figures import draw_curves, figure, shared_legend
from fewshot_ext.experiments.measurements import FewShotAccuracy, TrainedRun
from fewshot_ext.experiments.measures import base_class_probabilities, same_class_probability
from fewshot_ext.experiments.runs import SweepImages, SweepRun
from fewshot_ext.experiments.tables import write_table
from fewshot_ext.experiments.variance import base_similarities
from fewshot_ext.heads import FineTuning

NAME = "label_distribution"

# Rows that a picture of P_jk has at most; the paper plots every third class.
_PICTURED = 40

# The paper sorts its 16 validation and 20 novel classes together: neither has been trained on.
_UNSEEN = ("validation", "novel")


@dataclass(frozen=True)
class LabelDistribution:
    """P_jk and P_j^s of every class that no run has trained on.

    Args:
        groups: how many groups the classes will be cut into; this and ``accuracy`` have no part in what is measured
            here, only in what is checked beforehand.
        accuracy: how the accuracy of the groups will be measured.

    Returns (a call):
        One row a class, with columns classes, class, same_class (P_j^s) and probabilities (P_jk, a list over base
        classes).
    """

    groups: int = 1
    accuracy: FewShotAccuracy = field(default_factory=FewShotAccuracy)

    name: ClassVar[str] = "label_distribution"

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_count("groups", self.groups, 1)

    def settings(self) -> dict[str, Any]:
        return {}

    def check(self, run: SweepRun, images: SweepImages) -> None:
        labels, way = _unseen_labels(images), self.accuracy.protocol.way
        if len(labels.unique()) < self.groups * way:
            raise ValueError(
                f"groups: {self.groups} groups of {way}-way episodes need {self.groups * way} classes beside the base "
                f"classes, but {run.data} has {len(labels.unique())}"
            )
        for shot in self.accuracy.protocol.shots:
            self.accuracy.draw(run, "novel", labels, shot)

    def __call__(self, trained: TrainedRun, report: Callable[[str], None]) -> list[dict[str, Any]]:
        backbone, rows = trained.backbone(), []
        for classes in filter(trained.images.test.get, _UNSEEN):
            report(classes)
            archive = trained.images.test[classes]
            similarities, scale = base_similarities(trained.checkpoint, trained.features(backbone, archive).cpu())
            probabilities = base_class_probabilities(similarities.double(), archive.labels, scale)
            same_class = same_class_probability(probabilities).tolist()
            for name, own, of_class in zip(archive.class_names, same_class, probabilities.tolist(), strict=True):
                row = {"classes": classes, "class": name, "same_class": own}
                rows.append({**row, "probabilities": [round(value, 6) for value in of_class]})
        return rows


@dataclass(frozen=True)
class GroupAccuracy:
    """Few-shot accuracy within each of several groups of classes that no run has trained on.

    Args:
        groups: names of the classes of each group.
        accuracy: how it is measured; its sets of classes have no part in it.

    Returns (a call):
        One row a group and number of shots, with column group (0, 1, ...) beside those of ``FewShotAccuracy``.
    """

    groups: tuple[tuple[str, ...], ...]
    accuracy: FewShotAccuracy = field(default_factory=FewShotAccuracy)

    name: ClassVar[str] = "group_accuracy"

    def settings(self) -> dict[str, Any]:
        return {"groups": [list(group) for group in self.groups], "accuracy": self.accuracy.settings()}

    def check(self, run: SweepRun, images: SweepImages) -> None:
        labels, groups = _unseen_labels(images), self._members(images)
        for members in groups:
            for shot in self.accuracy.protocol.shots:
                self.accuracy.draw(run, "novel", labels[torch.isin(labels, members)], shot)

    def __call__(self, trained: TrainedRun, report: Callable[[str], None]) -> list[dict[str, Any]]:
        backbone, rows = trained.backbone(), []
        head = FineTuning.from_config(self.accuracy.finetuning, backbone.network.similarity)
        archives = [trained.images.test[classes] for classes in filter(trained.images.test.get, _UNSEEN)]
        features = torch.cat([trained.features(backbone, archive) for archive in archives])
        labels = _unseen_labels(trained.images)
        for number, members in enumerate(self._members(trained.images)):
            chosen = torch.isin(labels, members)
            for shot in self.accuracy.protocol.shots:
                report(f"group {number + 1} {shot}-shot")
                row = self.accuracy.row(trained.run, "novel", features[chosen], labels[chosen], shot, head, number)
                rows.append({**row, "classes": "unseen", "group": number})
        return rows

    def _members(self, images: SweepImages) -> list[torch.Tensor]:
        names = [name for classes in filter(images.test.get, _UNSEEN) for name in images.test[classes].class_names]
        return [torch.tensor([names.index(name) for name in group]) for group in self.groups]


def group_classes(rows: Sequence[Row], groups: int) -> tuple[tuple[str, ...], ...]:
    """Classes in rising order of P_j^s, cut into groups of nearly equal size.

    The order is by the mean over all seeds of the runs whose margin is closest to 0, so that the groups are the same
    for every margin.

    Args:
        rows: of ``Sweep.run`` with ``LabelDistribution``.
        groups: how many.

    Example:
        >>> rows = [{"margin": 0.0, "class": name, "same_class": own} for name, own in (("a", 0.9), ("b", 0.1))]
        >>> group_classes(rows, groups=2)
        (('b',), ('a',))
    """
    nearest = min(values(rows, "margin"), key=abs)
    reference = select(rows, margin=nearest)
    names = list(dict.fromkeys(row["class"] for row in reference))
    means = {name: _mean([row["same_class"] for row in select(reference, **{"class": name})]) for name in names}
    order = sorted(names, key=means.get)
    cuts = [round(i * len(order) / groups) for i in range(groups + 1)]
    return tuple(tuple(order[start:end]) for start, end in pairwise(cuts))


def write_label_distribution(
    folder: Path, distribution: Sequence[Row], accuracies: Sequence[Row], groups: Sequence[Sequence[str]], **head: Any
) -> list[Path]:
    """Writes ``label_distribution.json``, ``.csv`` and ``.png``, and ``group_accuracy.json`` and ``.csv``.

    Args:
        folder: must exist.
        distribution: rows of ``Sweep.run`` with ``LabelDistribution``.
        accuracies: rows of ``Sweep.run`` with ``GroupAccuracy``.
        groups: as ``group_classes`` gives them.
        head: what is needed to repeat the analysis.
    """
    pictured = pictured_rows(distribution, groups)
    drawn = {id(row) for row in pictured}
    # P_jk of hundreds of classes in every run would be tens of megabytes that nobody looks at; each run keeps its own.
    kept = [
        row if id(row) in drawn else {key: value for key, value in row.items() if key != "probabilities"}
        for row in distribution
    ]
    written = write_table(folder, NAME, kept, **head)
    means = _group_means(distribution, groups)
    described = [
        {"group": number, "same_class": round(mean, 4), "classes": list(group)}
        for number, (mean, group) in enumerate(zip(means, groups, strict=True))
    ]
    written += write_table(folder, "group_accuracy", accuracies, **head, groups=described)
    replace_file(folder / f"{NAME}.png", lambda path: plot_label_distribution(pictured, means, accuracies, path))
    return [*written, folder / f"{NAME}.png"]


def pictured_rows(distribution: Sequence[Row], groups: Sequence[Sequence[str]]) -> list[Row]:
    """The classes whose P_jk are drawn, of one run: in rising order of P_j^s, evenly spaced where they are many."""
    nearest = min(values(distribution, "margin"), key=abs)
    own = {row["class"]: row for row in select(distribution, margin=nearest, seed=values(distribution, "seed")[0])}
    names = [name for group in groups for name in group]
    step = -(-len(names) // _PICTURED)
    return [own[name] for name in names[::step]]


def plot_label_distribution(
    pictured: Sequence[Row], means: Sequence[float], accuracies: Sequence[Row], path: str | Path
) -> None:
    """Draws P_jk as a picture, sorted by P_j^s, and the accuracy of each group over the margin.

    Args:
        pictured: as ``pictured_rows`` gives them.
        means: P^s of each group.
        accuracies: rows of ``Sweep.run`` with ``GroupAccuracy``.
        path: the picture.
    """
    table = torch.tensor([row["probabilities"] for row in pictured])
    # The base classes most often chosen first: their own order means nothing.
    table = table[:, table.sum(0).argsort(descending=True)]
    shots = values(accuracies, "shot")
    with figure(path, rows=1 + len(shots), height=2.2) as axes:
        picture = axes[0, 0].imshow(
            table.sqrt().numpy(), aspect="auto", cmap="cividis", vmin=0, interpolation="nearest"
        )
        axes[0, 0].set_xlabel("base class $k$, by how often it is chosen", fontsize=8)
        axes[0, 0].set_ylabel("unseen class $j$, by $P_j^s$", fontsize=8)
        axes[0, 0].set_title(f"(a) $P_{{jk}}$ at margin {pictured[0]['margin']:g}", fontsize=8, loc="left")
        bar = axes[0, 0].figure.colorbar(picture, ax=axes[0, 0])
        bar.set_label(r"$\sqrt{P_{jk}}$", fontsize=8)
        bar.ax.tick_params(labelsize=7)
        for axis, shot in zip(axes[1:, 0], shots, strict=True):
            of_shot = select(accuracies, shot=shot)
            curves = {
                f"$P^s$ = {mean:.3f}": [
                    (margin, *mean_accuracy(select(of_shot, margin=margin, group=number)))
                    for margin in values(of_shot, "margin")
                ]
                for number, mean in enumerate(means)
            }
            way = of_shot[0]["way"]
            titles = {"title": f"(b) {shot}-shot", "x": "margin $m$", "y": f"{way}-way accuracy (%)"}
            draw_curves(axis, curves, **titles, legend=False)
        shared_legend(axes[1, 0], "outside lower center", columns=2)


def _group_means(rows: Sequence[Row], groups: Sequence[Sequence[str]]) -> list[float]:
    nearest = min(values(rows, "margin"), key=abs)
    reference: dict[str, list[float]] = {}
    for row in select(rows, margin=nearest):
        reference.setdefault(row["class"], []).append(row["same_class"])
    return [_mean([_mean(reference[name]) for name in group]) for group in groups]


def _unseen_labels(images: SweepImages) -> torch.Tensor:
    labels, before = [], 0
    for classes in filter(images.test.get, _UNSEEN):
        labels.append(images.test[classes].labels + before)
        before += images.test[classes].num_classes
    return torch.cat(labels)


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)
