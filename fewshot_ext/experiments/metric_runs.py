"""Metric trainings of a sweep: each in a folder of its own, found again by its settings, as a task for any process."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fewshot_ext._checks import check_at_least, check_positive
from fewshot_ext._record import check_same_settings, versions
from fewshot_ext.data import ImageArchive, Split
from fewshot_ext.experiments.runs import without_defaults
from fewshot_ext.experiments.sweep_task import RECORD, load_once, write_json
from fewshot_ext.training import MetricTrainingConfig
from fewshot_ext.training.metric_config import NO_ANTI_COLLAPSE, PROXY_LOSSES

# Neither how often a checkpoint is written nor what is measured has a part in the last weights, but the measurements
# are what the task returns.
_WITHOUT_EFFECT = ("checkpoint_epochs",)

LOSS_TITLES = {
    "proxy_anchor": "ProxyAnchor",
    "proxy_nca": "ProxyNCA",
    "contrastive": "contrastive",
    "triplet": "triplet",
}


@dataclass(frozen=True)
class MetricRun:
    """One metric training of a sweep.

    Args:
        data: image set, as ``load_images`` takes it.
        training: its settings.
        seed: decides the initial weights, batches, augmentation and mined negatives.

    Raises:
        ValueError: a negative seed.
    """

    data: str
    training: MetricTrainingConfig
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least("seed", self.seed, 0)

    @property
    def weight(self) -> float:
        """Of the Anti-Collapse penalty; 0 without it."""
        term = self.training.anti_collapse
        return 0.0 if term.variant == NO_ANTI_COLLAPSE else term.weight

    @property
    def name(self) -> str:
        """Loss, weight and seed in words."""
        return ", ".join([LOSS_TITLES[self.training.loss], arm_title(self.weight), f"seed {self.seed}"])

    @property
    def labels(self) -> dict[str, Any]:
        """The columns of a results table that say which run a row belongs to."""
        return {"loss": self.training.loss, "weight": self.weight, "seed": self.seed}

    def settings(self, checksum: str) -> dict[str, Any]:
        """Everything that decides the weights and what is measured of them, in plain JSON types.

        Args:
            checksum: of the image set.
        """
        config = json.loads(json.dumps(asdict(self.training)))
        for name in _WITHOUT_EFFECT:
            del config[name]
        return {"data": checksum, "training": config, "seed": self.seed}

    def folder(self, runs: Path, checksum: str) -> Path:
        """Where the run lives below ``runs``: named for a person to find, and by a hash of its settings.

        Settings that have their default stay out of the hash, as in ``SweepRun.folder``.
        """
        settings = self.settings(checksum)
        default = json.loads(json.dumps(asdict(MetricTrainingConfig())))
        settings["training"] = without_defaults(settings["training"], default)
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        return runs / f"{self.training.loss}_weight{self.weight:g}_seed{self.seed}_{digest[:12]}"


def arm_title(weight: float) -> str:
    """What tables and pictures call the training with this weight.

    Example:
        >>> arm_title(0.0), arm_title(0.1)
        ('without', 'Anti-Collapse 0.1')
    """
    return f"Anti-Collapse {weight:g}" if weight else "without"


def metric_runs(
    data: str,
    training: MetricTrainingConfig,
    losses: Sequence[str],
    seeds: Sequence[int],
    *,
    pair_weights: Sequence[float] = (0.1,),
    proxy_weights: Sequence[float] = (1.0,),
    proxy_variant: str = "batch_proxy",
) -> list[MetricRun]:
    """The runs of a sweep, seed by seed, each loss without the term and with it at every weight.

    Args:
        data: image set, as ``load_images`` takes it.
        training: settings of every run, but for the loss, and the variant and weight of the term.
        losses: of ``MetricTrainingConfig``.
        seeds: each repeats all runs.
        pair_weights: of the penalty for losses that compare images, which then spreads the embeddings; above 0.
        proxy_weights: of the penalty for losses that have proxies, above 0.
        proxy_variant: what it spreads there, "pair", "batch_proxy" or "all_proxy".

    Raises:
        ValueError: no losses, weights or seeds, one given twice, or a value that the settings do not take.

    Example:
        >>> [run.name for run in metric_runs("digits", MetricTrainingConfig(), ["triplet"], [0])]
        ['triplet, without, seed 0', 'triplet, Anti-Collapse 0.1, seed 0']
    """
    weights = {"pair_weights": pair_weights, "proxy_weights": proxy_weights}
    for name, values in {"losses": losses, "seeds": seeds, **weights}.items():
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name} must name at least one, and none twice, got {list(values)}")
    for name, values in weights.items():
        for weight in values:
            check_positive(name, weight)
    plain = replace(training.anti_collapse, variant=NO_ANTI_COLLAPSE)
    runs = []
    for seed in seeds:
        for loss in losses:
            runs.append(MetricRun(data, replace(training, loss=loss, anti_collapse=plain), seed))
            variant = proxy_variant if loss in PROXY_LOSSES else "pair"
            for weight in proxy_weights if loss in PROXY_LOSSES else pair_weights:
                term = replace(plain, variant=variant, weight=weight)
                runs.append(MetricRun(data, replace(training, loss=loss, anti_collapse=term), seed))
    return runs


def class_sets(archive: ImageArchive) -> Mapping[str, ImageArchive]:
    """The images by what they are for: "seen", "unseen", and "validation" where there is such a class.

    Raises:
        ValueError: no base or no novel classes.
    """
    sets = {"seen": archive.subset(Split.BASE), "unseen": archive.subset(Split.NOVEL)}
    if (archive.class_split == Split.VALIDATION).any():
        sets["validation"] = archive.subset(Split.VALIDATION)
    return sets


class TrainEmbedding:
    """The task of one run: train it where that is not done; what it measured on the way is the result.

    Args:
        run: see ``MetricRun``.
        runs: folder of all runs.
        checksum: of the image set.
        device: "cpu" or "cuda".

    Returns (a call):
        The rows of ``EmbeddingHistory``.
    """

    def __init__(self, run: MetricRun, runs: Path, checksum: str, device: str = "cpu") -> None:
        self.run, self.device = run, device
        self.folder = run.folder(runs, checksum)
        self._checksum = checksum

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def work(self) -> int:
        """Epochs to train."""
        return 0 if self.is_trained else self.run.training.epochs

    @property
    def is_trained(self) -> bool:
        return (self.folder / RECORD).exists()

    def rows(self) -> list[dict[str, Any]] | None:
        """What was measured before, None where the run is not finished."""
        return json.loads((self.folder / RECORD).read_text(encoding="utf-8"))["rows"] if self.is_trained else None

    def check_record(self) -> None:
        """Raises ValueError where the run in the folder was trained with other settings after all."""
        if self.is_trained:
            before = json.loads((self.folder / RECORD).read_text(encoding="utf-8"))["settings"]
            check_same_settings(before, self.run.settings(self._checksum), self.folder)

    def __call__(self, report: Callable[..., None]) -> list[dict[str, Any]]:
        from fewshot_ext.training import MetricTrainingRun

        if not self.is_trained:
            sets = class_sets(load_once(self.run.data, self._checksum))
            self.folder.mkdir(parents=True, exist_ok=True)
            training = MetricTrainingRun(
                self.run.training,
                sets["seen"],
                self.folder,
                validation=sets.get("validation"),
                unseen=sets["unseen"],
                seed=self.run.seed,
                device=self.device,
                resume=True,
                on_epoch=lambda epochs, loss: report(epochs, f"epoch {epochs}, loss {loss:.4f}"),
            )
            training.train()
            record = {
                "name": self.run.name,
                "settings": self.run.settings(self._checksum),
                "rows": training.history.rows,
                "versions": versions("torch", "numpy", "lightning", "pytorch-metric-learning"),
            }
            write_json(self.folder / RECORD, record)
        return self.rows()
