"""Classify pictures into classes that are given by a few pictures each.

The support folder holds a folder for each class, with one or more pictures in it. The pictures of the query folder
are classified on the features of a pre-trained backbone; where they lie in folders named after the classes, the
accuracy is printed too. Writes predictions.csv, contact_sheet.png (the pictures as the backbone sees them, with the
predictions beneath), results.json and config.yaml to the output folder.
"""

import csv
import io
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewshot_ext import _extras
from fewshot_ext._checks import check_at_least
from fewshot_ext._files import replace_file, replace_text
from fewshot_ext._progress import progress_bar
from fewshot_ext._record import versions
from fewshot_ext.classifier import FewShotClassifier
from fewshot_ext.commands.common import resolve_device, set_threads, writable_folder
from fewshot_ext.data import contact_sheet, list_images, read_image
from fewshot_ext.data._threads import in_threads
from fewshot_ext.evaluation.head_choice import features_record
from fewshot_ext.evaluation.images import class_folders
from fewshot_ext.models import LocalFeaturesConfig

SUMMARY = "sort pictures into classes from a few examples of each"

# Okabe and Ito's bluish green and vermilion, which stay apart for every common kind of colour blindness.
_RIGHT, _WRONG = "#009E73", "#D55E00"
_NAMED_AT_MOST = 3


def add_arguments(parser) -> None:
    """Adds the options of ``classify`` to a jsonargparse parser."""
    run = parser.add_argument_group("run")
    run.add_argument("--support", required=True, metavar="DIR", help="a folder of pictures for each class")
    run.add_argument("--query", required=True, metavar="DIR", help="the pictures to classify")
    run.add_argument("--output", default="classification", metavar="DIR", help="where the results go")
    run.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu or cuda")
    run.add_argument("--threads", type=int | None, default=None, help="CPU threads; null for torch's own choice")
    run.add_argument("--seed", type=int, default=0, help="decides the initial classifier of the head finetune")
    run.add_argument("--skip_corrupt", action="store_true", help="leave out pictures that cannot be read")
    run.add_argument("--sheet_pictures", type=int, default=64, help="most pictures on the contact sheet")
    model = parser.add_argument_group("model")
    model.add_argument("--checkpoint", default=None, type=str | None, metavar="FILE", help="of fewshot-ext pretrain")
    model.add_argument("--backbone", default=None, type=str | None, metavar="NAME", help="in its place: a timm model")
    model.add_argument(
        "--head",
        default="finetune",
        help="on feature vectors: finetune, protonet, protonet_cosine, matchingnet, nearest_neighbor, "
        "nearest_neighbor_euclidean or simpleshot_l2n; on regions of the pictures: deepemd, deepemd_uniform, "
        "deepemd_mean, knn, prediction_fusion, fc_dot or fc_cosine, followed by @fcn, @grid or @sampling for regions "
        "other than those below",
    )
    model.add_argument(
        "--image_size", type=int | None, default=None, help="side to resize to; null for that of the backbone"
    )
    model.add_argument("--batch_size", type=int, default=256, help="images a forward pass")
    parser.add_class_arguments(LocalFeaturesConfig, "local_features")
    # Otherwise the title is a sentence of the docstring.
    parser.groups["local_features"].title = "regions, for the heads that look at them"


@dataclass(frozen=True)
class _Pictures:
    """Pictures of one folder, read and of one size.

    Attributes:
        images: ``[N, C, H, W]`` uint8.
        files: where each comes from.
        labels: the class that its folder names, None where that is no class.
    """

    images: Tensor
    files: list[Path]
    labels: list[str | None]


def prepare(arguments, resolved: str) -> Callable[[], int]:
    """Checks the settings, reads every picture, and returns the function that classifies.

    Args:
        arguments: the parsed options.
        resolved: the same as YAML, to be written beside the results.
    """
    _extras.require("train", "PIL", "tqdm")
    if (arguments.checkpoint is None) == (arguments.backbone is None):
        raise ValueError("either --checkpoint or --backbone must be given, and not both")
    check_at_least("sheet_pictures", arguments.sheet_pictures, 1)
    set_threads(arguments.threads)
    support_files, support_labels = class_folders(arguments.support)
    classes = set(support_labels)
    if len(classes) < 2:
        raise ValueError(
            f"support must hold at least two classes, and {arguments.support} holds {classes.pop()!r} alone"
        )
    query_root = Path(arguments.query).expanduser()
    query_files = list_images(query_root)
    tops = [file.relative_to(query_root).parts[0] for file in query_files]
    query_labels = [top if top in classes else None for top in tops]
    classifier = FewShotClassifier(
        Path(arguments.checkpoint) if arguments.checkpoint is not None else arguments.backbone,
        arguments.head,
        image_size=arguments.image_size,
        device=resolve_device(arguments.device),
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        local_features=arguments.local_features,
    )
    if classifier.image_size is None:
        raise ValueError("image_size must be given, for the backbone does not say its own")
    output = writable_folder(arguments.output)
    pictures, corrupt = _read(support_files + query_files, classifier)
    if corrupt and not arguments.skip_corrupt:
        shown = "; ".join(list(corrupt.values())[:_NAMED_AT_MOST])
        more = f"; and {len(corrupt) - _NAMED_AT_MOST} more" if len(corrupt) > _NAMED_AT_MOST else ""
        raise ValueError(f"pictures cannot be read: {shown}{more}; --skip_corrupt leaves them out")
    support = _select(pictures, support_files, support_labels)
    query = _select(pictures, query_files, query_labels)
    lost = sorted(classes - set(support.labels))
    if lost:
        raise ValueError(f"support has no readable picture of the class {lost[0]!r}")
    if not query.files:
        raise ValueError(f"query has no readable picture in {arguments.query}")
    # As many as the smallest class has: a head may need more regions than that gives.
    least = min(support.labels.count(name) for name in classes)
    classifier.fit(support.images[:least], support.labels[:least])
    return lambda: _run(classifier, support, query, corrupt, output, resolved, arguments.sheet_pictures)


