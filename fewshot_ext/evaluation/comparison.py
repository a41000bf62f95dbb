"""Backbones and heads compared on the same few-shot episodes."""

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fewshot_ext import _extras
from fewshot_ext._progress import StagedProgress
from fewshot_ext._random import derive_generator, derive_seed
from fewshot_ext._record import versions
from fewshot_ext._validation import check_choice, check_count, check_positive
from fewshot_ext.data import Episodes, ImageArchive, Split, sample_episodes
from fewshot_ext.data.resampling import PICTURES
from fewshot_ext.evaluation.backbones import FrozenBackbone
from fewshot_ext.evaluation.calibration import calibration_measures, fit_temperature
from fewshot_ext.evaluation.features import FeatureCache
from fewshot_ext.evaluation.open_set import open_set_measures
from fewshot_ext.evaluation.protocol import (
    ProtocolConfig,
    check_map_memory,
    episode_scores,
    extract_features,
    query_target,
)
from fewshot_ext.evaluation.results import ComparisonResults, HeadAccuracy
from fewshot_ext.heads.maps import DeepEMDHead
from fewshot_ext.heads.names import (
    HeadChoice,
    HeadSettings,
    choose_head,
    crops_an_image,
    features_record,
)
from fewshot_ext.heads.vectors import FineTuningConfig
from fewshot_ext.models import LocalFeaturesConfig

# Second entries of the keys that `derive_seed` makes independent seeds of, after the seed of the run.
_EPISODES, _HEAD = 1, 2


