"""Train an embedding for retrieval by a metric learning loss, with or without the Anti-Collapse term.

Trains on the base classes of an image set, in batches of P classes with K images each, and measures retrieval on its
novel classes, which it has not seen, as it goes: Recall@K, MAP@R, coding rate and singular values. Recall@1 on
validation classes, where the set has some, chooses best.ckpt. Writes last.ckpt, best.ckpt, history.json, history.csv,
config.yaml, run.json and a TensorBoard log to the output folder; fewshot-ext retrieve takes the checkpoints, and so
does whatever takes those of pretrain. Settings come by name:

    fewshot-ext metric-train --config omniglot28_conv4 --data omniglot28 \\
        --loss triplet --anti-collapse.variant pair --output out
"""

from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fewshot_ext.commands.training import add_config_arguments, add_run_arguments, check_run, fields_of, train
from fewshot_ext.losses.base_losses import require_packages
from fewshot_ext.models import NetworkConfig
from fewshot_ext.models.network import own_network
from fewshot_ext.training.metric_config import NO_ANTI_COLLAPSE, OF_THE_EMBEDDING, MetricTrainingConfig

if TYPE_CHECKING:
    from fewshot_ext.training import MetricTrainingRun

SUMMARY = "train an embedding for retrieval, with or without Anti-Collapse"


def add_arguments(parser) -> None:
    """Adds the options of ``metric-train`` to a jsonargparse parser."""
    run = add_run_arguments(
        parser, "metric-train", seed="seed of weights, batches, augmentation and mined negatives", processes=False
    )
    run.add_argument(
        "--checkpoint",
        metavar="FILE|timm:NAME",
        help="network to start from: a checkpoint of any training or of other code, such as a state_dict of "
        "torchvision's ResNet-50, or timm:resnet50.tv_in1k; by default random weights",
    )
    add_config_arguments(parser, MetricTrainingConfig)


def dependent_defaults(arguments, given) -> dict[str, Any]:
    """What follows from ``--checkpoint``: the settings of its backbone, beside which no others can be given."""
    if arguments.checkpoint is None:
        return {}
    backbone = NetworkConfig.from_dict(own_network(arguments.checkpoint).made_from["network"]).backbone
    kept = {name: value for name, value in asdict(backbone).items() if name not in OF_THE_EMBEDDING}
    for name, value in vars(given.get("backbone", Namespace())).items():
        if name in kept and value != kept[name]:
            raise ValueError(
                f"backbone.{name}: expected {kept[name]}, as checkpoint {arguments.checkpoint} has it, got {value}"
            )
    return {f"backbone.{name}": value for name, value in kept.items()}


def prepare(arguments, resolved: str) -> Callable[[], int]:
    """Checks the settings and returns the function that trains.

    Args:
        arguments: the parsed options.
        resolved: the same as YAML, to be written beside the results.
    """
    require_packages(arguments.loss)
    config = MetricTrainingConfig(**fields_of(MetricTrainingConfig, arguments))
    inputs = check_run(arguments)

    from fewshot_ext.training import MetricTrainingRun

    run = MetricTrainingRun(
        config, inputs.base, inputs.output, checkpoint=arguments.checkpoint, unseen=inputs.novel, **inputs.options
    )
    unseen = inputs.novel and {"novel": {"images": len(inputs.novel), "classes": inputs.novel.num_classes}}
    settings = run.module.hparams
    record = {
        **inputs.record,
        "data": {**inputs.record["data"], **(unseen or {})},
        "checkpoint": {"name": arguments.checkpoint, "sha256": settings["checkpoint_sha256"]},
        "config": asdict(config),
        "network": settings["network"],
    }
    return lambda: train(
        "metric-train",
        run,
        record,
        resolved,
        headline=_headline(run),
        summary=lambda results: _summary(run, results),
        files=("history.json", "history.csv"),
    )


def _headline(run: "MetricTrainingRun") -> list[str]:
    config, term = run.config, run.config.anti_collapse
    parameters = sum(parameter.numel() for parameter in run.module.backbone.parameters())
    with_term = f", with Anti-Collapse ({term.variant}, {term.convention}, weight {term.weight:g})"
    return [
        f"backbone: {run.module.hparams['network']['backbone']['name']}, {parameters:,} parameters, embeddings of "
        f"{run.module.network.out_features:,} dimensions",
        f"loss: {config.loss}{'' if term.variant == NO_ANTI_COLLAPSE else with_term}",
        f"batches: {config.classes_per_batch} classes x {config.samples_per_class} images",
        *(
            f"{name} classes: {len(images):,} images are measured"
            + ("" if is_query is None else f", {int(is_query.sum()):,} of them queries among the others")
            for name, (images, _, is_query) in run.history.sets.items()
        ),
    ]


def _summary(run: "MetricTrainingRun", results: Mapping[str, Any]) -> list[str]:
    lines = []
    if run.validation:
        lines.append(
            f"best epoch {results['best_epoch']}: Recall@{min(run.config.measurement.ks)} "
            f"{100 * results['best_validation_accuracy']:.2f} % on validation classes"
        )
    width = max(map(len, run.history.sets))
    ks = run.config.measurement.ks
    shares = {f"Recall@{k}": f"recall_at_{k}" for k in ks} | {"MAP@R": "map_at_r"}
    shares |= {f"MAP@{k}": f"map_at_{k}" for k in run.config.measurement.map_ks}
    shares |= {"NMI": "nmi", "F1": "f1"} if run.config.measurement.clusters else {}
    heads = [*shares, "coding rate", "effective rank"]
    lines.append(f"{'last epoch':<{width + 8}}" + "".join(head.rjust(16) for head in heads))
    for name in run.history.sets:
        row = results[name]
        percents = [f"{100 * row[key]:.2f} %" for key in shares.values()]
        cells = [*percents, f"{row['coding_rate']:.2f} nats", f"{row['effective_rank']:.1f}"]
        lines.append(f"{f'{name} classes':<{width + 8}}" + "".join(cell.rjust(16) for cell in cells))
    return lines
