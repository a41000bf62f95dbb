"""Retrieval: exact nearest neighbours of every query, in chunks, and the measures of metric learning over them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fewshot_ext._checks import check_at_least
from fewshot_ext._extras import require

DISTANCES = ("cosine", "euclidean")
LONE_QUERIES = ("error", "exclude", "miss")
_SCORES_AT_ONCE = 2**26  # 256 MB in float32: a product this large runs at the full rate of every machine


@dataclass(frozen=True)
class RetrievalMetrics:
    """What :func:`retrieval_metrics` returns; means over the queries that count, in [0, 1].

    Attributes:
        recall: Recall@K by K: the share of queries with one of their class among the K nearest.
        map_at_r: mean average precision at R.
        r_precision: mean share of the query's class among its R nearest.
        queries: how many queries count.
    """

    recall: dict[int, float]
    map_at_r: float
    r_precision: float
    queries: int

    def row(self) -> dict[str, float]:
        """The means as columns of a table: recall_at_1, ..., map_at_r, r_precision."""
        recall = {f"recall_at_{k}": value for k, value in self.recall.items()}
        return {**recall, "map_at_r": self.map_at_r, "r_precision": self.r_precision}


def retrieval_metrics(
    embeddings: Tensor,
    labels: Tensor,
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    *,
    ks: Sequence[int] = (1, 2, 4, 8),
    distance: Literal["cosine", "euclidean"] = "cosine",
    lone_queries: Literal["error", "exclude", "miss"] = "error",
    chunk_size: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> RetrievalMetrics:
    r"""Recall@K, MAP@R and R-precision of each query's exact nearest neighbours.

    For a query with R others of its class in the gallery, and P(i) the share of its class among the i nearest,

    .. math::
        \text{MAP@R} = \frac{1}{R} \sum_{i=1}^{R} P(i) \, [\text{the } i\text{-th nearest is of the class}]

    as in Musgrave et al., "A Metric Learning Reality Check", ECCV 2020. A query never counts as its own neighbour.
    Neighbours at the same computed distance come in the order of the gallery.

    Scores are one matrix product a chunk of queries and are never stored whole: beside the embeddings and a normalised
    copy there is room for one chunk, 256 MB, and for three more where many distances tie. On a GPU with TF32 allowed
    the order of neighbours is that of distances rounded so.

    Definitions agree with ``AccuracyCalculator`` of pytorch-metric-learning, whose ``precision_at_1`` is Recall@1, but
    for three things: it has no Recall@K beyond K = 1; it leaves lone queries out without a word; and by default it
    takes Euclidean distances between embeddings as they come, in the order of cosines only where all have length 1.

    Args:
        embeddings: ``[Q, D]``, the queries; float32, float64, bfloat16 or float16 (half types are compared in float32).
        labels: ``[Q]`` int64, on the device of ``embeddings``.
        gallery: ``[N, D]``, dtype and device of ``embeddings``; where None the queries are the gallery, and each
            leaves itself out.
        gallery_labels: ``[N]`` int64, with ``gallery``.
        ks: the K of Recall@K, each at most the number of neighbours that a query has.
        distance: "cosine" or "euclidean".
        lone_queries: what to do with queries of whose class the gallery holds no other, which nothing can retrieve:
            "error" raises, "exclude" leaves them out of the means, "miss" counts them as 0, as the official
            Anti-Collapse code does.
        chunk_size: queries at a time; chosen for 256 MB of scores where None.
        on_progress: called with the number of queries done so far.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: shapes or devices that do not fit, entries that are not finite, a K out of range, lone queries (see
            ``lone_queries``) or no query that counts.

    Example:
        >>> import torch
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.8, 0.3]])
        >>> found = retrieval_metrics(embeddings, torch.tensor([0, 0, 1, 1]), ks=(1, 2))
        >>> found.recall, found.r_precision
        ({1: 0.75, 2: 0.75}, 0.75)
    """
    _check_set("embeddings", embeddings, "labels", labels)
    if (gallery is None) != (gallery_labels is None):
        missing = "gallery" if gallery is None else "gallery_labels"
        raise ValueError(f"{missing}: expected with {'gallery_labels' if gallery is None else 'gallery'}, got None")
    with_itself = gallery is None
    if with_itself:
        gallery, gallery_labels = embeddings, labels
    else:
        _check_set("gallery", gallery, "gallery_labels", gallery_labels)
        _check_fits(embeddings, gallery)
    neighbours = len(gallery) - with_itself
    _check_ks(ks, neighbours)
    _check_choice("distance", distance, DISTANCES)
    _check_choice("lone_queries", lone_queries, LONE_QUERIES)
    if chunk_size is None:
        chunk_size = max(1, _SCORES_AT_ONCE // len(gallery))
    elif not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 1:
        raise ValueError(f"chunk_size: expected an integer of at least 1, got {chunk_size!r}")
    relevant = _count_relevant(labels, gallery_labels) - int(with_itself)
    counted = _counted_queries(relevant, labels, lone_queries)

    # Queries with as many relevant neighbours side by side: few chunks have to look far.
    counted = counted[relevant[counted].argsort(descending=True, stable=True)]
    queries, gallery, offset = _comparable(embeddings, gallery, distance)
    scores = queries.new_empty(min(chunk_size, len(counted)), len(gallery))
    totals, done = torch.zeros(len(ks) + 2, dtype=torch.float64, device=scores.device), 0
    for chunk in counted.split(chunk_size):
        part = _scores(queries[chunk], gallery, offset, chunk if with_itself else None, scores[: len(chunk)])
        depth = min(max(*ks, int(relevant[chunk].max())), neighbours)
        hits = gallery_labels[_nearest(part, depth)] == labels[chunk].unsqueeze(1)
        totals += _sums(hits, relevant[chunk], ks)
        done += len(chunk)
        if on_progress is not None:
            on_progress(done)

    *recall, map_at_r, r_precision = (totals / len(counted)).tolist()
    return RetrievalMetrics(dict(zip(ks, recall, strict=True)), map_at_r, r_precision, len(counted))


def nearest_neighbors(
    embeddings: Tensor,
    gallery: Tensor | None = None,
    *,
    k: int,
    distance: Literal["cosine", "euclidean"] = "cosine",
    queries: Tensor | None = None,
) -> Tensor:
    """The gallery's k nearest embeddings of each query, the nearest first, in the order of :func:`retrieval_metrics`.

    Args:
        embeddings, gallery, distance: as in :func:`retrieval_metrics`.
        k: neighbours a query, at most as many as it has.
        queries: ``[q]`` int64, which rows of ``embeddings`` ask; all where None.

    Returns:
        ``[q, k]`` int64 rows of the gallery: candidates that :func:`rerank` takes.

    Raises:
        TypeError, ValueError: as :func:`retrieval_metrics`, and ``queries`` that are no rows of ``embeddings``.

    Example:
        >>> nearest_neighbors(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), k=2)
        tensor([[1, 2],
                [0, 2],
                [1, 0]])
    """
    _check_embeddings("embeddings", embeddings)
    with_itself = gallery is None
    if with_itself:
        gallery = embeddings
    else:
        _check_embeddings("gallery", gallery)
        _check_fits(embeddings, gallery)
    _check_ks((k,), len(gallery) - with_itself, "k")
    _check_choice("distance", distance, DISTANCES)
    asked = torch.arange(len(embeddings), device=embeddings.device)
    if queries is not None:
        _check_queries(queries, embeddings)
        asked = queries
    all_queries, gallery, offset = _comparable(embeddings, gallery, distance)
    found = []
    for chunk in asked.split(max(1, _SCORES_AT_ONCE // len(gallery))):
        scores = _scores(all_queries[chunk], gallery, offset, chunk if with_itself else None)
        found.append(_nearest(scores, k))
    return torch.cat(found)


def clustering_nmi(
    embeddings: Tensor, labels: Tensor, *, distance: Literal["cosine", "euclidean"] = "cosine", seed: int = 0
) -> float:
    """Normalised mutual information of the classes and a k-means clustering into as many clusters, in [0, 1].

    Clusters come from scikit-learn's k-means with one k-means++ start, and the information is normalised by the mean of
    the two entropies. ``AccuracyCalculator`` of pytorch-metric-learning computes the same measure of other clusters: 20
    iterations of faiss. An iteration costs samples x classes x D operations: minutes for thousands of classes.

    Args:
        embeddings: ``[n, D]``, on any device; dtypes as in :func:`retrieval_metrics`.
        labels: ``[n]`` int64.
        distance: "cosine" clusters the embeddings normalised to length 1.
        seed: of the start.

    Raises:
        ImportError: scikit-learn is missing (extra ``metric``).
        TypeError, ValueError: as in :func:`retrieval_metrics`, and a seed below 0.

    Example:
        >>> import torch
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
        >>> round(clustering_nmi(embeddings, torch.tensor([0, 0, 1, 1])), 6)
        1.0
    """
    _check_set("embeddings", embeddings, "labels", labels)
    _check_choice("distance", distance, DISTANCES)
    check_at_least("seed", seed, 0)
    require("metric", "sklearn")
    from sklearn.cluster import KMeans
    from sklearn.metrics import normalized_mutual_info_score

    points = in_full_precision(embeddings)
    points = (F.normalize(points, dim=1) if distance == "cosine" else points).numpy(force=True)
    clusters = KMeans(len(labels.unique()), n_init=1, random_state=seed).fit_predict(points)
    return float(normalized_mutual_info_score(labels.numpy(force=True), clusters))


def in_full_precision(embeddings: Tensor) -> Tensor:
    """Embeddings without their graph, in float64 where they are, in float32 otherwise."""
    embeddings = embeddings.detach()
    return embeddings if embeddings.dtype == torch.float64 else embeddings.float()


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def _check_shape(name: str, value: object, shape: str, dimensions: int) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {type(value).__name__}")
    if value.dim() != dimensions:
        raise ValueError(f"{name}: expected shape {shape}, got {list(value.shape)}")


def _check_embeddings(name: str, embeddings: object) -> None:
    _check_shape(name, embeddings, "[n, D]", 2)
    if not embeddings.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {embeddings.dtype}")
    if embeddings.numel() == 0:
        raise ValueError(f"{name}: expected samples and dimensions, got shape {list(embeddings.shape)}")
    finite = embeddings.isfinite().all(1)
    if not finite.all():
        raise ValueError(f"{name}: expected finite entries, got others in row {int((~finite).nonzero()[0, 0])}")


def _check_set(name: str, embeddings: object, labels_name: str, labels: object) -> None:
    _check_shape(labels_name, labels, "[n]", 1)
    _check_embeddings(name, embeddings)
    if labels.dtype != torch.int64:
        raise TypeError(f"{labels_name}: expected dtype torch.int64, got {labels.dtype}")
    if len(labels) != len(embeddings):
        raise ValueError(f"{labels_name}: expected shape [{len(embeddings)}] to fit {name}, got {list(labels.shape)}")
    if labels.device != embeddings.device:
        raise ValueError(f"{labels_name}: expected device {embeddings.device} as {name} is on, got {labels.device}")


def _check_queries(queries: object, embeddings: Tensor) -> None:
    _check_shape("queries", queries, "[q]", 1)
    if queries.dtype != torch.int64:
        raise TypeError(f"queries: expected dtype torch.int64, got {queries.dtype}")
    if queries.device != embeddings.device:
        raise ValueError(f"queries: expected device {embeddings.device} as embeddings is on, got {queries.device}")
    if len(queries) and not (queries.min() >= 0 and queries.max() < len(embeddings)):
        low, high = queries.min().item(), queries.max().item()
        raise ValueError(f"queries: expected rows in [0, {len(embeddings)}), got {low} to {high}")


def _check_fits(embeddings: Tensor, gallery: Tensor) -> None:
    if gallery.shape[1] != embeddings.shape[1]:
        raise ValueError(
            f"gallery: expected shape [N, {embeddings.shape[1]}] to fit embeddings, got {list(gallery.shape)}"
        )
    if gallery.dtype != embeddings.dtype:
        raise TypeError(f"gallery: expected dtype {embeddings.dtype} as embeddings has, got {gallery.dtype}")
    if gallery.device != embeddings.device:
        raise ValueError(f"gallery: expected device {embeddings.device} as embeddings is on, got {gallery.device}")


def check_retrieval(
    labels: Tensor,
    gallery_labels: Tensor | None = None,
    *,
    ks: Sequence[int] = (1, 2, 4, 8),
    lone_queries: Literal["error", "exclude", "miss"] = "error",
) -> None:
    """Finds what :func:`retrieval_metrics` would refuse, before there are embeddings.

    Args:
        labels, gallery_labels, ks, lone_queries: as there.

    Raises:
        TypeError, ValueError: as there.
    """
    with_itself = gallery_labels is None
    gallery_labels = labels if with_itself else gallery_labels
    _check_ks(ks, len(gallery_labels) - with_itself)
    _check_choice("lone_queries", lone_queries, LONE_QUERIES)
    _counted_queries(_count_relevant(labels, gallery_labels) - int(with_itself), labels, lone_queries)


def _check_ks(ks: Sequence[int], neighbours: int, name: str = "ks") -> None:
    if isinstance(ks, int) or not isinstance(ks, Sequence):
        raise TypeError(f"{name}: expected a sequence of integers, got {type(ks).__name__}")
    if neighbours < 1:
        raise ValueError(f"{name}: expected samples beside the query to search, got the query alone")
    if len(ks) == 0 or len(set(ks)) < len(ks):
        raise ValueError(f"{name}: expected at least one K, and none twice, got {list(ks)}")
    for k in ks:
        if not isinstance(k, int) or isinstance(k, bool):
            raise TypeError(f"{name}: expected integers, got {type(k).__name__}")
        if not 1 <= k <= neighbours:
            raise ValueError(f"{name}: expected K in [1, {neighbours}], the neighbours that each query has, got {k}")


def _count_relevant(labels: Tensor, gallery_labels: Tensor) -> Tensor:
    """How many of the gallery have each query's label, [Q]; the query itself included where it is in it."""
    classes, counts = gallery_labels.unique(return_counts=True)
    position = torch.searchsorted(classes, labels).clamp(max=len(classes) - 1)
    return torch.where(classes[position] == labels, counts[position], 0)


