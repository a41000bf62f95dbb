"""Backbones and heads compared on the same few-shot episodes."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fewshot_ext import _extras
from fewshot_ext._checks import check_at_least, check_choice
from fewshot_ext._progress import StagedProgress
from fewshot_ext._random import derive_generator, derive_seed
from fewshot_ext._record import versions
from fewshot_ext.data import Episodes, ImageArchive, Split, sample_episodes
from fewshot_ext.evaluation.backbones import FrozenBackbone
from fewshot_ext.evaluation.features import FeatureCache
from fewshot_ext.evaluation.heads import FineTuning, FineTuningConfig, Head, find_head
from fewshot_ext.evaluation.protocol import ProtocolConfig, episode_accuracies, extract_features
from fewshot_ext.evaluation.results import ComparisonResults, HeadAccuracy

# Second entries of the keys that `derive_seed` makes independent seeds of, after the seed of the run.
_EPISODES, _HEAD = 1, 2


@dataclass(frozen=True)
class ComparisonConfig:
    """What is measured.

    Args:
        heads: names in ``HEADS``.
        split: the classes that episodes are drawn from: "base", "validation" or "novel".
        seed: decides episodes, initial classifiers and the order of the passes, the same for all backbones.
        batch_size: images a forward pass.
        protocol: see ``ProtocolConfig``.
        finetuning: settings of the head "finetune"; see ``FineTuningConfig``.

    Raises:
        ValueError: no heads, an unknown one or one given twice, an unknown split, a negative seed, a batch size
            below 1.
    """

    heads: tuple[str, ...] = ("finetune",)
    split: Literal["base", "validation", "novel"] = "novel"
    seed: int = 0
    batch_size: int = 256
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    finetuning: FineTuningConfig = field(default_factory=FineTuningConfig)

    def __post_init__(self) -> None:
        if not self.heads or len(set(self.heads)) < len(self.heads):
            raise ValueError(f"heads must name at least one head, and none twice, got {list(self.heads)}")
        for head in self.heads:
            find_head(head)
        check_choice("split", self.split, "base", "validation", "novel")
        check_at_least("seed", self.seed, 0)
        check_at_least("batch_size", self.batch_size, 1)


class Comparison:
    """Measures every head on the features of every backbone, all on the same episodes.

    Everything that can be wrong with the settings is found here, before the first image goes through a backbone.

    Args:
        config: see ``ComparisonConfig``.
        archive: images with classes of the split; base classes too where a head needs their mean.
        backbones: at least one, names all different; differences are taken to the first. Features are kept only
            for one with a ``sha256``.
        data_name: what the table calls the image set.
        device: "cpu" or "cuda".
        cache: where features are kept; nowhere by default.

    Raises:
        ImportError: tqdm is missing.
        ValueError: no backbones or two of one name, no classes of the split, too few classes or images for the
            protocol (the smallest class is named), a backbone that does not take these images or whose features
            are not finite, or a head that needs base classes where there are none.

    Example:
        >>> from fewshot_ext.data import load_digits
        >>> config = ComparisonConfig(("protonet",), protocol=ProtocolConfig(episodes=20, shots=(1,)))
        >>> pixels = FrozenBackbone("pixels", torch.nn.Flatten())
        >>> results = Comparison(config, load_digits(), [pixels], data_name="digits").run()
        >>> len(results.find("pixels", "protonet", shot=1).correct)
        20
    """

    def __init__(
        self,
        config: ComparisonConfig,
        archive: ImageArchive,
        backbones: Sequence[FrozenBackbone],
        *,
        data_name: str,
        device: torch.device | str = "cpu",
        cache: FeatureCache | None = None,
    ) -> None:
        _extras.require("train", "tqdm")
        self.config, self.backbones, self.device = config, list(backbones), torch.device(device)
        self.cache = cache or FeatureCache(None)
        names = [backbone.name for backbone in self.backbones]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"backbones must be at least one, with names all different, got {names}")
        self.images = archive.subset(Split[config.split.upper()])
        self.episodes = {shot: self._sample(shot, data_name) for shot in config.protocol.shots}
        self.base_images = self._base_images(archive, data_name)
        for backbone in self.backbones:
            check_takes(backbone, archive.images[:1], self.device, data_name)
        self._checksum = archive.checksum()
        self.results = ComparisonResults(
            config={
                **json.loads(json.dumps(asdict(config))),
                "head_settings": {name: asdict(find_head(name)) for name in config.heads if name != "finetune"},
                "device": self.device.type,
            },
            versions=versions("torch", "numpy"),
            data={
                "name": data_name,
                "sha256": self._checksum,
                "split": config.split,
                "classes": self.images.num_classes,
                "images": len(self.images),
            },
            backbones=[
                {"name": b.name, "similarity": b.similarity, "sha256": b.sha256, "path": b.path} for b in self.backbones
            ],
            way=config.protocol.way,
        )

    def run(self, output: str | Path | None = None) -> ComparisonResults:
        """Measures everything, with a progress bar on a terminal.

        Args:
            output: existing folder that receives the results, again after every backbone.

        Returns:
            ``results``.

        Raises:
            KeyboardInterrupt: Ctrl-C. ``results`` and the files then hold the backbones finished before.
        """
        self._write(output)
        with StagedProgress("backbones", len(self.backbones)) as progress:
            for backbone in self.backbones:
                rows = self._measure(backbone, progress)
                self.results.accuracies += rows
                self._write(output)
                cells = (f"{row.head} {row.shot}-shot {row.per_episode().mean().item():.2f}" for row in rows)
                progress.finish(f"{backbone.name}: {', '.join(cells)}")
        return self.results

    def _write(self, output: str | Path | None) -> None:
        if output is not None:
            self.results.write(Path(output))

    def _measure(self, backbone: FrozenBackbone, progress: StagedProgress) -> list[HeadAccuracy]:
        config = self.config
        features = self._features(backbone, self.images, config.split, progress)
        base_mean = None
        if self.base_images is not None:
            base_mean = self._features(backbone, self.base_images, "base", progress).mean(0)
        rows, done = [], 0
        total = len(config.heads) * len(self.episodes) * config.protocol.episodes
        with progress.stage(f"{backbone.name}: episodes", total) as report:
            for name in config.heads:
                for shot, episodes in self.episodes.items():
                    accuracies = episode_accuracies(
                        features,
                        episodes,
                        head=self._head(name, backbone),
                        base_mean=base_mean,
                        seed=derive_seed(config.seed, _HEAD, shot),
                        on_progress=lambda count, before=done: report(before + count),
                    )
                    done += len(episodes)
                    queries = episodes.query[0].numel()
                    correct = tuple((accuracies * queries).round().long().tolist())
                    rows.append(HeadAccuracy(backbone.name, name, shot, correct, queries))
        return rows

    def _features(
        self, backbone: FrozenBackbone, archive: ImageArchive, split: str, progress: StagedProgress
    ) -> Tensor:
        key = {
            "split": split,
            "checkpoint": backbone.sha256 or "",
            "data": self._checksum,
            "device": self.device.type,
            **{name: self.results.versions[name] for name in ("fewshot_ext", "torch")},
        }
        kept = self.cache.load(key) if backbone.sha256 else None
        if kept is not None and len(kept) == len(archive):
            return kept.to(self.device)
        with progress.stage(f"{backbone.name}: features of {split} classes", len(archive)) as report:
            features = extract_features(
                backbone.module.to(self.device),
                archive.images,
                batch_size=self.config.batch_size,
                on_progress=report,
            )
        if backbone.sha256:
            try:
                self.cache.save(key, features)
            except OSError as error:
                warnings.warn(f"features of {backbone.name} are not kept for the next run: {error}", stacklevel=2)
        return features

    def _head(self, name: str, backbone: FrozenBackbone) -> Head:
        if name == "finetune":
            return FineTuning.from_config(self.config.finetuning, backbone.similarity)
        return find_head(name)

    def _sample(self, shot: int, data_name: str) -> Episodes:
        protocol, where = self.config.protocol, f"the {self.config.split} classes of {data_name}"
        counts = self.images.labels.bincount(minlength=self.images.num_classes)
        smallest = counts.argmin().item()
        if counts[smallest] < shot + protocol.queries:
            raise ValueError(
                f"{shot} shots and {protocol.queries} queries need {shot + protocol.queries} images a class, but of "
                f"{where} {self.images.class_names[smallest]!r} has {counts[smallest].item()}"
            )
        try:
            return sample_episodes(
                self.images.labels,
                protocol.episodes,
                way=protocol.way,
                shot=shot,
                queries=protocol.queries,
                generator=derive_generator(self.config.seed, _EPISODES, shot),
            )
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def _base_images(self, archive: ImageArchive, data_name: str) -> ImageArchive | None:
        needy = [name for name in self.config.heads if find_head(name).needs_base_mean]
        if not needy:
            return None
        if not (archive.class_split == Split.BASE).any():
            raise ValueError(f"heads: {needy[0]} needs the mean feature of the base classes, and {data_name} has none")
        return archive.subset(Split.BASE)


def check_takes(backbone: FrozenBackbone, image: Tensor, device: torch.device, data_name: str) -> None:
    """Sends one image through: what does not fit, channels, size or diverged weights, shows there and no sooner.

    Args:
        backbone: is moved to ``device``.
        image: ``[1, C, H, W]`` uint8.
        device: where it will run.
        data_name: what messages call the images.

    Raises:
        ValueError: the backbone does not take the image, or makes no features ``[1, D]`` of finite numbers of it.
    """
    shape = "x".join(map(str, image.shape[1:]))
    try:
        features = extract_features(backbone.module.to(device), image)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"backbone {backbone.name} does not take the {shape} images of {data_name}: {error}"
        ) from error
    if features.dim() != 2:
        raise ValueError(f"backbone {backbone.name} must give features [B, D], got {list(features.shape)}")
    if not features.isfinite().all():
        raise ValueError(f"backbone {backbone.name} gives features that are not finite: its training has diverged")
