"""Find the nearest images of every query by the embeddings of a checkpoint, and measure how many are of its class.

Takes the unseen classes of an image set, or folders of pictures with a folder for each class: --query alone, where
every picture is searched among the others, or --query and --gallery. Of an image set that marks its queries, as the
packed In-Shop Clothes does, these are searched among the others alone. Prints Recall@K, MAP@R, R-precision, NMI and
F1, and writes them to retrieval.json and retrieval.csv, the neighbors of every query to neighbors.csv, and a picture
of some queries with their nearest neighbors, right and wrong ones marked, to neighbors.png.

--rerank N retrieves in two stages: the N images nearest by their embeddings are put in the order of the Earth Mover's
Distance (EMD) between their regions. Recall@K is then given before and after; neighbors.csv and neighbors.png have the
second order, with the place that each image had in the first. The other measures are those of the embeddings. What the
first stage finds is written before the second begins, and is there if that is interrupted.
The regions are what --local-features says. They are compared by the backbone's dense features: where a metric training
put a projection behind the backbone (--backbone.embedding), the first stage takes the projected vectors, and the second
the features before the projection, which no loss compared directly. The local features of all images are in memory,
images x regions x channels x 4 bytes, and the pixels of pictures from folders beside them; --map-memory is the limit.
"""

import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewshot_ext import _extras
from fewshot_ext._files import replace_file, replace_text
from fewshot_ext._progress import progress_bar
from fewshot_ext._random import derive_generator
from fewshot_ext._record import versions
from fewshot_ext._validation import check_at_least, check_choice, check_counts, check_positive
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
from fewshot_ext.data.walk import FOLDER_RULE
from fewshot_ext.evaluation import FrozenBackbone, csv_of_rows
from fewshot_ext.evaluation.protocol import check_map_memory
from fewshot_ext.heads.names import features_record
from fewshot_ext.models import LocalFeaturesConfig
from fewshot_ext.models.network import DEFAULT
from fewshot_ext.retrieval import (
    ClusteringMetrics,
    RerankedRetrieval,
    check_retrieval,
    clustering_metrics,
    measure_spread,
    nearest_neighbors,
    retrieval_metrics,
    retrieve_and_rerank,
)
from fewshot_ext.retrieval.measures import DISTANCES
from fewshot_ext.retrieval.pictures import LabeledImages, common_labels, neighbor_rows, neighbor_sheet

SUMMARY = "nearest images by a checkpoint's embeddings: Recall@K, MAP@R, NMI and a picture"
FILES = ("retrieval.json", "retrieval.csv", "neighbors.csv", "neighbors.png", "config.yaml")
_HEADING = "The {} nearest by their embeddings, re-ranked by the EMD between regions. 'Was' is the place by embeddings."


