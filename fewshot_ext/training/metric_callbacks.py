"""The Lightning callback that measures a metric training: retrieval, coding rate and spectrum over the epochs."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from fewshot_ext._extras import require
from fewshot_ext._files import replace_text
from fewshot_ext._random import derive_generator
from fewshot_ext.data import ImageArchive
from fewshot_ext.evaluation import csv_of_rows, extract_features, json_with_rows
from fewshot_ext.retrieval import check_retrieval, clustering_metrics, measure_spread, retrieval_metrics
from fewshot_ext.training.callbacks import BestCheckpoint
from fewshot_ext.training.metric_config import MeasurementConfig

HISTORY = "history"

# Part of the key that makes the seed of the draw of seen images of the run's.
_SEEN = 1


class EmbeddingHistory(BestCheckpoint):
    """Measures the embeddings of seen, validation and unseen classes; Recall@1 on the second chooses the best epoch.

    Every measurement is a line of ``history.json`` and ``history.csv`` and a point in the TensorBoard log. The queries
    of a set that marks them (``ImageArchive.is_query``) are searched among its other images alone, and clusters, coding
    rate and spectrum are those of the queries, as in ``fewshot-ext retrieve``. Each seen image is searched among all
    others.

    Args:
        config: see ``MeasurementConfig``.
        sets: images by name, "seen", "validation" or "unseen".
        directory: receives the files.
        best: path of the best checkpoint.
        seed: decides which of the seen images are measured.

    Attributes:
        rows: one a measurement and set of classes, with columns epoch, classes, images, recall_at_K, map_at_r,
            r_precision, map_at_K, nmi and f1 where they are asked for, coding_rate, effective_rank, spectral_decay and
            spectrum; a checkpoint carries them.

    Raises:
        ValueError: a class with a single image, or a K larger than the neighbors that an image has; the message
            names the set.
    """

    def __init__(
        self, config: MeasurementConfig, sets: Mapping[str, ImageArchive], directory: Path, best: Path, seed: int
    ) -> None:
        super().__init__(config.epochs, best)
        if config.clusters:
            require("metric", "sklearn")
        self.config, self.directory = config, directory
        self.sets: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {}
        for name, archive in sets.items():
            chosen, is_query = slice(None), None
            try:
                if name == "seen":
                    chosen = evenly(archive.labels, config.seen_images, derive_generator(seed, _SEEN))
                else:
                    is_query = archive.is_query
                images, labels = archive[chosen]
                check_retrieval(*_parted(labels, is_query), ks=config.ks)
            except ValueError as error:
                raise ValueError(f"{name} classes, {len(archive.labels[chosen])} images: {error}") from error
            self.sets[name] = images, labels, is_query
        self.rows: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.rows = list(state_dict["rows"])

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.accuracy = None
        if not self.is_due(trainer):
            return
        epoch = trainer.current_epoch + 1
        found = {name: self._measure(module, name, epoch) for name in self.sets}
        self.rows += found.values()
        for name, row in found.items():
            for key, value in row.items():
                if isinstance(value, float):
                    module.log(f"{name}/{key}", value)
            module.logger.experiment.add_histogram(f"{name}/spectrum", torch.tensor(row["spectrum"]), epoch)
        if "validation" in found:
            self.keep_best(trainer, found["validation"][f"recall_at_{min(self.config.ks)}"])
        self.write()

    def write(self) -> None:
        """Writes ``history.json`` and ``history.csv``, each whole or not at all."""
        replace_text(self.directory / f"{HISTORY}.json", json_with_rows(asdict(self.config), {"rows": self.rows}))
        replace_text(self.directory / f"{HISTORY}.csv", csv_of_rows(self.rows))

    def _measure(self, module: pl.LightningModule, name: str, epoch: int) -> dict[str, Any]:
        images, labels, is_query = self.sets[name]
        embeddings = extract_features(module, images)
        if not embeddings.isfinite().all():
            raise FloatingPointError(
                f"embeddings of {name} classes are not finite after epoch {epoch}: take a smaller learning_rate"
            )
        parts = [_parted(values, is_query) for values in (embeddings, labels.to(embeddings.device))]
        pairs, config = [values for pair in zip(*parts, strict=True) for values in pair], self.config
        found = retrieval_metrics(*pairs, ks=config.ks, map_ks=config.map_ks).row()
        if config.clusters:
            found |= clustering_metrics(*pairs[:2])._asdict()
        spread = measure_spread(pairs[0], config.eps)
        return {"epoch": epoch, "classes": name, "images": len(images), **found, **spread.row()}


def _parted(values: Tensor, is_query: Tensor | None) -> tuple[Tensor, ...]:
    """Those of the queries and those of the gallery, or all of them where no image is a query."""
    if is_query is None:
        return (values,)
    is_query = is_query.to(values.device)
    return values[is_query], values[~is_query]


def evenly(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """At most ``count`` indices, from each class as many as from the next or all that it has, and at least two.

    Args:
        labels: ``[N]`` int64.
        count: as many as wanted.
        generator: decides which; a CPU generator.

    Returns:
        Indices in rising order.

    Example:
        >>> labels = torch.tensor([0, 0, 0, 0, 1, 1, 1])
        >>> labels[evenly(labels, 5, torch.Generator())]
        tensor([0, 0, 1, 1])
    """
    if len(labels) <= count:
        return torch.arange(len(labels))
    order = torch.randperm(len(labels), generator=generator)
    order = order[labels[order].argsort(stable=True)]
    sizes = labels.bincount()
    rank = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes)[labels[order]]
    share = max(2, count // int((sizes > 0).sum()))
    return order[rank < share].sort().values
