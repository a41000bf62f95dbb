"""Retrieval against a loop over the definitions, against pytorch-metric-learning, and within its memory."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fewshot_ext.retrieval import clustering_metrics, nearest_neighbors, retrieval_metrics

pytestmark = pytest.mark.usefixtures("one_thread")


MAP_KS = (1, 3, 1000)


def signs(count, seed):
    """Corners of a square of four dimensions: of length 2, so that cosines are exact and most of them tie."""
    generator = torch.Generator().manual_seed(seed)
    return 2.0 * torch.randint(2, (count, 4), generator=generator) - 1


def by_the_definitions(queries, labels, gallery, gallery_labels, ks, with_itself):
    """Query by query; neighbors by similarity and then by index. None for a query that nothing can retrieve."""
    found = []
    for index, (query, label) in enumerate(zip(queries, labels.tolist(), strict=True)):
        similarity = (gallery @ query).tolist()
        order = sorted(range(len(gallery)), key=lambda other: (-similarity[other], other))
        hits = [gallery_labels[other].item() == label for other in order if not (with_itself and other == index)]
        relevant = sum(hits)
        if relevant == 0:
            found.append(None)
            continue
        precisions = [sum(hits[:rank]) / rank * hits[rank - 1] for rank in range(1, relevant + 1)]
        near = [float(any(hits[:k])) for k in ks]
        near += [sum(precisions) / relevant, sum(hits[:relevant]) / relevant]
        found.append([*near, *official_map(hits, with_itself)])
    return found


def official_map(hits, with_itself):
    """mAP@K of the official Anti-Collapse code, which divides by the images of the class, the query among them."""
    hits, count = np.array(hits), sum(hits) + with_itself
    return [(np.cumsum(hits) * hits / np.arange(1, len(hits) + 1))[:k].sum() / count for k in MAP_KS]


def as_list(metrics):
    return [*metrics.recall.values(), metrics.map_at_r, metrics.r_precision, *metrics.map_at.values()]


def mean(rows):
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


@given(
    sizes=st.tuples(st.integers(3, 30), st.integers(3, 30)),
    classes=st.integers(1, 6),
    with_itself=st.booleans(),
    chunk_size=st.sampled_from((1, 3, None)),
    lone_queries=st.sampled_from(("error", "exclude", "miss")),
    seed=st.integers(0, 2**32),
)
def test_equals_the_definitions(sizes, classes, with_itself, chunk_size, lone_queries, seed):
    generator = torch.Generator().manual_seed(seed)
    queries, gallery = signs(sizes[0], seed), signs(sizes[1], seed + 1)
    labels = 10 * torch.randint(classes, (sizes[0],), generator=generator) - 20
    gallery_labels = 10 * torch.randint(classes, (sizes[1],), generator=generator) - 20
    others = (queries, labels) if with_itself else (gallery, gallery_labels)
    ks = (2, 1)
    rows = by_the_definitions(queries, labels, *others, ks, with_itself)
    arguments = (queries, labels) if with_itself else (queries, labels, gallery, gallery_labels)

    def found():
        return retrieval_metrics(*arguments, ks=ks, map_ks=MAP_KS, chunk_size=chunk_size, lone_queries=lone_queries)

    counted = [row for row in rows if row is not None]
    if None in rows and lone_queries == "error":
        with pytest.raises(ValueError, match=f"got none for {rows.count(None)} queries"):
            found()
        return
    if not counted and lone_queries == "exclude":
        with pytest.raises(ValueError, match="expected a query with another sample of its class"):
            found()
        return
    if lone_queries == "miss":
        counted = [row or [0.0] * (len(ks) + 2 + len(MAP_KS)) for row in rows]
    metrics = found()
    assert list(metrics.recall) == list(ks)
    assert metrics.queries == len(counted)
    assert as_list(metrics) == pytest.approx(mean(counted))


def test_collapsed_embeddings_are_retrieved_in_the_order_of_the_gallery():
    """Every distance ties: an order that differed would make chance look like skill."""
    labels = torch.tensor([3, 1, 1, 3, 1])
    metrics = retrieval_metrics(torch.ones(5, 8), labels, ks=(1, 2, 3, 4), map_ks=MAP_KS)
    rows = by_the_definitions(torch.ones(5, 8), labels, torch.ones(5, 8), labels, (1, 2, 3, 4), True)
    assert as_list(metrics) == pytest.approx(mean(rows))


@pytest.mark.parametrize("distance", ("cosine", "euclidean"))
@pytest.mark.parametrize("separate", (False, True))
def test_agrees_with_pytorch_metric_learning(separate, distance):
    pytest.importorskip("pytorch_metric_learning", reason="needs the extra metric")
    from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN
    from sklearn.cluster import KMeans

    torch.manual_seed(0)
    centers = 2 * torch.randn(20, 16)
    labels, gallery_labels = torch.randint(20, (300,)), torch.randint(20, (400,))
    embeddings = centers[labels] + 3 * torch.randn(300, 16)
    gallery = centers[gallery_labels] + 3 * torch.randn(400, 16)

    def clusters(points, count):
        points = F.normalize(points) if distance == "cosine" else points
        return torch.as_tensor(KMeans(count, n_init=1, random_state=7).fit_predict(points))

    measure = CosineSimilarity() if distance == "cosine" else LpDistance(normalize_embeddings=False)
    calculator = AccuracyCalculator(
        include=("precision_at_1", "r_precision", "mean_average_precision_at_r", "NMI"),
        k="max_bin_count",
        device=torch.device("cpu"),
        knn_func=CustomKNN(measure),
        kmeans_func=clusters,
    )
    others = (gallery, gallery_labels) if separate else ()
    expected = calculator.get_accuracy(embeddings, labels, *others)
    metrics = retrieval_metrics(embeddings, labels, *others, ks=(1,), distance=distance)
    assert metrics.recall[1] == pytest.approx(expected["precision_at_1"])
    assert metrics.r_precision == pytest.approx(expected["r_precision"])
    assert metrics.map_at_r == pytest.approx(expected["mean_average_precision_at_r"])
    assert clustering_metrics(embeddings, labels, distance=distance, seed=7).nmi == pytest.approx(expected["NMI"])


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.float16), ids=str)
def test_dtypes_and_gradients(dtype):
    torch.manual_seed(0)
    labels = torch.arange(40) % 8
    embeddings = torch.randn(40, 6).to(torch.bfloat16)
    expected = retrieval_metrics(embeddings.float(), labels)
    assert retrieval_metrics(embeddings.to(dtype).requires_grad_(), labels) == expected


def test_euclidean_distances_far_from_the_origin():
    """The squares are 1e8 and differ by 1: in float32 nothing would be left of their differences."""
    torch.manual_seed(0)
    embeddings, labels = torch.randn(60, 3), torch.arange(60) % 6
    near = retrieval_metrics(embeddings, labels, distance="euclidean")
    assert retrieval_metrics(embeddings + 1e4, labels, distance="euclidean").map_at_r == pytest.approx(
        near.map_at_r, abs=0.02
    )


def test_6_ties_of_integer_vectors_are_exact_for_any_chunk():
    generator = torch.Generator().manual_seed(2)
    embeddings = 2.0 * torch.randint(2, (1000, 16), generator=generator) - 1
    labels = torch.arange(1000) % 10
    differing = (embeddings[:, None] != embeddings).sum(-1)
    differing.fill_diagonal_(17)
    nearest = differing.sort(dim=1, stable=True).indices[:, 0]
    expected = (labels[nearest] == labels).double().mean().item()
    for chunk_size in (1, 3, 100, None):
        found = retrieval_metrics(embeddings, labels, ks=(1,), distance="euclidean", chunk_size=chunk_size)
        assert found.recall[1] == expected


@pytest.mark.parametrize("distance", ("cosine", "euclidean"))
def test_6_equal_rows_tie_wherever_the_chunks_are_cut(distance):
    """Copies of a row are at one distance, though they stand in other columns of a matrix product."""
    points = torch.randn(30, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gallery, labels = points.repeat(7, 1), torch.arange(210)
    for chunk_size in (1, 4, None):
        found = retrieval_metrics(
            points, labels[:30], gallery, labels, ks=(1, 2), distance=distance, chunk_size=chunk_size
        )
        assert found.recall[1] == 1.0  # the first copy, which alone has the label


def test_6_parallel_vectors_tie_by_cosine():
    """Divided by their lengths, 3 v and 7 v differ in their last bits."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        vector = torch.randint(1, 10, (7,), generator=generator).double()
        gallery = vector * torch.tensor([[7.0], [3], [1], [6], [2], [5], [9], [11]], dtype=torch.float64)
        assert nearest_neighbors(13 * vector[None], gallery, k=8).tolist() == [list(range(8))]