def add_arguments(parser) -> None:
    """Adds the options of ``retrieve`` to a jsonargparse parser."""
    parser.epilog = FOLDER_RULE
    run = parser.add_argument_group("run")
    run.add_argument("--checkpoint", default=DEFAULT, metavar="FILE", help=CHECKPOINT_HELP)
    run.add_argument("--output", default="retrieval", metavar="FOLDER", help="folder that the results are written to")
    add_machine_arguments(run)
    run.add_argument("--batch_size", type=int, default=256, help="number of images in a forward pass")
    images = parser.add_argument_group("images")
    images.add_argument(
        "--data", type=str | None, default=None, metavar="NAME|FILE", help="image set: a known name, a file or a folder"
    )
    images.add_argument("--split", default="novel", help="classes of the set to search: base, validation or novel")
    images.add_argument(
        "--query",
        type=str | None,
        default=None,
        metavar="DIR",
        help="folder with a folder for each class, in place of --data",
    )
    images.add_argument(
        "--gallery",
        type=str | None,
        default=None,
        metavar="DIR",
        help="folder that is searched; null takes the queries",
    )
    measures = parser.add_argument_group("measures")
    measures.add_argument("--ks", type=int, nargs="+", default=[1, 2, 4, 8], metavar="K", help="numbers K of Recall@K")
    measures.add_argument(
        "--map_ks", type=int, nargs="*", default=[], metavar="K", help="numbers K of MAP@K, such as 1000"
    )
    measures.add_argument("--distance", default="cosine", help="distance of embeddings: cosine or euclidean")
    measures.add_argument(
        "--lone_queries",
        default="error",
        help="what to do with queries whose class has no other image: error, exclude (leave them out) or miss (count "
        "as wrong)",
    )
    measures.add_argument("--no_nmi", action="store_true", help="leave out the clustering, which takes the longest")
    measures.add_argument(
        "--seed", type=int, default=0, help="seed of the clustering and of the queries in the picture"
    )
    second = parser.add_argument_group("second stage")
    second.add_argument(
        "--rerank",
        type=int | None,
        default=None,
        metavar="N",
        help="put the N nearest in the order of the EMD between their regions; null does not",
    )
    second.add_argument(
        "--weighting",
        default="cross_reference",
        help="weights of the regions: cross_reference (the paper's) or uniform",
    )
    second.add_argument(
        "--map_dtype",
        default="float32",
        help="type of stored features: float32, or float16 for half the memory; distances are in float32",
    )
    second.add_argument(
        "--map_memory", type=float, default=4.0, metavar="GIB", help="largest memory of local features in GiB"
    )
    picture = parser.add_argument_group("neighbors")
    picture.add_argument(
        "--neighbors", type=int, default=8, help="number of neighbors of each query in neighbors.csv and .png"
    )
    picture.add_argument("--rows", type=int, default=10, help="number of queries in the picture")
    add_settings(parser, LocalFeaturesConfig, "local_features", "regions, for --rerank")
    add_checkpoint_settings(parser)


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
    check_counts("map_ks", (*arguments.map_ks,), 1)
    check_at_least("seed", arguments.seed, 0)
    check_choice("distance", arguments.distance, *DISTANCES)
    check_choice("weighting", arguments.weighting, "cross_reference", "uniform")
    check_choice("map_dtype", arguments.map_dtype, "float32", "float16")
    check_positive("map_memory", arguments.map_memory)
    check_choice("split", arguments.split, *(split.name.lower() for split in Split))
    device = set_up_machine(arguments)
    if (arguments.data is None) == (arguments.query is None):
        raise ValueError("expected either --data or --query, and not both")
    if arguments.data is not None and arguments.gallery is not None:
        raise ValueError("--gallery goes with --query; the classes of --data are searched among themselves")
    backbone = FrozenBackbone.from_checkpoint(arguments.checkpoint, checkpoint_settings(arguments))
    queries, gallery = _images(arguments, backbone, device)
    labels = common_labels(queries) if gallery is None else common_labels(queries, gallery)
    check_retrieval(*labels, ks=(*arguments.ks,), lone_queries=arguments.lone_queries)
    most = len(queries) - 1 if gallery is None else len(gallery)
    if arguments.neighbors > most:
        raise ValueError(f"neighbors: expected at most {most}, the images that are searched, got {arguments.neighbors}")
    if arguments.rerank is not None:
        _check_rerank(arguments, backbone, queries, gallery, most, device)
    output = writable_folder(arguments.output)
    hold_folder(output)
    search = _Search(backbone, queries, gallery, labels, device, arguments)
    return lambda: _run(search, output, resolved)


def _images(arguments, backbone: FrozenBackbone, device: torch.device) -> tuple[LabeledImages, LabeledImages | None]:
    if arguments.data is not None:
        archive = load_data(arguments.data).subset(Split[arguments.split.upper()])
        backbone.try_out(archive.images[:1], arguments.data, device=device)
        images = LabeledImages.of_archive(archive)
        return (images, None) if archive.is_query is None else images.parted(archive.is_query)
    if backbone.network.image_size is None:
        raise ValueError(f"checkpoint {backbone.path} takes images that are not square: pack the pictures, take --data")
    query = Path(arguments.query).expanduser()
    gallery = None if arguments.gallery is None else Path(arguments.gallery).expanduser()
    if gallery is not None and gallery.resolve() == query.resolve():
        raise ValueError("gallery is the folder of the queries, each of which would find itself: leave --gallery out")
    queries = LabeledImages.of_folder(query)
    backbone.try_out(torch.stack(queries.pixels(backbone, [0])), str(query), device=device)
    tell_passed_over(query, queries.passed_over)
    if gallery is None:
        return queries, None
    searched = LabeledImages.of_folder(gallery)
    tell_passed_over(gallery, searched.passed_over)
    return queries, searched


