"""FewShotClassifier with heads that look at regions of the images."""

import pytest
import torch
from torch import nn

from fewshot_ext import FewShotClassifier
from fewshot_ext import classifier as classifier_module
from fewshot_ext.data import load_digits
from fewshot_ext.heads import MAP_HEADS, DeepEMDHead, FineTuning, LocalNearestNeighbors, Pooled
from fewshot_ext.heads import maps as map_heads
from fewshot_ext.models import LocalFeaturesConfig, StructuredClassifierConfig
from fewshot_ext.ops import finetune_episodes

pytestmark = pytest.mark.usefixtures("one_thread")

DIGITS = load_digits()
QUICK = DeepEMDHead(temperature=4.0, classifier=StructuredClassifierConfig(passes=3, lr=0.2))


def some(*counts, start=0):
    """The first images of the digits 0, 1, ..., as many of each as ``counts`` says, and their names."""
    rows = [(DIGITS.labels == digit).nonzero()[start : start + count, 0] for digit, count in enumerate(counts)]
    index = torch.cat(rows)
    return DIGITS.images[index], [f"digit {label}" for label in DIGITS.labels[index].tolist()]


class Blocks(nn.Module):
    """A backbone of pixels: its feature map has one channel for each pixel of a 2 x 2 block."""

    def feature_map(self, images):
        return nn.functional.pixel_unshuffle(images, 2)

    def forward(self, images):
        return self.feature_map(images).flatten(1)


def textures(each, seed):
    """Gray images: stripes that lie, stripes that stand, and neither, as many of each, with noise."""
    ramp = torch.arange(8)
    stripes = 200 * (ramp % 2)
    patterns = torch.stack([stripes.view(8, 1).expand(8, 8), stripes.expand(8, 8), (15 * ramp).expand(8, 8)])
    noise = torch.randint(50, (3, each, 8, 8), generator=torch.Generator().manual_seed(seed))
    images = (patterns.unsqueeze(1) + noise).to(torch.uint8)
    return images.view(-1, 1, 8, 8), [name for name in ("lying", "standing", "neither") for _ in range(each)]


@pytest.mark.parametrize("head", [*(f"{name}@fcn" for name in MAP_HEADS), "deepemd@grid", "deepemd@sampling", QUICK])
def test_textures_are_told_apart_by_every_head(head):
    classifier = FewShotClassifier(Blocks(), head).fit(*textures(4, seed=0))
    query, labels = textures(10, seed=1)
    # Random crops of 8 x 8 pixels, resized and mirrored, leave little of a texture.
    assert classifier.score(query, labels) > (0.45 if "sampling" in str(head) else 0.8)
    shares = classifier.predict_proba(query)
    torch.testing.assert_close(shares.sum(1), torch.ones(30))
    assert [classifier.classes_[index] for index in shares.argmax(1)] == classifier.predict(query)


@pytest.mark.parametrize("counts", [(1, 1, 1), (3, 1, 2)])
def test_it_is_an_episode_of_the_head(counts):
    support, labels = some(*counts)
    query, _ = some(3, 3, 3, start=10)
    classifier = FewShotClassifier(Blocks(), QUICK, seed=3).fit(support, labels)
    maps = [Blocks().feature_map(images / 255).flatten(2).mT for images in (support, query)]
    target = torch.tensor([int(label[-1]) for label in labels])
    expected = QUICK(maps[0][None], target[None], maps[1][None], 3, generator=torch.Generator().manual_seed(3))[0]
    torch.testing.assert_close(classifier.decision_function(query), expected)
    torch.testing.assert_close(classifier.predict_proba(query), expected.softmax(1))


def test_the_structured_layer_is_fitted_once(monkeypatch):
    fits = []
    fit = map_heads.class_prototypes

    def counted(support, *arguments):
        fits.append(support.shape[1])
        return fit(support, *arguments)

    monkeypatch.setattr(map_heads, "class_prototypes", counted)
    monkeypatch.setattr(classifier_module, "_BYTES_AT_ONCE", 1)
    classifier = FewShotClassifier(Blocks(), QUICK, batch_size=2).fit(*some(3, 3))
    query, _ = some(4, 4, start=10)
    whole = classifier.decision_function(query)
    # What is left for the queries are the prototypes, one a class.
    assert fits == [6, 2, 2, 2, 2]
    torch.testing.assert_close(classifier.decision_function(query[5:6]), whole[5:6])
    assert 6 not in fits[1:]
    classifier.partial_fit(*some(1, start=5))
    assert fits[-1] == 7