@pytest.mark.parametrize("length", (1e-30, 1e-14, 1e30))
def test_4_cosines_do_not_depend_on_lengths(length):
    embeddings = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    expected = nearest_neighbors(embeddings, k=49)
    lengths = length * torch.linspace(1, 3, 50)[:, None]
    assert torch.equal(nearest_neighbors(embeddings * lengths, k=49), expected)


@pytest.mark.parametrize("exponent", (-1020, -700, 600, 1020))
def test_6_euclidean_distances_at_any_range(exponent):
    embeddings = torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = nearest_neighbors(embeddings, k=39, distance="euclidean")
    found = nearest_neighbors(embeddings * 2.0**exponent, k=39, distance="euclidean")
    assert torch.equal(found, expected)
    zeros = torch.zeros(1, 6, dtype=torch.float64)  # have no range of their own
    by_length = nearest_neighbors(zeros, embeddings, k=40, distance="euclidean")
    assert torch.equal(nearest_neighbors(zeros, embeddings * 2.0**exponent, k=40, distance="euclidean"), by_length)


def test_6_one_far_embedding_leaves_the_order_of_the_rest():
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.randn(50, 8, generator=generator)
    far = torch.cat([torch.full((1, 8), 1e18), embeddings])
    near = nearest_neighbors(embeddings, k=48, distance="euclidean")
    assert torch.equal(nearest_neighbors(far, k=49, distance="euclidean")[1:, :48], near + 1)


