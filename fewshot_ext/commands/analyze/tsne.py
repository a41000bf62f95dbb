"""t-SNE pictures of base and novel classes for a negative, a zero and a positive margin (Fig. 7).

Looks at the backbones of one seed of a margin sweep: the same images for every margin, with the 1-shot accuracy beside
each picture. Writes tsne.json, tsne.csv and tsne.png. A picture is no proof: the accuracy is that of all classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from fewshot_ext.commands.analyze import common
from fewshot_ext.experiments.runs import SweepRun
from fewshot_ext.experiments.sweep import Sweep
from fewshot_ext.experiments.tsne import Embedding, write_tsne

SUMMARY = "t-SNE of features (Fig. 7)"


def add_arguments(parser) -> None:
    """Adds the options of ``analyze tsne`` to a jsonargparse parser."""
    common.add_sweep_arguments(parser)
    picture = parser.add_argument_group("picture")
    defaults = Embedding()
    picture.add_argument(
        "--num_classes", type=int, default=defaults.num_classes, help="number of classes in each picture"
    )
    picture.add_argument("--images", type=int, default=defaults.images, help="largest number of images of each class")
    picture.add_argument("--perplexity", type=float, default=defaults.perplexity, help="perplexity of t-SNE")
    common.add_protocol_arguments(parser, shots=(1,))


def _pictured(sweep: Sweep, margins: Sequence[float]) -> Callable[[SweepRun], bool]:
    """One seed; the margins asked for, or the smallest, the one closest to 0 and the largest."""
    seed = sweep.tasks[0].run.seed
    there = sorted({task.run.pretraining.margin for task in sweep.tasks})
    chosen = margins or (there[0], min(there, key=abs), there[-1])
    return lambda run: run.seed == seed and run.pretraining.margin in chosen


def prepare(arguments, resolved: str) -> Callable[[], int]:
    """Checks the settings and returns the function that runs the analysis."""
    common.check_one_loss(arguments)
    accuracy = replace(common.read_accuracy(arguments), classes=("base", "novel"))
    measurement = Embedding(arguments.num_classes, arguments.images, arguments.perplexity, accuracy)
    sweep, output = common.open_sweep("tsne", arguments, measurement)
    sweep = sweep.restrict(_pictured(sweep, arguments.margins))
    return lambda: common.analyze_sweep("tsne", sweep, arguments, resolved, write_tsne, output)
