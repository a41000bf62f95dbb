"""Accuracy over the margin of the fine-tuning stage, on one pre-trained backbone a seed: the paper's Fig. 9."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from fewshot_ext._validation import check_number, plain_numbers
from fewshot_ext.experiments.accuracies import Row, mean_accuracy, select, values
from fewshot_ext.experiments.figures import CLASS_TITLES, draw_curves, figure
from fewshot_ext.experiments.measurements import FewShotAccuracy, TrainedRun
from fewshot_ext.experiments.runs import SweepImages, SweepRun
from fewshot_ext.experiments.tables import writer
from fewshot_ext.heads import FineTuning

NAME = "finetuning_margin"


@dataclass(frozen=True)
class FineTuningMargins:
    """Few-shot accuracy for each of several margins of the fine-tuning, on the same episodes.

    Args:
        margins: of the fine-tuning.
        accuracy: how it is measured, but for that margin; it names one set of classes.

    Returns (a call):
        One row a margin and number of shots, with column finetuning_margin beside those of ``FewShotAccuracy``.

    Raises:
        ValueError: no margins, one that is not finite or that comes twice.
    """

    margins: tuple[float, ...]
    accuracy: FewShotAccuracy = field(default_factory=FewShotAccuracy)

    name: ClassVar[str] = "finetuning_margin"

    def __post_init__(self) -> None:
        plain_numbers(self)
        if not self.margins or len(set(self.margins)) < len(self.margins):
            raise ValueError(f"margins: expected at least one margin, and none twice, got {list(self.margins)}")
        for margin in self.margins:
            check_number("margins", margin)

    def settings(self) -> dict[str, Any]:
        return {"margins": list(self.margins), "accuracy": self.accuracy.settings()}

    def check(self, run: SweepRun, images: SweepImages) -> None:
        self.accuracy.check(run, images)

    def __call__(self, trained: TrainedRun, report: Callable[[str], None]) -> list[dict[str, Any]]:
        backbone, rows = trained.backbone(), []
        for classes in filter(trained.images.test.get, self.accuracy.classes):
            archive = trained.images.test[classes]
            features = trained.features(backbone, archive)
            for margin in self.margins:
                config = replace(self.accuracy.finetuning, margin=margin)
                head = FineTuning.from_config(config, backbone.network.similarity)
                for shot in self.accuracy.protocol.shots:
                    report(f"margin {margin:+g} {shot}-shot")
                    row = self.accuracy.row(trained.run, classes, features, archive.labels, shot, head)
                    rows.append({**row, "finetuning_margin": margin})
        return rows


def plot_finetuning_margin(rows: Sequence[Row], path: str | Path) -> None:
    """Draws accuracy over the margin of the fine-tuning: a panel a number of shots, a curve a pre-training margin."""
    shots = values(rows, "shot")
    with figure(path, rows=len(shots), height=1.9, sharex=True) as axes:
        for axis, shot in zip(axes[:, 0], shots, strict=True):
            of_shot = select(rows, shot=shot)
            curves = {
                f"pre-training margin {margin:g}": [
                    (own, *mean_accuracy(select(of_shot, margin=margin, finetuning_margin=own)))
                    for own in values(of_shot, "finetuning_margin")
                ]
                for margin in values(of_shot, "margin")
            }
            way, classes = of_shot[0]["way"], of_shot[0]["classes"]
            draw_curves(axis, curves, title=f"{CLASS_TITLES[classes]}, {shot}-shot", y=f"{way}-way accuracy (%)")
        axes[-1, 0].set_xlabel("margin of the fine-tuning", fontsize=8)


write_finetuning_margin = writer(NAME, plot_finetuning_margin)
