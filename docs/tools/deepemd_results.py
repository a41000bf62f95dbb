"""What was measured of DeepEMD on one image set: the files of evaluate, retrieve and analyze matches in one folder."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from verdicts import read_table

from fewshot_ext._formats import check_schema, misfits_named, read_json
from fewshot_ext.evaluation import ComparisonResults, HeadAccuracy
from fewshot_ext.heads import HeadSettings, choose_head
from fewshot_ext.models import LocalFeaturesConfig

# evaluate and retrieve both write a config.yaml: each command has a folder of its own.
FILES = {
    "evaluation": "evaluation/results.json",
    "evaluation_10way": "evaluation_10way/results.json",
    "retrieval": "retrieval/retrieval.json",
    "matches": "matches/matches.json",
}
PICTURES = {"retrieval": "retrieval/neighbors.png", "matches": "matches/matches.png"}
PRETRAINED, META_TRAINED = "pre-trained", "meta-trained"

# What a page is made of, of the files that evaluate and retrieve write.
_NULL = type(None)
_COMPARISON = {
    "config": dict,
    "versions": {str: str},
    "data": {"name": str},
    "backbones": [{"name": str}],
    "way": int,
    "accuracies": [{"backbone": str, "head": str, "shot": int, "correct": [object], "queries": int}],
}
_RETRIEVAL = {
    "checkpoint": {"path": (str, _NULL)},
    "images": {"data": (str, _NULL), "query": (str, _NULL)},
    "measures": {"queries": int, "gallery_images": int},
    "rerank": (dict, _NULL),
    "versions": {str: str},
}

# A classifier and its regions, None for vectors.
Kind = tuple[str, str | None]


def read(folder: Path) -> dict[str, Any]:
    """What is in ``folder``, by the keys of ``FILES``: ``ComparisonResults`` of evaluations, JSON for the others.

    Raises:
        OSError: a file cannot be read, or a picture is missing.
        ValueError: a file does not hold what its name says, or the files are of different image sets.
    """
    readers: dict[str, Callable[[Path], Any]] = {
        "evaluation": read_comparison,
        "evaluation_10way": read_comparison,
        "retrieval": _read_retrieval,
        "matches": lambda path: read_table(path.parent, "matches"),
    }
    found = {name: readers[name](folder / file) for name, file in FILES.items() if (folder / file).exists()}
    for name in found:
        if name in PICTURES and not (folder / PICTURES[name]).exists():
            raise FileNotFoundError(f"{folder / PICTURES[name]} is missing, the picture of {FILES[name]}")
    named = {FILES[name]: data for name, content in found.items() if (data := data_name(content))}
    if len(set(named.values())) > 1:
        raise ValueError(
            f"{folder}: expected results of one image set, got "
            + ", ".join(f"{data} in {file}" for file, data in named.items())
        )
    return found


def data_name(content: ComparisonResults | Mapping[str, Any]) -> str | None:
    """The image set of a results file; None for pictures of one's own."""
    if isinstance(content, ComparisonResults):
        return content.data["name"]
    if "images" in content:
        return Path(content["images"]["data"] or content["images"]["query"]).stem
    return content["data"] and content["data"]["name"]


def read_comparison(path: Path) -> ComparisonResults:
    """The content of a ``results.json`` of ``fewshot-ext evaluate``.

    Args:
        path: the file. Its backbones are one, or pairs of before and after meta-training, one a seed.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds something else, no accuracies, heads that met other episodes, or backbones that are not
            in pairs.
    """
    what = "the results of fewshot-ext evaluate"
    content = read_json(path, _COMPARISON, what)
    with misfits_named(f"{path} does not hold {what}"):
        head = {key: content[key] for key in ("config", "versions", "data", "backbones", "way")}
        rows = [
            HeadAccuracy(row["backbone"], row["head"], row["shot"], tuple(row["correct"]), row["queries"])
            for row in content["accuracies"]
        ]
        results = ComparisonResults(**head, accuracies=rows)
        heads_by_kind(results)
    if not rows:
        raise ValueError(f"{path} holds no accuracies: the evaluation was interrupted before the first head was done")
    for row in rows:
        if not row.correct or not all(isinstance(count, int) and 0 <= count <= row.queries for count in row.correct):
            raise ValueError(f"{path}: expected counts from 0 to {row.queries} for {_arm(row)}, got {row.correct[:5]}")
        first = next(other for other in rows if other.shot == row.shot)
        if (len(row.correct), row.queries) != (len(first.correct), first.queries):
            raise ValueError(
                f"{path}: expected the same episodes for all heads, got {_met(first)} for {_arm(first)}, "
                f"{_met(row)} for {_arm(row)}"
            )
    _check_pairs(path, [backbone["name"] for backbone in results.backbones])
    return results