def _counted_queries(relevant: Tensor, labels: Tensor, lone_queries: str) -> Tensor:
    lone = relevant == 0
    if lone_queries == "error" and lone.any():
        first = int(lone.nonzero()[0, 0])
        raise ValueError(
            f"labels: expected another sample of each query's class in the gallery, got none for "
            f"{int(lone.sum())} queries, the first of class {int(labels[first])} at index {first}; "
            "lone_queries='exclude' leaves them out, 'miss' counts them as 0"
        )
    counted = torch.arange(len(labels), device=labels.device)
    if lone_queries == "exclude":
        counted = counted[~lone]
        if len(counted) == 0:
            raise ValueError("labels: expected a query with another sample of its class in the gallery, got none")
    return counted


def _comparable(embeddings: Tensor, gallery: Tensor, distance: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Queries, gallery and an offset [N], such that near ones have a large inner product plus offset."""
    same = gallery is embeddings
    queries, gallery = in_full_precision(embeddings), in_full_precision(gallery)
    if distance == "cosine":
        queries = F.normalize(queries, dim=1)
        return queries, queries if same else F.normalize(gallery, dim=1), None
    # Far from the origin the distances would be small differences of large numbers.
    centre = gallery.mean(0)
    gallery = gallery - centre
    return (gallery if same else queries - centre), gallery, gallery.square().sum(1) / -2


def _scores(
    queries: Tensor, gallery: Tensor, offset: Tensor | None, own: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """How near each of the gallery is to each query, [queries, N]; ``own`` [queries] are the rows of the queries."""
    scores = torch.matmul(queries, gallery.mT, out=out)
    if offset is not None:
        scores.add_(offset)
    return scores if own is None else scores.scatter_(1, own.unsqueeze(1), -torch.inf)


def _nearest(scores: Tensor, depth: int) -> Tensor:
    """Indices of the ``depth`` largest scores of each row, [rows, depth], the lower index first where scores tie."""
    values, index = scores.topk(depth, dim=1)
    # topk takes any of those that tie with the last.
    last = values[:, -1:]
    crowded = ((scores >= last).count_nonzero(1) > depth).nonzero().squeeze(1)
    if len(crowded):
        rows, last = scores[crowded], last[crowded]
        above = rows > last
        tied = rows == last
        room = depth - above.count_nonzero(1)
        chosen = above | (tied & (tied.cumsum(1, dtype=torch.int32) <= room.unsqueeze(1)))
        index[crowded] = chosen.nonzero()[:, 1].view(-1, depth)
    index = index.sort(dim=1).values
    order = scores.gather(1, index).sort(dim=1, descending=True, stable=True).indices
    return index.gather(1, order)


def _sums(hits: Tensor, relevant: Tensor, ks: Sequence[int]) -> Tensor:
    """Sums over queries of what each contributes to Recall@K, MAP@R and R-precision, [len(ks) + 2] in float64.

    ``hits`` [queries, depth] says which neighbours, from the nearest on, are of the query's class.
    """
    rank = torch.arange(1, hits.shape[1] + 1, device=hits.device)
    within = hits & (rank <= relevant.unsqueeze(1))
    precision = within.cumsum(1) / rank.double()
    count = relevant.clamp(min=1).double()  # a lone query has no hits
    return torch.stack(
        [
            *(hits[:, :k].any(1).sum().double() for k in ks),
            ((precision * within).sum(1) / count).sum(),
            (within.sum(1) / count).sum(),
        ]
    )
