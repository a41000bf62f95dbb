"""Meta-train a network on few-shot episodes, through DeepEMD or another classifier.

This is the second stage of DeepEMD. It goes on from a checkpoint of pretrain or of another training, draws episodes
from the base classes of an image set, and trains the backbone through the head that classifies them: with deepemd
through the Earth Mover's Distance, and with --head protonet, matchingnet and others as the papers of these train. It
validates on episodes of the validation classes where there are some, by the same head, and writes last.ckpt, best.ckpt,
config.yaml, run.json and a TensorBoard log to the output folder. Whatever takes a checkpoint takes these too.
Published settings come by name:

    fewshot-ext meta-train --config miniimagenet_resnet12_deepemd_fcn_1shot \\
        --data mini.npz --checkpoint pre/best.ckpt --output out

Recipes such as miniimagenet_resnet12_protonet_1shot are the other rows of the comparison in the DeepEMD paper; with
--way 10 --validation.way 10 they are those of its 10-way column. The rows FC are not trained in episodes: evaluate
measures fc_dot and fc_cosine on a pre-trained checkpoint.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewshot_ext.commands.training import (
    add_config_arguments,
    add_run_arguments,
    check_run,
    fields_of,
    train,
    validation_line,
)
from fewshot_ext.models.network import read_checkpoint
from fewshot_ext.training.meta_config import MetaTrainingConfig

if TYPE_CHECKING:
    from fewshot_ext.training import MetaTrainingRun

SUMMARY = "meta-train a network on episodes of base classes, by DeepEMD or another head"
SCRATCH = "scratch"


def add_arguments(parser) -> None:
    """Adds the options of ``meta-train`` to a jsonargparse parser."""
    run = add_run_arguments(parser, "meta-train", seed="seed of episodes, augmentation and, from scratch, weights")
    run.add_argument(
        "--checkpoint",
        metavar=f"FILE|{SCRATCH}",
        help=f"checkpoint of any training or of other code; {SCRATCH} starts from random weights (DeepEMD's authors "
        "advise against it)",
    )
    add_config_arguments(parser, MetaTrainingConfig)


def prepare(arguments, resolved: str) -> Callable[[], int]:
    """Checks the settings and returns the function that trains.

    Args:
        arguments: the parsed options.
        resolved: the same as YAML, to be written beside the results.
    """
    if arguments.checkpoint is None:
        raise ValueError(f"--checkpoint: expected a file of any training, or {SCRATCH}, got none")
    config = MetaTrainingConfig(**fields_of(MetaTrainingConfig, arguments))
    checkpoint = None if arguments.checkpoint == SCRATCH else arguments.checkpoint
    if checkpoint is not None:
        # A large image set takes minutes to load: a wrong path should not.
        read_checkpoint(Path(checkpoint).expanduser(), settings=config.checkpoint_settings)
    inputs = check_run(arguments)

    from fewshot_ext.training import MetaTrainingRun

    run = MetaTrainingRun(config, inputs.base, inputs.output, checkpoint=checkpoint, **inputs.options)
    settings = run.module.hparams
    record = {
        **inputs.record,
        "checkpoint": {"name": arguments.checkpoint, "sha256": settings["checkpoint_sha256"]},
        "config": asdict(config),
        "network": settings["network"],
    }

    def summary(results):
        return [*_start_line(results), *validation_line(run, results)]

    return lambda: train("meta-train", run, record, resolved, headline=_headline(run, checkpoint), summary=summary)


def _headline(run: "MetaTrainingRun", checkpoint: str | None) -> list[str]:
    config, module = run.config, run.module
    *regions, channels = module.features_an_image
    parameters = sum(parameter.numel() for parameter in module.backbone.parameters())
    name = module.hparams["network"]["backbone"]["name"]
    return [
        f"backbone: {name}, {parameters:,} parameters, {'random weights' if checkpoint is None else checkpoint}",
        f"images: {regions[0]} regions of {channels} features each ({config.choice.local_features.name})"
        if regions
        else f"images: {channels} features each",
        f"head: {config.head}, temperature {module.head.logit_scale:g}",
        f"episodes: {config.way}-way {config.shot}-shot, {config.queries} queries a class, "
        f"{config.epoch_episodes:,} an epoch, {config.episodes_per_step} a step",
    ]


def _start_line(results: dict[str, Any]) -> list[str]:
    start = results.get("start_validation_accuracy")
    return [] if start is None else [f"before meta-training: {100 * start:.2f} % on the same validation episodes"]
