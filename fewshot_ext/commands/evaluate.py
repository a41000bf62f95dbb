"""Measure few-shot accuracy of pre-trained backbones on episodes from classes that they have not seen.

Extracts the features of every image once, draws seeded episodes, and classifies their queries with each of the
chosen heads. Several checkpoints meet the same episodes, and the table gives their differences with intervals.
Prints the table and writes results.json, results.csv and config.yaml to the output folder; features are kept
there too, so that a second call with other heads or episodes takes seconds.

"--open-set N" adds queries of N classes that an episode's support set lacks, and measures how well they are told from
the others by the largest score of the head: AUROC, and the accuracy over the share of queries that are rejected.

"--split validation" also finds, for each head and number of shots, the temperature that calibrates the probabilities
(the one of the least negative log-likelihood). "--temperature T" sets it, here and in classify; the table then has the
expected calibration error. results.csv has it always.

Heads on feature vectors: finetune (the official protocol: a fresh classifier trained by SGD for each episode),
protonet and protonet_cosine (nearest class mean), matchingnet (attention over the support), nearest_neighbor and
nearest_neighbor_euclidean, simpleshot and simpleshot_l2n (nearest mean of normalized features).

Heads on local features: deepemd (optimal matching of the regions; for more than one shot with the structured layer),
deepemd_uniform (equal weights), deepemd_mean (class means in place of the structured layer), knn (nearest local
features), prediction_fusion (local features classified one by one), fc_dot and fc_cosine (a classifier trained on their
mean). The regions follow the name: deepemd@fcn (positions of the feature map, the default), deepemd@grid or
deepemd@sampling (crops); with them protonet, protonet_cosine and matchingnet take the mean of the local features.
"--heads deepemd_table" is the whole comparison of the DeepEMD paper. The rate of the structured layer depends on the
length of the features: choose --deepemd.classifier.lr with "--split validation".

"--protocol deepemd" sets the defaults of that paper's evaluation: the head deepemd, 15 queries, 5000 episodes for one
shot and 600 for several, and a rate of 100 for the structured layer, as the authors have it for their ResNet-12. The
defaults below are those of negative_margin. Whatever is given beside the name of a protocol is taken as given, and
config.yaml tells what was used.

The local features of all images are kept in memory and on disk, one kind at a time: images x regions x channels x 4
bytes. That is 0.77 GB for the 12,000 novel images of mini-ImageNet under a ResNet-12 (25 regions, 640 channels).
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fewshot_ext import _extras
from fewshot_ext._files import remove_leftovers, replace_text
from fewshot_ext.commands.common import (
    CHECKPOINT_HELP,
    DATA_HELP,
    add_checkpoint_settings,
    add_machine_arguments,
    add_settings,
    checkpoint_settings,
    load_data,
    print_written,
    set_up_machine,
    tell_passed_over,
    writable_folder,
)
from fewshot_ext.commands.locks import hold_folder
from fewshot_ext.data import ImageArchive, Split
from fewshot_ext.data.named import short_name
from fewshot_ext.data.walk import FOLDER_RULE
from fewshot_ext.evaluation import Comparison, ComparisonConfig, FeatureCache, FrozenBackbone, ProtocolConfig
from fewshot_ext.evaluation.backbones import distinct_names
from fewshot_ext.evaluation.results import RESULT_FILES
from fewshot_ext.heads import DeepEMDHead, FineTuningConfig, expand_heads
from fewshot_ext.models import LocalFeaturesConfig

SUMMARY = "few-shot accuracy of checkpoints on novel classes, with several heads on the same episodes"


def dependent_defaults(arguments, given) -> dict[str, Any]:
    """What follows from ``--protocol``; the defaults that the options have are those of negative_margin."""
    if arguments.protocol == "negative_margin":
        return {}
    return {
        "heads": ["deepemd"],
        "queries": 15,
        "episodes": tuple(5000 if shot == 1 else 600 for shot in arguments.shots),
        "deepemd.classifier.lr": 100.0,
    }


def add_arguments(parser) -> None:
    """Adds the options of ``evaluate`` to a jsonargparse parser."""
    parser.epilog = FOLDER_RULE
    config, protocol = ComparisonConfig(), ProtocolConfig()
    run = parser.add_argument_group("run")
    run.add_argument(
        "--checkpoint",
        nargs="+",
        required=True,
        metavar="FILE",
        help=f"{CHECKPOINT_HELP}; several are compared, and differences taken to the first",
    )
    run.add_argument("--data", required=True, metavar="NAME|PATH", help=DATA_HELP)
    run.add_argument("--output", default="evaluation", metavar="FOLDER", help="folder that the results are written to")
    add_machine_arguments(run)
    run.add_argument(
        "--seed", type=int, default=config.seed, help="seed of the episodes and of the initial classifiers"
    )
    run.add_argument("--batch_size", type=int, default=config.batch_size, help="number of images in a forward pass")
    run.add_argument(
        "--no_cache", action="store_true", help="do not keep features in the output folder, and do not read kept ones"
    )
    episodes = parser.add_argument_group("episodes")
    episodes.add_argument(
        "--protocol",
        default="negative_margin",
        choices=["negative_margin", "deepemd"],
        help="paper whose evaluation the defaults of the other options are from",
    )
    episodes.add_argument("--split", default=config.split, help="classes to draw from: base, validation or novel")
    episodes.add_argument("--way", type=int, default=protocol.way, help="number of classes in an episode")
    episodes.add_argument(
        "--shots",
        type=int,
        nargs="+",
        default=list(protocol.shots),
        metavar="K",
        help="numbers of support images of each class",
    )
    episodes.add_argument("--queries", type=int, default=protocol.queries, help="number of query images of each class")
    episodes.add_argument(
        "--small_classes",
        default="error",
        choices=["error", "drop"],
        help="what becomes of classes with fewer images than shots and queries take: an error, or they are left out",
    )
    episodes.add_argument(
        "--open_set",
        type=int,
        default=protocol.open_set,
        metavar="N",
        help="number of further classes in an episode that have queries and no support images",
    )
    episodes.add_argument(
        "--episodes",
        type=int | tuple[int, ...],
        default=protocol.episodes,
        help="number of episodes for each number of shots; one number for all, or a list such as [5000,600]",
    )
    episodes.add_argument(
        "--heads",
        nargs="+",
        default=list(config.heads),
        metavar="HEAD",
        help="classifiers from the lists above, or deepemd_table",
    )
    episodes.add_argument(
        "--temperature",
        type=float,
        default=config.temperature,
        metavar="T",
        help="number that divides the logits of every head before the softmax; --split validation finds a good one",
    )
    maps = parser.add_argument_group("memory of local features")
    maps.add_argument(
        "--map_dtype",
        default=config.map_dtype,
        help="type of stored features: float32, or float16 for half the memory; scores are in float32",
    )
    maps.add_argument(
        "--map_memory",
        type=float,
        default=config.map_memory,
        metavar="GIB",
        help="largest memory of local features in GiB",
    )
    # Other heads of the family differ in the weighting; nothing is trained here.
    for name, settings, skip, title in (
        ("finetuning", FineTuningConfig, set(), "head finetune"),
        ("deepemd", DeepEMDHead, {"weighting", "detach_weights"}, "heads deepemd"),
        ("local_features", LocalFeaturesConfig, set(), "local features"),
    ):
        add_settings(parser, settings, name, title, skip)
    add_checkpoint_settings(parser)
    parser.groups["deepemd.classifier"].title = "heads deepemd: structured layer"


def prepare(arguments, resolved: str) -> Callable[[], int]:
    """Checks the settings and returns the function that runs the evaluation.

    Args:
        arguments: the parsed options.
        resolved: the same as YAML, to be written beside the results.
    """
    _extras.require("train", "tqdm")
    config = ComparisonConfig(
        heads=expand_heads(arguments.heads),
        split=arguments.split,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        protocol=ProtocolConfig(
            episodes=arguments.episodes,
            way=arguments.way,
            shots=tuple(arguments.shots),
            queries=arguments.queries,
            open_set=arguments.open_set,
        ),
        finetuning=arguments.finetuning,
        deepemd=arguments.deepemd,
        local_features=arguments.local_features,
        map_dtype=arguments.map_dtype,
        map_memory=arguments.map_memory,
        temperature=arguments.temperature,
    )
    device = set_up_machine(arguments)
    names = distinct_names(arguments.checkpoint)
    settings = checkpoint_settings(arguments)
    backbones = [
        replace(FrozenBackbone.from_checkpoint(path, settings), name=name)
        for name, path in zip(names, arguments.checkpoint, strict=True)
    ]
    archive = load_data(arguments.data)
    if arguments.small_classes == "drop":
        archive = _of_large_classes(archive, config, arguments.data)
    output = writable_folder(arguments.output)
    hold_folder(output)
    remove_leftovers(output / "features")
    comparison = Comparison(
        config,
        archive,
        backbones,
        data_name=short_name(arguments.data),
        device=device,
        cache=FeatureCache(None if arguments.no_cache else output / "features"),
    )
    return lambda: _run(comparison, output, resolved)


def _of_large_classes(archive: ImageArchive, config: ComparisonConfig, name: str) -> ImageArchive:
    """The classes of the split that have images enough for the episodes, and all others; tells which are left out."""
    split = Split[config.split.upper()]
    part = archive.subset(split, held_out=config.split == "base" and archive.has_held_out)
    least = max(config.protocol.shots) + config.protocol.queries
    counts = part.labels.bincount(minlength=part.num_classes).tolist()
    small = {own for own, count in zip(part.class_names, counts, strict=True) if count < least}
    if len(small) == part.num_classes:
        raise ValueError(
            f"small_classes: no {config.split} class of {name} has the {least} images of shots and queries"
        )
    if not small:
        return archive
    first = next(own for own in part.class_names if own in small)
    told = f"{config.split} classes with fewer than {least} images left out: {len(small):,}, such as {first!r}"
    tell_passed_over(name, [told])
    roles = zip(archive.class_names, archive.class_split.tolist(), strict=True)
    kept = archive.with_roles({own: Split(role) for own, role in roles if own not in small})
    return replace(kept, passed_over=(*archive.passed_over, told))


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
        print()
        print_written([output / name for name in (*RESULT_FILES, "config.yaml")])
    else:
        done = comparison.finished
        kept = comparison.cache.folder
        found = "" if kept is None else f"; the same command finds the features extracted so far in {kept}"
        print(f"{trouble}, with {done} of {len(comparison.backbones)} backbones done{found}", file=sys.stderr)
    return exit_code
