"""Watch negative-margin pre-training and few-shot evaluation run on real images, in one or two minutes.

This is analyze margins on the handwritten digits that scikit-learn ships. It pre-trains a small convolutional network
on the digits 0-4, once for each margin and seed; then it classifies five-way episodes from held-out images of these
base classes and from the novel digits 5-9, fine-tuning a fresh classifier for every episode. Prints one table and
writes margins.json, margins.csv, margins.png, checkpoints and TensorBoard logs to the output folder. The same command
goes on with an interrupted demo, and the other analyses take the folder as --sweep.
"""

from fewshot_ext.commands.analyze import margins

SUMMARY = "accuracy over margins on handwritten digits, in one or two minutes"


def add_arguments(parser) -> None:
    """Adds the options of ``analyze margins`` to a jsonargparse parser, with defaults of which none is missing."""
    margins.add_arguments(parser)
    parser.set_defaults(
        data="digits",
        output="demo_output",
        jobs=2,
        losses=["cosine"],
        cosine_margins=[-0.3, -0.1, 0.0, 0.1, 0.3],
        seeds=[0, 1, 2],
        held_out=0.4,
    )


prepare = margins.prepare
