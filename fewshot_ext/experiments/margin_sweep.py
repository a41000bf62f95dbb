"""Accuracy on base and novel classes over the pre-training margin: the paper's Fig. 1."""

import json
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fewshot_ext import _extras
from fewshot_ext._progress import StagedProgress
from fewshot_ext._random import derive_generator, derive_seed
from fewshot_ext._record import check_same_settings, versions
from fewshot_ext._validation import check_count, check_number
from fewshot_ext.data import Episodes, ImageArchive, Split, sample_episodes
from fewshot_ext.evaluation import ProtocolConfig, episode_accuracies, extract_features
from fewshot_ext.experiments.results import CLASSES, Accuracy, SweepResults
from fewshot_ext.heads import FineTuning, FineTuningConfig
from fewshot_ext.models import NetworkConfig, build_network
from fewshot_ext.training import PreTrainingConfig

# Second entries of the keys that `derive_seed` makes independent seeds of, after the seed of the run.
_HOLD_OUT, _EPISODES, _FINE_TUNING = 1, 2, 3


@dataclass(frozen=True)
class MarginSweepConfig:
    """Settings of a margin sweep.

    Args:
        margins: of the pre-training; each trains a backbone of its own.
        runs: independent repetitions. A training run's own luck is larger than the interval over episodes.
        seed: decides everything that is random. Within a run all margins share initial weights, batches and
            episodes.
        held_out: share of each base class's images that is kept from training and measures base accuracy.
        protocol: see ``ProtocolConfig``.
        pretraining: see ``PreTrainingConfig``; its margin gives way to those of the sweep.
        finetuning: see ``FineTuningConfig``.

    Raises:
        ValueError: no margins, one that is not finite or that comes twice, a negative seed.
    """

    margins: tuple[float, ...] = (-0.3, -0.1, 0.0, 0.1, 0.3)
    runs: int = 3
    seed: int = 0
    held_out: float = 0.4
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    pretraining: PreTrainingConfig = field(default_factory=PreTrainingConfig)
    finetuning: FineTuningConfig = field(default_factory=FineTuningConfig)

    def __post_init__(self) -> None:
        if not self.margins:
            raise ValueError("margins: expected at least one margin, got none")
        for margin in self.margins:
            check_number("margins", margin)
        if len(set(self.margins)) < len(self.margins):
            raise ValueError(f"margins: expected all to be different, got {list(self.margins)}")
        check_count("runs", self.runs, 1)
        check_count("seed", self.seed, 0)


