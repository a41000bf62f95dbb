"""Metric learning with and without the Anti-Collapse term: spectrum, coding rate and retrieval over losses and seeds.

Trains an embedding for each loss and seed without the term and with it at every weight, and measures it on seen and on
unseen classes as it goes. Writes collapse.json, collapse.csv and collapse.png: means and 95 % t intervals over seeds,
singular values after the last epoch, Recall@1 and coding rate over the epochs. Runs that are in the folder already
are taken over, so that losses, weights and seeds can be added later; the same command goes on with an interrupted
sweep. Choose the weight by what is measured on validation classes.
"""

from collections.abc import Callable

from fewshot_ext._validation import check_choice
from fewshot_ext.commands.analyze import common
from fewshot_ext.experiments.collapse import NAME, CollapseSweep, collapse_table, write_collapse
from fewshot_ext.experiments.metric_runs import metric_runs
from fewshot_ext.losses.base_losses import BASE_LOSSES

SUMMARY = "spectrum and retrieval with and without Anti-Collapse; trains"
_WEIGHTS = ("pair_weights", "proxy_weights", "proxy_variant", "proxy_pair_weights")


def add_arguments(parser) -> None:
    """Adds the options of ``analyze collapse`` to a jsonargparse parser."""
    common.add_run_arguments(parser)
    sweep = parser.add_argument_group("sweep")
    sweep.add_argument(
        "--losses",
        nargs="+",
        default=["triplet", "proxy_anchor"],
        metavar="LOSS",
        help=f"losses: {', '.join(BASE_LOSSES)}",
    )
    weights = {"type": float, "metavar": "W"}
    sweep.add_argument(
        "--pair_weights",
        nargs="+",
        default=[0.1],
        help="weights of the term for contrastive and triplet, where it spreads embeddings; 0 is always added",
        **weights,
    )
    sweep.add_argument(
        "--proxy_weights",
        nargs="+",
        default=[1.0],
        help="weights of the term for losses with proxies, where it spreads proxies; 0 is always added",
        **weights,
    )
    sweep.add_argument(
        "--proxy_variant", default="batch_proxy", help="proxies that the term spreads: batch_proxy or all_proxy"
    )
    sweep.add_argument(
        "--proxy_pair_weights",
        nargs="*",
        default=[],
        help="weights of the term for losses with proxies, where it spreads embeddings instead",
        **weights,
    )
    common.add_training_arguments(parser, seeds=(0, 1, 2), command="metric-train")


def prepare(arguments, resolved: str) -> Callable[[], int]:
    """Checks the settings and returns the function that runs the sweep."""
    for loss in arguments.losses:
        check_choice("losses", loss, *BASE_LOSSES)

    def runs(data: str):
        config = common.read_metric_training(arguments, data, ("loss",))
        weights = {name: arguments[name] for name in _WEIGHTS}
        return metric_runs(data, config, arguments.losses, arguments.seeds, **weights)

    sweep = common.prepare_sweep(NAME, arguments, runs, CollapseSweep)
    return lambda: common.train_and_write(NAME, sweep, arguments, resolved, write_collapse, collapse_table)
