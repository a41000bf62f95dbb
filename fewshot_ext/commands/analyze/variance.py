"""Inter-class variance, intra-class variance and their ratio over margins, and the proposition (eq. 2-4, Fig. 2).

Looks at the backbones of a margin sweep: how far the classes lie apart (D_inter), how wide they spread (D_intra), and
how well that lets them be told apart (phi), on base and novel classes. Then holds every two neighboring margins
against the proposition of section 3.4: are its premises met, does its conclusion hold? Writes variance.json, .csv and
.png, proposition.json and .csv. Intervals are jackknife intervals over the classes.
"""

from collections.abc import Callable

from fewshot_ext.commands.analyze import common
from fewshot_ext.experiments.variance import VarianceMeasurement, check_propositions, write_variance

SUMMARY = "inter- and intra-class variance over margins (Fig. 2), the proposition of section 3.4"


def add_arguments(parser) -> None:
    """Adds the options of ``analyze variance`` to a jsonargparse parser."""
    common.add_sweep_arguments(parser)


def prepare(arguments, resolved: str) -> Callable[[], int]:
    """Checks the settings and returns the function that runs the analysis."""
    sweep, output = common.open_sweep("variance", arguments, VarianceMeasurement())

    def run() -> int:
        exit_code = common.analyze_sweep("variance", sweep, arguments, resolved, write_variance, output)
        checks = check_propositions(sweep.rows)
        met = [check for check in checks if check["premises"]]
        held = sum(check["conclusion"] for check in met)
        others = sum(check["conclusion"] for check in checks) - held
        print(
            f"proposition: premises met for {len(met)} of {len(checks)} pairs of neighboring margins, its conclusion "
            f"held for {held} of these and for {others} of the other {len(checks) - len(met)}"
        )
        return exit_code

    return run
