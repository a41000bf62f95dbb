"""The claims of the DeepEMD paper held against measured numbers, by differences on the same episodes."""

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from deepemd_results import Kind, heads_by_kind, stages
from verdicts import Finding, gain_text, judge, sign_of

from fewshot_ext.evaluation import ComparisonResults, mean_and_interval
from fewshot_ext.experiments.accuracies import Difference

# What a head is called on a page, by the name of its classifier.
HEAD_TITLES = {
    "protonet": "ProtoNet",
    "protonet_cosine": "cosine ProtoNet",
    "matchingnet": "MatchingNet",
    "fc_dot": "dot-product classifier on the mean",
    "fc_cosine": "cosine classifier on the mean",
    "knn": "kNN on local features",
    "prediction_fusion": "prediction fusion",
    "deepemd_uniform": "DeepEMD, uniform weights",
    "deepemd_mean": "DeepEMD, class means",
    "deepemd": "DeepEMD",
}
REGION_TITLES = {"grid": "regions from a grid of crops", "sampling": "regions from random crops"}
SOURCES = ("meta-training", "baselines", "weights", "k-shot", "regions")
BASELINES = ("protonet", "protonet_cosine", "matchingnet", "fc_dot", "fc_cosine", "knn", "prediction_fusion")

# The backbones of one stage, seed by seed, and a head.
Arm = tuple[Sequence[str], str]


def deepemd_findings(results: Mapping[str, Any]) -> list[Finding]:
    """What the results of one image set say about the paper's claims; those that are not measured are left out.

    Args:
        results: of ``read``.
    """
    found = accuracy_findings(results["evaluation"]) if "evaluation" in results else []
    if "retrieval" in results:
        found += retrieval_findings(results["retrieval"], backbone_of(results, "retrieval"))
    return found


def accuracy_findings(results: ComparisonResults) -> list[Finding]:
    """Meta-training, and DeepEMD against every other head on the same backbone."""
    by_stage, found = stages(results), []
    for contest in _contests(heads_by_kind(results)):
        # One support image a class is its prototype, with the structured layer and without.
        shots = [shot for shot in results.shots if shot > 1 or contest.source != "k-shot"]
        for (where, mine, others), shot in product(_sides(contest, by_stage), shots):
            if gain := paired_gain(results, (mine, contest.ours), (others, contest.theirs), shot):
                text = f"{contest.claim} ({shot}-shot{where})"
                found.append(Finding(contest.source, text, gain_text(gain), judge(1, sign_of(gain))))
    return found


def retrieval_findings(retrieval: Mapping[str, Any], backbone: str = "") -> list[Finding]:
    """Whether the second stage of a retrieval puts more images of the right class first.

    The file does not tell which queries gained and which lost, so the interval is the widest that the two shares allow.

    Args:
        retrieval: content of ``retrieval.json``.
        backbone: what to call it.
    """
    measures = retrieval["measures"]
    shares = [measures.get(name) for name in ("recall_at_1", "recall_at_1_reranked")]
    if None in shares:
        return []
    before, after = shares
    changed = min(before + after, 2 - before - after)
    interval = 1.96 * math.sqrt(max(0.0, changed - (after - before) ** 2) / measures["queries"])
    gain = Difference(100 * (after - before), 100 * interval, (100 * (after - before),))
    where = f"{retrieval['rerank']['candidates']} nearest" + (f", {backbone}" if backbone else "")
    measured = f"{100 * before:.2f} % by embeddings, {100 * after:.2f} % re-ranked: {gain_text(gain)}"
    return [
        Finding("retrieval", f"re-ranking by the EMD raises Recall@1 ({where})", measured, judge(1, sign_of(gain))),
    ]


def paired_gain(results: ComparisonResults, ours: Arm, theirs: Arm, shot: int) -> Difference | None:
    """How far one arm lies above another, in points.

    All seeds meet the same episodes, so that they are no further draws of them: the interval is that of the seeds'
    mean, episode by episode.

    Args:
        results: with all accuracies.
        ours, theirs: backbones, seed by seed, and a head.
        shot: support images a class.

    Returns:
        None unless every seed has both.
    """
    measured = {(row.backbone, row.head): row.per_episode() for row in results.accuracies if row.shot == shot}
    pairs = [((mine, ours[1]), (other, theirs[1])) for mine, other in zip(ours[0], theirs[0], strict=True)]
    if not {arm for pair in pairs for arm in pair} <= measured.keys():
        return None
    by_episode = torch.stack([measured[mine] - measured[other] for mine, other in pairs])
    return Difference(*mean_and_interval(by_episode.mean(0)), tuple(by_episode.mean(1).tolist()))


def backbone_of(results: Mapping[str, Any], name: str) -> str:
    """The stage of the backbone that another file is about, by the checksum of its checkpoint; "" if unknown."""
    if "evaluation" not in results:
        return ""
    names = {own["sha256"]: own["name"] for own in results["evaluation"].backbones if own["sha256"]}
    known = names.get(results[name]["checkpoint"]["sha256"])
    return next((stage for stage, backbones in stages(results["evaluation"]).items() if known in backbones), "")


def head_title(kind: Kind) -> str:
    """What a head is called on a page.

    Example:
        >>> head_title(("deepemd", "grid"))
        'DeepEMD, regions from a grid of crops'
    """
    plain, regions = kind
    return ", ".join(filter(None, (HEAD_TITLES.get(plain, plain), REGION_TITLES.get(regions))))


class _Contest(NamedTuple):
    """A claim that one head is better than another, or one head after meta-training than before."""

    source: str
    claim: str
    ours: str
    theirs: str


def _contests(heads: Mapping[Kind, str]) -> list[_Contest]:
    contests = []
    for kind, head in heads.items():
        plain, regions = kind
        # DeepEMD with the same regions; a head on vectors has none of its own.
        rival = ("deepemd", regions or "fcn")
        if plain == "deepemd":
            contests.append(
                _Contest("meta-training", f"meta-training raises the accuracy of {head_title(kind)}", head, head)
            )
            if regions in REGION_TITLES and ("deepemd", "fcn") in heads:
                claim = f"{REGION_TITLES[regions]} beat the positions of the feature map"
                contests.append(_Contest("regions", claim, head, heads["deepemd", "fcn"]))
        elif rival in heads and plain == "deepemd_uniform":
            contests.append(_Contest("weights", "cross-reference weights beat uniform ones", heads[rival], head))
        elif rival in heads and plain == "deepemd_mean":
            contests.append(_Contest("k-shot", "the structured layer beats class means", heads[rival], head))
        elif rival in heads and plain in BASELINES:
            claim = f"{head_title(rival)} beats {head_title(kind)}"
            contests.append(_Contest("baselines", claim, heads[rival], head))
    return sorted(contests, key=lambda contest: SOURCES.index(contest.source))


def _sides(contest: _Contest, by_stage: Mapping[str, list[str]]) -> list[tuple[str, list[str], list[str]]]:
    """Where a contest is held: a title, and the backbones of either side."""
    if contest.source != "meta-training":
        return [(f", {stage}", backbones, backbones) for stage, backbones in by_stage.items()]
    return [("", *reversed(by_stage.values()))] if len(by_stage) > 1 else []
