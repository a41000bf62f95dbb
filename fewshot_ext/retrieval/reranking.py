"""Retrieval in two stages: candidates by a global feature, put in order by matching their regions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewshot_ext._precision import full_precision
from fewshot_ext._validation import (
    check_choice,
    check_count,
    check_integer,
    check_integers,
    check_like,
    check_positive,
)
from fewshot_ext.evaluation.backbones import FrozenBackbone
from fewshot_ext.evaluation.protocol import check_map_memory, extract_features
from fewshot_ext.heads.names import crops_an_image
from fewshot_ext.models import LocalFeaturesConfig, emd_logits
from fewshot_ext.models.matching import Weighting, check_finite_maps, check_floating
from fewshot_ext.retrieval.measures import check_retrieval, count_relevant, nearest_neighbors

# As in the evaluation of episodes: copies much larger than this are slow to allocate.
_BYTES_AT_ONCE = 2**26
_LOCAL_FEATURES = LocalFeaturesConfig()


@torch.no_grad()
@full_precision()
def rerank(
    query_maps: Tensor,
    gallery_maps: Tensor,
    candidates: Tensor,
    *,
    weighting: Weighting = "cross_reference",
    bytes_at_once: int = _BYTES_AT_ONCE,
    on_progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Puts the candidates of each query in the order of their Earth Mover's Distance to it, nearest first.

    Args:
        query_maps: ``[Q, N, C]`` local features.
        gallery_maps: ``[G, M, C]``, in the dtype and on the device of ``query_maps``.
        candidates: ``[Q, K]`` int64 indices into the gallery, such as the nearest K by a global feature.
        weighting: as in ``fewshot_ext.models.emd_logits``.
        bytes_at_once: bound on the maps of candidates that are gathered at a time.
        on_progress: called with the number of queries done so far.

    Returns:
        ``[Q, K]`` int64: the same gallery indices, nearest first. Equal distances stay in the order in which
        they came, but rounding may tell two copies of an image apart.

    Raises:
        TypeError: maps that are not floating-point, or candidates that are not an int64 tensor.
        ValueError: shapes or devices that do not fit each other, no regions, an index outside of the gallery, maps
            that are not finite, or an option out of range.

    Reference:
        Zhang et al., DeepEMD: Differentiable Earth Mover's Distance for Few-Shot Learning, TPAMI 2022, on image
        retrieval.

    Example:
        >>> gallery = torch.rand(6, 9, 16)
        >>> rerank(gallery[:2], gallery, torch.tensor([[3, 2, 0], [1, 4, 5]]))[:, 0]
        tensor([0, 1])
    """
    bytes_at_once = check_count("bytes_at_once", bytes_at_once, 1)
    check_floating(query_maps=query_maps, gallery_maps=gallery_maps)
    for name, maps in (("query_maps", query_maps), ("gallery_maps", gallery_maps)):
        if maps.dim() != 3 or 0 in maps.shape[1:]:
            raise ValueError(f"{name}: expected shape [images, N, C], N and C at least 1, got {list(maps.shape)}")
    if gallery_maps.shape[2] != query_maps.shape[2]:
        raise ValueError(
            f"gallery_maps: expected the {query_maps.shape[2]} channels of query_maps, got {gallery_maps.shape[2]}"
        )
    check_like("query_maps", query_maps, "gallery_maps", gallery_maps)
    check_integers("candidates", candidates, "[Q, K]", 2)
    if len(candidates) != len(query_maps):
        raise ValueError(f"candidates: expected shape [{len(query_maps)}, K], got {list(candidates.shape)}")
    check_like("query_maps", query_maps, "candidates", candidates, any_dtype=True)
    if candidates.numel() == 0:
        return candidates.clone()
    low, high = torch.stack(candidates.aminmax()).tolist()
    if low < 0 or high >= len(gallery_maps):
        raise ValueError(f"candidates: expected numbers in [0, {len(gallery_maps)}), got {low} to {high}")
    check_finite_maps(query_maps=query_maps, gallery_maps=gallery_maps)

    queries = max(1, int(bytes_at_once // (gallery_maps[0].nbytes * candidates.shape[1])))
    order, done = [], 0
    for maps, chosen in zip(query_maps.split(queries), candidates.split(queries), strict=True):
        logits = emd_logits(maps.unsqueeze(1), gallery_maps[chosen], weighting=weighting, bytes_at_once=bytes_at_once)
        order.append(logits.squeeze(1).argsort(dim=-1, descending=True, stable=True))
        done += len(maps)
        if on_progress is not None:
            on_progress(done)
    return candidates.gather(1, torch.cat(order))


@dataclass(frozen=True)
class RerankedRetrieval:
    """What :func:`retrieve_and_rerank` returns.

    Attributes:
        before: Recall@K by K of the global features, in [0, 1].
        after: the same when the candidates are in the order of the matching.
        queries: how many queries count in both.
        candidates: ``[Q, candidates]`` int64 rows of the gallery, nearest by the global feature first, on the CPU.
        reranked: ``[Q, candidates]``, the same rows, nearest by the matching first.

    Example:
        >>> first, second = torch.tensor([[7, 2, 5]]), torch.tensor([[5, 7, 2]])
        >>> RerankedRetrieval({1: 0.0}, {1: 1.0}, 1, first, second).places(2)
        tensor([[3, 1]])
    """

    before: dict[int, float]
    after: dict[int, float]
    queries: int
    candidates: Tensor
    reranked: Tensor

    def places(self, k: int) -> Tensor:
        """``[Q, k]`` int64: which place, from 1, the first k after the matching had by the global feature."""
        rows, place = self.candidates.sort(dim=1)
        return 1 + place.gather(1, torch.searchsorted(rows, self.reranked[:, :k].contiguous()))


def retrieve_and_rerank(
    images: Tensor,
    labels: Tensor,
    backbone: FrozenBackbone,
    gallery_images: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    *,
    candidates: int = 50,
    ks: Sequence[int] = (1, 2, 4, 8),
    distance: Literal["cosine", "euclidean"] = "cosine",
    lone_queries: Literal["error", "exclude", "miss"] = "error",
    weighting: Weighting = "cross_reference",
    local_features: LocalFeaturesConfig = _LOCAL_FEATURES,
    map_dtype: torch.dtype = torch.float32,
    map_memory: float = 4.0,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    embeddings: Tensor | None = None,
    gallery_embeddings: Tensor | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> RerankedRetrieval:
    """Recall@K of a global retrieval, and of its nearest candidates put in order by matching their regions.

    The local features of all images are in memory: images x regions x channels x 4 bytes, half of it in float16.

    Args:
        images: ``[Q, C, H, W]`` uint8, the queries.
        labels: ``[Q]`` int64, on the CPU.
        backbone: gives the global features and the maps.
        gallery_images: ``[G, C, H, W]`` uint8; where None the queries are the gallery, and each leaves itself out.
        gallery_labels: ``[G]`` int64, with ``gallery_images``.
        candidates: how many of the nearest are put in order, at least the largest K.
        ks: the K of Recall@K.
        distance: of the global features, "cosine" or "euclidean".
        lone_queries: as in ``retrieval_metrics``.
        weighting: as in ``fewshot_ext.models.emd_logits``.
        local_features: which regions are matched.
        map_dtype: torch.float32 or torch.float16, in which the maps are kept; they are compared in float32.
        map_memory: most that they may take, in GiB.
        batch_size: images a forward pass.
        device: where everything is computed.
        embeddings: ``[Q, D]`` global features that are there already, such as those of a metric training.
        gallery_embeddings: ``[G, D]``, with ``embeddings`` where there is a gallery.
        on_progress: called with the name of a stage, how much of it is done and its total.

    Raises:
        TypeError: images or labels of another dtype, ``candidates`` that is no integer, or a backbone without feature
            maps.
        ValueError: shapes that do not fit each other, fewer candidates than the largest K, more than the gallery holds,
            lone queries (see ``lone_queries``), images that the backbone does not take, maps that take more than
            ``map_memory``, features that are not finite, or an option out of range. All but the features are looked
            at before the first pass over the images.

    Reference:
        Zhang et al., DeepEMD: Differentiable Earth Mover's Distance for Few-Shot Learning, TPAMI 2022, on image
        retrieval.

    Example:
        >>> from fewshot_ext.models import conv4
        >>> images, labels = torch.randint(256, (12, 3, 32, 32), dtype=torch.uint8), torch.arange(12) % 3
        >>> found = retrieve_and_rerank(images, labels, FrozenBackbone.open(conv4()), candidates=5, ks=(1, 5))
        >>> found.before[5] == found.after[5], found.reranked.shape
        (True, torch.Size([12, 5]))
    """
    sets = {"images": (images, labels)}
    if (gallery_images is None) != (gallery_labels is None):
        raise ValueError("gallery_images and gallery_labels: expected both or neither")
    if gallery_images is not None:
        sets["gallery_images"] = (gallery_images, gallery_labels)
    elif gallery_embeddings is not None:
        raise ValueError("gallery_embeddings: expected none where the queries are the gallery")
    if gallery_images is not None and (embeddings is None) != (gallery_embeddings is None):
        raise ValueError("embeddings and gallery_embeddings: expected both or neither")
    for name, (pictures, own) in sets.items():
        _check_images(name, pictures, own)
    for name, vectors, pictures in (
        ("embeddings", embeddings, images),
        ("gallery_embeddings", gallery_embeddings, gallery_images),
    ):
        if vectors is not None and len(vectors) != len(pictures):
            raise ValueError(f"{name}: expected shape [{len(pictures)}, D], a row an image, got {list(vectors.shape)}")
    check_retrieval(labels, gallery_labels, ks=ks, lone_queries=lone_queries)
    check_choice("distance", distance, "cosine", "euclidean")
    check_choice("weighting", weighting, "cross_reference", "uniform")
    batch_size = check_count("batch_size", batch_size, 1)
    check_positive("map_memory", map_memory)
    if map_dtype not in (torch.float32, torch.float16):
        raise ValueError(f"map_dtype: expected torch.float32 or torch.float16, got {map_dtype}")
    neighbors = len(images) - 1 if gallery_images is None else len(gallery_images)
    check_integer("candidates", candidates)
    if not max(ks) <= candidates <= neighbors:
        raise ValueError(
            f"candidates: expected numbers in [{max(ks)}, {neighbors}], from the largest K to the images that can be "
            f"found, got {candidates}"
        )
    maps_of = backbone.network.local_features(local_features).to(device)
    try:
        example = extract_features(maps_of, images[:1])
    except RuntimeError as error:
        shape = list(images.shape)
        raise ValueError(f"images: expected what backbone {backbone.name} takes, got {shape}: {error}") from error
    total = sum(len(pictures) for pictures, _ in sets.values())
    check_map_memory(map_memory, total, example.shape[1:], map_dtype, "re-ranking")

    def extract(stage: str, module: torch.nn.Module, pictures: Tensor, **options) -> Tensor:
        report = None if on_progress is None else lambda done: on_progress(stage, done, len(pictures))
        return extract_features(module, pictures, on_progress=report, **options)

    vectors = [embeddings, gallery_embeddings]
    if embeddings is None:
        module = backbone.network.to(device)
        vectors = [extract("features", module, pictures, batch_size=batch_size) for pictures, _ in sets.values()]
    found = nearest_neighbors(*(part for part in vectors if part is not None), k=candidates, distance=distance)
    crops = {"batch_size": max(1, batch_size // crops_an_image(local_features)), "dtype": map_dtype}
    maps = [extract("maps", maps_of, pictures, **crops) for pictures, _ in sets.values()]
    report = None if on_progress is None else lambda done: on_progress("matching", done, len(images))
    found = found.to(maps[0].device)
    ordered = rerank(maps[0], maps[-1], found, weighting=weighting, on_progress=report).cpu()
    found = found.cpu()

    others = labels if gallery_labels is None else gallery_labels
    counted = torch.ones(len(labels), dtype=torch.bool)
    if lone_queries == "exclude":
        counted = count_relevant(labels, others) > int(gallery_labels is None)
    before, after = (_recall(order[counted], labels[counted], others, ks) for order in (found, ordered))
    return RerankedRetrieval(before, after, int(counted.sum()), found, ordered)


def _check_images(name: str, images: object, labels: object) -> None:
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        came = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"{name}: expected a uint8 tensor, got {came}")
    if images.dim() != 4 or not len(images):
        raise ValueError(f"{name}: expected shape [images, C, H, W] with at least one image, got {list(images.shape)}")
    kind = "labels" if name == "images" else "gallery_labels"
    check_integers(kind, labels, "[images]", 1)
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{kind}: expected shape [{len(images)}] for {name}, got {list(labels.shape)}")


def _recall(order: Tensor, labels: Tensor, gallery_labels: Tensor, ks: Sequence[int]) -> dict[int, float]:
    hits = gallery_labels[order] == labels.unsqueeze(1)
    return {k: hits[:, :k].any(1).double().mean().item() for k in ks}
