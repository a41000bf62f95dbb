"""The page of the DeepEMD paper: accuracies, retrieval, claims and pictures of each image set as Markdown."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from deepemd_claims import backbone_of, deepemd_findings, head_title
from deepemd_results import FILES, PICTURES, data_name, heads_by_kind, kind_of, read, recalled, stages
from verdicts import findings_markdown, markdown_table, picture_markdown, source_markdown

from fewshot_ext.evaluation import ComparisonResults, mean_and_interval
from fewshot_ext.heads import expand_heads

__all__ = ["FILES", "missing", "read", "section"]

TABLE, SHOTS = "deepemd_table", (1, 5)


def section(results: Mapping[str, Any], link: str) -> list[str]:
    """Lines of Markdown about one image set.

    Args:
        results: of ``read``, not empty.
        link: the folder of the results, as the page links it.
    """
    first = next(iter(results.values()))
    versions = first.versions if isinstance(first, ComparisonResults) else first["versions"]
    lines = source_markdown(data_name(first) or "of one's own", versions)
    for name, content in results.items():
        if isinstance(content, ComparisonResults):
            lines += accuracy_markdown(content, f"{link}/{Path(FILES[name]).parent}")
    if "retrieval" in results:
        lines += retrieval_markdown(results["retrieval"], backbone_of(results, "retrieval"))
    lines += findings_markdown(deepemd_findings(results))
    if "retrieval" in results:
        lines += _retrieval_picture(results["retrieval"], link)
    if "matches" in results:
        lines += _matches_picture(results["matches"], backbone_of(results, "matches"), link)
    return lines


def missing(results: Mapping[Path, Mapping[str, Any]]) -> list[str]:
    """Lines of Markdown: what has not been measured on each image set, with the command that does.

    Args:
        results: of ``read``, by folder; none for what there is to measure at all.
    """
    lines = []
    for folder, own in results.items() or [(Path("DATA"), {})]:
        data = next(filter(None, map(data_name, own.values())), folder.name)
        evaluate = f"evaluate --checkpoint PRETRAINED META_TRAINED --data {data} --queries 15 --heads {TABLE}"
        retrieve = f"retrieve --checkpoint META_TRAINED --data {data} --rerank 50"
        matches = f"analyze matches --checkpoint META_TRAINED --data {data}"
        gaps = {
            "evaluation": (_gaps(own.get("evaluation")), f"{evaluate} --shots {' '.join(map(str, SHOTS))}"),
            "evaluation_10way": ("" if "evaluation_10way" in own else "10-way", f"{evaluate} --way 10 --shots 1"),
            "retrieval": (_retrieval_gap(own.get("retrieval")), retrieve),
            "matches": ("" if "matches" in own else "a picture of matches", matches),
        }
        for name, (gap, command) in gaps.items():
            if gap:
                output = f"{folder.name}/{Path(FILES[name]).parent}"
                lines.append(f"- {folder.name}, {gap}: `fewshot-ext {command} --output {output}`")
    return lines


def accuracy_markdown(results: ComparisonResults, link: str) -> list[str]:
    """Every head on the backbones of each stage, the best of each column in bold.

    Args:
        results: with all accuracies.
        link: the folder of the results, as the page links it.
    """
    columns = [(stage, backbones, shot) for stage, backbones in stages(results).items() for shot in results.shots]
    rows = [[f"{head_title(kind)} (`{head}`)"] for kind, head in heads_by_kind(results).items()]
    for _, backbones, shot in columns:
        cells = [_mean_over_seeds(results, backbones, head, shot) for head in heads_by_kind(results).values()]
        best = max((mean for mean, _ in filter(None, cells)), default=None)
        for row, cell in zip(rows, cells, strict=True):
            text = "" if cell is None else f"{cell[0]:.2f} ± {cell[1]:.2f}"
            row.append(f"**{text}**" if cell and cell[0] == best else text)
    names = [f"{stage}, {shot}-shot" for stage, _, shot in columns]
    command = f"fewshot-ext evaluate --config {link}/config.yaml --checkpoint PRETRAINED META_TRAINED --output OUTPUT"
    return [_accuracy_caption(results), "", *markdown_table(["head", *names], rows), "", f"Again: `{command}`", ""]


def retrieval_markdown(retrieval: Mapping[str, Any], backbone: str) -> list[str]:
    """Recall@K of both stages of a retrieval.

    Args:
        retrieval: content of ``retrieval.json``.
        backbone: what to call it; "" if unknown.
    """
    measures, split = retrieval["measures"], retrieval["images"]["split"]
    ks = recalled(measures)
    rows = [["embeddings", *(f"{100 * measures[f'recall_at_{k}']:.2f}" for k in ks)]]
    if retrieval["rerank"] is not None:
        shares = (f"{100 * measures[f'recall_at_{k}_reranked']:.2f}" for k in ks)
        rows.append([f"the {retrieval['rerank']['candidates']} nearest re-ranked by the EMD", *shares])
    which = "" if retrieval["images"]["data"] is None else f" of {split} classes"
    caption = f"Retrieval (%): {measures['queries']:,} queries{which}, each searched among all other images"
    if retrieval["images"].get("gallery"):
        caption = (
            f"Retrieval (%): {measures['queries']:,} queries, searched among {measures['gallery_images']:,} images"
        )
    caption += f"; {backbone} backbone." if backbone else "."
    return [caption, "", *markdown_table(["order by", *(f"Recall@{k}" for k in ks)], rows), ""]


def _accuracy_caption(results: ComparisonResults) -> str:
    first = results.accuracies[0]
    queries, seeds = first.queries // results.way, max(map(len, stages(results).values()))
    draw = f"{results.draw()}, {queries} queries a class"
    caption = f"{results.way}-way accuracy (%) on {results.data['split']} classes, the best of each column in bold. "
    if seeds == 1:
        return f"{caption}Mean and 95 % interval over {draw}, of one training: it covers the draw of episodes alone."
    return (
        f"{caption}Mean over {seeds} trainings, which meet the same episodes, and 95 % interval over {draw}: it covers "
        "the draw of episodes. How far trainings scatter is in the differences by seed."
    )


def _mean_over_seeds(
    results: ComparisonResults, backbones: list[str], head: str, shot: int
) -> tuple[float, float] | None:
    """Mean of all seeds and half-width of its interval over episodes, in percent; None unless all are measured."""
    rows = [row for row in results.accuracies if (row.head, row.shot) == (head, shot) and row.backbone in backbones]
    if len(rows) < len(backbones):
        return None
    return mean_and_interval(torch.stack([row.per_episode() for row in rows]).mean(0))


def _gaps(results: ComparisonResults | None) -> str:
    """What the paper's comparison has and the results lack, in words."""
    if results is None:
        return "accuracies"
    kinds, cells = heads_by_kind(results), len(results.backbones) * len(results.shots)
    measured = {kind for kind, head in kinds.items() if sum(row.head == head for row in results.accuracies) == cells}
    gaps = [head for head in expand_heads([TABLE]) if kind_of(head) not in measured]
    gaps += [f"{shot}-shot" for shot in SHOTS if shot not in results.shots]
    return ", ".join([*gaps, *(["meta-training"] if len(stages(results)) == 1 else [])])


