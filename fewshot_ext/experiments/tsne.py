"""t-SNE pictures of base and novel classes for negative, zero and positive margin: the paper's Fig. 7."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewshot_ext import _extras
from fewshot_ext._precision import normalize
from fewshot_ext._random import derive_generator, derive_seed
from fewshot_ext._validation import check_count, check_positive, plain_numbers
from fewshot_ext.data import ImageArchive
from fewshot_ext.evaluation import ProtocolConfig
from fewshot_ext.experiments.accuracies import Row, select, values
from fewshot_ext.experiments.figures import COLUMN, STYLES, figure
from fewshot_ext.experiments.measurements import FewShotAccuracy, TrainedRun
from fewshot_ext.experiments.runs import SweepImages, SweepRun
from fewshot_ext.experiments.tables import writer
from fewshot_ext.heads import FineTuning

NAME = "tsne"
_CLASSES = ("base", "novel")

# Part of the key that makes the seed of the classes, the images and the embedding of the run's.
_EMBEDDING = 4


@dataclass(frozen=True)
class Embedding:
    """Two-dimensional t-SNE embeddings of some classes, base and novel, and the accuracy on all of them.

    Args:
        num_classes: classes of each set that are drawn; as many as there are styles at most.
        images: of each class, at most.
        perplexity: of t-SNE.
        accuracy: of the episodes whose accuracy stands beside the picture, its smallest number of shots.

    Returns (a call):
        One row a set of classes, with columns classes, class_names, shot, accuracy, points ``[N][2]`` and labels
        ``[N]``.

    Raises:
        ValueError: a count out of range, or a perplexity that is not positive.

    Reference:
        van der Maaten and Hinton, Visualizing Data using t-SNE, JMLR 2008; features are L2-normalized, so that
        distances are those of the cosine.
    """

    num_classes: int = 5
    images: int = 60
    perplexity: float = 30.0
    accuracy: FewShotAccuracy = field(default_factory=lambda: FewShotAccuracy(ProtocolConfig(shots=(1,))))

    name: ClassVar[str] = "tsne"

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_count("num_classes", self.num_classes, 2)
        if self.num_classes > len(STYLES):
            raise ValueError(f"num_classes: expected at most {len(STYLES)} to be told apart, got {self.num_classes}")
        check_count("images", self.images, 2)
        check_positive("perplexity", self.perplexity)

    def settings(self) -> dict[str, Any]:
        return {
            "num_classes": self.num_classes,
            "images": self.images,
            "perplexity": self.perplexity,
            "accuracy": self.accuracy.settings(),
        }

    def check(self, run: SweepRun, images: SweepImages) -> None:
        _extras.require("train", "sklearn")
        for classes in _CLASSES:
            archive = images.test[classes]
            if archive.num_classes < self.num_classes:
                raise ValueError(
                    f"num_classes: expected at most {archive.num_classes}, the {classes} classes of {run.data}, "
                    f"got {self.num_classes}"
                )
            drawn = len(self._draw(run, classes, archive))
            if drawn <= self.perplexity:
                raise ValueError(
                    f"perplexity: expected less than the {drawn} images of a picture, got {self.perplexity}"
                )
        self.accuracy.check(run, images)

    def __call__(self, trained: TrainedRun, report: Callable[[str], None]) -> list[dict[str, Any]]:
        from sklearn.manifold import TSNE

        backbone, rows = trained.backbone(), []
        head = FineTuning.from_config(self.accuracy.finetuning, backbone.network.similarity)
        for classes in _CLASSES:
            archive, run = trained.images.test[classes], trained.run
            features = trained.features(backbone, archive)
            report(f"t-SNE of {classes} classes")
            chosen = self._draw(run, classes, archive)
            seed = derive_seed(run.seed, _EMBEDDING, _CLASSES.index(classes)) % 2**32
            embedding = TSNE(perplexity=self.perplexity, init="pca", random_state=seed)
            points = embedding.fit_transform(normalize(features[chosen]).cpu().numpy())
            names, labels = archive.labels[chosen].unique(return_inverse=True)
            shot = min(self.accuracy.protocol.shots)
            row = self.accuracy.row(run, classes, features, archive.labels, shot, head)
            rows.append(
                {
                    **{key: row[key] for key in ("classes", "way", "shot", "accuracy", "interval")},
                    "class_names": [archive.class_names[name] for name in names.tolist()],
                    "points": [[round(value, 3) for value in point] for point in points.tolist()],
                    "labels": labels.tolist(),
                }
            )
        return rows

    def _draw(self, run: SweepRun, classes: str, archive: ImageArchive) -> Tensor:
        """``[N]`` indices of the images: the same for every margin of a seed."""
        generator = derive_generator(run.seed, _EMBEDDING, _CLASSES.index(classes))
        names = torch.randperm(archive.num_classes, generator=generator)[: self.num_classes]
        members = [(archive.labels == name).nonzero().squeeze(1) for name in names]
        return torch.cat([own[torch.randperm(len(own), generator=generator)[: self.images]] for own in members])


def plot_tsne(rows: Sequence[Row], path: str | Path) -> None:
    """Draws the embeddings: base classes above, novel classes below, the margin rising from left to right."""
    margins = values(rows, "margin")
    width = COLUMN * (1 if len(margins) < 3 else 2)
    with figure(path, rows=2, columns=len(margins), width=width, height=width / len(margins)) as axes:
        for i, classes in enumerate(_CLASSES):
            for j, margin in enumerate(margins):
                (row,), axis = select(rows, classes=classes, margin=margin), axes[i, j]
                points, labels = torch.tensor(row["points"]), torch.tensor(row["labels"])
                for label, style in zip(range(len(row["class_names"])), STYLES, strict=False):
                    own = points[labels == label]
                    axis.scatter(
                        own[:, 0], own[:, 1], s=7, linewidths=0, alpha=0.8, color=style["color"], marker=style["marker"]
                    )
                axis.set_title(
                    f"{classes}, $m$ = {margin:g}\n{row['shot']}-shot {row['accuracy']:.1f} ± {row['interval']:.1f} %",
                    fontsize=8,
                )
                axis.set_xticks([])
                axis.set_yticks([])


write_tsne = writer(NAME, plot_tsne)