class MarginSweep:
    """Pre-trains a backbone for each margin and measures few-shot accuracy on held-out base and on novel
    classes.

    Everything that can be wrong with the settings is found here, before the first training step.

    Args:
        config: see ``MarginSweepConfig``.
        archive: images with base and novel classes.
        output: existing folder for results, checkpoints and TensorBoard logs.
        device: "cpu" or "cuda".
        resume: keep the margins that ``output`` holds the results of, and go on from the last checkpoint of
            the one that was broken off. Otherwise the sweep starts afresh and replaces them.

    Raises:
        ImportError: a package of the extra ``train`` is missing.
        ValueError: a class with too few images for the protocol, images too small for the backbone, or, with
            ``resume``, results of other settings or versions.

    Reference:
        Liu et al., Negative Margin Matters, ECCV 2020, Fig. 1.
    """

    def __init__(
        self,
        config: MarginSweepConfig,
        archive: ImageArchive,
        output: str | Path,
        *,
        device: torch.device | str = "cpu",
        resume: bool = False,
    ) -> None:
        _extras.require("train", "lightning", "tensorboard", "kornia", "matplotlib", "tqdm")
        self.config, self.output, self.device, self.resume = (
            config,
            Path(output),
            torch.device(device),
            resume,
        )
        base, novel = archive.subset(Split.BASE), archive.subset(Split.NOVEL)
        self._runs = [_Run(run, config, base, novel, derive_seed(config.seed, run)) for run in range(config.runs)]
        shape, unit = tuple(archive.images.shape[1:]), (1.0,) * archive.images.shape[1]
        with torch.device("meta"):
            build_network(NetworkConfig(config.pretraining.backbone, shape, unit, unit, config.pretraining.image_size))
        self.results = SweepResults(
            _plain(config, self.device), versions("torch", "numpy", "lightning", "kornia"), config.protocol.way
        )
        if resume and (self.output / "results.json").exists():
            earlier = SweepResults.read(self.output / "results.json")
            _check_same_run(earlier, self.results, self.output)
            self.results.accuracies = [
                row for row in earlier.accuracies if row.margin in config.margins and row.run < config.runs
            ]

    def __len__(self) -> int:
        """Backbones to train: runs times margins."""
        return len(self._runs) * len(self.config.margins)

    def run(self) -> SweepResults:
        """Runs what is not yet there, writes the files again after every margin, and returns all results.

        Raises:
            KeyboardInterrupt: Ctrl-C. The files then hold what was finished before, as ``results`` does.
        """
        self.results.write(self.output)
        with StagedProgress("backbones", len(self)) as progress:
            for run in self._runs:
                for margin in self.config.margins:
                    if (run.number, margin) not in self.results.finished:
                        self.results.accuracies += self._measure(run, margin, progress)
                        self.results.write(self.output)
                    progress.finish(_summary(run.number, margin, self.results))
        return self.results

    def _measure(self, run: "_Run", margin: float, progress: StagedProgress) -> list[Accuracy]:
        from fewshot_ext.training import pretrain

        directory = self.output / f"run_{run.number}" / f"margin_{margin:+g}"
        if not self.resume:
            shutil.rmtree(directory, ignore_errors=True)
        name = f"run {run.number}, margin {margin:+g}"
        with progress.stage(f"{name}: pre-training", self.config.pretraining.epochs) as report:
            module = pretrain(
                replace(self.config.pretraining, margin=margin),
                run.training_images,
                directory,
                seed=run.seed,
                device=self.device,
                resume=self.resume,
                on_epoch=lambda epochs, loss: report(epochs, f"loss {loss:.4f}"),
            )
        head = FineTuning.from_config(self.config.finetuning, self.config.pretraining.similarity)
        accuracies, done = [], 0
        with progress.stage(f"{name}: episodes", len(run.episodes) * self.config.protocol.episodes) as report:
            features = {
                classes: extract_features(module, archive.images) for classes, archive in run.test_images.items()
            }
            for (classes, shot), episodes in run.episodes.items():
                queries = episodes.query[0].numel()
                per_episode = episode_accuracies(
                    features[classes],
                    episodes,
                    head=head,
                    seed=derive_seed(run.seed, _FINE_TUNING, CLASSES.index(classes), shot),
                    on_progress=lambda count, before=done: report(before + count),
                )
                done += len(episodes)
                correct = tuple((per_episode * queries).round().long().tolist())
                accuracies.append(Accuracy(run.number, margin, classes, shot, correct, queries))
        return accuracies


class _Run:
    """What all margins of one run share: the images to train on, the images to test on, and the episodes."""

    def __init__(
        self, number: int, config: MarginSweepConfig, base: ImageArchive, novel: ImageArchive, seed: int
    ) -> None:
        self.number, self.seed = number, seed
        self.training_images, held_out = base.hold_out(config.held_out, derive_generator(seed, _HOLD_OUT))
        self.test_images = dict(zip(CLASSES, (held_out, novel), strict=True))
        self.episodes = {
            (classes, shot): self._sample(config.protocol, classes, shot)
            for classes in CLASSES
            for shot in config.protocol.shots
        }

    def _sample(self, protocol: ProtocolConfig, classes: str, shot: int) -> Episodes:
        try:
            return sample_episodes(
                self.test_images[classes].labels,
                protocol.episodes,
                way=protocol.way,
                shot=shot,
                queries=protocol.queries,
                generator=derive_generator(self.seed, _EPISODES, CLASSES.index(classes), shot),
            )
        except ValueError as error:
            raise ValueError(f"{classes} classes: {error}") from error


def _plain(config: MarginSweepConfig, device: torch.device) -> dict[str, Any]:
    """The settings as JSON gives them back, without the one margin that the sweep overrides."""
    values = json.loads(json.dumps(asdict(config)))
    del values["pretraining"]["margin"]
    return {**values, "device": device.type}


def _check_same_run(earlier: SweepResults, now: SweepResults, output: Path) -> None:
    before, after = ({**r.config, **r.versions, "margins": None, "runs": None} for r in (earlier, now))
    # A setting that the earlier results are older than had its default.
    default = asdict(PreTrainingConfig())
    del default["margin"]
    before["pretraining"] = default | before["pretraining"]
    check_same_settings(before, after, output)


def _summary(run: int, margin: float, results: SweepResults) -> str:
    cells = (
        f"{row.classes} {row.shot}-shot {row.per_episode().mean().item():.2f}"
        for row in results.accuracies
        if (row.run, row.margin) == (run, margin)
    )
    return f"run {run}, margin {margin:+g}: {', '.join(cells)}"
