"""Measure few-shot accuracy of pre-trained backbones on episodes from classes that they have not seen.

Extracts the features of every image once, draws seeded episodes, and classifies their queries with each of the
chosen heads. Several checkpoints meet the same episodes, and the table gives their differences with intervals.
Prints the table and writes results.json, results.csv and config.yaml to the output folder; features are kept
there too, so that a second call with other heads or episodes takes seconds.

Heads: finetune (the official protocol: a fresh classifier trained by SGD for each episode), protonet and
protonet_cosine (nearest class mean), matchingnet (attention over the support), nearest_neighbor and
nearest_neighbor_euclidean, simpleshot and simpleshot_l2n (nearest mean of normalised features).
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fewshot_ext import _extras
from fewshot_ext._files import replace_text
from fewshot_ext.commands.common import resolve_device, set_threads, writable_folder
from fewshot_ext.data import load_images
from fewshot_ext.evaluation import (
    Comparison,
    ComparisonConfig,
    FeatureCache,
    FineTuningConfig,
    FrozenBackbone,
    ProtocolConfig,
)
from fewshot_ext.evaluation.backbones import distinct_names
from fewshot_ext.evaluation.results import RESULT_FILES

SUMMARY = "few-shot accuracy of checkpoints on novel classes, with several heads on the same episodes"


def add_arguments(parser) -> None:
    """Adds the options of ``evaluate`` to a jsonargparse parser."""
    config, protocol = ComparisonConfig(), ProtocolConfig()
    run = parser.add_argument_group("run")
    run.add_argument(
        "--checkpoint",
        nargs="+",
        required=True,
        metavar="FILE",
        help="checkpoints of fewshot-ext pretrain; differences are taken to the first",
    )
    run.add_argument("--data", required=True, metavar="NAME_OR_PATH", help="images: a known name, a file or a folder")
    run.add_argument("--output", default="evaluation", metavar="FOLDER", help="where the results go")
    run.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu or cuda")
    run.add_argument("--threads", type=int | None, default=None, help="CPU threads; null for torch's own choice")
    run.add_argument("--seed", type=int, default=config.seed, help="decides episodes and initial classifiers")
    run.add_argument("--batch_size", type=int, default=config.batch_size, help="images a forward pass")
    run.add_argument("--no_cache", action="store_true", help="neither read nor keep features in the output folder")
    episodes = parser.add_argument_group("episodes")
    episodes.add_argument("--split", default=config.split, help="classes to draw from: base, validation or novel")
    episodes.add_argument("--way", type=int, default=protocol.way, help="classes an episode")
    episodes.add_argument(
        "--shots", type=int, nargs="+", default=list(protocol.shots), metavar="K", help="support images a class"
    )
    episodes.add_argument("--queries", type=int, default=protocol.queries, help="query images a class")
    episodes.add_argument("--episodes", type=int, default=protocol.episodes, help="episodes for each number of shots")
    episodes.add_argument(
        "--heads", nargs="+", default=list(config.heads), metavar="HEAD", help="classifiers, from the list above"
    )
    parser.add_class_arguments(FineTuningConfig, "finetuning")
    # Otherwise the title is a sentence of the docstring.
    parser.groups["finetuning"].title = "head finetune"


def prepare(arguments, resolved: str) -> Callable[[], int]:
    """Checks the settings and returns the function that runs the evaluation.

    Args:
        arguments: the parsed options.
        resolved: the same as YAML, to be written beside the results.
    """
    _extras.require("train", "tqdm")
    config = ComparisonConfig(
        heads=tuple(arguments.heads),
        split=arguments.split,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        protocol=ProtocolConfig(
            episodes=arguments.episodes,
            way=arguments.way,
            shots=tuple(arguments.shots),
            queries=arguments.queries,
        ),
        finetuning=arguments.finetuning,
    )
    set_threads(arguments.threads)
    device = resolve_device(arguments.device)
    names = distinct_names(arguments.checkpoint)
    backbones = [
        replace(FrozenBackbone.from_checkpoint(path), name=name)
        for name, path in zip(names, arguments.checkpoint, strict=True)
    ]
    archive = load_images(arguments.data)
    output = writable_folder(arguments.output)
    comparison = Comparison(
        config,
        archive,
        backbones,
        data_name=Path(arguments.data).stem,
        device=device,
        cache=FeatureCache(None if arguments.no_cache else output / "features"),
    )
    return lambda: _run(comparison, output, resolved)


def _run(comparison: Comparison, output: Path, resolved: str) -> int:
    exit_code, trouble = 0, None
    try:
        replace_text(output / "config.yaml", resolved)
        comparison.run(output)
    except KeyboardInterrupt:
        exit_code, trouble = 130, "interrupted"
    except OSError as error:
        exit_code, trouble = 1, f"error: {error}"
    results = comparison.results
    if results.accuracies:
        print(results.table())
    if trouble is None:
        print("\nwritten:", ", ".join(str(output / name) for name in (*RESULT_FILES, "config.yaml")), flush=True)
    else:
        done = len({row.backbone for row in results.accuracies})
        kept = comparison.cache.folder
        found = "" if kept is None else f"; the same command finds the features extracted so far in {kept}"
        print(f"{trouble}, with {done} of {len(comparison.backbones)} backbones done{found}", file=sys.stderr)
    return exit_code
