"""Watch negative-margin pre-training and few-shot evaluation run on real images, in one or two minutes.

Pre-trains a small convolutional network on the handwritten digits 0-4 that scikit-learn ships, once for each
margin and run; then classifies five-way episodes from held-out images of these base classes and from the
novel digits 5-9, fine-tuning a fresh classifier for every episode. Prints one table and writes results.json,
results.csv, accuracy_over_margin.png, checkpoints and TensorBoard logs to the output folder.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from fewshot_ext import _extras
from fewshot_ext._files import replace_text
from fewshot_ext._validation import check_at_least
from fewshot_ext.commands.common import print_written, resolve_device, writable_folder
from fewshot_ext.commands.locks import hold_folder
from fewshot_ext.data import AugmentationConfig, load_digits
from fewshot_ext.evaluation import ProtocolConfig
from fewshot_ext.experiments import MarginSweep, MarginSweepConfig
from fewshot_ext.heads import FineTuningConfig
from fewshot_ext.training import BackboneConfig, PreTrainingConfig

SUMMARY = "accuracy over margins on handwritten digits, in one or two minutes"

# Sizes for 541 training images of 8 x 8 pixels, three poolings to a 1 x 1 map; the recipe is the paper's.
PRETRAINING = PreTrainingConfig(
    epochs=20,
    batch_size=64,
    checkpoint_epochs=5,
    backbone=BackboneConfig(pooled_blocks=3),
    augmentation=AugmentationConfig(rotation=10.0, translation=0.1, zoom=0.1),
)


def add_arguments(parser) -> None:
    """Adds the options of ``demo`` to a jsonargparse parser."""
    sweep, protocol = MarginSweepConfig(), ProtocolConfig()
    run = parser.add_argument_group("run")
    run.add_argument("--output", default="demo_output", metavar="FOLDER", help="where the results go")
    run.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu or cuda")
    run.add_argument(
        "--threads",
        type=int,
        default=1,
        help="CPU threads; images this small gain little from more, and one gives the same numbers on any "
        "number of cores",
    )
    run.add_argument("--seed", type=int, default=sweep.seed, help="the same seed gives the same numbers on one machine")
    run.add_argument(
        "--resume",
        action="store_true",
        help="go on with an interrupted run in the output folder, with the same settings",
    )
    sizes = parser.add_argument_group("experiment")
    sizes.add_argument(
        "--margins",
        type=float,
        nargs="+",
        default=list(sweep.margins),
        metavar="M",
        help="pre-training margins",
    )
    sizes.add_argument(
        "--runs", type=int, default=sweep.runs, help="repetitions of the whole sweep, each with its own seed"
    )
    sizes.add_argument("--epochs", type=int, default=PRETRAINING.epochs, help="pre-training epochs for each margin")
    sizes.add_argument("--episodes", type=int, default=protocol.episodes, help="episodes for each number of shots")
    sizes.add_argument(
        "--shots",
        type=int,
        nargs="+",
        default=list(protocol.shots),
        metavar="K",
        help="support images a class",
    )
    sizes.add_argument("--queries", type=int, default=protocol.queries, help="query images a class")
    parser.add_class_arguments(PreTrainingConfig, "pretraining", skip={"margin", "epochs"}, default=PRETRAINING)
    parser.add_class_arguments(FineTuningConfig, "finetuning")


def prepare(arguments, resolved: str) -> Callable[[], int]:
    """Checks the settings and returns the function that runs the demo.

    Args:
        arguments: the parsed options.
        resolved: the same as YAML, to be written beside the results.
    """
    _extras.require("train", "sklearn")
    config = MarginSweepConfig(
        margins=tuple(arguments.margins),
        runs=arguments.runs,
        seed=arguments.seed,
        protocol=ProtocolConfig(episodes=arguments.episodes, shots=tuple(arguments.shots), queries=arguments.queries),
        pretraining=replace(arguments.pretraining, epochs=arguments.epochs),
        finetuning=arguments.finetuning,
    )
    check_at_least("threads", arguments.threads, 1)
    torch.set_num_threads(arguments.threads)
    device = resolve_device(arguments.device)
    output = writable_folder(arguments.output)
    hold_folder(output)
    sweep = MarginSweep(config, load_digits(), output, device=device, resume=arguments.resume)
    return lambda: _run(sweep, output, resolved)


def _run(sweep: MarginSweep, output: Path, resolved: str) -> int:
    replace_text(output / "config.yaml", resolved)
    print(f"{len(sweep)} trainings, {len(sweep.results.finished)} of them done, into {output}", file=sys.stderr)
    try:
        sweep.run()
        exit_code = 0
    except KeyboardInterrupt:
        exit_code = 130
    results = sweep.results
    if results.accuracies:
        print(results.table())
        print()
        for line in results.findings():
            print(line)
        print_written(results.write(output))
    if exit_code:
        print(
            f"interrupted with {len(results.finished)} of {len(sweep)} backbones done; "
            f"the same command with --resume goes on from {output}",
            file=sys.stderr,
        )
    return exit_code
