"""Accuracy over the number of support images, from few to many, for a few margins (Fig. 8).

Looks at the backbones of a margin sweep: does a negative margin still help where every class has hundreds of labeled
images? Writes shots.json, shots.csv and shots.png, whose lower half shows the gain over margin 0 on the same episodes.
"""

from collections.abc import Callable

from fewshot_ext.commands.analyze import common
from fewshot_ext.experiments.shots import write_shots

SUMMARY = "accuracy over 1 to 300 shots (Fig. 8)"


def add_arguments(parser) -> None:
    """Adds the options of ``analyze shots`` to a jsonargparse parser."""
    common.add_sweep_arguments(parser)
    common.add_classes_argument(parser)
    common.add_protocol_arguments(parser, shots=(1, 5, 10, 20, 50, 100, 200, 300), base=False)


def prepare(arguments, resolved: str) -> Callable[[], int]:
    """Checks the settings and returns the function that runs the analysis."""
    common.check_one_loss(arguments)
    sweep, output = common.open_sweep("shots", arguments, common.read_accuracy(arguments, classes=(arguments.classes,)))
    return lambda: common.analyze_sweep("shots", sweep, arguments, resolved, write_shots, output)