def _check_rerank(
    arguments: Namespace,
    backbone: FrozenBackbone,
    queries: LabeledImages,
    gallery: LabeledImages | None,
    most: int,
    device: torch.device,
) -> None:
    least, reason = max((max(arguments.ks), "the largest K"), (arguments.neighbors, "neighbors"))
    if arguments.rerank < least:
        raise ValueError(f"rerank: expected at least {least}, {reason}, got {arguments.rerank}")
    if arguments.rerank > most:
        raise ValueError(f"rerank: expected at most {most}, the images that are searched, got {arguments.rerank}")
    image = torch.stack(queries.pixels(backbone, [0]))
    maps = backbone.try_out(image, arguments.data or arguments.query, arguments.local_features, device)
    parts = [part for part in (queries, gallery) if part is not None]
    check_map_memory(
        arguments.map_memory,
        sum(map(len, parts)),
        maps.shape[1:],
        getattr(torch, arguments.map_dtype),
        "re-ranking",
        pixels=sum(len(part) * image.nbytes for part in parts if not isinstance(part.images, Tensor)),
    )


@dataclass(frozen=True, eq=False)
class _Found:
    """What a search comes to.

    Attributes:
        measures: by name, as they are written.
        neighbors: ``[Q, k]`` int64 rows of the gallery, the nearest first, on the CPU.
        second: of the second stage, where there is one.
    """

    measures: dict[str, Any]
    neighbors: Tensor
    second: RerankedRetrieval | None

    @property
    def places(self) -> Tensor | None:
        return None if self.second is None else self.second.places(self.neighbors.shape[1])


class _Search:
    """What is searched for what, and how."""

    def __init__(
        self,
        backbone: FrozenBackbone,
        queries: LabeledImages,
        gallery: LabeledImages | None,
        labels: Sequence[Tensor],
        device: torch.device,
        arguments: Namespace,
    ) -> None:
        self.backbone, self.queries, self.gallery, self.arguments = backbone, queries, gallery, arguments
        self.labels, self.device = labels, device

    def run(self) -> Iterator[_Found]:
        """Yields what each stage comes to, the second with what the first found."""
        arguments, parts = self.arguments, [part for part in (self.queries, self.gallery) if part is not None]
        if arguments.rerank is not None and not isinstance(parts[0].images, Tensor):
            # Both stages look at every picture: it is read once.
            with progress_bar(total=sum(map(len, parts)), desc="reading pictures", unit=" images") as bar:
                parts = [part.in_memory(self.backbone, bar.update) for part in parts]
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
                map_ks=(*arguments.map_ks,),
                on_progress=lambda count: bar.update(count - bar.n),
            )
        found: dict[str, Any] = {
            "queries": metrics.queries,
            "query_classes": metrics.classes,
            "gallery_images": len(parts[-1]),
            **metrics.row(),
        }
        if not arguments.no_nmi:
            found |= clustering_metrics(*pairs[:2], distance=arguments.distance, seed=arguments.seed)._asdict()
        found |= measure_spread(embeddings[0]).row()
        neighbors = nearest_neighbors(*embeddings, k=arguments.neighbors, distance=arguments.distance)
        yield _Found(found, neighbors.cpu(), None)
        if arguments.rerank is not None:
            second = self._rerank(parts, embeddings)
            reranked = {f"recall_at_{k}_reranked": share for k, share in second.after.items()}
            yield _Found(found | reranked, second.reranked[:, : arguments.neighbors], second)

    def _rerank(self, parts: Sequence[LabeledImages], embeddings: Sequence[Tensor]) -> RerankedRetrieval:
        arguments = self.arguments
        pairs = [value for part, label in zip(parts, self.labels, strict=True) for value in (part.images, label)]
        with _stages() as report:
            return retrieve_and_rerank(
                *pairs[:2],
                self.backbone,
                *pairs[2:],
                candidates=arguments.rerank,
                ks=(*arguments.ks,),
                distance=arguments.distance,
                lone_queries=arguments.lone_queries,
                weighting=arguments.weighting,
                local_features=arguments.local_features,
                map_dtype=getattr(torch, arguments.map_dtype),
                map_memory=arguments.map_memory,
                batch_size=arguments.batch_size,
                device=self.device,
                embeddings=embeddings[0],
                gallery_embeddings=embeddings[1] if len(embeddings) > 1 else None,
                on_progress=report,
            )