def test_classes_one_after_the_other():
    images, labels = some(3, 2, 4)
    whole = FewShotClassifier(Blocks(), QUICK).fit(images, labels)
    grown = FewShotClassifier(Blocks(), QUICK).fit(images[:3], labels[:3])
    with pytest.raises(ValueError, match="classes: expected at least two, and only 'digit 0' is known"):
        grown.predict(images)
    grown.partial_fit(images[3:5], labels[3:5]).partial_fit(images[5:], labels[5:])
    torch.testing.assert_close(grown.decision_function(images), whole.decision_function(images))


@pytest.mark.parametrize("head", ["fc_cosine", "knn"])
def test_memory_bounds_the_queries_at_once_and_changes_nothing(head, monkeypatch):
    query, _ = some(4, 4, start=10)
    classifier = FewShotClassifier(Blocks(), f"{head}@fcn", batch_size=3).fit(*some(2, 2))
    whole = classifier.decision_function(query)
    monkeypatch.setattr(classifier_module, "_BYTES_AT_ONCE", 1)
    torch.testing.assert_close(classifier.decision_function(query), whole)


@pytest.mark.parametrize("head", ["fc_cosine", "fc_dot"])
def test_a_linear_classifier_is_fitted_once_to_mean_features(head, monkeypatch):
    images, labels = some(2, 2)
    query, _ = some(4, 4, start=10)
    maps, queries = (Blocks().feature_map(part / 255).flatten(2).mT[None] for part in (images, query))
    target = torch.tensor([[int(label[-1]) for label in labels]])
    expected = MAP_HEADS[head](maps, target, queries, 2, generator=torch.Generator().manual_seed(0))[0]
    calls = []

    def counted(support, target, query, **settings):
        calls.append(query.shape[1])
        return finetune_episodes(support, target, query, **settings)

    monkeypatch.setattr("fewshot_ext.heads.vectors.finetune_episodes", counted)
    monkeypatch.setattr(classifier_module, "_QUERIES_AT_ONCE", 4)
    classifier = FewShotClassifier(Blocks(), head, batch_size=3).fit(images, labels)
    assert torch.equal(classifier.decision_function(query), expected)
    assert calls == [8]
    # One mean of 4 channels of 4 bytes is left of an image's 16 regions.
    monkeypatch.setattr(classifier_module, "_BYTES_AT_ONCE", 4 * 4 * 4)
    assert torch.equal(classifier.decision_function(query), expected)
    assert calls == [8, 6, 2]


@pytest.mark.parametrize(
    "head",
    ["deepemd", "deepemd_uniform@grid", "knn@grid", QUICK, LocalNearestNeighbors(2), Pooled(FineTuning(steps=3))],
    ids=str,
)
def test_nested_settings_survive_a_file(head, checkpoints, tmp_path):
    local_features = LocalFeaturesConfig("sampling", regions=4, horizontal_flip=False, seed=9)
    query, _ = some(2, 2, start=10)
    classifier = FewShotClassifier(checkpoints[0], head, seed=5, local_features=local_features).fit(*some(3, 3))
    classifier.save(tmp_path / "classifier.pt")
    again = FewShotClassifier.load(tmp_path / "classifier.pt")
    assert (again.head, again.local_features) == (classifier.head, classifier.local_features)
    assert torch.equal(again.predict_proba(query), classifier.predict_proba(query))
    assert again.partial_fit(query[:1], ["new"]).classes_[-1] == "new"


def test_a_module_of_ones_own_survives_too(tmp_path):
    query, _ = some(2, 2, start=10)
    classifier = FewShotClassifier(Blocks(), QUICK).fit(*some(2, 2))
    classifier.save(tmp_path / "classifier.pt")
    again = FewShotClassifier.load(tmp_path / "classifier.pt", Blocks())
    assert torch.equal(again.decision_function(query), classifier.decision_function(query))


