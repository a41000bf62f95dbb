"""Metric trainings of a sweep: each in a folder of its own, found again by its settings, as a task for any process."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fewshot_ext._validation import check_choice, check_count, check_positive, plain_numbers
from fewshot_ext.data import ImageArchive, Split
from fewshot_ext.experiments.runs import folder_name
from fewshot_ext.experiments.sweep_task import SweepTask, load_once
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


@dataclass(frozen=True, order=True)
class Arm:
    """What a training adds to its loss: the Anti-Collapse term of one variant and weight, or nothing.

    Args:
        variant: "pair", "batch_proxy" or "all_proxy"; "none" without the term.
        weight: of the penalty; 0 without the term.
    """

    variant: str = NO_ANTI_COLLAPSE
    weight: float = 0.0

    @property
    def title(self) -> str:
        """What tables and pictures call it.

        Example:
            >>> Arm().title, Arm("pair", 0.1).title
            ('without', 'Anti-Collapse pair 0.1')
        """
        return f"Anti-Collapse {self.variant} {self.weight:g}" if self.weight else "without"


WITHOUT = Arm()


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
        plain_numbers(self)
        check_count("seed", self.seed, 0)

    @property
    def arm(self) -> Arm:
        """What it adds to its loss."""
        term = self.training.anti_collapse
        return WITHOUT if term.variant == NO_ANTI_COLLAPSE else Arm(term.variant, term.weight)

    @property
    def name(self) -> str:
        """Loss, arm and seed in words."""
        return ", ".join([LOSS_TITLES[self.training.loss], self.arm.title, f"seed {self.seed}"])

    @property
    def labels(self) -> dict[str, Any]:
        """The columns of a results table that say which run a row belongs to."""
        return {"loss": self.training.loss, **asdict(self.arm), "seed": self.seed}

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
        """Where the run lives below ``runs``, see ``folder_name``."""
        arm = f"{self.arm.variant}{self.arm.weight:g}" if self.arm.weight else "without"
        default = json.loads(json.dumps(asdict(MetricTrainingConfig())))
        name = f"{self.training.loss}_{arm}_seed{self.seed}"
        return runs / folder_name(name, self.settings(checksum), {"training": default})


def metric_runs(
    data: str,
    training: MetricTrainingConfig,
    losses: Sequence[str],
    seeds: Sequence[int],
    *,
    pair_weights: Sequence[float] = (0.1,),
    proxy_weights: Sequence[float] = (1.0,),
    proxy_variant: str = "batch_proxy",
    proxy_pair_weights: Sequence[float] = (),
) -> list[MetricRun]:
    """The runs of a sweep, seed by seed, each loss without the term and with it at every weight.

    Args:
        data: image set, as ``load_images`` takes it.
        training: settings of every run, but for the loss, and the variant and weight of the term.
        losses: of ``MetricTrainingConfig``.
        seeds: each repeats all runs.
        pair_weights: of the penalty for losses that compare images, which then spreads the embeddings; above 0.
        proxy_weights: of the penalty for losses that have proxies, above 0.
        proxy_variant: which proxies it spreads there, "batch_proxy" or "all_proxy".
        proxy_pair_weights: of the penalty that spreads the embeddings of a loss with proxies, above 0; an arm each,
            beside those of ``proxy_weights``.

    Raises:
        ValueError: no losses, weights or seeds, one given twice, or a value that the settings do not take.

    Example:
        >>> [run.name for run in metric_runs("digits", MetricTrainingConfig(), ["triplet"], [0])]
        ['triplet, without, seed 0', 'triplet, Anti-Collapse pair 0.1, seed 0']
    """
    weights = {"pair_weights": pair_weights, "proxy_weights": proxy_weights}
    check_choice("proxy_variant", proxy_variant, "batch_proxy", "all_proxy")
    for name, values in {"losses": losses, "seeds": seeds, **weights}.items():
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name}: expected at least one, and none twice, got {list(values)}")
    weights["proxy_pair_weights"] = proxy_pair_weights
    if len(set(proxy_pair_weights)) < len(proxy_pair_weights):
        raise ValueError(f"proxy_pair_weights: expected none twice, got {list(proxy_pair_weights)}")
    for name, values in weights.items():
        for weight in values:
            check_positive(name, weight)
    plain = replace(training.anti_collapse, variant=NO_ANTI_COLLAPSE)
    of_pairs = [Arm("pair", weight) for weight in pair_weights]
    of_proxies = [Arm(proxy_variant, weight) for weight in proxy_weights]
    of_proxies += [Arm("pair", weight) for weight in proxy_pair_weights]
    runs = []
    for seed in seeds:
        for loss in losses:
            terms = [replace(plain, **asdict(arm)) for arm in (of_proxies if loss in PROXY_LOSSES else of_pairs)]
            for term in (plain, *terms):
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


class TrainEmbedding(SweepTask):
    """The task of one run, a ``MetricRun``: train it where that is not done; what it measured on the way is the result.

    Returns (a call):
        The rows of ``EmbeddingHistory``.
    """

    @property
    def work(self) -> int:
        """Epochs to train."""
        return 0 if self.is_trained else self.run.training.epochs

    def rows(self) -> list[dict[str, Any]] | None:
        return self._record["rows"] if self.is_trained else None

    def _do(self, report: Callable[..., None]) -> list[dict[str, Any]]:
        from fewshot_ext.training import MetricTrainingRun

        if not self.is_trained:
            sets = class_sets(load_once(self.run.data, self._checksum))
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
            self._write_record("pytorch-metric-learning", rows=training.history.rows)
        return self.rows()
