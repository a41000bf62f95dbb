"""Pre-train a backbone on base classes with a margin softmax loss.

The first of the two stages of few-shot classification by transfer. Trains on the base classes of an image set,
validates on episodes of its validation classes where it has some, and writes last.ckpt, best.ckpt, config.yaml,
run.json and a TensorBoard log to the output folder. Published settings come by name:

    fewshot-ext pretrain --config miniimagenet_resnet12_neg_cosine_5shot --data mini.npz --output out

Recipes that end in _deepemd are the first stage of DeepEMD, whose second is fewshot-ext meta-train: a plain softmax by
SGD in steps (--optimizer sgd) in place of Adam with warm-up and cosine decay.
"""

from collections.abc import Callable
from dataclasses import asdict

from fewshot_ext.commands.training import (
    add_config_arguments,
    add_run_arguments,
    check_run,
    fields_of,
    train,
    validation_line,
)
from fewshot_ext.training.config import LOSSES, PreTrainingConfig

SUMMARY = "train a backbone on base classes"

# What `--loss`, `--margin` and `--scale` decide together; see PreTrainingConfig.for_loss.
_LOSS_FIELDS = {"similarity", "margin", "scale"}


def add_arguments(parser) -> None:
    """Adds the options of ``pretrain`` to a jsonargparse parser."""
    add_run_arguments(parser, "pretrain", seed="seed of weights, batches, augmentation and validation episodes")
    loss = parser.add_argument_group("loss")
    loss.add_argument(
        "--loss", choices=list(LOSSES), default="neg-cosine", help="loss; cosine and softmax have margin 0"
    )
    loss.add_argument(
        "--margin",
        type=float | None,
        default=None,
        help="margin; null takes -0.3 for neg-cosine and -1 for neg-softmax",
    )
    loss.add_argument(
        "--scale",
        type=float | None,
        default=None,
        help="factor of the similarities; null takes 30 (cosine), 5 (softmax) or 10 (softmax with resnet12)",
    )
    add_config_arguments(parser, PreTrainingConfig, skip=_LOSS_FIELDS)


def prepare(arguments, resolved: str) -> Callable[[], int]:
    """Checks the settings and returns the function that trains.

    Args:
        arguments: the parsed options.
        resolved: the same as YAML, to be written beside the results.
    """
    settings = fields_of(PreTrainingConfig, arguments, skip=_LOSS_FIELDS)
    config = PreTrainingConfig.for_loss(arguments.loss, margin=arguments.margin, scale=arguments.scale, **settings)
    inputs = check_run(arguments)

    from fewshot_ext.training import PreTrainingRun

    run = PreTrainingRun(config, inputs.base, inputs.output, held_out=inputs.held_out, **inputs.options)
    record = {**inputs.record, "config": asdict(config)}
    parameters = sum(parameter.numel() for parameter in run.module.backbone.parameters())
    headline = [
        f"backbone: {config.backbone.name}, {parameters:,} parameters, {run.module.network.out_features:,} features",
        f"loss: {arguments.loss}, margin {config.margin:g}, scale {config.scale:g}",
    ]

    def summary(results):
        shares = [f"{100 * results['training_accuracy']:.2f} % of {len(inputs.base):,} training images"]
        if inputs.held_out is not None:
            shares.append(f"{100 * results['held_out_accuracy']:.2f} % of {len(inputs.held_out):,} held out")
        return [f"base classes told apart without augmentation: {', '.join(shares)}", *validation_line(run, results)]

    return lambda: train("pretrain", run, record, resolved, headline=headline, summary=summary)
