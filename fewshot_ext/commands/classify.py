"""Classify pictures into classes that are given by a few pictures each.

The support folder holds a folder for each class, with one or more pictures in it. The pictures of the query folder
are classified on the features of a pre-trained backbone, by default one of ImageNet; where they lie in folders named
after the classes, the accuracy is printed too. Writes predictions.csv (with the probability of every class),
contact_sheet.png (the pictures as the backbone sees them, with the predictions beneath), results.json and config.yaml
to the output folder.

"--reject LEVEL" tells pictures of none of the classes. Each example is left out in turn and classified by the others; a
picture that fits worse than all but a share LEVEL of them is rejected. With N examples the finest level is 1 / (N + 1).
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewshot_ext import _extras
from fewshot_ext._files import as_text, file_sha256, replace_file, replace_text
from fewshot_ext._progress import progress_bar
from fewshot_ext._record import versions
from fewshot_ext._threads import in_threads
from fewshot_ext._validation import check_at_least
from fewshot_ext.classifier import FewShotClassifier
from fewshot_ext.commands.common import (
    CHECKPOINT_HELP,
    add_checkpoint_settings,
    add_machine_arguments,
    add_settings,
    checkpoint_settings,
    print_written,
    set_up_machine,
    tell_passed_over,
    writable_folder,
)
from fewshot_ext.commands.locks import hold_folder
from fewshot_ext.data import Split, contact_sheet
from fewshot_ext.data.folders import list_folder
from fewshot_ext.data.pictures import opened
from fewshot_ext.data.walk import FOLDER_RULE, find_pictures
from fewshot_ext.evaluation import FrozenBackbone, csv_of_rows
from fewshot_ext.evaluation.images import ImageBatches
from fewshot_ext.heads.conformal import check_leaving_one_out, check_reject
from fewshot_ext.heads.names import features_record
from fewshot_ext.models import LocalFeaturesConfig
from fewshot_ext.models.foreign import BringsItsOwn
from fewshot_ext.models.network import DEFAULT

SUMMARY = "sort pictures into classes from a few examples of each"

# Okabe and Ito's bluish green, vermilion and blue, which stay apart for every common kind of color blindness.
_RIGHT, _WRONG, _REJECTED = "#009E73", "#D55E00", "#0072B2"
_REJECTED_CAPTION = "none of these"
_NAMED_AT_MOST = 3
_READ_AT_ONCE = 64


def add_arguments(parser) -> None:
    """Adds the options of ``classify`` to a jsonargparse parser."""
    parser.epilog = FOLDER_RULE
    run = parser.add_argument_group("run")
    run.add_argument(
        "--support", required=True, metavar="DIR", help="folder that holds a folder of pictures for each class"
    )
    run.add_argument("--query", required=True, metavar="DIR", help="folder of the pictures to classify")
    run.add_argument("--output", default="classification", metavar="DIR", help="folder that the results are written to")
    run.add_argument(
        "--reject",
        type=float | None,
        default=None,
        metavar="LEVEL",
        help="mark pictures of none of the classes; about this share of pictures of the classes, 0.1 for a tenth, are "
        "marked as well; needs two pictures a class",
    )
    add_machine_arguments(run)
    run.add_argument("--seed", type=int, default=0, help="seed of the initial classifier of the head finetune")
    run.add_argument("--skip_corrupt", action="store_true", help="leave out pictures that cannot be read")
    run.add_argument("--sheet_pictures", type=int, default=64, help="largest number of pictures on the contact sheet")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--checkpoint",
        default=None,
        type=str | None,
        metavar="FILE",
        help=f"{CHECKPOINT_HELP}; null takes the default where no --backbone is given",
    )
    model.add_argument(
        "--backbone",
        default=None,
        type=str | None,
        metavar="NAME",
        help="timm model in place of a checkpoint, as NAME or NAME=FILE with weights from a file",
    )
    model.add_argument(
        "--head",
        default="finetune",
        help="classifier. On feature vectors: finetune, protonet, protonet_cosine, matchingnet, nearest_neighbor, "
        "nearest_neighbor_euclidean or simpleshot_l2n; on regions of the pictures: deepemd, deepemd_uniform, "
        "deepemd_mean, knn, prediction_fusion, fc_dot or fc_cosine, followed by @fcn, @grid or @sampling for regions "
        "other than those below",
    )
    model.add_argument(
        "--image_size",
        type=int | None,
        default=None,
        help="side to resize to; null takes the backbone's own, or for a checkpoint of other code its paper's",
    )
    model.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="number that divides the logits before the softmax; evaluate --split validation finds a good one",
    )
    model.add_argument("--batch_size", type=int, default=256, help="number of images in a forward pass")
    add_settings(parser, LocalFeaturesConfig, "local_features", "regions, for the heads that look at them")
    add_checkpoint_settings(parser, skip={"image_size"})


@dataclass(frozen=True)
class _Pictures:
    """Picture files of one folder.

    Attributes:
        files: where they are.
        labels: the class that its folder names, None where that is no class.
    """

    files: list[Path]
    labels: list[str | None]


class _Damage(dict[Path, str]):
    """What is wrong with the pictures that cannot be read, by their files."""

    def refuse(self, file: Path, message: str) -> None:
        """Raises ValueError, for all that are known."""
        self[file] = message
        self.check()

    def check(self) -> None:
        """Raises ValueError where there is one."""
        if self:
            shown = as_text("; ".join(list(self.values())[:_NAMED_AT_MOST]))
            more = f"; and {len(self) - _NAMED_AT_MOST} more" if len(self) > _NAMED_AT_MOST else ""
            raise ValueError(f"pictures cannot be read: {shown}{more}; --skip-corrupt leaves them out")


def prepare(arguments, resolved: str) -> Callable[[], int]:
    """Checks the settings, looks at every picture, and returns the function that classifies.

    Args:
        arguments: the parsed options.
        resolved: the same as YAML, to be written beside the results.
    """
    _extras.require("train", "PIL", "tqdm")
    if None not in (arguments.checkpoint, arguments.backbone):
        raise ValueError("expected either --checkpoint or --backbone, and not both")
    check_at_least("sheet_pictures", arguments.sheet_pictures, 1)
    device = set_up_machine(arguments)
    examples = list_folder(arguments.support, Split.NOVEL)
    classes = examples.class_names
    if len(classes) < 2:
        raise ValueError(f"support: expected at least two classes, and {arguments.support} holds {classes[0]!r} alone")
    found = find_pictures(arguments.query)
    query = _Pictures(
        found.files, [next((name for name in part[:-1] if name in classes), None) for part in found.parts]
    )
    backbone, image_size = _backbone(arguments)
    classifier = FewShotClassifier(
        backbone,
        arguments.head,
        image_size=image_size,
        device=device,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        local_features=arguments.local_features,
        temperature=arguments.temperature,
    )
    if classifier.image_size is None:
        raise ValueError("image_size: expected a value, for the backbone does not say its own, got none")
    output = writable_folder(arguments.output)
    hold_folder(output)
    passed_over = {"support": list(examples.passed_over), "query": list(found.passed_over)}
    for name, told in passed_over.items():
        tell_passed_over(arguments[name], told)
    damage = _Damage()
    support, images = _read(_Pictures(examples.files, examples.classes), classifier, damage)
    query = _look(query, damage)
    if not arguments.skip_corrupt:
        damage.check()
    lost = sorted(set(classes) - set(support.labels))
    if lost:
        raise ValueError(f"support has no readable picture of the class {lost[0]!r}")
    if not query.files:
        raise ValueError(f"query has no readable picture in {arguments.query}")
    if known := _examples_among(query.files, support.files):
        told = f"pictures that are examples too: {len(known):,}, such as {known[0].name!r}; they tell nothing of others"
        tell_passed_over(arguments.query, [told])
    if arguments.reject is not None:
        check_reject(arguments.reject, len(support.labels))
        check_leaving_one_out({name: support.labels.count(name) for name in classes})
    # As many as the smallest class has: a head may need more regions than that gives.
    least = min(support.labels.count(name) for name in classes)
    classifier.fit(images[:least], support.labels[:least])
    work = _Work(
        classifier, support, images, query, damage, arguments.skip_corrupt, passed_over, arguments.reject, len(known)
    )
    return lambda: _run(work, output, resolved, arguments.sheet_pictures)


def _backbone(arguments) -> tuple[FrozenBackbone, int | None]:
    """The backbone, and the side of pictures where that is not for the backbone to say."""
    source = arguments.checkpoint or DEFAULT if arguments.backbone is None else f"timm:{arguments.backbone}"
    settings = checkpoint_settings(arguments)
    try:
        return FrozenBackbone.from_checkpoint(source, settings), None
    except BringsItsOwn:
        # The preprocessing stays as it is; pictures may be brought to it in another size.
        own = replace(settings, image_size=None)
        return FrozenBackbone.from_checkpoint(source, own), arguments.image_size


def _read(pictures: _Pictures, classifier: FewShotClassifier, damage: _Damage) -> tuple[_Pictures, Tensor]:
    """The pictures that can be read, and ``[N, C, H, W]`` uint8 of them."""
    with progress_bar(total=len(pictures.files), desc="reading examples") as bar:
        batches = ImageBatches(
            pictures.files,
            channels=classifier.backbone.network.channels,
            image_size=classifier.image_size,
            batch_size=_READ_AT_ONCE,
            on_damage=damage.__setitem__,
            resize_mode=classifier.backbone.network.resize_mode,
        )
        images = []
        for batch in batches:
            images.append(batch)
            bar.update(len(batch))
    return _without(pictures, damage), torch.cat(images) if images else torch.empty(0)


def _look(pictures: _Pictures, damage: _Damage) -> _Pictures:
    """Those that begin as pictures do; the rest of a file is read when its turn comes."""

    def look(file: Path) -> str | None:
        try:
            opened(file, repr(str(file))).close()
        except (OSError, ValueError) as error:
            return str(error)
        return None

    with progress_bar(total=len(pictures.files), desc="looking at pictures") as bar:
        for file, trouble in zip(pictures.files, in_threads(look, pictures.files), strict=True):
            if trouble is not None:
                damage[file] = trouble
            bar.update()
    return _without(pictures, damage)


def _examples_among(files: list[Path], examples: list[Path]) -> list[Path]:
    """Those of the files that have the content of an example."""
    by_size: dict[int, set[str]] = {}
    for example in examples:
        by_size.setdefault(example.stat().st_size, set()).add(file_sha256(example))
    found = ((file, by_size.get(file.stat().st_size)) for file in files)
    return [file for file, same in found if same and file_sha256(file) in same]


def _without(pictures: _Pictures, damage: _Damage) -> _Pictures:
    kept = [index for index, file in enumerate(pictures.files) if file not in damage]
    return _Pictures([pictures.files[index] for index in kept], [pictures.labels[index] for index in kept])


@dataclass(frozen=True)
class _Work:
    """What is classified by what, and what was left out on the way here; ``images`` are those of the support set."""

    classifier: FewShotClassifier
    support: _Pictures
    images: Tensor
    query: _Pictures
    damage: _Damage
    skip_corrupt: bool
    passed_over: dict[str, list[str]]
    reject: float | None
    among_examples: int  # queries that are examples too


def _run(work: _Work, output: Path, resolved: str, sheet_pictures: int) -> int:
    classifier, support, damage = work.classifier, work.support, work.damage
    try:
        rows, shown = _classify(work, sheet_pictures)
    except KeyboardInterrupt:
        print("interrupted before the pictures were classified; nothing was written", file=sys.stderr)
        return 130
    except ValueError as error:
        print(f"fewshot-ext classify: error: {error}; nothing was written", file=sys.stderr)
        return 1
    for message in damage.values():
        print(as_text(f"left out: {message}"), file=sys.stderr)
    known = [row["correct"] for row in rows if row["correct"] is not None]
    accuracy = sum(known) / len(known) if known else None
    rejected = None if work.reject is None else _count_rejected(rows)
    print(f"{len(rows)} pictures classified into {len(classifier.classes_)} classes from {len(support.files)} examples")
    if accuracy is not None:
        where = "" if len(known) == len(rows) else f" of the {len(known)} in folders named after a class"
        wrong = "" if rejected is None else ", where a rejected picture counts as wrong"
        print(f"accuracy {100 * accuracy:.2f} %{where}{wrong}")
    if rejected is not None:
        print(
            f"of none of the classes at level {work.reject:g}: {rejected['in_class_folders']} of the {len(known)} in "
            f"folders named after a class, {rejected['elsewhere']} of the {len(rows) - len(known)} others"
        )
    record = {
        **_record(classifier),
        "support": {str(name): support.labels.count(name) for name in classifier.classes_},
        "queries": len(rows),
        "queries_in_class_folders": len(known),
        "queries_among_examples": work.among_examples,
        "accuracy": accuracy,
        "reject": work.reject,
        "rejected": rejected,
        "left_out": {as_text(file): as_text(message) for file, message in damage.items()},
        "passed_over": work.passed_over,
    }
    try:
        replace_text(output / "predictions.csv", csv_of_rows(rows))
        sheet = _sheet(rows, shown)
        replace_file(output / "contact_sheet.png", lambda path: sheet.save(path))
        replace_text(output / "results.json", json.dumps(record, indent=2) + "\n")
        replace_text(output / "config.yaml", resolved)
    except OSError as error:
        print(f"fewshot-ext classify: error: cannot write the results: {error}", file=sys.stderr)
        return 1
    names = ("predictions.csv", "contact_sheet.png", "results.json", "config.yaml")
    print_written([output / name for name in names])
    return 0


def _classify(work: _Work, sheet_pictures: int) -> tuple[list[dict[str, Any]], dict[int, Tensor]]:
    """The rows of predictions.csv, and by their numbers the pictures of the contact sheet: the only ones kept."""
    classifier, query, damage = work.classifier, work.query, work.damage
    examples, total = len(work.support.files), len(work.query.files)
    # Where they are too many for the sheet, evenly spaced ones, so that each folder shows.
    shown = torch.linspace(0, total - 1, min(total, sheet_pictures)).round().long().tolist()
    wanted, kept = {query.files[index] for index in shown}, {}

    class Batches(ImageBatches):
        def _read(self, path: Path) -> Tensor | None:
            image = super()._read(path)
            if image is not None and path in wanted:
                kept[path] = image
            return image

    batches = Batches(
        query.files,
        channels=classifier.backbone.network.channels,
        image_size=classifier.image_size,
        batch_size=classifier.batch_size,
        # A picture that begins well may end badly: to find that in the last of many hours would cost all of them.
        on_damage=damage.__setitem__ if work.skip_corrupt else damage.refuse,
        resize_mode=classifier.backbone.network.resize_mode,
    )
    with progress_bar(total=examples + total, desc="classifying", unit="pictures") as bar:

        def report(count: int) -> None:
            bar.update(count - bar.n)

        classifier.fit(work.images, work.support.labels, on_progress=report)
        shares, p_values = _look_at(classifier, batches, work.reject, lambda count: report(examples + count))
    query = _without(query, damage)
    best = shares.topk(2)
    rows = [
        {
            "file": as_text(file),
            "predicted": None if none else classifier.classes_[first],
            **({} if work.reject is None else {"rejected": none, "p_value": round(p_value, 4)}),
            "probability": round(share, 4),
            "runner_up": classifier.classes_[second],
            "runner_up_probability": round(second_share, 4),
            "true": label,
            "correct": None if label is None else not none and classifier.classes_[first] == label,
            # A class may be called as another column is, or as what a spreadsheet would run.
            **{f"probability of {name}": round(part, 4) for name, part in zip(classifier.classes_, own, strict=True)},
        }
        for file, label, (first, second), (share, second_share), own, (none, p_value) in zip(
            query.files,
            query.labels,
            best.indices.tolist(),
            best.values.tolist(),
            shares.tolist(),
            p_values,
            strict=True,
        )
    ]
    return rows, {index: kept[file] for index, file in enumerate(query.files) if file in kept}


def _look_at(
    classifier: FewShotClassifier, batches: ImageBatches, reject: float | None, on_progress: Callable[[int], None]
) -> tuple[Tensor, list[tuple[bool, float]]]:
    """Probabilities, and of each picture whether it is of none of the classes, with its p-value; 1 where none ask."""
    if reject is None:
        shares = classifier.predict_proba(batches, on_progress=on_progress)
        return shares, [(False, 1.0)] * len(shares)
    found = classifier.assess(batches, on_progress=on_progress)
    rejected = found.p_values.rejected(reject).tolist()
    return found.probabilities, list(zip(rejected, found.p_values.known.tolist(), strict=True))


def _count_rejected(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """How many pictures are of none of the classes, in folders of a class, where that is wrong, and elsewhere."""
    counts = {"in_class_folders": 0, "elsewhere": 0}
    for row in rows:
        counts["elsewhere" if row["true"] is None else "in_class_folders"] += row["rejected"]
    return counts


def _record(classifier: FewShotClassifier) -> dict[str, Any]:
    backbone = classifier.backbone
    return {
        "backbone": {"name": backbone.name, "sha256": backbone.sha256, "path": backbone.path},
        "head": {"type": type(classifier.head).__name__, **asdict(classifier.head)},
        "local_features": None if classifier.local_features is None else features_record(classifier.local_features),
        "image_size": classifier.image_size,
        "seed": classifier.seed,
        "temperature": classifier.temperature,
        "versions": versions("torch", "numpy", "pillow"),
    }


def _sheet(rows: Sequence[dict[str, Any]], shown: dict[int, Tensor]):
    colors = {True: _RIGHT, False: _WRONG, None: None}
    return contact_sheet(
        list(shown.values()),
        [
            _REJECTED_CAPTION
            if rows[index].get("rejected")
            else f"{rows[index]['predicted']} {rows[index]['probability']:.0%}"
            for index in shown
        ],
        borders=[_REJECTED if rows[index].get("rejected") else colors[rows[index]["correct"]] for index in shown],
    )
