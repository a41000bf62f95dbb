"""Label smoothing beside the negative margin, on base and on validation classes (Table 5); trains.

Both make the training target easier to reach; the paper finds that they act in opposite ways. Writes
label_smoothing.json, .csv and .png, and prints the differences on the same episodes.
"""

from collections.abc import Callable

from fewshot_ext.commands.analyze import common
from fewshot_ext.experiments.variants import label_smoothing_configs, variant_runs, variants_table, variants_writer

SUMMARY = "label smoothing beside the margin (Table 5); trains"
NAME = "label_smoothing"


def add_arguments(parser) -> None:
    """Adds the options of ``analyze label-smoothing`` to a jsonargparse parser."""
    common.add_run_arguments(parser)
    variants = parser.add_argument_group("variants")
    variants.add_argument("--margin", type=float, default=-0.3, help="margin of the variant with a margin")
    variants.add_argument("--label_smoothing", type=float, default=0.05, help="label smoothing of the variant with it")
    common.add_training_arguments(parser)
    common.add_protocol_arguments(parser)


def prepare(arguments, resolved: str) -> Callable[[], int]:
    """Checks the settings and returns the function that runs the analysis."""

    def runs(data: str):
        config = common.read_pretraining(arguments, data)
        configs = label_smoothing_configs(config, arguments.margin, arguments.label_smoothing)
        return variant_runs(data, configs, arguments.seeds, arguments.held_out)

    sweep = common.prepare_sweep(NAME, arguments, runs, measurement=common.read_accuracy(arguments))
    write = variants_writer(NAME)
    return lambda: common.train_and_write(NAME, sweep, arguments, resolved, write, variants_table)
