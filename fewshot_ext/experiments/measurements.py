"""What can be measured on a trained run; few-shot accuracy is the first of it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor

from fewshot_ext._random import derive_generator, derive_seed
from fewshot_ext._validation import check_count, plain_numbers
from fewshot_ext.data import Episodes, ImageArchive, sample_episodes
from fewshot_ext.evaluation import (
    FrozenBackbone,
    ProtocolConfig,
    episode_accuracies,
    extract_features,
    mean_and_interval,
)
from fewshot_ext.experiments.runs import CLASSES, SweepImages, SweepRun
from fewshot_ext.heads import FineTuning, FineTuningConfig, Head

# Parts of the keys that `derive_seed` makes independent seeds of, after the seed of the run; 1 parts its images.
_EPISODES, _FINE_TUNING = 2, 3


@dataclass(frozen=True)
class TrainedRun:
    """A run with its weights, as a measurement gets it.

    Args:
        run: its settings.
        checkpoint: the weights after its last epoch.
        images: what it was trained on and what it may be tested on.
        device: "cpu" or "cuda".
    """

    run: SweepRun
    checkpoint: Path
    images: SweepImages
    device: str = "cpu"

    def backbone(self) -> FrozenBackbone:
        """The backbone, on the device.

        Raises:
            OSError, ValueError: see ``FrozenBackbone.from_checkpoint``.
        """
        backbone = FrozenBackbone.from_checkpoint(self.checkpoint)
        backbone.network.to(self.device)
        return backbone

    def features(self, backbone: FrozenBackbone, archive: ImageArchive) -> Tensor:
        """``[N, D]`` features of images."""
        return extract_features(backbone.network, archive.images, batch_size=256)


class Measurement(Protocol):
    """Something that is measured on every run of a sweep; it can be sent to another process.

    Attributes:
        name: part of the name of the file that keeps what was found.
        row_schema: where there is one, what each row in that file must be, as ``check_schema`` takes it.
    """

    name: str

    def settings(self) -> dict[str, Any]:
        """Everything that decides the numbers beside the run, in plain JSON types."""

    def check(self, run: SweepRun, images: SweepImages) -> None:
        """Raises ValueError where it cannot be measured on this run."""

    def __call__(self, trained: TrainedRun, report: Callable[[str], None]) -> list[dict[str, Any]]:
        """Rows of results; ``report`` takes a remark on what is under way."""


@dataclass(frozen=True)
class FewShotAccuracy:
    """Accuracy over few-shot episodes on each set of classes, by the paper's protocol, and of plain classification.

    The latter is of held-out images of base classes among all of these, by the classifier that was trained with the
    network: the accuracy on base classes of the paper's Fig. 1.

    Args:
        protocol: which episodes are drawn.
        base_queries: query images a class in episodes of base classes, of which fewer images are held out; the
            same as elsewhere where None.
        finetuning: of the classifier of each episode, which takes the loss of the pre-training.
        classes: names in ``CLASSES``; those of "validation" are left out where the image set has none.

    Returns (a call):
        One row a set of classes and number of shots, with columns classes, way, shot, accuracy and interval (percent),
        queries, and correct, the number of queries classified rightly in each episode. Where base classes are among
        them one more, whose shot is 0 and whose way all base classes: accuracy and interval are over the classes,
        correct is the share of each class, and queries 1.

    Raises:
        ValueError: no classes, an unknown one or one given twice.
    """

    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    base_queries: int | None = None
    finetuning: FineTuningConfig = field(default_factory=FineTuningConfig)
    classes: tuple[str, ...] = CLASSES

    name: ClassVar[str] = "accuracy"
    row_schema: ClassVar[dict[str, Any]] = {
        "classes": str,
        **dict.fromkeys(("way", "shot", "queries"), int),
        **dict.fromkeys(("accuracy", "interval"), float),
        "correct": [(int, float)],
    }

    def __post_init__(self) -> None:
        plain_numbers(self)
        if self.base_queries is not None:
            check_count("base_queries", self.base_queries, 1)
        if not self.classes or len(set(self.classes)) < len(self.classes) or not set(self.classes) <= set(CLASSES):
            raise ValueError(
                f"classes: expected some of {', '.join(CLASSES)}, none of them twice, got {list(self.classes)}"
            )

    def settings(self) -> dict[str, Any]:
        # What version 0.1 measured had no plain classification.
        plain = {"plain_classification": True} if "base" in self.classes else {}
        return json.loads(json.dumps(asdict(self) | plain))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "FewShotAccuracy":
        """Rebuilds what ``settings`` gave."""
        protocol = {**values["protocol"], "shots": tuple(values["protocol"]["shots"])}
        return cls(
            ProtocolConfig(**protocol),
            values["base_queries"],
            FineTuningConfig(**values["finetuning"]),
            tuple(values["classes"]),
        )

    def check(self, run: SweepRun, images: SweepImages) -> None:
        there = [classes for classes in self.classes if classes in images.test]
        if not there:
            raise ValueError(f"{run.data} has no {' and no '.join(self.classes)} classes")
        for classes in there:
            for shot in self.protocol.shots:
                self.draw(run, classes, images.test[classes].labels, shot)

    def draw(self, run: SweepRun, classes: str, labels: Tensor, shot: int, *part: int) -> Episodes:
        """The episodes of a run, the same for all runs of one seed on one image set.

        Args:
            run: whose seed decides.
            classes: the set of classes that the images are of.
            labels: ``[N]`` int64 class of each image.
            shot: support images a class.
            part: tells draws from different parts of the classes apart.

        Raises:
            ValueError: too few classes, or too few images in one of them.
        """
        queries = self.protocol.queries
        if classes == "base" and self.base_queries is not None:
            queries = self.base_queries
        try:
            return sample_episodes(
                labels,
                self.protocol.episodes_by_shot[shot],
                way=self.protocol.way,
                shot=shot,
                queries=queries,
                generator=derive_generator(run.seed, _EPISODES, CLASSES.index(classes), shot, *part),
            )
        except ValueError as error:
            raise ValueError(f"{classes} classes of {run.data}: {error}") from error

    def row(
        self, run: SweepRun, classes: str, features: Tensor, labels: Tensor, shot: int, head: Head, *part: int
    ) -> dict[str, Any]:
        """A row of results for one number of shots.

        Args:
            run, classes, labels, shot, part: see ``draw``.
            features: ``[N, D]`` of the same images.
            head: the classifier.
        """
        episodes = self.draw(run, classes, labels, shot, *part)
        seed = derive_seed(run.seed, _FINE_TUNING, CLASSES.index(classes), shot, *part)
        per_episode = episode_accuracies(features, episodes, head=head, seed=seed)
        queries = episodes.query[0].numel()
        correct = (per_episode * queries).round().long().tolist()
        return _row(per_episode, classes=classes, way=self.protocol.way, shot=shot, queries=queries, correct=correct)

    def __call__(self, trained: TrainedRun, report: Callable[[str], None]) -> list[dict[str, Any]]:
        backbone = trained.backbone()
        head = FineTuning.from_config(self.finetuning, backbone.network.similarity)
        rows = []
        for classes in self.classes:
            archive = trained.images.test.get(classes)
            if archive is None:
                continue
            features = trained.features(backbone, archive)
            for shot in self.protocol.shots:
                report(f"{classes} {shot}-shot")
                rows.append(self.row(trained.run, classes, features, archive.labels, shot, head))
            if classes == "base":
                report("plain classification")
                rows.append(_plain_classification(trained, archive))
        return rows


def _plain_classification(trained: TrainedRun, archive: ImageArchive) -> dict[str, Any]:
    from fewshot_ext.training import PreTraining

    predicted = PreTraining.from_checkpoint(trained.checkpoint).to(trained.device).classify(archive.images)
    counts = archive.labels.bincount(minlength=archive.num_classes)
    hits = archive.labels[predicted == archive.labels].bincount(minlength=archive.num_classes)
    shares = (hits / counts.double())[counts > 0]
    correct = [round(share, 6) for share in shares.tolist()]
    return _row(shares, classes="base", way=archive.num_classes, shot=0, queries=1, correct=correct)


def _row(shares: Tensor, *, classes: str, way: int, shot: int, queries: int, correct: list) -> dict[str, Any]:
    mean, interval = mean_and_interval(100 * shares)
    return {
        "classes": classes,
        "way": way,
        "shot": shot,
        "accuracy": round(mean, 4),
        "interval": round(interval, 4),
        "queries": queries,
        "correct": correct,
    }
