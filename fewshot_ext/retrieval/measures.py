"""Retrieval: exact nearest neighbors of every query, in chunks, and the measures of metric learning over them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fewshot_ext._extras import require
from fewshot_ext._precision import accumulate_dtype, full_precision, normalize
from fewshot_ext._validation import (
    check_at_least,
    check_choice,
    check_count,
    check_integer,
    check_integers,
    check_like,
    check_tensor,
)
from fewshot_ext.retrieval.exact_search import SCORES_AT_ONCE, ExactSearch

DISTANCES = ("cosine", "euclidean")
LONE_QUERIES = ("error", "exclude", "miss")


@dataclass(frozen=True)
class RetrievalMetrics:
    """What :func:`retrieval_metrics` returns; means over the queries that count, in [0, 1].

    Attributes:
        recall: Recall@K by K: the share of queries with one of their class among the K nearest.
        map_at_r: mean average precision at R.
        r_precision: mean share of the query's class among its R nearest.
        queries: how many queries count.
        classes: how many classes they are of.
        map_at: mean average precision among the K nearest, by K.
    """

    recall: dict[int, float]
    map_at_r: float
    r_precision: float
    queries: int
    classes: int
    map_at: dict[int, float] = field(default_factory=dict)

    def row(self) -> dict[str, float]:
        """The means as columns of a table: recall_at_1, ..., map_at_r, r_precision, map_at_1000, ..."""
        recall = {f"recall_at_{k}": value for k, value in self.recall.items()}
        map_at = {f"map_at_{k}": value for k, value in self.map_at.items()}
        return {**recall, "map_at_r": self.map_at_r, "r_precision": self.r_precision, **map_at}


class ClusteringMetrics(NamedTuple):
    """What :func:`clustering_metrics` returns, in [0, 1]: normalized mutual information, and F1 over pairs."""

    nmi: float
    f1: float


@full_precision()
def retrieval_metrics(
    embeddings: Tensor,
    labels: Tensor,
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    *,
    ks: Sequence[int] = (1, 2, 4, 8),
    distance: Literal["cosine", "euclidean"] = "cosine",
    lone_queries: Literal["error", "exclude", "miss"] = "error",
    query_index: Tensor | None = None,
    map_ks: Sequence[int] = (),
    chunk_size: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> RetrievalMetrics:
    r"""Recall@K, MAP@R, R-precision and MAP@K of each query's exact nearest neighbors.

    For a query with R others of its class in the gallery, and P(i) the share of its class among the i nearest,

    .. math::
        \text{MAP@R} = \frac{1}{R} \sum_{i=1}^{R} P(i) \, [\text{the } i\text{-th nearest is of the class}]

    as in Musgrave et al., "A Metric Learning Reality Check", ECCV 2020. MAP@K is the same sum to K in place of R, over
    the number of the class's images in the gallery, the query included where it is one of them: that is "mAP@1000" of
    the official Anti-Collapse code, below 1 even where nothing is wrong. A query never counts as its own neighbor.
    Neighbors at the same distance come in the order of the gallery.

    Distances are compared in float64, and again by sums of squared differences where rounding leaves their order open:
    results do not depend on ``chunk_size``, on autocast or on TF32, and embeddings that have collapsed to nearly one
    point are told apart as far as their own digits do. Beside float64 copies of the embeddings there is room for one
    chunk of distances, 256 MB, and for two more where many of them tie.

    Definitions agree with ``AccuracyCalculator`` of pytorch-metric-learning, whose ``precision_at_1`` is Recall@1, but
    for three things: it has no Recall@K beyond K = 1; it leaves lone queries out without a word; and by default it
    takes Euclidean distances between embeddings as they come, in the order of cosines only where all have length 1.

    Args:
        embeddings: ``[Q, D]``, the queries; float32, float64, bfloat16 or float16.
        labels: ``[Q]`` int64, on the device of ``embeddings``.
        gallery: ``[N, D]``, dtype and device of ``embeddings``; where None the queries are the gallery, and each
            leaves itself out. To pass the queries again is an error without ``query_index``.
        gallery_labels: ``[N]`` int64, with ``gallery``.
        ks: the K of Recall@K, each at most the number of neighbors that a query has.
        distance: "cosine" or "euclidean".
        lone_queries: what to do with queries of whose class the gallery holds no other, which nothing can retrieve:
            "error" raises, "exclude" leaves them out of the means, "miss" counts them as 0, as the official
            Anti-Collapse code does.
        query_index: ``[Q]`` int64, the rows of the gallery that the queries are, where they are in it; each leaves
            itself out.
        map_ks: the K of MAP@K; of fewer neighbors all are taken.
        chunk_size: queries at a time; chosen for 256 MB of distances where None.
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
    if gallery is not None:
        _check_set("gallery", gallery, "gallery_labels", gallery_labels)
    gallery, own = _searched(embeddings, gallery, query_index)
    gallery_labels = labels if gallery_labels is None else gallery_labels
    neighbors = len(gallery) - (own is not None)
    ks = _check_ks(ks, neighbors)
    map_ks = [check_count("map_ks", k, 1) for k in map_ks]
    if len(set(map_ks)) < len(map_ks):
        raise ValueError(f"map_ks: expected no K twice, got {map_ks}")
    check_choice("distance", distance, *DISTANCES)
    check_choice("lone_queries", lone_queries, *LONE_QUERIES)
    if chunk_size is None:
        chunk_size = max(1, SCORES_AT_ONCE // len(gallery))
    else:
        chunk_size = check_count("chunk_size", chunk_size, 1)
    relevant = count_relevant(labels, gallery_labels)
    if own is not None:
        relevant -= (gallery_labels[own] == labels).long()
    counted = _counted_queries(relevant, labels, lone_queries)
    classes = len(labels[counted].unique())

    # Queries with as many relevant neighbors side by side: few chunks have to look far.
    counted = counted[relevant[counted].argsort(descending=True, stable=True)]
    search = ExactSearch(embeddings, gallery, distance)
    totals, done = torch.zeros(len(ks) + 2 + len(map_ks), dtype=torch.float64, device=labels.device), 0
    for chunk in counted.split(chunk_size):
        depth = min(max(*ks, *map_ks, int(relevant[chunk].max())), neighbors)
        found = search.nearest(chunk, None if own is None else own[chunk], depth)
        hits = gallery_labels[found] == labels[chunk].unsqueeze(1)
        totals[: len(ks) + 2] += _sums(hits, relevant[chunk], ks)
        if map_ks:
            of_class = relevant[chunk].clone()
            if own is not None:
                of_class += gallery_labels[own[chunk]] == labels[chunk]
            totals[len(ks) + 2 :] += _map_sums(hits, of_class, map_ks)
        done += len(chunk)
        if on_progress is not None:
            on_progress(done)

    means = (totals / len(counted)).tolist()
    recall, (map_at_r, r_precision), map_at = means[: len(ks)], means[len(ks) :][:2], means[len(ks) + 2 :]
    return RetrievalMetrics(
        dict(zip(ks, recall, strict=True)),
        map_at_r,
        r_precision,
        len(counted),
        classes,
        dict(zip(map_ks, map_at, strict=True)),
    )


@full_precision()
def nearest_neighbors(
    embeddings: Tensor,
    gallery: Tensor | None = None,
    *,
    k: int,
    distance: Literal["cosine", "euclidean"] = "cosine",
    query_index: Tensor | None = None,
) -> Tensor:
    """The gallery's k nearest embeddings of each query, the nearest first, in the order of :func:`retrieval_metrics`.

    Args:
        embeddings, gallery, distance, query_index: as in :func:`retrieval_metrics`.
        k: neighbors a query, at most as many as it has.

    Returns:
        ``[Q, k]`` int64 rows of the gallery: candidates that :func:`rerank` takes.

    Raises:
        TypeError, ValueError: as :func:`retrieval_metrics`.

    Example:
        >>> nearest_neighbors(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), k=2)
        tensor([[1, 2],
                [0, 2],
                [1, 0]])
    """
    _check_embeddings("embeddings", embeddings)
    if gallery is not None:
        _check_embeddings("gallery", gallery)
    gallery, own = _searched(embeddings, gallery, query_index)
    _check_ks((k,), len(gallery) - (own is not None), "k")
    check_choice("distance", distance, *DISTANCES)
    search = ExactSearch(embeddings, gallery, distance)
    chunks = torch.arange(len(embeddings), device=embeddings.device).split(max(1, SCORES_AT_ONCE // len(gallery)))
    return torch.cat([search.nearest(chunk, None if own is None else own[chunk], k) for chunk in chunks])


@full_precision()
def clustering_metrics(
    embeddings: Tensor, labels: Tensor, *, distance: Literal["cosine", "euclidean"] = "cosine", seed: int = 0
) -> ClusteringMetrics:
    """Agreement of the classes with a k-means clustering into as many clusters.

    Clusters come from scikit-learn's k-means with one k-means++ start. NMI is their mutual information with the classes
    over the mean of the two entropies. F1 is that of pairs: precision is the share of one class among the pairs in a
    cluster, recall the share of one cluster among the pairs of a class. ``AccuracyCalculator`` of
    pytorch-metric-learning and the official Anti-Collapse code compute the same measures of other clusters: 20
    iterations of faiss. An iteration costs samples x classes x D operations: minutes for thousands of classes.

    Args:
        embeddings: ``[n, D]``, on any device; dtypes as in :func:`retrieval_metrics`.
        labels: ``[n]`` int64.
        distance: "cosine" clusters the embeddings normalized to length 1.
        seed: of the start.

    Raises:
        ImportError: scikit-learn is missing (extra ``metric``).
        TypeError, ValueError: as in :func:`retrieval_metrics`, and a seed below 0.

    Example:
        >>> import torch
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
        >>> clustering_metrics(embeddings, torch.tensor([0, 0, 1, 1])).f1
        1.0
    """
    _check_set("embeddings", embeddings, "labels", labels)
    check_choice("distance", distance, *DISTANCES)
    check_at_least("seed", seed, 0)
    require("metric", "sklearn")
    from sklearn.cluster import KMeans
    from sklearn.metrics import normalized_mutual_info_score
    from sklearn.metrics.cluster import pair_confusion_matrix

    points = normalize(embeddings) if distance == "cosine" else embeddings.to(accumulate_dtype(embeddings.dtype))
    clusters = KMeans(len(labels.unique()), n_init=1, random_state=seed).fit_predict(points.numpy(force=True))
    classes = labels.numpy(force=True)
    (_, apart_in_class), (apart_in_cluster, together) = pair_confusion_matrix(classes, clusters).tolist()
    wrong = apart_in_class + apart_in_cluster
    # Without any pair both groupings say that all are different, and agree.
    f1 = 2 * together / (2 * together + wrong) if together or wrong else 1.0
    return ClusteringMetrics(float(normalized_mutual_info_score(classes, clusters)), f1)


def _check_embeddings(name: str, embeddings: object) -> None:
    check_tensor(name, embeddings, "[n, D]", 2)
    if not embeddings.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {embeddings.dtype}")
    if embeddings.numel() == 0:
        raise ValueError(f"{name}: expected samples and dimensions, got shape {list(embeddings.shape)}")
    finite = embeddings.isfinite().all(1)
    if not finite.all():
        raise ValueError(f"{name}: expected finite entries, got others in row {int((~finite).nonzero()[0, 0])}")


def _check_set(name: str, embeddings: object, labels_name: str, labels: object) -> None:
    _check_embeddings(name, embeddings)
    check_integers(labels_name, labels, "[n]", 1)
    if len(labels) != len(embeddings):
        raise ValueError(f"{labels_name}: expected shape [{len(embeddings)}] to fit {name}, got {list(labels.shape)}")
    check_like(name, embeddings, labels_name, labels, any_dtype=True)


def _searched(embeddings: Tensor, gallery: Tensor | None, query_index: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The gallery, and the place of each query in it where it has one."""
    if gallery is None:
        if query_index is not None:
            raise ValueError("query_index: expected with gallery; without one the queries are the gallery")
        return embeddings, torch.arange(len(embeddings), device=embeddings.device)
    if gallery.shape[1] != embeddings.shape[1]:
        raise ValueError(
            f"gallery: expected shape [N, {embeddings.shape[1]}] to fit embeddings, got {list(gallery.shape)}"
        )
    check_like("embeddings", embeddings, "gallery", gallery)
    if query_index is None:
        # Two sets that have collapsed to one point may well be equal.
        same = embeddings.shape == gallery.shape and embeddings.data_ptr() == gallery.data_ptr()
        if torch.equal(embeddings, gallery) and (same or (gallery != gallery[0]).any()):
            raise ValueError(
                "gallery: expected others than the queries, got the same, of which each would find itself; leave "
                "gallery out, or name the row of each query by query_index"
            )
        return gallery, None
    check_integers("query_index", query_index, "[Q]", 1)
    check_like("embeddings", embeddings, "query_index", query_index, any_dtype=True)
    if len(query_index) != len(embeddings):
        raise ValueError(
            f"query_index: expected shape [{len(embeddings)}] to fit embeddings, got {list(query_index.shape)}"
        )
    low, high = query_index.min().item(), query_index.max().item()
    if low < 0 or high >= len(gallery):
        raise ValueError(f"query_index: expected rows in [0, {len(gallery)}), got {low} to {high}")
    return gallery, query_index


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
    check_choice("lone_queries", lone_queries, *LONE_QUERIES)
    _counted_queries(count_relevant(labels, gallery_labels) - int(with_itself), labels, lone_queries)


def _check_ks(ks: Sequence[int], neighbors: int, name: str = "ks") -> list[int]:
    if not isinstance(ks, Sequence):
        raise TypeError(f"{name}: expected a sequence of integers, got {type(ks).__name__}")
    if neighbors < 1:
        raise ValueError(f"{name}: expected samples beside the query to search, got the query alone")
    if len(ks) == 0 or len(set(ks)) < len(ks):
        raise ValueError(f"{name}: expected at least one K, and none twice, got {list(ks)}")
    ks = [check_integer(name, k) for k in ks]
    for k in ks:
        if not 1 <= k <= neighbors:
            raise ValueError(f"{name}: expected K in [1, {neighbors}], the neighbors that each query has, got {k}")
    return ks


def count_relevant(labels: Tensor, gallery_labels: Tensor) -> Tensor:
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


def _sums(hits: Tensor, relevant: Tensor, ks: Sequence[int]) -> Tensor:
    """Sums over queries of what each contributes to Recall@K, MAP@R and R-precision, [len(ks) + 2] in float64.

    ``hits`` [queries, depth] says which neighbors, from the nearest on, are of the query's class.
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


def _map_sums(hits: Tensor, of_class: Tensor, map_ks: Sequence[int]) -> Tensor:
    """Sums over queries of what each contributes to MAP@K, [len(map_ks)] in float64; ``of_class`` [queries]."""
    rank = torch.arange(1, hits.shape[1] + 1, device=hits.device)
    precision = hits * hits.cumsum(1) / rank.double()
    return torch.stack([(precision[:, :k].sum(1) / of_class.clamp(min=1)).sum() for k in map_ks])
