"""Lightning callbacks of a training run: validation, reports, the progress bar."""

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from fewshot_ext._random import derive_generator
from fewshot_ext.data import Episodes, ImageArchive, sample_episodes
from fewshot_ext.evaluation import episode_accuracies, extract_features, mean_and_interval
from fewshot_ext.heads.names import crops_an_image
from fewshot_ext.training.module import ImageTraining

# Part of the key that makes the episodes' seed of the run's.
_EPISODES = 1
_IMAGES_AT_ONCE = 1024
_MAP_BYTES_AT_ONCE = 2**30

# How the progress bar words the means that it has room for.
_WORDS: dict[str, Callable[[float], str]] = {
    "loss": "loss {:.4f}".format,
    "accuracy": lambda share: f"accuracy {100 * share:.1f} %",
    "coding_rate": "coding rate {:.1f} nats".format,
}


class EpochMeans(Callback):
    """Logs means over each epoch's images, and ends a run whose loss is not a number any more.

    Lightning's own means over several processes divide by a rounded count of images.

    Args:
        on_epoch: called with (epochs done, mean loss of the last epoch).
        names: what the training step returns beside "mean_loss", as scalars that are means over its images.

    Attributes:
        means: "loss" and ``names`` over the last epoch; a checkpoint carries them.

    Raises (while training):
        FloatingPointError: the mean loss of an epoch is NaN or infinite. The last checkpoint is from before.
    """

    def __init__(
        self, on_epoch: Callable[[int, float], None] | None = None, names: Sequence[str] = ("accuracy",)
    ) -> None:
        self.on_epoch, self.names = on_epoch, tuple(names)
        self.means: dict[str, float] = {}
        self._sums: Tensor

    def state_dict(self) -> dict[str, Any]:
        return dict(self.means)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.means = dict(state_dict)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.current_epoch and self.on_epoch:
            self.on_epoch(trainer.current_epoch, math.nan)

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._sums = torch.zeros(2 + len(self.names), dtype=torch.float64, device=module.device)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        count, loss = batch[1].numel(), outputs["mean_loss"]
        means = torch.stack([loss, *(outputs[name] for name in self.names), loss.new_ones(())])
        self._sums.add_(means, alpha=count)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._sums = trainer.strategy.reduce(self._sums, reduce_op="sum")
        self.means = self.so_far()
        epoch, loss = trainer.current_epoch + 1, self.means["loss"]
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss of epoch {epoch} is {loss}: take a smaller learning_rate or scale")
        for name, mean in self.means.items():
            module.log(f"train/{name}", mean)
        if self.on_epoch:
            self.on_epoch(epoch, loss)

    def so_far(self) -> dict[str, float]:
        """The means over the running epoch's images in this process; waits for the device."""
        *sums, images = self._sums.tolist()
        return {name: total / images for name, total in zip(("loss", *self.names), sums, strict=True)}


class BestCheckpoint(Callback):
    """Keeps the checkpoint of the epoch with the best accuracy on validation classes; a subclass measures it.

    Args:
        epochs: epochs between two measurements; the last epoch is always measured.
        path: of the best checkpoint.

    Attributes:
        accuracy: share of right answers, None after an epoch that was not measured.
        best_accuracy, best_epoch: of the best epoch, the earliest of equals.
        best_interval: half-width of the 95 % interval of ``best_accuracy``; 0 where it has none.
    """

    def __init__(self, epochs: int, path: Path) -> None:
        self.epochs, self.path = epochs, path
        self.accuracy: float | None = None
        self.best_accuracy, self.best_epoch = -1.0, 0
        self.best_interval = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("best_accuracy", "best_interval", "best_epoch")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in state_dict.items():
            setattr(self, name, value)

    def results(self) -> dict[str, float]:
        """What a record of the run says of its validation."""
        return {
            "best_validation_accuracy": self.best_accuracy,
            "best_validation_interval": self.best_interval,
            "best_epoch": self.best_epoch,
        }

    def is_due(self, trainer: pl.Trainer) -> bool:
        """Whether the epoch that ends is one to measure."""
        epoch = trainer.current_epoch + 1
        return not epoch % self.epochs or epoch == trainer.max_epochs

    def keep_best(self, trainer: pl.Trainer, accuracy: float, interval: float = 0.0) -> None:
        """Takes the accuracy after the epoch that ends, and writes the checkpoint where it is the best so far."""
        self.accuracy = accuracy
        if accuracy > self.best_accuracy:
            epoch = trainer.current_epoch + 1
            self.best_accuracy, self.best_interval, self.best_epoch = accuracy, interval, epoch
            trainer.save_checkpoint(self.path)