def test_7_collapsed_embeddings_are_told_apart():
    """One common vector and a little structure: in float32 the cosines differ in their last bits."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 20
    structure = torch.randn(20, 64, generator=generator)[labels] + 0.1 * torch.randn(200, 64, generator=generator)
    collapsed = torch.nn.functional.normalize(torch.randn(64, generator=generator) + 3e-4 * structure, dim=1)
    for distance in ("cosine", "euclidean"):
        assert retrieval_metrics(collapsed, labels, ks=(1,), distance=distance).recall[1] == 1.0
    assert retrieval_metrics(1e25 * collapsed, labels, ks=(1,)).recall[1] == 1.0  # lengths whose squares overflow


def test_8_queries_that_are_rows_of_the_gallery_leave_themselves_out():
    generator = torch.Generator().manual_seed(0)
    embeddings, labels = torch.randn(40, 4, generator=generator), torch.arange(40) % 4
    alone = retrieval_metrics(embeddings, labels)
    again = retrieval_metrics(embeddings, labels, embeddings.clone(), labels, query_index=torch.arange(40))
    assert again == alone
    some = torch.tensor([30, 2, 7])
    found = retrieval_metrics(embeddings[some], labels[some], embeddings, labels, ks=(1,), query_index=some)
    nearest = nearest_neighbors(embeddings, k=1)[some, 0]
    assert found.recall[1] == pytest.approx((labels[nearest] == labels[some]).double().mean().item())
    for call in (
        lambda: retrieval_metrics(embeddings, labels, embeddings.clone(), labels),
        lambda: nearest_neighbors(embeddings, embeddings, k=1),
    ):
        with pytest.raises(ValueError, match=r"gallery: expected others than the queries, got the same.*query_index"):
            call()
    ones = torch.ones(4, 2)
    retrieval_metrics(ones, LABELS[:4], ones.clone(), LABELS[:4], ks=(1,))  # two sets that have collapsed are two sets
    with pytest.raises(ValueError, match="gallery: expected others than the queries, got the same"):
        retrieval_metrics(ones, LABELS[:4], ones, LABELS[:4], ks=(1,))


def test_9_the_classes_of_the_queries_that_count():
    labels = torch.tensor([0, 0, 1, 1, 2, 3])
    found = retrieval_metrics(signs(6, 0), labels, ks=(1,), lone_queries="exclude")
    assert (found.queries, found.classes) == (4, 2)
    assert retrieval_metrics(signs(6, 0), labels, ks=(1,), lone_queries="miss").classes == 4


def test_progress_reaches_all_queries():
    seen = []
    retrieval_metrics(signs(10, 0), torch.arange(10) % 2, ks=(1,), chunk_size=4, on_progress=seen.append)
    assert seen == [4, 8, 10]


def test_chunks_do_not_change_the_metrics():
    torch.manual_seed(0)
    embeddings, labels = torch.randn(200, 16), torch.randint(9, (200,))
    expected = as_list(retrieval_metrics(embeddings, labels))
    for chunk_size in (1, 7, 64):
        assert as_list(retrieval_metrics(embeddings, labels, chunk_size=chunk_size)) == pytest.approx(expected)


def test_nmi_is_one_for_clusters_that_are_the_classes_and_seeded():
    torch.manual_seed(0)
    labels = torch.arange(60) % 3
    embeddings = 10 * torch.eye(3)[labels] + torch.rand(60, 3)
    assert clustering_metrics(embeddings, labels).nmi == pytest.approx(1.0)
    noise = torch.randn(60, 3)
    assert clustering_metrics(noise, labels, seed=3) == clustering_metrics(noise, labels, seed=3)
    assert 0 <= clustering_metrics(noise, labels).nmi < 0.3


def test_f1_is_that_of_the_pairs():
    """Pair by pair, as the official Anti-Collapse code counts them; the clusters are scikit-learn's."""
    from sklearn.cluster import KMeans

    torch.manual_seed(0)
    labels = torch.randint(4, (50,))
    embeddings = 2 * torch.eye(4)[labels] + torch.randn(50, 4)
    clusters = KMeans(4, n_init=1, random_state=2).fit_predict(embeddings.numpy())
    pairs = [(labels[i] == labels[j], clusters[i] == clusters[j]) for i in range(50) for j in range(i)]
    both = sum(of_class and of_cluster for of_class, of_cluster in pairs)
    precision, recall = both / sum(of_cluster for _, of_cluster in pairs), both / sum(of_class for of_class, _ in pairs)
    expected = 2 * precision * recall / (precision + recall)
    found = clustering_metrics(embeddings, labels, distance="euclidean", seed=2)
    assert 0.1 < found.f1 < 0.9
    assert found.f1 == pytest.approx(float(expected))
    assert clustering_metrics(torch.eye(3), torch.arange(3)).f1 == 1


