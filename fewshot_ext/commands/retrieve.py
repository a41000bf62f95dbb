"""Find the nearest images of every query by the embeddings of a checkpoint, and measure how many are of its class.

Takes the unseen classes of an image set, or folders of pictures with a folder for each class: --query alone, where
every picture is searched among the others, or --query and --gallery. Prints Recall@K, MAP@R, R-precision and NMI, and
writes them to retrieval.json and retrieval.csv, the neighbours of every query to neighbors.csv, and a picture of
some queries with their nearest neighbours, right and wrong ones marked, to neighbors.png.
"""

import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewshot_ext import _extras
from fewshot_ext._checks import check_at_least, check_choice
from fewshot_ext._files import replace_file, replace_text
from fewshot_ext._progress import progress_bar
from fewshot_ext._random import derive_generator
from fewshot_ext._record import versions
from fewshot_ext.commands.common import resolve_device, set_threads, writable_folder
from fewshot_ext.data import Split, load_images
from fewshot_ext.evaluation import (
    FrozenBackbone,
    check_retrieval,
    clustering_nmi,
    csv_of_rows,
    measure_spread,
    nearest_neighbors,
    retrieval_metrics,
)
from fewshot_ext.evaluation.retrieval import DISTANCES
from fewshot_ext.evaluation.retrieval_images import LabelledImages, common_labels, neighbor_rows, neighbor_sheet

SUMMARY = "nearest images by a checkpoint's embeddings: Recall@K, MAP@R, NMI and a picture"
FILES = ("retrieval.json", "retrieval.csv", "neighbors.csv", "neighbors.png", "config.yaml")


def add_arguments(parser) -> None:
    """Adds the options of ``retrieve`` to a jsonargparse parser."""
    run = parser.add_argument_group("run")
    run.add_argument(
        "--checkpoint", required=True, metavar="FILE", help="of fewshot-ext metric-train, or of another training"
    )
    run.add_argument("--output", default="retrieval", metavar="FOLDER", help="where the results go")
    run.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu or cuda")
    run.add_argument("--threads", type=int | None, default=None, help="CPU threads; null for torch's own choice")
    run.add_argument("--batch_size", type=int, default=256, help="images a forward pass")
    images = parser.add_argument_group("images")
    images.add_argument(
        "--data", type=str | None, default=None, metavar="NAME|FILE", help="image set: a known name, a file or a folder"
    )
    images.add_argument("--split", default="novel", help="classes of the set to search: base, validation or novel")
    images.add_argument(
        "--query", type=str | None, default=None, metavar="DIR", help="in place of --data: a folder for each class"
    )
    images.add_argument(
        "--gallery", type=str | None, default=None, metavar="DIR", help="what is searched; null for the queries"
    )
    measures = parser.add_argument_group("measures")
    measures.add_argument("--ks", type=int, nargs="+", default=[1, 2, 4, 8], metavar="K", help="the K of Recall@K")
    measures.add_argument("--distance", default="cosine", help="cosine or euclidean")
    measures.add_argument(
        "--lone_queries",
        default="error",
        help="queries whose class has no other image: error, exclude (leave them out) or miss (count them as wrong)",
    )
    measures.add_argument("--no_nmi", action="store_true", help="leave out the clustering, which takes the longest")
    measures.add_argument("--seed", type=int, default=0, help="decides the clustering, and the queries of the picture")
    picture = parser.add_argument_group("neighbours")
    picture.add_argument("--neighbors", type=int, default=8, help="neighbours a query in neighbors.csv and .png")
    picture.add_argument("--rows", type=int, default=10, help="queries in the picture")


def prepare(arguments, resolved: str) -> Callable[[], int]:
    """Checks the settings, opens every picture, and returns the function that searches.

    Args:
        arguments: the parsed options.
        resolved: the same as YAML, to be written beside the results.
    """
    _extras.require("train", "PIL", "tqdm")
    if not arguments.no_nmi:
        _extras.require("metric", "sklearn")
    for name in ("batch_size", "neighbors", "rows"):
        check_at_least(name, arguments[name], 1)
    check_at_least("seed", arguments.seed, 0)
    check_choice("distance", arguments.distance, *DISTANCES)
    check_choice("split", arguments.split, *(split.name.lower() for split in Split))
    set_threads(arguments.threads)
    device = resolve_device(arguments.device)
    if (arguments.data is None) == (arguments.query is None):
        raise ValueError("either --data or --query must be given, and not both")
    if arguments.data is not None and arguments.gallery is not None:
        raise ValueError("--gallery goes with --query; the classes of --data are searched among themselves")
    backbone = FrozenBackbone.from_checkpoint(arguments.checkpoint)
    queries, gallery = _images(arguments, backbone, device)
    labels = common_labels(queries) if gallery is None else common_labels(queries, gallery)
    check_retrieval(*labels, ks=(*arguments.ks,), lone_queries=arguments.lone_queries)
    most = len(queries) - 1 if gallery is None else len(gallery)
    if arguments.neighbors > most:
        raise ValueError(f"neighbors must be at most {most}, the images that are searched, got {arguments.neighbors}")
    output = writable_folder(arguments.output)
    search = _Search(backbone, queries, gallery, labels, arguments)
    return lambda: _run(search, output, resolved)