@dataclass(frozen=True)
class ComparisonConfig:
    """What is measured.

    Args:
        heads: names as ``choose_head`` takes them, of heads for feature vectors and for maps.
        split: the classes that episodes are drawn from: "base", "validation" or "novel".
        seed: decides episodes, initial classifiers and the order of the passes, the same for all backbones.
        batch_size: images a forward pass.
        protocol: see ``ProtocolConfig``.
        finetuning: settings of the head "finetune"; see ``FineTuningConfig``.
        deepemd: settings of the heads that begin with "deepemd"; see ``HeadSettings``.
        local_features: the regions that heads for maps look at; see ``LocalFeaturesConfig``.
        map_dtype: "float32" or "float16", in which the maps of all images are kept; heads compute in float32.
        map_memory: most that the maps of all images may take, in GiB; one kind of map is kept at a time.
        temperature: divides the logits of every head before the softmax; it decides how far the probabilities are from
            calibrated and nothing else.

    Raises:
        ValueError: no heads, an unknown one or one given twice, maps for a head that takes vectors, an unknown split or
            dtype, a negative seed, a batch size below 1, no memory, a temperature not above 0.
    """

    heads: tuple[str, ...] = ("finetune",)
    split: Literal["base", "validation", "novel"] = "novel"
    seed: int = 0
    batch_size: int = 256
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    finetuning: FineTuningConfig = field(default_factory=FineTuningConfig)
    deepemd: DeepEMDHead = field(default_factory=DeepEMDHead)
    local_features: LocalFeaturesConfig = field(default_factory=LocalFeaturesConfig)
    map_dtype: Literal["float32", "float16"] = "float32"
    map_memory: float = 4.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.heads or len(set(self.heads)) < len(self.heads):
            raise ValueError(f"heads: expected at least one head, and none twice, got {list(self.heads)}")
        for head in self.heads:
            self.choose(head)
        check_choice("split", self.split, "base", "validation", "novel")
        check_count("seed", self.seed, 0)
        check_count("batch_size", self.batch_size, 1)
        check_choice("map_dtype", self.map_dtype, "float32", "float16")
        check_positive("map_memory", self.map_memory)
        check_positive("temperature", self.temperature)

    def choose(self, name: str, similarity: Literal["cosine", "dot"] = "cosine") -> HeadChoice:
        """The head called ``name`` with these settings; see ``choose_head``."""
        return choose_head(name, HeadSettings(self.finetuning, self.deepemd, self.local_features), similarity)

    def heads_by_features(self) -> dict[LocalFeaturesConfig | None, list[str]]:
        """The heads that share features; None stands for the backbone's feature vectors."""
        groups: dict[LocalFeaturesConfig | None, list[str]] = {}
        for name in self.heads:
            groups.setdefault(self.choose(name).local_features, []).append(name)
        return groups


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
            protocol (the smallest class is named), a backbone that does not take these images, gives no maps where a
            head needs them, or whose features are not finite, maps that are too small for a head or take more than
            ``map_memory``, or a head that needs base classes where there are none.

    Example:
        >>> from fewshot_ext.data import load_digits
        >>> config = ComparisonConfig(("protonet",), protocol=ProtocolConfig(episodes=20, shots=(1,)))
        >>> pixels = FrozenBackbone.open(torch.nn.Flatten())
        >>> results = Comparison(config, load_digits(), [pixels], data_name="digits").run()
        >>> len(results.find("Flatten", "protonet", shot=1).correct)
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
            raise ValueError(f"backbones: expected at least one, with names all different, got {names}")
        # Of base classes the images that no network has seen, where the set holds some out.
        held_out = config.split == "base" and archive.has_held_out
        self.images = archive.subset(Split[config.split.upper()], held_out=held_out)
        self.episodes = {shot: self._sample(shot, data_name) for shot in config.protocol.shots}
        self.base_images = self._base_images(archive, data_name)
        for backbone in self.backbones:
            for local_features, heads in config.heads_by_features().items():
                example = backbone.try_out(archive.images[:1], data_name, local_features, self.device)
                if local_features is not None:
                    self._check_maps(backbone.name, heads, example.shape[1:])
        self._record = archive.record(data_name)
        self._checksum = self._record["sha256"]
        self.results = ComparisonResults(
            config={
                **json.loads(json.dumps(asdict(config))),
                "head_settings": {
                    name: _settings_of(config.choose(name)) for name in config.heads if name != "finetune"
                },
                "device": self.device.type,
            },
            versions=versions("torch", "numpy"),
            data={
                **self._record,
                "split": config.split,
                "classes": self.images.num_classes,
                "images": len(self.images),
            },
            backbones=[
                {"name": b.name, "similarity": b.network.similarity, "sha256": b.sha256, "path": b.path}
                for b in self.backbones
            ],
            way=config.protocol.way,
        )

    def run(self, output: str | Path | None = None) -> ComparisonResults:
        """Measures everything, with a progress bar on a terminal.

        Args:
            output: existing folder that receives the results, again after every head.

        Returns:
            ``results``.

        Raises:
            KeyboardInterrupt: Ctrl-C. ``results`` and the files then hold what was finished before.
        """
        self._write(output)
        with StagedProgress("backbones", len(self.backbones)) as progress:
            for backbone in self.backbones:
                for local_features, heads in self.config.heads_by_features().items():
                    self._measure(backbone, local_features, heads, progress, output)
                rows = [row for row in self.results.accuracies if row.backbone == backbone.name]
                cells = (f"{row.head} {row.shot}-shot {row.per_episode().mean().item():.2f}" for row in rows)
                progress.finish(f"{backbone.name}: {', '.join(cells)}")
        return self.results

    @property
    def finished(self) -> int:
        """How many backbones are measured under every head."""
        rows = [row.backbone for row in self.results.accuracies]
        return sum(rows.count(b.name) == len(self.config.heads) * len(self.episodes) for b in self.backbones)

    def _write(self, output: str | Path | None) -> None:
        if output is not None:
            self.results.write(Path(output))

    def _measure(
        self,
        backbone: FrozenBackbone,
        local_features: LocalFeaturesConfig | None,
        heads: Sequence[str],
        progress: StagedProgress,
        output: str | Path | None,
    ) -> None:
        """Every head on one kind of features, which are gone afterwards: those of several kinds may not fit."""
        config = self.config
        features = self._features(backbone, local_features, self.images, config.split, progress)
        base_mean = None
        if self.base_images is not None and local_features is None:
            base_mean = self._features(backbone, None, self.base_images, "base", progress).mean(0)
        places = [(b.name, head, shot) for b in self.backbones for head in config.heads for shot in self.episodes]
        for name in heads:
            rows, head = [], config.choose(name, backbone.network.similarity).head
            for shot, episodes in self.episodes.items():
                with progress.stage(f"{backbone.name}: {name}, {shot}-shot episodes", len(episodes)) as report:
                    scores = episode_scores(
                        features,
                        episodes,
                        head=head,
                        base_mean=base_mean,
                        seed=derive_seed(config.seed, _HEAD, shot),
                        unknown=config.protocol.open_set,
                        on_progress=report,
                    )
                rows.append(self._row(backbone.name, name, shot, scores, head.scale))
            self.results.accuracies += rows
            self.results.accuracies.sort(key=lambda row: places.index((row.backbone, row.head, row.shot)))
            self._write(output)

    def _row(self, backbone: str, head: str, shot: int, scores: Tensor, scale: float) -> HeadAccuracy:
        everything = query_target(self.episodes[shot])
        further = open_set_measures(scores, everything) if self.config.protocol.open_set else {}
        # All other measures are of the queries that have a class.
        known = everything < scores.shape[-1]
        target, scores = everything[known], scores[:, known]
        logits, correct = scale * scores, (scores.argmax(-1) == target).sum(1)
        measures = calibration_measures(logits, target, self.config.temperature) | further
        fitted = None
        if self.config.split == "validation":
            fitted = fit_temperature(logits, target)
            calibrated = calibration_measures(logits, target, fitted)
            measures |= {f"{name}_at_fitted": value for name, value in calibrated.items()}
        return HeadAccuracy(backbone, head, shot, tuple(correct.tolist()), len(target), measures, fitted)

    def _features(
        self,
        backbone: FrozenBackbone,
        local_features: LocalFeaturesConfig | None,
        archive: ImageArchive,
        split: str,
        progress: StagedProgress,
    ) -> Tensor:
        key = {
            "split": split,
            "pictures": PICTURES,
            "checkpoint": backbone.sha256 or "",
            # Of a checkpoint of other code the file does not tell how images are brought to it.
            "network": hashlib.sha256(
                json.dumps(backbone.network.made_from.get("network"), sort_keys=True).encode()
            ).hexdigest(),
            "data": self._checksum,
            "device": self.device.type,
            **{name: self.results.versions[name] for name in ("fewshot_ext", "torch")},
        }
        module, kind, batch_size, dtype = backbone.network, "features", self.config.batch_size, torch.float32
        if local_features is not None:
            settings = json.dumps(features_record(local_features), sort_keys=True)
            key |= {
                "maps": local_features.name,
                "settings": hashlib.sha256(settings.encode()).hexdigest(),
                "dtype": self.config.map_dtype,
            }
            module, kind = backbone.network.local_features(local_features), f"{local_features.name} maps"
            batch_size = max(1, batch_size // crops_an_image(local_features))
            dtype = getattr(torch, self.config.map_dtype)
        kept = self.cache.load(key) if backbone.sha256 else None
        if kept is not None and len(kept) == len(archive) and kept.dtype == dtype:
            return kept.to(self.device)
        with progress.stage(f"{backbone.name}: {kind} of {split} classes", len(archive)) as report:
            features = extract_features(
                module.to(self.device), archive.images, batch_size=batch_size, dtype=dtype, on_progress=report
            )
        if backbone.sha256:
            try:
                self.cache.save(key, features)
            except OSError as error:
                warnings.warn(f"{kind} of {backbone.name} are not kept for the next run: {error}", stacklevel=2)
        return features

    def _check_maps(self, backbone: str, heads: Sequence[str], shape: Sequence[int]) -> None:
        for name in heads:
            try:
                self.config.choose(name).head.check_regions(shape[0] * min(self.episodes))
            except ValueError as error:
                raise ValueError(f"head {name} on backbone {backbone}: {error}") from error
        dtype, purpose = getattr(torch, self.config.map_dtype), f"head {heads[0]} on backbone {backbone}"
        check_map_memory(self.config.map_memory, len(self.images), shape, dtype, purpose)

    def _sample(self, shot: int, data_name: str) -> Episodes:
        protocol, where = self.config.protocol, f"the {self.config.split} classes of {data_name}"
        counts = self.images.labels.bincount(minlength=self.images.num_classes)
        smallest = counts.argmin().item()
        if counts[smallest] < shot + protocol.queries:
            raise ValueError(
                f"{shot} shots and {protocol.queries} queries need {shot + protocol.queries} images a class, but of "
                f"{where} {self.images.class_names[smallest]!r} has {counts[smallest].item()}"
            )
        if protocol.open_set and len(counts) < protocol.way + protocol.open_set:
            most = max(0, len(counts) - protocol.way)
            raise ValueError(
                f"open_set: expected at most {most}, for {where} are {len(counts)} and way takes {protocol.way} of "
                f"them, got {protocol.open_set}"
            )
        try:
            return sample_episodes(
                self.images.labels,
                protocol.episodes_by_shot[shot],
                way=protocol.way + protocol.open_set,
                shot=shot,
                queries=protocol.queries,
                generator=derive_generator(self.config.seed, _EPISODES, shot),
            )
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def _base_images(self, archive: ImageArchive, data_name: str) -> ImageArchive | None:
        needy = [name for name in self.config.heads if self.config.choose(name).head.needs_base_mean]
        if not needy:
            return None
        if not (archive.class_split == Split.BASE).any():
            raise ValueError(f"heads: {needy[0]} needs the mean feature of the base classes, and {data_name} has none")
        return archive.subset(Split.BASE)


def _settings_of(choice: HeadChoice) -> dict[str, Any]:
    settings = asdict(choice.head)
    return settings if choice.local_features is None else {**settings, "maps": features_record(choice.local_features)}
