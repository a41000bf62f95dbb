"""Regularizers of the pre-training one at a time: margin, weight decay, DropBlock and others (Table 4); trains.

The first variant has margin 0 and no further regularizer, the second the margin alone, and each further one the margin
and one regularizer more. Writes regularizers.json, .csv and .png, and prints the differences on the same episodes.
"""

from collections.abc import Callable

from fewshot_ext.commands.analyze import common
from fewshot_ext.experiments.variants import regularizer_configs, variant_runs, variants_table, variants_writer

SUMMARY = "regularizers one at a time (Table 4); trains"
NAME = "regularizers"


def add_arguments(parser) -> None:
    """Adds the options of ``analyze regularizers`` to a jsonargparse parser."""
    common.add_run_arguments(parser)
    variants = parser.add_argument_group("variants")
    variants.add_argument("--margin", type=float, default=-0.1, help="margin of all variants except the first")
    variants.add_argument(
        "--weight_decay",
        type=float | None,
        default=1e-4,
        help="value of the variant with it; null leaves the variant out",
    )
    variants.add_argument(
        "--drop_rate",
        type=float | None,
        default=None,
        help="rate of DropBlock, which conv4 does not have; null leaves the variant out",
    )
    variants.add_argument("--drop_block_size", type=int, default=5, help="side of the blocks that --drop-rate drops")
    variants.add_argument(
        "--label_smoothing",
        type=float | None,
        default=None,
        help="value of the variant with it; null leaves the variant out",
    )
    variants.add_argument(
        "--without_augmentation", type=bool, default=True, help="whether there is a variant without augmentation"
    )
    common.add_training_arguments(parser)
    common.add_protocol_arguments(parser)


def prepare(arguments, resolved: str) -> Callable[[], int]:
    """Checks the settings and returns the function that runs the analysis."""
    names = ("weight_decay", "drop_rate", "drop_block_size", "label_smoothing", "without_augmentation")
    settings = {name: arguments[name] for name in names}

    def runs(data: str):
        configs = regularizer_configs(common.read_pretraining(arguments, data), arguments.margin, **settings)
        return variant_runs(data, configs, arguments.seeds, arguments.held_out)

    sweep = common.prepare_sweep(NAME, arguments, runs, measurement=common.read_accuracy(arguments))
    write = variants_writer(NAME)
    return lambda: common.train_and_write(NAME, sweep, arguments, resolved, write, variants_table)
