"""Accuracy over the margin of the fine-tuning stage, the pre-training margin held fixed (Fig. 9).

Looks at the backbones of a margin sweep. Writes finetuning_margin.json, .csv and .png.
"""

from collections.abc import Callable

from fewshot_ext.commands.analyze import common
from fewshot_ext.experiments.finetuning_margin import FineTuningMargins, write_finetuning_margin

SUMMARY = "margin in the fine-tuning stage (Fig. 9)"


def add_arguments(parser) -> None:
    """Adds the options of ``analyze finetuning-margin`` to a jsonargparse parser."""
    common.add_sweep_arguments(parser)
    margins = parser.add_argument_group("fine-tuning")
    margins.add_argument(
        "--finetuning_margins",
        type=float,
        nargs="+",
        default=[-0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3],
        metavar="M",
        help="margins; every episode is fine-tuned with each",
    )
    common.add_classes_argument(parser)
    common.add_protocol_arguments(parser, base=False)


def prepare(arguments, resolved: str) -> Callable[[], int]:
    """Checks the settings and returns the function that runs the analysis."""
    accuracy = common.read_accuracy(arguments, classes=(arguments.classes,))
    measurement = FineTuningMargins(tuple(arguments.finetuning_margins), accuracy)
    sweep, output = common.open_sweep("finetuning_margin", arguments, measurement)
    return lambda: common.analyze_sweep(
        "finetuning_margin", sweep, arguments, resolved, write_finetuning_margin, output
    )