class Validation(BestCheckpoint):
    """Measures few-shot accuracy on validation classes and keeps the checkpoint of the best epoch.

    Args:
        module: what is trained; its settings have the episodes and the head that classifies them.
        archive: images of the validation classes.
        path: of the best checkpoint.
        seed: decides the episodes.

    Raises:
        ValueError: the classes or their images are too few for the episodes, or images too small for the head.
    """

    def __init__(self, module: ImageTraining, archive: ImageArchive, path: Path, seed: int) -> None:
        config, (name, self.choice) = module.config.validation, module.config.validation_head
        super().__init__(config.epochs, path)
        module.feature_shape(f"validation.head {name}", self.choice, config.shot)
        self.images = archive.images
        try:
            self.episodes = sample_episodes(
                archive.labels,
                config.episodes,
                way=config.way,
                shot=config.shot,
                queries=config.queries,
                generator=derive_generator(seed, _EPISODES),
            )
        except ValueError as error:
            raise ValueError(f"validation classes: {error}") from error

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.accuracy = None
        if not self.is_due(trainer):
            return
        # Evaluation has nothing to synchronize, so one process does it and the others wait.
        found = self._measure(module) if trainer.is_global_zero else (0.0, 0.0)
        accuracy, interval = trainer.strategy.broadcast(found)
        module.log("validation/accuracy", accuracy)
        self.keep_best(trainer, accuracy, interval)

    def _measure(self, module: pl.LightningModule) -> tuple[float, float]:
        """Accuracy and the half-width of its interval.

        Raises:
            FloatingPointError: the features are not finite any more.
        """
        try:
            return mean_and_interval(self._accuracies(module))
        except ValueError as error:
            # The episodes were drawn before the run: what is left are features that are not finite.
            raise FloatingPointError(
                f"validation after epoch {module.current_epoch + 1}: {error}: take a smaller learning_rate"
            ) from error

    def _accuracies(self, module: pl.LightningModule) -> Tensor:
        """``[E]``, of each episode."""
        head, local_features = self.choice.head, self.choice.local_features
        if local_features is None:
            return episode_accuracies(extract_features(module, self.images), self.episodes, head=head)
        was_training = module.training
        extractor = module.network.local_features(local_features)  # in evaluation mode, and the network with it
        batch_size, accuracies = max(1, _IMAGES_AT_ONCE // crops_an_image(local_features)), []
        bytes_an_image = extract_features(extractor, self.images[:1]).nbytes
        for part in _groups(self.episodes, _MAP_BYTES_AT_ONCE // bytes_an_image):
            maps = extract_features(extractor, self.images[part.images], batch_size=batch_size)
            accuracies.append(episode_accuracies(maps, part.episodes, head=head))
        module.train(was_training)
        return torch.cat(accuracies)


class _Group(NamedTuple):
    images: Tensor  # [n] int64, the different images of its episodes
    episodes: Episodes  # of indices into them


def _groups(episodes: Episodes, images_at_once: int) -> Iterator[_Group]:
    """Parts of the episodes, of about ``images_at_once`` images each: all of them where their images are so few."""
    shot, chosen = episodes.support.shape[-1], torch.cat([episodes.support, episodes.query], -1)  # [E, way, images]
    together = len(chosen)
    if len(chosen.unique()) > images_at_once:
        together = max(1, images_at_once // chosen[0].numel())
    for part, classes in zip(chosen.split(together), episodes.classes.split(together), strict=True):
        images, index = part.unique(return_inverse=True)
        yield _Group(images, Episodes(index[..., :shot], index[..., shot:], classes))


class ProgressBar(Callback):
    """One bar over the whole run on a terminal, elsewhere one line an epoch; process 0 alone draws.

    Shows means over the epoch so far, images a second, and the time left.

    Args:
        means: what is shown; it must come first among the callbacks.
        validation: whose accuracies are shown, where there is one.
    """

    def __init__(self, means: EpochMeans, validation: BestCheckpoint | None = None) -> None:
        self.means, self.validation = means, validation
        self._images = 0
        self._started = self._stepped = 0.0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        from tqdm import tqdm

        self._bar = tqdm(
            total=int(trainer.estimated_stepping_batches) * trainer.accumulate_grad_batches,
            initial=trainer.global_step * trainer.accumulate_grad_batches,
            desc=_epoch(trainer),
            bar_format="{desc} |{bar}| {percentage:3.0f}% {elapsed}<{remaining}{postfix}",
            file=sys.stderr,
            disable=None if trainer.is_global_zero else True,
            leave=False,
            dynamic_ncols=True,
        )

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._bar.set_description_str(_epoch(trainer), refresh=False)
        self._images, self._started = 0, time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        self._images += batch[1].numel() * trainer.world_size
        self._stepped = time.perf_counter()
        # Reading the means waits for the device, so it is done only where the bar is about to be drawn.
        if not self._bar.disable and self._bar.n + 1 - self._bar.last_print_n >= self._bar.miniters:
            self._bar.set_postfix_str(self._figures(), refresh=False)
        self._bar.update()

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self._bar.disable and trainer.is_global_zero:
            print(f"{_epoch(trainer)}: {self._figures()}", file=sys.stderr, flush=True)

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        # A run that was finished before it was resumed never starts to train.
        if hasattr(self, "_bar"):
            self._bar.close()

    def _figures(self) -> str:
        means, rate = self.means.so_far(), self._images / (self._stepped - self._started)
        figures = [_WORDS[name](mean) for name, mean in means.items() if name in _WORDS]
        figures.append(f"{rate:,.0f} images/s")
        if self.validation and self.validation.best_epoch:
            best = f"best {100 * self.validation.best_accuracy:.2f} % in epoch {self.validation.best_epoch}"
            now = self.validation.accuracy
            figures.append(f"validation {best}" if now is None else f"validation {100 * now:.2f} %, {best}")
        return ", ".join(figures)


def _epoch(trainer: pl.Trainer) -> str:
    return f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