@contextmanager
def _stages() -> Iterator[Callable[[str, int, int], None]]:
    """Yields what draws a bar for each stage that it is told of, one after the other."""
    bar = None

    def report(stage: str, done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = progress_bar(total=total, desc=stage, unit=" queries" if stage == "matching" else " images")
        bar.update(done - bar.n)
        if done == total:
            bar.close()
            bar = None

    try:
        yield report
    finally:
        if bar is not None:
            bar.close()


def _run(search: _Search, output: Path, resolved: str) -> int:
    started, found, written = time.perf_counter(), None, None
    exit_code, ending = 0, ""
    try:
        # The second stage may take hours: what the first found is written before.
        for found in search.run():
            _write(search, found, output, resolved, round(time.perf_counter() - started, 1))
            written = found
    except KeyboardInterrupt:
        exit_code, ending = 130, "interrupted before everything was measured"
    except (OSError, ValueError) as error:
        # A full disk, pixels that cannot be decoded, embeddings beyond what floats can hold: all come late.
        exit_code, ending = 1, f"fewshot-ext retrieve: error: {error}"
    if found is not None:
        print(_table(search, found), flush=True)
    if found is None:
        kept = "nothing was written"
    elif found is written:
        kept = "what was written are the results without --rerank"
        print_written([output / name for name in FILES])
    else:
        kept = "not everything was written"
    if exit_code:
        print(f"{ending}; {kept}", file=sys.stderr)
    return exit_code


def _table(search: _Search, results: _Found) -> str:
    arguments, found = search.arguments, results.measures
    where = f"{arguments.split} classes of {arguments.data}" if arguments.data else str(arguments.query)
    gallery = "its gallery" if arguments.data else str(arguments.gallery)
    among = "the others" if search.gallery is None else f"{found['gallery_images']:,} images of {gallery}"
    shares = {f"Recall@{k}": found[f"recall_at_{k}"] for k in arguments.ks}
    shares |= {"MAP@R": found["map_at_r"], "R-precision": found["r_precision"]}
    shares |= {f"MAP@{k}": found[f"map_at_{k}"] for k in arguments.map_ks}
    shares |= {name.upper(): found[name] for name in ClusteringMetrics._fields if name in found}
    rows = {"embeddings": list(shares.values())}
    if results.second is not None:
        rows[f"{arguments.rerank} re-ranked"] = list(results.second.after.values())
    width = max(map(len, rows)) if len(rows) > 1 else 0
    return "\n".join(
        [
            f"{where}: {found['queries']:,} queries of {found['query_classes']} classes, searched among {among}",
            "",
            " " * width + "".join(name.rjust(13) for name in shares),
            *(
                name[:width].ljust(width) + "".join(f"{100 * share:.2f} %".rjust(13) for share in row)
                for name, row in rows.items()
            ),
            "",
            f"coding rate {found['coding_rate']:.2f} nats, effective rank {found['effective_rank']:.1f} of "
            f"{len(found['spectrum'])} dimensions",
        ]
    )


def _second_stage(arguments: Namespace) -> dict[str, Any]:
    return {
        "candidates": arguments.rerank,
        "local_features": features_record(arguments.local_features),
        **{name: arguments[name] for name in ("weighting", "map_dtype")},
    }


def _write(search: _Search, found: _Found, output: Path, resolved: str, seconds: float) -> None:
    arguments, backbone, neighbors, places = search.arguments, search.backbone, found.neighbors, found.places
    gallery = search.queries if search.gallery is None else search.gallery
    record = {
        "checkpoint": {"path": backbone.path, "sha256": backbone.sha256},
        "images": {name: arguments[name] for name in ("data", "split", "query", "gallery")},
        "passed_over": {
            name: list(part.passed_over)
            for name, part in (("queries", search.queries), ("gallery", search.gallery))
            if part is not None and part.passed_over
        },
        "distance": arguments.distance,
        "lone_queries": arguments.lone_queries,
        "seed": arguments.seed,
        "rerank": None if found.second is None else _second_stage(arguments),
        "measures": found.measures,
        "seconds": seconds,
        "versions": versions("torch", "numpy"),
    }
    row = {"checkpoint": backbone.path, **record["images"], "distance": arguments.distance}
    row |= {"rerank": None if found.second is None else arguments.rerank, **found.measures}
    order = torch.randperm(len(search.queries), generator=derive_generator(arguments.seed))
    asked = order[: arguments.rows].sort().values.tolist()
    sheet = neighbor_sheet(
        backbone,
        search.queries,
        gallery,
        neighbors[asked],
        asked,
        places=None if places is None else places[asked],
        heading="" if places is None else _HEADING.format(arguments.rerank),
    )
    # Drawn before, so that an interrupt hardly finds the files of one stage beside those of the other.
    replace_text(output / "retrieval.json", json.dumps(record, indent=2) + "\n")
    replace_text(output / "retrieval.csv", csv_of_rows([row]))
    replace_text(
        output / "neighbors.csv", csv_of_rows(neighbor_rows(search.queries, gallery, neighbors, places=places))
    )
    replace_file(output / "neighbors.png", lambda path: sheet.save(path))
    replace_text(output / "config.yaml", resolved)