def stages(results: ComparisonResults) -> dict[str, list[str]]:
    """The backbones before and after meta-training, one a seed; a single backbone is a stage of its own name.

    Example:
        >>> backbones = [{"name": name} for name in ("pre_0", "meta_0", "pre_1", "meta_1")]
        >>> stages(ComparisonResults({}, {}, {}, backbones, way=5))
        {'pre-trained': ['pre_0', 'pre_1'], 'meta-trained': ['meta_0', 'meta_1']}
    """
    names = [backbone["name"] for backbone in results.backbones]
    return {names[0]: names} if len(names) == 1 else {PRETRAINED: names[::2], META_TRAINED: names[1::2]}


def kind_of(head: str, regions: str = "fcn") -> Kind:
    """What the head called ``head`` is: a classifier, and the regions that it looks at, None for vectors.

    Args:
        head: as ``choose_head`` takes it.
        regions: of a head for maps that is called without any.

    Raises:
        ValueError: there is no such head.

    Example:
        >>> kind_of("knn"), kind_of("protonet"), kind_of("protonet@grid")
        (('knn', 'fcn'), ('protonet', None), ('protonet', 'grid'))
    """
    maps = choose_head(head, HeadSettings(local_features=LocalFeaturesConfig(regions))).local_features
    return head.partition("@")[0], maps and maps.name


def heads_by_kind(results: ComparisonResults) -> dict[Kind, str]:
    """The names of the heads, in their order, by what they are.

    Raises:
        ValueError: there is no such head.
    """
    regions = results.config.get("local_features", {}).get("name", "fcn")
    return {kind_of(head, regions): head for head in dict.fromkeys(row.head for row in results.accuracies)}


def recalled(measures: Mapping[str, Any]) -> list[int]:
    """The K of the Recall@K that a retrieval measured.

    Example:
        >>> recalled({"queries": 9, "recall_at_8": 0.5, "recall_at_1": 0.25, "recall_at_1_reranked": 0.5})
        [1, 8]
    """
    names = (name.removeprefix("recall_at_") for name in measures if name.startswith("recall_at_"))
    return sorted(int(name) for name in names if name.isdigit())


def _read_retrieval(path: Path) -> dict[str, Any]:
    what = "the results of fewshot-ext retrieve"
    content = read_json(path, _RETRIEVAL, what)
    if content["rerank"] is not None:
        reranked = {f"recall_at_{k}_reranked": float for k in recalled(content["measures"])}
        with misfits_named(f"{path} does not hold {what}"):
            check_schema(content["measures"], reranked, "content['measures']")
    return content


def _check_pairs(path: Path, names: list[str]) -> None:
    # Folders are commonly called after the stage; in the wrong order the differences would have the wrong sign.
    swapped = len(names) > 1 and any("meta" in name for name in names[::2])
    if swapped or (len(names) > 1 and len(names) % 2):
        raise ValueError(
            f"{path}: expected backbones in pairs, each before and after its meta-training "
            f"(evaluate --checkpoint PRETRAINED META_TRAINED PRETRAINED META_TRAINED), got {', '.join(names)}"
        )


def _arm(row: HeadAccuracy) -> str:
    return f"{row.head} on {row.backbone}, {row.shot}-shot"


def _met(row: HeadAccuracy) -> str:
    return f"{len(row.correct)} episodes of {row.queries} queries"
