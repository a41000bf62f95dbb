"""Which regions of two images DeepEMD matches, and how much each region counts, as numbers and as a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewshot_ext._files import replace_file
from fewshot_ext._precision import normalize
from fewshot_ext._random import derive_generator
from fewshot_ext._validation import check_count
from fewshot_ext.data import ImageArchive, ImageInput
from fewshot_ext.data.fonts import figure_text
from fewshot_ext.evaluation import FrozenBackbone, extract_features
from fewshot_ext.experiments.match_plots import MatchedPair, plot_matches, strongest_flows
from fewshot_ext.experiments.tables import Row, write_table
from fewshot_ext.models import LocalFeatures, LocalFeaturesConfig, emd_logits, match_flows
from fewshot_ext.models.matching import Weighting

NAME, FLOWS = "matches", "match_flows"
MOST_PAIRS = 24
_LOCAL_FEATURES = LocalFeaturesConfig()

# Characters of a title that fit above a pair, and above one image of it.
_TITLE, _HALF_TITLE = 36, 18


@dataclass(frozen=True)
class ImagePair:
    """Two images of one size that are to be matched.

    Args:
        query, support: ``[C, H, W]`` uint8.
        names: of the images.
        classes: of the images, the same name twice for one class; None where nobody knows.
    """

    query: Tensor
    support: Tensor
    names: tuple[str, str]
    classes: tuple[str, str] | None = None


def draw_pairs(archive: ImageArchive, *, same_class: int = 4, other_class: int = 2, seed: int = 0) -> list[ImagePair]:
    """Pairs of random images, first of one class each, all classes different, then of two classes each.

    Args:
        archive: the classes to draw from.
        same_class: pairs of one class.
        other_class: pairs of two classes.
        seed: decides the pairs.

    Raises:
        ValueError: no pairs or too many for one picture, or fewer classes, or classes of two images, than they need.

    Example:
        >>> from fewshot_ext.data import load_digits
        >>> [len(set(pair.classes)) for pair in draw_pairs(load_digits(), same_class=2, other_class=1)]
        [1, 1, 2]
    """
    check_count("same_class", same_class, 0)
    check_count("other_class", other_class, 0)
    check_count("seed", seed, 0)
    check_pairs(same_class + other_class)
    counts = archive.labels.bincount(minlength=archive.num_classes)
    generator = derive_generator(seed)
    order = torch.randperm(archive.num_classes, generator=generator).tolist()
    large = [label for label in order if counts[label] > 1]
    if same_class > len(large):
        raise ValueError(f"same_class: expected at most {len(large)}, the classes with two images, got {same_class}")
    if other_class and (counts > 0).sum() < 2:
        raise ValueError(f"other_class: expected 0 where there is one class, got {other_class}")

    def pick(label: int, count: int) -> list[int]:
        members = (archive.labels == label).nonzero().squeeze(1)
        return members[torch.randperm(len(members), generator=generator)[:count]].tolist()

    drawn = [tuple(pick(label, 2)) for label in large[:same_class]]
    present = [label for label in order if counts[label] > 0]
    for _ in range(other_class):
        two = torch.randperm(len(present), generator=generator)[:2].tolist()
        drawn.append(tuple(pick(present[place], 1)[0] for place in two))
    # WordNet's words are followed by their synonyms.
    words = archive.class_titles
    return [
        ImagePair(
            archive.images[query],
            archive.images[support],
            (str(query), str(support)),
            tuple(words[archive.labels[index]] for index in (query, support)),
        )
        for query, support in drawn
    ]


def measure_matches(
    pairs: Sequence[ImagePair],
    backbone: FrozenBackbone,
    *,
    local_features: LocalFeaturesConfig = _LOCAL_FEATURES,
    weighting: Weighting = "cross_reference",
    flows: int = 5,
    device: torch.device | str = "cpu",
) -> tuple[list[MatchedPair], list[Row], list[Row]]:
    """What is to be drawn, and the numbers behind it.

    Args:
        pairs: images that the backbone takes, all of one size.
        backbone, local_features, device: where the local features come from.
        weighting: as in ``fewshot_ext.models.emd_logits``.
        flows: how many of the strongest flows of each pair are told.

    Returns:
        The pairs for ``plot_matches``; a row a pair, with the distance EMD / N in [0, 2], which is 1 minus the mean
        cosine of what is matched, and all weights; and a row for each of the strongest flows.

    Raises:
        ValueError: no pairs or too many for one picture, fewer than one flow.
    """
    check_pairs(len(pairs))
    check_count("flows", flows, 1)
    module = backbone.network.local_features(local_features).to(device)
    images = torch.stack([image for pair in pairs for image in (pair.query, pair.support)])
    maps = extract_features(module, images).unflatten(0, (-1, 2))
    with torch.inference_mode():
        regions = module.boxes(images.to(device)).cpu().unflatten(0, (-1, 2))
        views = _seen_by(module, images.to(device)).cpu().unflatten(0, (-1, 2))
    distances = 1 - emd_logits(maps[:, :1], maps[:, 1:], temperature=1.0, weighting=weighting).flatten()
    matches = match_flows(maps[:, 0], maps[:, 1], weighting=weighting)
    centered = normalize(maps - maps.mean(-1, keepdim=True))
    cosines = centered[:, 0] @ centered[:, 1].mT
    drawn, rows, flow_rows = [], [], []
    for k, (pair, distance) in enumerate(zip(pairs, distances.tolist(), strict=True)):
        flow = matches.flow[k].cpu()
        drawn.append(
            MatchedPair(*views[k], *maps[k].cpu(), *regions[k], titles=_titles(pair), title=_title(pair, distance))
        )
        named = {"query": pair.names[0], "support": pair.names[1]}
        classes = {} if pair.classes is None else {"query_class": pair.classes[0], "support_class": pair.classes[1]}
        strongest = strongest_flows(flow, flows)
        rows.append(
            {
                "pair": k + 1,
                **named,
                **classes,
                "distance": round(distance, 4),
                "regions": flow.shape[0],
                "strongest_share": round(strongest[0][0], 4),
                **{
                    f"{side}_weights": [round(weight, 4) for weight in weights[k].tolist()]
                    for side, weights in zip(named, matches[1:], strict=True)
                },
                **{f"{side}_regions": regions[k, i].tolist() for i, side in enumerate(named)},
            }
        )
        for rank, (share, *places) in enumerate(strongest):
            flow_rows.append(
                {
                    "pair": k + 1,
                    "rank": rank + 1,
                    "share": round(share, 4),
                    "cosine": round(cosines[k][tuple(places)].item(), 4),
                    **{
                        f"{side}_{edge}": round(value, 2)
                        for i, (side, place) in enumerate(zip(named, places, strict=True))
                        for edge, value in zip(
                            ("left", "top", "right", "bottom"), regions[k, i, place].tolist(), strict=True
                        )
                    },
                }
            )
    return drawn, rows, flow_rows


def write_matches(
    folder: Path,
    drawn: Sequence[MatchedPair],
    rows: Sequence[Row],
    flow_rows: Sequence[Row],
    *,
    weighting: Weighting = "cross_reference",
    flows: int = 5,
    columns: int = 3,
    **head: Any,
) -> list[Path]:
    """Writes ``matches.png``, ``matches.json`` and ``.csv`` (the pairs), ``match_flows.json`` and ``.csv``.

    Args:
        folder: must exist.
        drawn, rows, flow_rows: of :func:`measure_matches`.
        weighting, flows, columns: as in ``plot_matches``.
        head: what is needed to repeat the analysis.
    """
    written = [*write_table(folder, NAME, rows, **head), *write_table(folder, FLOWS, flow_rows, **head)]
    picture = folder / f"{NAME}.png"
    replace_file(picture, lambda path: plot_matches(drawn, path, weighting=weighting, flows=flows, columns=columns))
    return [picture, *written]


def matches_table(rows: Sequence[Row]) -> str:
    """The distances as text, one line a pair."""
    lines = ["pair  distance  query and support"]
    for row in rows:
        names = [shortened(str(row.get(f"{side}_class", row[side])), 30) for side in ("query", "support")]
        whom = names[0] if "query_class" in row and names[0] == names[1] else " and ".join(names)
        lines.append(f"{row['pair']:>4}  {row['distance']:>8.4f}  {whom}")
    return "\n".join(lines)


def shortened(name: str, width: int) -> str:
    """At most ``width`` characters: the middle is left out, because names of one set tend to begin alike.

    Example:
        >>> shortened("Atemayar_Qelisayer/character06", 15), shortened("ant", 15)
        ('Atemaya…acter06', 'ant')
    """
    name = " ".join(name.split())
    if len(name) <= width:
        return name
    end = (width - 1) // 2
    return f"{name[: width - 1 - end]}…{name[len(name) - end :]}"


def check_pairs(pairs: int) -> None:
    """Raises ValueError unless one picture has room for so many pairs."""
    if not 1 <= pairs <= MOST_PAIRS:
        raise ValueError(f"pairs: expected 1 to {MOST_PAIRS} for one picture, got {pairs}")


def _seen_by(module: LocalFeatures, images: Tensor) -> Tensor:
    """The images that the regions are of, but not normalized: ``[B, C, H, W]`` in [0, 1]."""
    pixels, preprocessing = module.view(images), module.preprocessing
    if isinstance(preprocessing, ImageInput):
        return (pixels * preprocessing.std + preprocessing.mean).clamp(0, 1)
    return F.interpolate(images / 255, pixels.shape[2:])


def _titles(pair: ImagePair) -> tuple[str, str]:
    if pair.classes is not None:
        return "query", "support"
    return tuple(figure_text(shortened(name, _HALF_TITLE)) for name in pair.names)


def _title(pair: ImagePair, distance: float) -> str:
    if pair.classes is None:
        return f"distance {distance:.2f}"
    first, second = pair.classes
    room = _TITLE - len(", distance 0.00")
    if first == second:
        return f"{figure_text(shortened(first, room))}, distance {distance:.2f}"
    names = [figure_text(shortened(name, room // 2)) for name in pair.classes]
    return f"{' / '.join(names)}, distance {distance:.2f}"
