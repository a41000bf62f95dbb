"""Accuracy over the pre-training margin, on base, validation and novel classes, for both losses (Fig. 1 and 6).

Pre-trains a backbone for each loss, margin and seed, and measures few-shot accuracy on images of base classes that
were kept from training, on validation classes where the image set has some, and on novel classes. Runs that are in
the folder already are taken over, so that margins and seeds can be added later; the same command goes on with an
interrupted sweep. Writes margins.json, margins.csv and margins.png; the other analyses take the folder as --sweep.
"""

from collections.abc import Callable

from fewshot_ext.commands.analyze import common
from fewshot_ext.experiments.margins import margin_runs, margins_table, write_margins

SUMMARY = "accuracy over margins for both losses (Fig. 1, 6); trains"


def add_arguments(parser) -> None:
    """Adds the options of ``analyze margins`` to a jsonargparse parser."""
    common.add_run_arguments(parser)
    sweep = parser.add_argument_group("sweep")
    sweep.add_argument(
        "--losses", nargs="+", default=["cosine", "softmax"], metavar="LOSS", help="losses: cosine, softmax"
    )
    sweep.add_argument(
        "--cosine_margins",
        type=float,
        nargs="+",
        default=[-0.5, -0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3],
        metavar="M",
        help="margins of the cosine softmax",
    )
    sweep.add_argument(
        "--softmax_margins",
        type=float,
        nargs="+",
        default=[-15.0, -10.0, -5.0, -2.0, -1.0, 0.0, 1.0, 2.0],
        metavar="M",
        help="margins of the inner-product softmax",
    )
    common.add_training_arguments(parser)
    common.add_protocol_arguments(parser)


def prepare(arguments, resolved: str) -> Callable[[], int]:
    """Checks the settings and returns the function that runs the sweep."""
    chosen = {"cosine": arguments.cosine_margins, "softmax": arguments.softmax_margins}
    for loss in arguments.losses:
        if loss not in chosen:
            raise ValueError(f"losses: expected cosine or softmax, got {loss!r}")
    margins = {loss: chosen[loss] for loss in arguments.losses}

    def runs(data: str):
        config = common.read_pretraining(arguments, data)
        return margin_runs(data, config, margins, arguments.seeds, arguments.held_out)

    sweep = common.prepare_sweep("margins", arguments, runs, measurement=common.read_accuracy(arguments))

    def run() -> int:
        sweep.write_plan()
        return common.train_and_write("margins", sweep, arguments, resolved, write_margins, margins_table)

    return run