def _read(files: Sequence[Path], classifier: FewShotClassifier) -> tuple[dict[Path, Tensor], dict[Path, str]]:
    """Pictures by file, and for the damaged ones what is wrong with them."""
    mode = "L" if classifier.backbone.channels == 1 else "RGB"

    def read(file: Path) -> Tensor | str:
        try:
            return read_image(file, classifier.image_size, mode=mode)
        except (OSError, ValueError) as error:
            return str(error)

    pictures, corrupt = {}, {}
    with progress_bar(total=len(files), desc="reading pictures") as bar:
        for file, result in zip(files, in_threads(read, files), strict=True):
            if isinstance(result, Tensor):
                pictures[file] = result
            else:
                corrupt[file] = result
            bar.update()
    return pictures, corrupt


def _select(pictures: dict[Path, Tensor], files: Sequence[Path], labels: Sequence[str | None]) -> _Pictures:
    there = [(file, label) for file, label in zip(files, labels, strict=True) if file in pictures]
    images = torch.stack([pictures[file] for file, _ in there]) if there else torch.empty(0)
    return _Pictures(images, [file for file, _ in there], [label for _, label in there])


def _run(
    classifier: FewShotClassifier,
    support: _Pictures,
    query: _Pictures,
    corrupt: dict[Path, str],
    output: Path,
    resolved: str,
    sheet_pictures: int,
) -> int:
    for message in corrupt.values():
        print(f"left out: {message}", file=sys.stderr)
    try:
        rows = _classify(classifier, support, query)
    except KeyboardInterrupt:
        print("interrupted before the pictures were classified; nothing was written", file=sys.stderr)
        return 130
    known = [row["correct"] for row in rows if row["correct"] is not None]
    accuracy = sum(known) / len(known) if known else None
    print(f"{len(rows)} pictures classified into {len(classifier.classes_)} classes from {len(support.files)} examples")
    if accuracy is not None:
        where = "" if len(known) == len(rows) else f" of the {len(known)} in folders named after a class"
        print(f"accuracy {100 * accuracy:.2f} %{where}")
    record = {
        **_record(classifier),
        "support": {str(name): support.labels.count(name) for name in classifier.classes_},
        "queries": len(rows),
        "queries_in_class_folders": len(known),
        "accuracy": accuracy,
        "left_out": {str(file): message for file, message in corrupt.items()},
    }
    try:
        replace_text(output / "predictions.csv", _csv(rows))
        sheet = _sheet(rows, query.images, sheet_pictures)
        replace_file(output / "contact_sheet.png", lambda path: sheet.save(path))
        replace_text(output / "results.json", json.dumps(record, indent=2) + "\n")
        replace_text(output / "config.yaml", resolved)
    except OSError as error:
        print(f"fewshot-ext classify: error: cannot write the results: {error}", file=sys.stderr)
        return 1
    names = ("predictions.csv", "contact_sheet.png", "results.json", "config.yaml")
    print("written:", ", ".join(str(output / name) for name in names), flush=True)
    return 0


def _classify(classifier: FewShotClassifier, support: _Pictures, query: _Pictures) -> list[dict[str, Any]]:
    examples = len(support.files)
    with progress_bar(total=examples + len(query.files), desc="classifying", unit="pictures") as bar:

        def report(count: int) -> None:
            bar.update(count - bar.n)

        classifier.fit(support.images, support.labels, on_progress=report)
        shares = classifier.predict_proba(query.images, on_progress=lambda count: report(examples + count))
    best = shares.topk(2)
    return [
        {
            "file": str(file),
            "predicted": classifier.classes_[first],
            "probability": round(share, 4),
            "runner_up": classifier.classes_[second],
            "runner_up_probability": round(second_share, 4),
            "true": label,
            "correct": None if label is None else classifier.classes_[first] == label,
        }
        for file, label, (first, second), (share, second_share) in zip(
            query.files, query.labels, best.indices.tolist(), best.values.tolist(), strict=True
        )
    ]


def _record(classifier: FewShotClassifier) -> dict[str, Any]:
    backbone = classifier.backbone
    return {
        "backbone": {"name": backbone.name, "sha256": backbone.sha256, "path": backbone.path},
        "head": {"type": type(classifier.head).__name__, **asdict(classifier.head)},
        "local_features": None if classifier.local_features is None else features_record(classifier.local_features),
        "image_size": classifier.image_size,
        "seed": classifier.seed,
        "versions": versions("torch", "numpy", "pillow"),
    }


def _sheet(rows: Sequence[dict[str, Any]], images: Tensor, most: int):
    """The pictures with their predictions; where they are too many, evenly spaced ones, so that each folder shows."""
    shown = torch.linspace(0, len(rows) - 1, min(len(rows), most)).round().long().tolist()
    colours = {True: _RIGHT, False: _WRONG, None: None}
    return contact_sheet(
        [images[index] for index in shown],
        [f"{rows[index]['predicted']} {rows[index]['probability']:.0%}" for index in shown],
        borders=[colours[rows[index]["correct"]] for index in shown],
    )


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