def _images(arguments, backbone: FrozenBackbone, device: torch.device) -> tuple[LabelledImages, LabelledImages | None]:
    if arguments.data is not None:
        archive = load_images(arguments.data).subset(Split[arguments.split.upper()])
        backbone.try_out(archive.images[:1], arguments.data, device=device)
        return LabelledImages.of_archive(archive), None
    if backbone.image_size is None:
        raise ValueError(f"checkpoint {backbone.path} takes images that are not square: pack the pictures, take --data")
    query = Path(arguments.query).expanduser()
    gallery = None if arguments.gallery is None else Path(arguments.gallery).expanduser()
    if gallery is not None and gallery.resolve() == query.resolve():
        raise ValueError("gallery is the folder of the queries, each of which would find itself: leave --gallery out")
    queries = LabelledImages.of_folder(query)
    backbone.try_out(torch.stack(queries.pixels(backbone, [0])), str(query), device=device)
    return queries, None if gallery is None else LabelledImages.of_folder(gallery)


class _Search:
    """What is searched for what, and how."""

    def __init__(
        self,
        backbone: FrozenBackbone,
        queries: LabelledImages,
        gallery: LabelledImages | None,
        labels: Sequence[Tensor],
        arguments: Namespace,
    ) -> None:
        self.backbone, self.queries, self.gallery, self.arguments = backbone, queries, gallery, arguments
        self.labels = labels

    def run(self) -> tuple[dict[str, Any], Tensor]:
        """The measures, and the neighbours ``[Q, k]`` of every query; they are what re-ranking would take."""
        arguments, parts = self.arguments, [part for part in (self.queries, self.gallery) if part is not None]
        with progress_bar(total=sum(map(len, parts)), desc="embedding", unit=" images") as bar:
            embeddings = [part.embed(self.backbone, arguments.batch_size, bar.update) for part in parts]
        labels = [label.to(embeddings[0].device) for label in self.labels]
        pairs = [value for pair in zip(embeddings, labels, strict=True) for value in pair]
        with progress_bar(total=len(self.queries), desc="searching", unit=" queries") as bar:
            metrics = retrieval_metrics(
                *pairs,
                ks=(*arguments.ks,),
                distance=arguments.distance,
                lone_queries=arguments.lone_queries,
                on_progress=lambda count: bar.update(count - bar.n),
            )
        neighbors = nearest_neighbors(*embeddings, k=arguments.neighbors, distance=arguments.distance)
        found: dict[str, Any] = {"queries": metrics.queries, "gallery": len(parts[-1]), **metrics.row()}
        if not arguments.no_nmi:
            found["nmi"] = clustering_nmi(*pairs[:2], distance=arguments.distance, seed=arguments.seed)
        return {**found, **measure_spread(embeddings[0]).row()}, neighbors.cpu()


def _run(search: _Search, output: Path, resolved: str) -> int:
    started = time.perf_counter()
    try:
        found, neighbors = search.run()
        print(_table(search, found))
        _write(search, found, neighbors, output, resolved, round(time.perf_counter() - started, 1))
    except KeyboardInterrupt:
        print("interrupted before everything was measured; nothing was written", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        # A full disk, pixels that cannot be decoded, embeddings beyond what floats can hold: all come late.
        print(f"fewshot-ext retrieve: error: {error}", file=sys.stderr)
        return 1
    print("written:", ", ".join(str(output / name) for name in FILES), flush=True)
    return 0


def _table(search: _Search, found: dict[str, Any]) -> str:
    arguments = search.arguments
    where = f"{arguments.split} classes of {arguments.data}" if arguments.data else str(arguments.query)
    among = "the others" if search.gallery is None else f"{found['gallery']:,} images of {arguments.gallery}"
    classes = len(set(search.queries.classes))
    shares = {f"Recall@{k}": found[f"recall_at_{k}"] for k in arguments.ks}
    shares |= {"MAP@R": found["map_at_r"], "R-precision": found["r_precision"]}
    shares |= {"NMI": found["nmi"]} if "nmi" in found else {}
    return "\n".join(
        [
            f"{where}: {found['queries']:,} queries of {classes} classes, searched among {among}",
            "",
            "".join(name.rjust(13) for name in shares),
            "".join(f"{100 * share:.2f} %".rjust(13) for share in shares.values()),
            "",
            f"coding rate {found['coding_rate']:.2f} nats, effective rank {found['effective_rank']:.1f} of "
            f"{len(found['spectrum'])} dimensions",
        ]
    )


def _write(
    search: _Search, found: dict[str, Any], neighbors: Tensor, output: Path, resolved: str, seconds: float
) -> None:
    arguments, backbone = search.arguments, search.backbone
    gallery = search.queries if search.gallery is None else search.gallery
    record = {
        "checkpoint": {"path": backbone.path, "sha256": backbone.sha256},
        "images": {name: arguments[name] for name in ("data", "split", "query", "gallery")},
        "distance": arguments.distance,
        "lone_queries": arguments.lone_queries,
        "seed": arguments.seed,
        "measures": found,
        "seconds": seconds,
        "versions": versions("torch", "numpy"),
    }
    row = {"checkpoint": backbone.path, **record["images"], "distance": arguments.distance, **found}
    replace_text(output / "retrieval.json", json.dumps(record, indent=2) + "\n")
    replace_text(output / "retrieval.csv", csv_of_rows([row]))
    replace_text(output / "neighbors.csv", csv_of_rows(neighbor_rows(search.queries, gallery, neighbors)))
    order = torch.randperm(len(search.queries), generator=derive_generator(arguments.seed))
    asked = order[: arguments.rows].sort().values.tolist()
    sheet = neighbor_sheet(backbone, search.queries, gallery, neighbors[asked], asked)
    replace_file(output / "neighbors.png", lambda path: sheet.save(path))
    replace_text(output / "config.yaml", resolved)
