"""Which base classes the images of unseen classes fall into, and the accuracy of classes sorted by it (eq. 5, Fig. 4).

Looks at the backbones of a margin sweep: P_jk, the probability that an image of class j is taken for base class k;
P_j^s, that two images of class j are taken for the same one. Validation and novel classes are sorted by P_j^s and cut
into groups, whose few-shot accuracy is then measured over the margin. Writes label_distribution.json, .csv and .png,
group_accuracy.json and .csv.
"""

from collections.abc import Callable

from fewshot_ext.commands.analyze import common
from fewshot_ext.commands.common import print_written
from fewshot_ext.experiments.label_distribution import (
    GroupAccuracy,
    LabelDistribution,
    group_classes,
    write_label_distribution,
)

SUMMARY = "base classes that unseen images fall into, accuracy of classes sorted by it (Fig. 4)"


def add_arguments(parser) -> None:
    """Adds the options of ``analyze label-distribution`` to a jsonargparse parser."""
    common.add_sweep_arguments(parser)
    groups = parser.add_argument_group("groups")
    groups.add_argument("--groups", type=int, default=3, help="number of groups that the sorted classes are cut into")
    common.add_protocol_arguments(parser, shots=(1,), base=False)


def prepare(arguments, resolved: str) -> Callable[[], int]:
    """Checks the settings and returns the function that runs the analysis."""
    common.check_one_loss(arguments)
    accuracy = common.read_accuracy(arguments)
    sweep, output = common.open_sweep("label_distribution", arguments, LabelDistribution(arguments.groups, accuracy))

    def run() -> int:
        common.write_config(output, "label_distribution", resolved)
        exit_code = common.run_sweep(sweep, arguments)
        distribution = sweep.rows
        if exit_code == 130 or not distribution:
            return exit_code
        groups = group_classes(distribution, arguments.groups)
        grouped = sweep.remeasure(GroupAccuracy(groups, accuracy))
        exit_code = max(exit_code, common.run_sweep(grouped, arguments))
        if rows := grouped.rows:
            head = common.head_of(sweep, resolved)
            print_written(write_label_distribution(output, distribution, rows, groups, **head))
        return exit_code

    return run
