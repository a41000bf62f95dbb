"""The regions that DeepEMD matches between a query and a support image, and how much each of them counts.

Draws random pairs from a data set, of one class and of two, or takes two folders or files of pictures. Writes
matches.png (the strongest flows above, the cross-reference weights as heat maps below), matches.json and .csv (a row a
pair, with its distance) and match_flows.json and .csv (a row for each flow that is drawn).
"""

import sys
from collections.abc import Callable
from pathlib import Path

from fewshot_ext import _extras
from fewshot_ext._files import as_text
from fewshot_ext._record import versions
from fewshot_ext._validation import check_at_least, check_choice
from fewshot_ext.commands.analyze import common
from fewshot_ext.commands.common import (
    CHECKPOINT_HELP,
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
from fewshot_ext.data import Split
from fewshot_ext.data.named import short_name
from fewshot_ext.data.walk import FOLDER_RULE, find_pictures
from fewshot_ext.evaluation import FrozenBackbone
from fewshot_ext.evaluation.images import read_for
from fewshot_ext.experiments.matches import (
    ImagePair,
    check_pairs,
    draw_pairs,
    matches_table,
    measure_matches,
    write_matches,
)
from fewshot_ext.models import LocalFeaturesConfig

SUMMARY = "the regions that DeepEMD matches between two images, drawn"


def add_arguments(parser) -> None:
    """Adds the options of ``analyze matches`` to a jsonargparse parser."""
    parser.epilog = FOLDER_RULE
    run = parser.add_argument_group("run")
    run.add_argument("--checkpoint", type=str | None, default=None, metavar="FILE", help=CHECKPOINT_HELP)
    run.add_argument(
        "--data",
        type=str | None,
        default=None,
        metavar="NAME|FILE",
        help="image set to draw pairs from: digits, a file or a folder",
    )
    run.add_argument(
        "--query",
        type=str | None,
        default=None,
        metavar="PATH",
        help="picture or folder of pictures, in place of --data",
    )
    run.add_argument(
        "--support",
        type=str | None,
        default=None,
        metavar="PATH",
        help="as many pictures as --query has, in the order of their names, or one for all",
    )
    run.add_argument(
        "--output", type=str | None, default=None, metavar="FOLDER", help="folder that the results are written to"
    )
    add_machine_arguments(run, threads=1)
    pairs = parser.add_argument_group("pairs of a data set")
    pairs.add_argument("--classes", default="novel", help="classes to look at: base, validation or novel")
    pairs.add_argument("--same_class", type=int, default=4, metavar="N", help="number of pairs of one class")
    pairs.add_argument("--other_class", type=int, default=2, metavar="N", help="number of pairs of two classes")
    pairs.add_argument("--seed", type=int, default=0, help="seed of the pairs")
    matching = parser.add_argument_group("matching and picture")
    matching.add_argument(
        "--weighting", default="cross_reference", help="weights of the regions: cross_reference or uniform"
    )
    matching.add_argument(
        "--flows",
        type=int,
        default=5,
        help="number of flows that are drawn and listed for each pair, the strongest ones",
    )
    matching.add_argument("--columns", type=int, default=3, help="number of pairs next to each other; 3 fill a page")
    add_settings(parser, LocalFeaturesConfig, "local_features", "regions")
    add_checkpoint_settings(parser)


def prepare(arguments, resolved: str) -> Callable[[], int]:
    """Checks the settings, reads the pictures, and returns the function that matches them."""
    _extras.require("train", "matplotlib")
    for name in ("checkpoint", "output"):
        if arguments[name] is None:
            raise ValueError(f"--{name}: expected a value, got none")
    files = [arguments.query, arguments.support]
    if (arguments.data is None) == (None in files) or (arguments.data is not None and any(files)):
        raise ValueError("expected either --data, or --query and --support")
    check_choice("weighting", arguments.weighting, "cross_reference", "uniform")
    check_choice("classes", arguments.classes, "base", "validation", "novel")
    check_at_least("flows", arguments.flows, 1)
    check_at_least("columns", arguments.columns, 1)
    device = set_up_machine(arguments)
    backbone = FrozenBackbone.from_checkpoint(arguments.checkpoint, checkpoint_settings(arguments))
    data = None
    if arguments.data is None:
        pairs, passed_over = _read_pairs(*files, backbone)
        data = {"name": None, "passed_over": passed_over} if passed_over else None
    else:
        archive = load_data(arguments.data).subset(Split[arguments.classes.upper()])
        pairs = draw_pairs(
            archive, same_class=arguments.same_class, other_class=arguments.other_class, seed=arguments.seed
        )
        data = archive.record(short_name(arguments.data))
    backbone.try_out(pairs[0].query[None], arguments.data or arguments.query, arguments.local_features, device)
    output = writable_folder(arguments.output)
    hold_folder(output, "matches")
    head = {
        "config": common.settings_of(resolved),
        "checkpoint": {"name": backbone.name, "sha256": backbone.sha256},
        "data": data,
        "versions": versions("torch", "numpy", "matplotlib"),
    }
    matching = {"weighting": arguments.weighting, "flows": arguments.flows}

    def run() -> int:
        try:
            drawn, rows, flows = measure_matches(
                pairs, backbone, local_features=arguments.local_features, device=device, **matching
            )
            print(matches_table(rows))
            common.write_config(output, "matches", resolved)
            written = write_matches(output, drawn, rows, flows, **matching, columns=arguments.columns, **head)
        except KeyboardInterrupt:
            print("interrupted; the same command starts anew", file=sys.stderr)
            return 130
        except OSError as error:
            print(f"fewshot-ext analyze matches: error: cannot write the results: {error}", file=sys.stderr)
            return 1
        print_written(written)
        return 0

    return run


def _read_pairs(query: str, support: str, backbone: FrozenBackbone) -> tuple[list[ImagePair], list[str]]:
    """The pairs, and what was passed over in the folders that they come from."""
    if backbone.network.image_size is None:
        raise ValueError(f"checkpoint {backbone.name} was trained on images that are not square: take --data")
    sides: list[list[Path]] = []
    told: list[str] = []
    for name in (query, support):
        path = Path(name).expanduser()
        if path.is_dir():
            found = find_pictures(path)
            tell_passed_over(name, found.passed_over)
            told += found.passed_over
        sides.append(found.files if path.is_dir() else [path])
    count = max(map(len, sides))
    if {len(side) for side in sides} - {1, count}:
        raise ValueError(
            f"query and support: expected as many pictures, or one on either side, got {len(sides[0])} and "
            f"{len(sides[1])}"
        )
    check_pairs(count)
    network = backbone.network
    read = {
        path: read_for(path, network.image_size, network.channels, network.resize_mode)
        for path in dict.fromkeys((*sides[0], *sides[1]))
    }
    sides = [side * count if len(side) == 1 else side for side in sides]
    pairs = zip(*sides, strict=True)
    return [
        ImagePair(read[first], read[second], (as_text(first.stem), as_text(second.stem))) for first, second in pairs
    ], told