def test_nmi_of_lengths_alone():
    """Cosines see no difference between near and far in one direction."""
    labels = torch.arange(40) % 2
    embeddings = (1.0 + 9.0 * labels)[:, None] * torch.ones(40, 2)
    assert clustering_metrics(embeddings, labels, distance="euclidean").nmi == pytest.approx(1.0)


def entry(value):
    embeddings = signs(6, 0)
    embeddings[4, 1] = value
    return embeddings


LABELS = torch.tensor([0, 0, 1, 1, 2, 2])


@pytest.mark.parametrize(
    "change, error, message",
    (
        ({"embeddings": [[1.0]]}, TypeError, "embeddings: expected a tensor [n, D], got list"),
        ({"embeddings": torch.zeros(6)}, ValueError, "embeddings: expected shape [n, D], got [6]"),
        ({"embeddings": torch.zeros(6, 2).long()}, TypeError, "embeddings: expected a floating dtype"),
        (
            {"embeddings": torch.zeros(6, 0)},
            ValueError,
            "embeddings: expected samples and dimensions, got shape [6, 0]",
        ),
        ({"embeddings": entry(math.nan)}, ValueError, "embeddings: expected finite entries, got others in row 4"),
        ({"embeddings": entry(math.inf)}, ValueError, "embeddings: expected finite entries, got others in row 4"),
        ({"labels": LABELS[:5]}, ValueError, "labels: expected shape [6] to fit embeddings, got [5]"),
        ({"labels": LABELS[:, None]}, ValueError, "labels: expected shape [n], got [6, 1]"),
        ({"labels": LABELS.float()}, TypeError, "labels: expected dtype torch.int64, got torch.float32"),
        ({"labels": LABELS.to("meta")}, ValueError, "labels: expected device cpu as embeddings is on, got meta"),
        ({"labels": torch.tensor([0, 0, 1, 1, 2, 3])}, ValueError, "got none for 2 queries, the first of class 2"),
        ({"gallery": signs(6, 1)}, ValueError, "gallery_labels: expected with gallery, got None"),
        ({"gallery_labels": LABELS}, ValueError, "gallery: expected with gallery_labels, got None"),
        ({"gallery": torch.ones(6, 3), "gallery_labels": LABELS}, ValueError, "gallery: expected shape [N, 4] to fit"),
        (
            {"gallery": signs(6, 1).double(), "gallery_labels": LABELS},
            TypeError,
            "gallery: expected dtype torch.float32",
        ),
        ({"gallery": entry(math.nan), "gallery_labels": LABELS}, ValueError, "gallery: expected finite entries"),
        (
            {"gallery": signs(6, 1), "gallery_labels": LABELS[:4]},
            ValueError,
            "gallery_labels: expected shape [6] to fit",
        ),
        ({"ks": (1, 6)}, ValueError, "ks: expected K in [1, 5], the neighbors that each query has, got 6"),
        ({"ks": (0,)}, ValueError, "got 0"),
        ({"ks": ()}, ValueError, "ks: expected at least one K"),
        ({"ks": (1, 1)}, ValueError, "ks: expected at least one K, and none twice, got [1, 1]"),
        ({"ks": (1.0,)}, TypeError, "ks: expected an integer, got float"),
        ({"ks": 1}, TypeError, "ks: expected a sequence of integers, got int"),
        (
            {"embeddings": signs(1, 0), "labels": LABELS[:1]},
            ValueError,
            "ks: expected samples beside the query to search, got the query alone",
        ),
        ({"distance": "manhattan"}, ValueError, "distance: expected one of cosine, euclidean, got 'manhattan'"),
        ({"lone_queries": "drop"}, ValueError, "lone_queries: expected one of error, exclude, miss, got 'drop'"),
        ({"chunk_size": 0}, ValueError, "chunk_size: expected at least 1, got 0"),
    ),
)
def test_bad_input(change, error, message):
    with pytest.raises(error) as raised:
        retrieval_metrics(**{"embeddings": signs(6, 0), "labels": LABELS, "ks": (1,), **change})
    assert message in str(raised.value)


