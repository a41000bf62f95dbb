"""Meta-training through the head of an episode, such as DeepEMD: the second of two stages."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from fewshot_ext.data import ImageArchive
from fewshot_ext.models import BackboneConfig, EmbeddedBackbone, NetworkConfig, build_local_features
from fewshot_ext.models.checkpoint import META_TRAINING
from fewshot_ext.training.episodic import EpisodeBatches, EpisodeValidation, RankEpisodes, episode_loader
from fewshot_ext.training.meta_config import MetaTrainingConfig
from fewshot_ext.training.module import ImageTraining, describe_network, read_start
from fewshot_ext.training.run import BEST, TrainingRun
from fewshot_ext.training.schedule import sgd_in_steps


class MetaTraining(ImageTraining):
    """A network over episodes of uint8 images, through the head that classifies them, with SGD and a stepped rate.

    Args:
        config: see ``MetaTrainingConfig``.
        network: what is trained.
        seed: with the epoch's number it decides the augmentation of that epoch.
        checkpoint_sha256: of the file that the first weights come from, for the record.

    Attributes:
        head: the classifier.
        features: the module that makes what it takes of images, ``network`` or its local features.
        features_an_image: shape of these, ``(D,)`` or ``(N, C)``.

    Shape:
        ``[B, C, H, W]`` uint8 -> features ``[B, D]``.

    Reference:
        Zhang et al., "DeepEMD: Few-Shot Image Classification with Differentiable Earth Mover's Distance and Structured
        Classifiers", CVPR 2020 (https://arxiv.org/abs/2003.06777).
    """

    stage = META_TRAINING
    config_type = MetaTrainingConfig
    others = ("checkpoint_sha256",)

    def __init__(
        self,
        config: MetaTrainingConfig,
        network: NetworkConfig,
        seed: int = 0,
        checkpoint_sha256: str | None = None,
    ) -> None:
        super().__init__(config, network, seed, checkpoint_sha256=checkpoint_sha256)
        choice = config.choice
        self.head, features = choice.head, self.network
        if choice.local_features is not None:
            features = build_local_features(choice.local_features, self.backbone, self.network.preprocessing)
            if isinstance(self.backbone, EmbeddedBackbone):
                # It projects feature vectors, which maps never become; several processes wait for every gradient.
                self.backbone.projection.requires_grad_(False)
        # Not a submodule: all that it holds is the network's, and a checkpoint should have it once.
        object.__setattr__(self, "features", features)
        self.features_an_image = self.feature_shape(f"head {config.head}", choice, config.shot)

    def train(self, mode: bool = True) -> "MetaTraining":
        super().train(mode)
        self.features.train(mode)
        return self

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> dict[str, Tensor]:
        way, counts = self.config.way, [self.config.shot, self.config.queries]
        parts = [part.flatten(0, 1) for part in batch[0].split(counts, 1)]  # of [way, images, C, H, W]
        label = torch.arange(way, device=self.device)
        support_target, target = (label.repeat_interleave(count) for count in counts)
        # Together, so that in training they share their batch statistics.
        support, query = self.features(torch.cat(parts)).unsqueeze(0).split([way * count for count in counts], 1)
        try:
            logits = self.head.scale * self.head(support, support_target.unsqueeze(0), query, way).squeeze(0)
        except ValueError as error:
            # Shapes were tried before the run: what is left are features that are not finite.
            raise FloatingPointError(
                f"epoch {self.current_epoch + 1}: features of {error}: take a smaller learning_rate"
            ) from error
        loss = F.cross_entropy(logits, target)
        return {
            "loss": loss,
            "mean_loss": loss.detach(),
            "accuracy": (logits.detach().argmax(1) == target).float().mean(),
        }

    def configure_optimizers(self) -> dict:
        return sgd_in_steps([parameter for parameter in self.parameters() if parameter.requires_grad], self.config)


class MetaTrainingRun(TrainingRun):
    """Everything that a meta-training needs, checked before its first step.

    Args:
        config: see ``MetaTrainingConfig``.
        archive: images of the base classes.
        directory: receives ``last.ckpt``, ``best.ckpt`` and the TensorBoard log.
        checkpoint: of a pre-training, or of any other training, whose network is trained on; None starts from
            random weights, which the authors of DeepEMD advise against.
        validation: images of validation classes, which choose ``best.ckpt``; without any the last epoch is the best.
        seed: decides random weights, training episodes, augmentation and validation episodes.
        options: ``device``, ``devices``, ``num_nodes``, ``resume``, ``on_epoch`` and ``progress``, as ``TrainingRun``
            has them; its processes share the episodes of a step.

    Batch normalization takes its statistics over the support and query images of one episode, as in the official
    implementation on one GPU.

    Raises:
        ImportError: Lightning, TensorBoard or kornia (where images are augmented) is missing.
        OSError: ``checkpoint`` or ``last.ckpt`` cannot be read.
        ValueError: a file that is no checkpoint, or whose network does not fit the images or is not finite; settings
            of a network beside a checkpoint; images too small for the backbone or the regions; too few classes or
            images for the episodes; ``episodes_per_step`` that the processes cannot share; or a ``last.ckpt`` of other
            settings.
    """

    def __init__(
        self,
        config: MetaTrainingConfig,
        archive: ImageArchive,
        directory: str | Path,
        *,
        checkpoint: str | Path | None,
        validation: ImageArchive | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            if checkpoint is None:
                module = _from_scratch(config, archive, seed)
            else:
                module = _from_checkpoint(config, archive, checkpoint, seed)
        try:
            episodes = EpisodeBatches(
                archive.labels,
                config.epoch_episodes,
                way=config.way,
                shot=config.shot,
                queries=config.queries,
                seed=seed,
            )
        except ValueError as error:
            raise ValueError(f"base classes: {error}") from error
        super().__init__(
            module,
            archive,
            episode_loader(archive, episodes),
            directory,
            validation=validation and EpisodeValidation(module, validation, Path(directory) / BEST, seed),
            **options,
        )

    def _shared(self, loader: DataLoader, rank: int, processes: int) -> DataLoader:
        if self.config.episodes_per_step % processes:
            raise ValueError(
                f"episodes_per_step {self.config.episodes_per_step} is shared by {processes} processes: "
                "it has to be a multiple of them"
            )
        return episode_loader(self.archive, RankEpisodes(loader.sampler, rank, processes))

    def _trainer_options(self) -> dict[str, Any]:
        return {"accumulate_grad_batches": self.config.episodes_per_step // self._processes}


def meta_train(
    config: MetaTrainingConfig, archive: ImageArchive, directory: str | Path, **options: Any
) -> MetaTraining:
    """Meta-trains a network on the classes of ``archive``.

    The arguments are those of ``MetaTrainingRun``; what comes back and what is raised are those of it and its
    ``train``.
    """
    return MetaTrainingRun(config, archive, directory, **options).train()


def _from_scratch(config: MetaTrainingConfig, archive: ImageArchive, seed: int) -> MetaTraining:
    return MetaTraining(config, describe_network(config, config.backbone or BackboneConfig(), archive), seed)


def _from_checkpoint(config: MetaTrainingConfig, archive: ImageArchive, path: str | Path, seed: int) -> MetaTraining:
    for name in ("backbone", "resize_mode"):
        if (given := getattr(config, name)) is not None:
            raise ValueError(f"{name}: expected null beside a checkpoint, which brings its own, got {given}")
    start = read_start(path, archive, config.checkpoint_settings)
    network = replace(start.config, channels_last=config.channels_last)
    module = MetaTraining(config, network, seed, checkpoint_sha256=start.sha256)
    module.network.load_state_dict(start.network.state_dict())
    return module