def _retrieval_gap(retrieval: Mapping[str, Any] | None) -> str:
    found = retrieval is not None and "recall_at_1_reranked" in retrieval["measures"]
    return "" if found else "retrieval with re-ranking"


def _retrieval_picture(retrieval: Mapping[str, Any], link: str) -> list[str]:
    caption = "Queries and what is found for each, the nearest first"
    if retrieval["rerank"] is not None:
        caption += ", in the order of the EMD"
    config = Path(FILES["retrieval"]).parent / "config.yaml"
    command = f"fewshot-ext retrieve --config {link}/{config} --checkpoint META_TRAINED --output OUTPUT"
    return picture_markdown(f"{link}/{PICTURES['retrieval']}", f"{caption}.", command)


def _matches_picture(matches: Mapping[str, Any], backbone: str, link: str) -> list[str]:
    config, regions = matches["config"], matches["rows"][0]["regions"]
    of = f" ({backbone} backbone)" if backbone else ""
    caption = (
        f"The {config['flows']} strongest flows between the {regions} regions of two images, and below them how much "
        f"each region counts{of}."
    )
    file = Path(FILES["matches"]).with_suffix(".yaml")
    command = f"fewshot-ext analyze matches --config {link}/{file} --checkpoint META_TRAINED --output OUTPUT"
    return picture_markdown(f"{link}/{PICTURES['matches']}", caption, command)