class Other(FineTuning):
    pass


@pytest.mark.parametrize("head", [Other(), Pooled(Other())], ids=["plain", "pooled"])
def test_a_head_of_ones_own_is_not_saved(head, tmp_path):
    classifier = FewShotClassifier(Blocks(), head).fit(*some(1, 1))
    with pytest.raises(TypeError, match=r"head: expected one of .*DeepEMDHead.* to be saved"):
        classifier.save(tmp_path / "classifier.pt")
    assert not list(tmp_path.iterdir())


class NotANumber(Blocks):
    def feature_map(self, images):
        return super().feature_map(images) * float("nan")


@pytest.mark.parametrize(
    ("backbone", "head", "error", "message"),
    [
        (nn.Flatten(), "deepemd", TypeError, "gives no feature maps, which matching needs: Flatten has no method"),
        (Blocks(), "finetune@fcn", ValueError, "asks for maps, but finetune takes feature vectors"),
        (Blocks(), "deepemd@patch", ValueError, "regions after @: expected one of fcn, grid, sampling, got 'patch'"),
    ],
)
def test_heads_that_do_not_fit_the_backbone_are_named(backbone, head, error, message):
    with pytest.raises(error, match=message):
        FewShotClassifier(backbone, head)


@pytest.mark.parametrize(
    ("backbone", "head", "local_features", "message"),
    [
        (NotANumber(), "deepemd", {}, "the backbone gives features that are not finite"),
        (Blocks(), "deepemd", {"pyramid": (5,)}, "does not take images of 1x8x8: pyramid: expected sides of at most 4"),
        (Blocks(), "deepemd@grid", {"grids": (5,)}, "images: expected at least 10 x 10 pixels for a grid of 5 x 5"),
        (Blocks(), "knn@grid", {"grids": (1,)}, "neighbors: expected at most 1, .* got 3"),
    ],
)
def test_images_that_do_not_fit_are_named_and_nothing_is_learned(backbone, head, local_features, message):
    classifier = FewShotClassifier(backbone, head, local_features=LocalFeaturesConfig(**local_features))
    with pytest.raises(ValueError, match=message):
        classifier.fit(*some(1, 2))
    assert classifier.classes_ == ()


def test_queries_of_another_size_are_named():
    classifier = FewShotClassifier(Blocks(), "deepemd_mean").fit(*some(1, 1))
    with pytest.raises(ValueError, match="they give 25 x 4 features, those gave 16 x 4"):
        classifier.predict(torch.zeros(2, 1, 10, 10, dtype=torch.uint8))


@pytest.mark.parametrize(
    "head", ["knn@fcn", "protonet@fcn", "prediction_fusion@fcn", "matchingnet@fcn", "knn@grid", QUICK]
)
def test_images_of_none_of_the_classes(head):
    rejected, strangers, covered = 0, 0, 0
    for seed in range(10):  # what is promised is an average over support sets
        images, labels = textures(5, seed=10 + seed)
        classifier = FewShotClassifier(Blocks(), head).fit(images[:10], labels[:10])
        query, truth = textures(5, seed=30 + seed)
        predicted = classifier.predict(query, reject=0.2)
        rejected += predicted[:10].count(None)
        strangers += predicted[10:].count(None)
        sets = classifier.predict_set(query[:10], level=0.8)
        covered += sum(label in chosen for label, chosen in zip(truth[:10], sets, strict=True))
    assert rejected <= 40
    assert strangers >= 45
    assert covered >= 70


@pytest.mark.parametrize("head", ["fc_dot@fcn", "fc_cosine@fcn", "deepemd_mean@fcn", "protonet_cosine@fcn"])
def test_every_head_can_be_left_one_out(head):
    images, labels = textures(3, seed=0)
    found = FewShotClassifier(Blocks(), head).fit(images, labels).assess(images[:4])
    assert found.p_values.labels.shape == (4, 3)
    assert ((found.p_values.known >= 0.1 - 1e-9) & (found.p_values.known <= 1)).all()