def test_numbers_may_be_numpys():
    found = retrieval_metrics(signs(6, 0), LABELS, ks=(np.int64(1), 2), chunk_size=np.int32(2))
    assert as_list(found) == as_list(retrieval_metrics(signs(6, 0), LABELS, ks=(1, 2)))


def test_bad_input_of_nmi(monkeypatch):
    with pytest.raises(ValueError, match="embeddings: expected finite entries, got others in row 4"):
        clustering_metrics(entry(math.nan), LABELS)
    with pytest.raises(ValueError, match="distance: expected one of cosine, euclidean"):
        clustering_metrics(signs(6, 0), LABELS, distance="dot")
    with pytest.raises(ValueError, match="seed: expected at least 0, got -1"):
        clustering_metrics(signs(6, 0), LABELS, seed=-1)
    monkeypatch.setattr("fewshot_ext._extras.is_installed", lambda module: False)
    with pytest.raises(ImportError, match=r"'sklearn' is missing; pip install 'fewshot_ext\[metric\]'"):
        clustering_metrics(signs(6, 0), LABELS)


_PEAK = """
import resource, sys, torch
from fewshot_ext.retrieval import retrieval_metrics
samples, queries, spread = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
torch.manual_seed(0)
labels = torch.arange(samples) // 5
gallery = torch.randn(512) + spread * torch.randn(samples, 512)
metrics = retrieval_metrics(gallery[:queries], labels[:queries], gallery, labels)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


def peak_gib(samples, queries, spread):
    output = subprocess.run(
        [sys.executable, "-c", _PEAK, str(samples), str(queries), str(spread)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return float(output)


@pytest.mark.parametrize("spread", (1.0, 0.0), ids=("spread", "collapsed"))
def test_a_gallery_of_120_000_stays_within_4_gib(spread):
    """Two chunks of queries: those that follow use the same memory."""
    assert peak_gib(120_000, 400, spread) < 4


@pytest.mark.slow
def test_memory_does_not_grow_with_the_queries():
    assert peak_gib(120_000, 12_000, 1.0) < 4
