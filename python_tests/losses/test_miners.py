"""Triplet miners against the probabilities that the official Anti-Collapse code gives to each triplet, by loops."""

import itertools
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from fewshot_ext.losses.miners import MINERS, TripletMiner

LABELS = (2, 0, 2, 1, 0, 2, 7)  # the last has no other of its class


def points(dimensions, seed=0):
    """Among them two near ones of different classes, and two opposite ones."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(len(LABELS), dimensions, generator=generator, dtype=torch.float64)
    embeddings[1] = embeddings[0] + 0.1 * embeddings[2]
    embeddings[4] = 0.2 * embeddings[5] - embeddings[3]
    return F.normalize(embeddings, dim=1)


def evenly(items):
    return dict.fromkeys(items, 1 / len(items))


def inverse_density(distance, dimensions):
    distance = max(distance, 0.5)
    return distance ** (2 - dimensions) * (1 - distance**2 / 4) ** ((3 - dimensions) / 2)


def official(name, embeddings, labels):
    """Expected number of each triplet in one draw."""
    n, dimensions = embeddings.shape
    distance = [[math.dist(a, b) for b in embeddings.tolist()] for a in embeddings.tolist()]
    positives = [[j for j in range(n) if labels[j] == labels[i] and j != i] for i in range(n)]
    negatives = [[j for j in range(n) if labels[j] != labels[i]] for i in range(n)]
    if name == "random":
        every = [(i, p, q) for i in range(n) for p, q in itertools.product(positives[i], negatives[i])]
        return dict.fromkeys(every, min(1, n / len(every)))
    expected = Counter()
    for i in range(n):
        if not positives[i]:
            continue
        first = positives[i]
        if name == "softhard":
            nearest = min(distance[i][q] for q in negatives[i])
            first = [p for p in first if distance[i][p] > nearest] or first
        for p, chance in evenly(first).items():
            second = negatives[i]
            if name == "semihard":
                second = [q for q in second if distance[i][p] < distance[i][q] < distance[i][p] + 0.2] or second
            if name == "softhard":
                farthest = max(distance[i][p] for p in positives[i])
                second = [q for q in second if distance[i][q] < farthest] or second
            weights = evenly(second)
            if name == "distance":
                weights = {q: inverse_density(distance[i][q], dimensions) for q in second}
            for q, weight in weights.items():
                expected[i, p, q] += chance * weight / sum(weights.values())
    return expected


@pytest.mark.parametrize("name", MINERS)
@pytest.mark.parametrize("dimensions", (3, 8))
def test_triplets_are_drawn_as_by_the_official_code(name, dimensions):
    embeddings, labels, draws = points(dimensions), torch.tensor(LABELS), 3000
    torch.manual_seed(0)
    miner = TripletMiner(name)
    found = Counter()
    for _ in range(draws):
        triplets = list(zip(*(part.tolist() for part in miner(embeddings, labels)), strict=True))
        found.update(triplets)
        if name == "random":
            assert len(set(triplets)) == len(LABELS)
        else:
            assert [anchor for anchor, *_ in triplets] == [0, 1, 2, 4, 5]
    expected = official(name, embeddings, LABELS)
    assert found.keys() <= expected.keys()
    for triplet, chance in expected.items():
        deviation = math.sqrt(chance * (1 - chance) / draws)
        assert found[triplet] / draws == pytest.approx(chance, abs=5 * deviation + 1e-9), triplet


def test_negatives_beyond_1_4_are_drawn():
    """Wu et al. leave them out, and so did version 0.1."""
    embeddings = torch.tensor([[1.0, 0, 0], [0.9, 0.1, 0], [-1.0, 0.2, 0], [-1.0, 0, 0.2]])
    anchors, _, negatives = TripletMiner("distance")(F.normalize(embeddings), torch.tensor([0, 0, 1, 1]))
    assert anchors.tolist() == [0, 1, 2, 3]
    assert all((embeddings[anchors] - embeddings[negatives]).norm(dim=1) > 1.4)


def test_no_anchor_is_lost_in_512_dimensions():
    """Weights relative to the largest of the batch would underflow beside two near images of different classes."""
    embeddings = torch.randn(90, 512, generator=torch.Generator().manual_seed(0))
    embeddings[2] = embeddings[0] + 0.01 * embeddings[1]
    embeddings[5] = -embeddings[7]
    labels = torch.arange(45).repeat_interleave(2)
    anchors, positives, negatives = TripletMiner("distance")(F.normalize(embeddings), labels)
    assert torch.equal(anchors, torch.arange(90))
    assert torch.equal(positives, anchors ^ 1)
    assert negatives[[0, 2, 5, 7]].tolist() == [2, 0, 7, 5]


def test_where_there_are_few_triplets_random_draws_them_all():
    triplets = torch.stack(TripletMiner("random")(points(4)[:3], torch.tensor([0, 0, 1])), 1)
    assert sorted(triplets.tolist()) == [[0, 1, 2], [1, 0, 2]]
