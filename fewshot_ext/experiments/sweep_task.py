"""Training a run and measuring it, as a task that any process can do."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from fewshot_ext._files import alone_in, replace_file
from fewshot_ext._formats import check_schema, misfits_named, read_json
from fewshot_ext._record import check_same_settings, versions
from fewshot_ext.data import ImageArchive
from fewshot_ext.data.named import open_images
from fewshot_ext.experiments.measurements import Measurement, TrainedRun
from fewshot_ext.experiments.runs import SweepImages, SweepRun

RECORD = "run.json"
_ROWS = [{str: object}]


class SweepTask(ABC):
    """One run of a sweep in a folder of its own, as a task that any process can do.

    Args:
        run: see ``SweepRun`` or ``MetricRun``.
        runs: folder of all runs.
        checksum: of the image set.
        device: "cpu" or "cuda".

    Returns (a call):
        The rows of ``rows``.
    """

    prefix = ""  # of the name, where a sweep has several image sets

    def __init__(self, run: Any, runs: Path, checksum: str, device: str = "cpu") -> None:
        self.run, self.device = run, device
        self.folder = run.folder(runs, checksum)
        self._checksum = checksum

    @property
    def name(self) -> str:
        return self.prefix + self.run.name

    @property
    @abstractmethod
    def work(self) -> int:
        """Epochs, or what takes about as long, that are left to do."""

    @property
    def is_trained(self) -> bool:
        return (self.folder / RECORD).exists()

    @abstractmethod
    def rows(self) -> list[dict[str, Any]] | None:
        """What was measured before, None where that is not finished."""

    def check_record(self) -> None:
        """Raises ValueError where the run in the folder was trained with other settings after all."""
        if self.is_trained:
            check_same_settings(self._record["settings"], self.run.settings(self._checksum), self.folder)

    def __call__(self, report: Callable[..., None]) -> list[dict[str, Any]]:
        """Does what is left to do; ``report`` takes the epochs done so far and a remark."""
        # Not what they lie in, for that was removed if it is gone.
        for folder in (self.folder.parent, self.folder):
            folder.mkdir(exist_ok=True)
        # A cluster gives a run to a second worker where the first one is only out of reach, and still writes there.
        with alone_in(self.folder):
            return self._do(report)

    @abstractmethod
    def _do(self, report: Callable[..., None]) -> list[dict[str, Any]]:
        """Does what is left to do, alone in the run's folder."""

    @property
    def _record(self) -> dict[str, Any]:
        return read_json(self.folder / RECORD, {"settings": dict, "rows?": _ROWS}, "the record of a run")

    def _write_record(self, *packages: str, **results: Any) -> None:
        """Marks the run as trained; ``packages`` are those whose versions its weights depend on."""
        record = {
            "name": self.run.name,
            "settings": self.run.settings(self._checksum),
            **results,
            "versions": versions("torch", "numpy", "lightning", *packages),
        }
        write_json(self.folder / RECORD, record)


class TrainAndMeasure(SweepTask):
    """The task of one run: train it where that is not done, then measure it where that is not done.

    Args:
        run: see ``SweepRun``.
        runs: folder of all runs.
        checksum: of the image set.
        measurement: what is measured; nothing where None.
        device: "cpu" or "cuda".

    Returns (a call):
        The rows of the measurement.
    """

    def __init__(
        self, run: SweepRun, runs: Path, checksum: str, measurement: Measurement | None = None, device: str = "cpu"
    ) -> None:
        super().__init__(run, runs, checksum, device)
        self.measurement = measurement

    @property
    def work(self) -> int:
        """Epochs to train, and one for what is measured."""
        trained = 0 if self.is_trained else self.run.pretraining.epochs
        return trained + (self.measurement is not None and self.rows() is None)

    @property
    def checkpoint(self) -> Path:
        """The weights after the last epoch."""
        return self.folder / "last.ckpt"

    def rows(self) -> list[dict[str, Any]] | None:
        """What was measured before, None where nothing was."""
        if self.measurement is None:
            return []
        path = self._measured
        if not (self.is_trained and path.exists()):
            return None
        return read_json(path, [getattr(self.measurement, "row_schema", {str: object})], "measurements of a run")

    def check_record(self) -> None:
        if self.is_trained:
            before, now = self._record["settings"], self.run.settings(self._checksum)
            with misfits_named(f"{self.folder / RECORD} does not hold the record of a run"):
                check_schema(before, {"pretraining": {str: object}}, "settings")
            # What only one of two releases knows had its default in the other.
            common = before["pretraining"].keys() & now["pretraining"].keys()
            for settings in (before, now):
                settings["pretraining"] = {key: settings["pretraining"][key] for key in common}
            check_same_settings(before, now, self.folder)
            self.rows()  # what cannot be read is found before the work

    def _do(self, report: Callable[..., None]) -> list[dict[str, Any]]:
        images = SweepImages.part(load_once(self.run.data, self._checksum), self.run)
        epochs = 0
        if not self.is_trained:
            epochs = self.run.pretraining.epochs
            self._train(images, report)
        rows = self.rows()
        if rows is None:
            trained = TrainedRun(self.run, self.checkpoint, images, self.device)
            rows = self.measurement(trained, lambda remark: report(epochs, remark))
            write_json(self._measured, rows)
        return rows

    @property
    def _measured(self) -> Path:
        text = json.dumps(self.measurement.settings(), sort_keys=True)
        return self.folder / f"{self.measurement.name}_{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"

    def _train(self, images: SweepImages, report: Callable[..., None]) -> None:
        from fewshot_ext.training import PreTrainingRun

        training = PreTrainingRun(
            self.run.pretraining,
            images.training,
            self.folder,
            seed=self.run.seed,
            device=self.device,
            resume=True,
            on_epoch=lambda epochs, loss: report(epochs, f"epoch {epochs}, loss {loss:.4f}"),
        )
        training.train()
        self._write_record("kornia", results=training.results())


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    text = json.dumps(content) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


@lru_cache(maxsize=1)
def load_once(data: str, checksum: str) -> ImageArchive:
    """The image set, read once a process; the checksum guards against another file under the same name."""
    archive = open_images(data)
    if archive.checksum() != checksum:
        raise ValueError(f"data {data} has changed since the sweep was planned")
    return archive
