"""Softmax and cosine softmax without and with a negative margin, on one image set or several (Table 3); trains.

Pre-trains a backbone with each of the four losses on each set and measures its few-shot accuracy on the validation
classes, as the paper does, or on others. Sets of two domains have a plus in their name: the paper's table is

    fewshot-ext analyze losses --data mini.npz cub.npz mini.npz+cub.npz --output losses

Writes losses.json, losses.csv and losses.png, and prints what each margin gains on the same episodes. Choose margins by
analyze margins: those here are the same for all sets, or one for each.
"""

from collections.abc import Callable
from functools import partial

from fewshot_ext._validation import check_choice
from fewshot_ext.commands.analyze import common
from fewshot_ext.experiments.runs import CLASSES
from fewshot_ext.experiments.variants import WITHOUT_MARGIN, loss_configs, variant_runs, variants_table, variants_writer

SUMMARY = "four losses on several image sets (Table 3); trains"
NAME = "losses"


def add_arguments(parser) -> None:
    """Adds the options of ``analyze losses`` to a jsonargparse parser."""
    common.add_run_arguments(parser, several=True)
    variants = parser.add_argument_group("variants")
    for loss, margin in (("cosine", -0.1), ("softmax", -1.0)):
        variants.add_argument(
            f"--{loss}_margins",
            type=float,
            nargs="+",
            default=[margin],
            metavar="M",
            help=f"margin of neg-{loss}: one for all image sets, or one for each",
        )
    common.add_training_arguments(parser)
    common.add_protocol_arguments(parser, base=False)
    common.add_classes_argument(parser, default="validation")


def prepare(arguments, resolved: str) -> Callable[[], int]:
    """Checks the settings and returns the function that runs the analysis."""
    check_choice("classes", arguments.classes, *CLASSES)
    count = len(arguments.data or ())
    margins = {}
    for loss in ("cosine", "softmax"):
        given = arguments[f"{loss}_margins"]
        if len(given) not in (1, count):
            raise ValueError(
                f"{loss}_margins: expected one value or one for each of {count} image sets, got {len(given)}"
            )
        margins[f"{loss}_margin"] = given * count if len(given) == 1 else given

    def runs(data: str):
        index = arguments.data.index(data)
        of_data = {name: values[index] for name, values in margins.items()}
        configs = loss_configs(common.read_pretraining(arguments, data), **of_data)
        return variant_runs(data, configs, arguments.seeds, arguments.held_out)

    accuracy = common.read_accuracy(arguments, classes=(arguments.classes,))
    sweep = common.prepare_sweep(NAME, arguments, runs, measurement=accuracy)
    table = {"against": WITHOUT_MARGIN, "by": "data"}
    write = variants_writer(NAME, **table)
    return lambda: common.train_and_write(NAME, sweep, arguments, resolved, write, partial(variants_table, **table))
