"""Directions of two-dimensional features over the margin, on base and novel classes (Fig. 3); trains.

Pre-trains a Conv-4 whose features are projected to a plane, once for each margin and seed, with the cosine softmax; the
image set "mnist" has seven base and three novel digits, as in the paper. Writes angles.json, angles.csv and angles.png:
how often each direction occurs, class by class, with phi = D_inter / D_intra, and the peaks of each class counted.
"""

from collections.abc import Callable
from dataclasses import replace

from fewshot_ext.commands.analyze import common
from fewshot_ext.experiments.angles import AngleMeasurement, angles_table, write_angles
from fewshot_ext.experiments.margins import margin_runs

SUMMARY = "directions of 2-D features on MNIST (Fig. 3); trains"


def add_arguments(parser) -> None:
    """Adds the options of ``analyze angles`` to a jsonargparse parser."""
    common.add_run_arguments(parser, data="mnist")
    sweep = parser.add_argument_group("sweep")
    sweep.add_argument(
        "--margins",
        type=float,
        nargs="+",
        default=[-0.5, -0.3, 0.0, 0.2, 0.4],
        metavar="M",
        help="margins of the cosine softmax",
    )
    sweep.add_argument("--bins", type=int, default=AngleMeasurement().bins, help="number of parts of the circle")
    common.add_training_arguments(parser, seeds=(0,))


def prepare(arguments, resolved: str) -> Callable[[], int]:
    """Checks the settings and returns the function that runs the analysis."""

    def runs(data: str):
        config = common.read_pretraining(arguments, data)
        config = replace(config, backbone=replace(config.backbone, embedding=2))
        margins = {"cosine": arguments.margins}
        return margin_runs(data, config, margins, arguments.seeds, arguments.held_out)

    sweep = common.prepare_sweep("angles", arguments, runs, measurement=AngleMeasurement(arguments.bins))
    return lambda: common.train_and_write("angles", sweep, arguments, resolved, write_angles, angles_table)
