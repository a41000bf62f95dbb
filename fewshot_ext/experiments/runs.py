"""One training run of a sweep: what decides it, and which of the images are for what."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fewshot_ext._random import derive_generator
from fewshot_ext._validation import check_count, plain_numbers
from fewshot_ext.data import ImageArchive, Split
from fewshot_ext.training import PreTrainingConfig

# Sets of classes that a run can be measured on. "base" are images of base classes that no run has trained on.
CLASSES = ("base", "validation", "novel")

# Part of the key that `derive_seed` makes independent seeds of, after the seed of the run.
_HOLD_OUT = 1

# Neither how often a checkpoint is written nor how validation chooses one has a part in the last weights.
_WITHOUT_EFFECT = ("checkpoint_epochs", "validation")


@dataclass(frozen=True)
class SweepRun:
    """One training run of a sweep.

    Args:
        data: image set, as ``load_images`` takes it.
        pretraining: its settings.
        seed: decides the held-out images, the initial weights, batches, augmentation and episodes.
        held_out: share of each base class's images that is kept from training; without effect where the image set
            itself holds some out.
        variant: what an analysis calls it beside loss, margin and seed; no part of what is trained.

    Raises:
        ValueError: a negative seed, or a share outside (0, 1).
    """

    data: str
    pretraining: PreTrainingConfig
    seed: int = 0
    held_out: float = 0.2
    variant: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_count("seed", self.seed, 0)
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out: expected a number in (0, 1), got {self.held_out}")

    @property
    def name(self) -> str:
        """Loss, margin and seed in words, or variant and seed where there is a variant."""
        config = self.pretraining
        parts = [self.variant] if self.variant else [config.loss, f"margin {config.margin:+g}"]
        return ", ".join([*parts, f"seed {self.seed}"])

    @property
    def labels(self) -> dict[str, Any]:
        """The columns of a results table that say which run a row belongs to."""
        config = self.pretraining
        variant = {"variant": self.variant} if self.variant else {}
        return {**variant, "loss": config.loss, "margin": config.margin, "seed": self.seed}

    def settings(self, checksum: str) -> dict[str, Any]:
        """Everything that decides the weights, in plain JSON types.

        Args:
            checksum: of the image set.
        """
        return {
            "data": checksum,
            "pretraining": _plain(self.pretraining),
            "seed": self.seed,
            "held_out": self.held_out,
        }

    def folder(self, runs: Path, checksum: str) -> Path:
        """Where the run lives below ``runs``, see ``folder_name``."""
        name = f"{self.pretraining.loss}_margin{self.pretraining.margin:+g}_seed{self.seed}"
        return runs / folder_name(name, self.settings(checksum), {"pretraining": _plain(PreTrainingConfig())})


def _plain(config: PreTrainingConfig) -> dict[str, Any]:
    """What decides the weights, as version 0.1 has it, whose runs are then found."""
    plain = json.loads(json.dumps(asdict(config)))
    for name in _WITHOUT_EFFECT:
        del plain[name]
    plain["similarity"] = config.loss
    if plain["backbone"]["pooled_blocks"] is None:
        plain["backbone"]["pooled_blocks"] = 4
    return plain


@dataclass(frozen=True)
class SweepImages:
    """The images of one run, parted by what they are for.

    Attributes:
        training: of the base classes.
        test: by name of the set of classes; "base" holds images of the same classes as ``training``.
    """

    training: ImageArchive
    test: Mapping[str, ImageArchive]

    @classmethod
    def part(cls, archive: ImageArchive, run: SweepRun) -> "SweepImages":
        """Holds out images of every base class: those that the image set says, or else some by the run's seed.

        Raises:
            ValueError: no base or no novel classes, or a base class with too few images to hold out some.
        """
        training = archive.subset(Split.BASE)
        if archive.has_held_out:
            held_out = archive.subset(Split.BASE, held_out=True)
        else:
            training, held_out = training.hold_out(run.held_out, derive_generator(run.seed, _HOLD_OUT))
        test = {"base": held_out}
        if (archive.class_split == Split.VALIDATION).any():
            test["validation"] = archive.subset(Split.VALIDATION)
        return cls(training, {**test, "novel": archive.subset(Split.NOVEL)})


def folder_name(name: str, settings: Mapping[str, Any], default: Mapping[str, Any]) -> str:
    """The name of a run's folder: for a person to find, and by a hash of its settings.

    Settings that have their default stay out of the hash, so that runs are still found once a release knows more
    settings; ``run.json`` holds all of them and is compared before a run is taken over.

    Args:
        name: what a person looks for.
        settings: everything that decides the run.
        default: of some of the settings.
    """
    told = {key: without_defaults(value, default[key]) if key in default else value for key, value in settings.items()}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    return f"{name}_{digest[:12]}"


def without_defaults(values: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that differ from their default, nested ones likewise."""
    kept = {}
    for key, value in values.items():
        if isinstance(value, dict):
            value = without_defaults(value, default[key])
            if value:
                kept[key] = value
        elif value != default[key]:
            kept[key] = value
    return kept
