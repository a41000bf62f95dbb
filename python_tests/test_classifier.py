import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fewshot_ext import FewShotClassifier
from fewshot_ext.data import ImageInput, load_digits
from fewshot_ext.evaluation import extract_features
from fewshot_ext.evaluation.images import ImageBatches
from fewshot_ext.heads import HEADS, FineTuning, MatchingNet, ProtoNet, SimpleShot
from fewshot_ext.ops import finetune_episodes

pytestmark = pytest.mark.usefixtures("one_thread")

DIGITS = load_digits()


def some(*counts, start=0):
    """The first images of the digits 0, 1, ..., as many of each as ``counts`` says, and their names."""
    rows = [(DIGITS.labels == digit).nonzero()[start : start + count, 0] for digit, count in enumerate(counts)]
    index = torch.cat(rows)
    return DIGITS.images[index], [f"digit {label}" for label in DIGITS.labels[index].tolist()]


@pytest.fixture
def folder(tmp_path):
    """Picture files of three digits in a folder for each."""
    for image, label in zip(*some(2, 3, 1), strict=True):
        (tmp_path / "tree" / label).mkdir(parents=True, exist_ok=True)
        number = len(list((tmp_path / "tree" / label).iterdir()))
        Image.fromarray(image[0].numpy()).save(tmp_path / "tree" / label / f"{number}.png")
    return tmp_path / "tree"


@pytest.mark.parametrize("head", [name for name in HEADS if name != "simpleshot"])
def test_digits_are_told_apart_by_every_head(head):
    classifier = FewShotClassifier(nn.Flatten(), head)
    assert classifier.fit(*some(5, 5, 5)) is classifier
    query, labels = some(20, 20, 20, start=10)
    assert classifier.score(query, labels) > 0.8
    shares = classifier.predict_proba(query)
    assert shares.shape == (60, 3)
    torch.testing.assert_close(shares.sum(1), torch.ones(60))
    assert [classifier.classes_[index] for index in shares.argmax(1)] == classifier.predict(query)


def test_it_is_an_episode_of_the_head():
    support, labels = some(1, 4, 2)
    query, _ = some(3, 3, 3, start=10)
    classifier = FewShotClassifier(nn.Flatten(), FineTuning(steps=7), seed=3).fit(support, labels)
    features = (support.flatten(1) / 255, query.flatten(1) / 255)
    target = torch.tensor([int(label[-1]) for label in labels])
    expected = FineTuning(steps=7)(
        features[0][None], target[None], features[1][None], 3, generator=torch.Generator().manual_seed(3)
    )[0]
    torch.testing.assert_close(classifier.decision_function(query), expected)
    torch.testing.assert_close(classifier.predict_proba(query), (5 * expected).softmax(1))


def test_scores_do_not_depend_on_the_neighbors(monkeypatch):
    query, _ = some(4, 4, start=10)
    classifier = FewShotClassifier(nn.Flatten(), batch_size=3).fit(*some(2, 2))
    whole = classifier.decision_function(query)
    torch.testing.assert_close(classifier.decision_function(query[5:6]), whole[5:6])
    monkeypatch.setattr("fewshot_ext.classifier._BYTES_AT_ONCE", 1)
    torch.testing.assert_close(classifier.decision_function(query), whole)


def test_queries_of_a_head_that_fits_nothing_are_scored_in_parts(monkeypatch):
    query, _ = some(4, 4, start=10)
    classifier = FewShotClassifier(nn.Flatten(), "matchingnet", batch_size=3).fit(*some(2, 2))
    whole, parts, score = classifier.decision_function(query), [], MatchingNet._scores

    def counted(head, support, target, query, *others):
        parts.append(query.shape[1])
        return score(head, support, target, query, *others)

    monkeypatch.setattr(MatchingNet, "_scores", counted)
    monkeypatch.setattr("fewshot_ext.classifier._QUERIES_AT_ONCE", 4)
    torch.testing.assert_close(classifier.decision_function(query), whole)
    assert parts == [4, 2, 2]


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_fine_tuning_is_done_once_for_all_queries(similarity, monkeypatch):
    query, _ = some(4, 4, start=10)
    classifier = FewShotClassifier(nn.Flatten(), FineTuning(similarity=similarity), batch_size=3).fit(*some(2, 2))
    whole, calls = classifier.decision_function(query), []

    def counted(support, target, query, **settings):
        calls.append(query.shape[1])
        return finetune_episodes(support, target, query, **settings)

    monkeypatch.setattr("fewshot_ext.heads.vectors.finetune_episodes", counted)
    monkeypatch.setattr("fewshot_ext.classifier._QUERIES_AT_ONCE", 4)
    assert torch.equal(classifier.decision_function(query), whole)
    assert calls == [8]
    # 64 features of 4 bytes: memory is the bound, on batches of 3.
    monkeypatch.setattr("fewshot_ext.classifier._BYTES_AT_ONCE", 4 * 64 * 4)
    assert torch.equal(classifier.decision_function(query), whole)
    assert calls == [8, 6, 2]


def test_the_module_is_used_in_evaluation_mode_and_without_gradients():
    module = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(0.5)).train()
    classifier = FewShotClassifier(module, "protonet").fit(*some(2, 2))
    assert module[1].num_batches_tracked == 0
    query, _ = some(1, 1)
    assert torch.equal(classifier.predict_proba(query), classifier.predict_proba(query))
    assert not classifier.predict_proba(query).requires_grad


def test_uint8_floats_arrays_and_files_are_the_same_images(folder):
    files = sorted(folder.rglob("*.png"))
    labels = [file.parent.name for file in files]
    tensor = torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in files]).unsqueeze(1)
    forms = {
        "uint8 tensor": tensor,
        "float tensor": tensor / 255,
        "double tensor": tensor.double() / 255,
        "uint8 array": tensor[:, 0].numpy(),
        "uint8 array with channels": tensor.permute(0, 2, 3, 1).numpy(),
        "float array": tensor[:, 0].numpy() / 255,
        "list of paths": files,
        "list of texts": [str(file) for file in files],
    }
    module = nn.Sequential(ImageInput((0.0,), (1.0,)), nn.Flatten())
    query, _ = some(3, 3, 3, start=10)
    expected = FewShotClassifier(module, image_size=8).fit(tensor, labels).decision_function(query)
    for name, images in forms.items():
        classifier = FewShotClassifier(module, image_size=8, batch_size=4).fit(images, labels)
        torch.testing.assert_close(classifier.decision_function(query), expected, msg=name)
    tree = FewShotClassifier(module, image_size=8).fit(folder)
    torch.testing.assert_close(tree.decision_function(query), expected)
    assert tree.classes_ == ("digit 0", "digit 1", "digit 2")
    assert tree.predict(folder) == tree.predict(files)
    assert tree.predict(files[0]) == [labels[0]]
    assert tree.score(folder) == tree.score(files, labels) == 1.0


def test_gray_and_color_are_turned_into_what_the_backbone_takes():
    gray = torch.randint(256, (2, 1, 4, 4), dtype=torch.uint8)
    color = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)

    def batches(images, channels):
        return next(iter(ImageBatches(images, channels=channels, image_size=None, batch_size=8, resize_mode=None)))

    assert torch.equal(batches(gray, 3), gray.repeat(1, 3, 1, 1))
    luma = (color.double() * torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64).view(3, 1, 1)).sum(1)
    assert (batches(color, 1)[:, 0].double() - luma).abs().max() < 0.51
    for images, channels in ((gray, 1), (gray, None), (color, 3), (color, None)):
        assert torch.equal(batches(images, channels), images)


def test_files_of_mixed_sizes_and_kinds_are_brought_to_one_size(tmp_path):
    Image.new("RGB", (40, 20), "red").save(tmp_path / "a.jpg")
    Image.new("L", (9, 33), 255).save(tmp_path / "b.png")
    Image.new("RGBA", (16, 16), (0, 0, 255, 255)).save(tmp_path / "c.png")
    (batch,) = ImageBatches(tmp_path, channels=None, image_size=8, batch_size=4, resize_mode=None)
    assert batch.shape == (3, 3, 8, 8)
    assert (batch[1] == 255).all()


def test_a_picture_is_the_same_however_it_is_handed_over(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 25, 3), dtype=np.uint8)
    picture, gray = Image.fromarray(pixels), Image.fromarray(pixels[..., 0])
    picture.save(tmp_path / "a.png")
    gray.save(tmp_path / "b.png")
    before = picture.tobytes()
    as_tensor = torch.from_numpy(pixels).permute(2, 0, 1)

    def read(images, channels=3):
        options = {"channels": channels, "image_size": 8, "batch_size": 9, "resize_mode": None}
        return torch.cat(list(ImageBatches(images, **options)))

    ways = [tmp_path / "a.png", str(tmp_path / "a.png"), [tmp_path / "a.png"], str(tmp_path / "[a].png"), picture]
    ways += [[picture], [pixels], (as_tensor,), [pixels.astype(np.float32) / 255], [as_tensor.double() / 255]]
    for images in ways:
        assert torch.equal(read(images), read(tmp_path)[:1])
    for images in (gray, [pixels[..., 0]], [pixels[..., :1]], [as_tensor[0]], [as_tensor[:1]]):
        assert torch.equal(read(images), read(tmp_path)[1:])
    mixed = [as_tensor, gray, tmp_path / "b.png", pixels[:9]]
    assert read(mixed).shape == (4, 3, 8, 8) and torch.equal(read(mixed)[1], read(mixed)[2])
    assert torch.equal(read(str(tmp_path / "*.png")), read(tmp_path))
    assert torch.equal(read(str(tmp_path / "**" / "b.*"), 1), read([gray], 1))
    # Nothing of the user's is changed.
    assert picture.tobytes() == before and picture.size == (25, 40)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ("nowhere/*.jpg", FileNotFoundError, r"images: no file fits 'nowhere/\*\.jpg'"),
        (
            [np.zeros((2, 8, 8, 3), np.uint8)],
            ValueError,
            r"images\[0\]: expected an array \[H, W\] or .*, got \[2, 8, 8, 3\]",
        ),
        ([np.zeros((8, 8), np.uint8), np.zeros((8, 8), np.int64)], TypeError, r"images\[1\]: expected uint8 or floats"),
        ([torch.full((3, 8, 8), 2.0)], ValueError, r"images\[0\]: expected floats in \[0, 1\]"),
        ([torch.zeros(8, 8, 3)], ValueError, r"images\[0\]: expected \[N, C, H, W\]"),
        ([b"bytes"], TypeError, "images: expected .*, got a list of bytes"),
        (b"bytes", TypeError, "images: expected .*, got bytes"),
        ({"a": 1}, TypeError, "images: expected .*, got dict"),
    ],
)
def test_what_is_no_picture_is_named(images, error, message):
    with pytest.raises(error, match=message):
        ImageBatches(images, channels=3, image_size=8, batch_size=9, resize_mode=None)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["b", "a", "b", "c"], ("a", "b", "c")),
        ([3, 1, 3, 2], (1, 2, 3)),
        (torch.tensor([3, 1, 3, 2]), (1, 2, 3)),
        (np.array(["x", "w", "x", "y"]), ("w", "x", "y")),
        ([("b", 1), ("a", 2), ("b", 1), None], (("b", 1), ("a", 2), None)),
        ([1, "a", 1, 2.5], (1, "a", 2.5)),
        ([np.int64(4), True, np.int64(4), 9], (True, 4, 9)),
    ],
)
def test_labels_of_any_hashable_kind(labels, classes, tmp_path):
    images, _ = some(1, 1, 1, 1)
    classifier = FewShotClassifier(nn.Flatten(), "nearest_neighbor").fit(images, labels)
    assert classifier.classes_ == classes
    plain = labels.tolist() if hasattr(labels, "tolist") else labels
    assert classifier.predict(images)[1:2] + classifier.predict(images)[3:] == [plain[1], plain[3]]
    classifier.save(tmp_path / "classifier.pt")
    assert FewShotClassifier.load(tmp_path / "classifier.pt", nn.Flatten()).classes_ == classes


def test_classes_and_images_can_be_added_one_after_the_other():
    images, labels = some(3, 2, 4)
    whole = FewShotClassifier(nn.Flatten(), "protonet").fit(images, labels)
    grown = FewShotClassifier(nn.Flatten(), "protonet").fit(images[:3], labels[:3])
    with pytest.raises(ValueError, match="classes: expected at least two, and only 'digit 0' is known"):
        grown.predict(images)
    grown.partial_fit(images[3:4], labels[3:4]).partial_fit(images[4:], labels[4:])
    assert grown.classes_ == whole.classes_
    torch.testing.assert_close(grown.decision_function(images), whole.decision_function(images))
    assert FewShotClassifier(nn.Flatten()).partial_fit(images, labels).classes_ == whole.classes_
    assert whole.fit(images[:5], labels[:5]).classes_ == ("digit 0", "digit 1")


def test_fit_anew_with_images_of_another_size():
    classifier = FewShotClassifier(nn.Flatten(), "protonet").fit(*some(1, 1))
    larger = torch.randint(256, (2, 1, 9, 9), dtype=torch.uint8)
    classifier.fit(larger, ["a", "b"])
    assert classifier.predict(larger) == ["a", "b"]


def test_progress_counts_images():
    done = []
    images, labels = some(4, 3)
    classifier = FewShotClassifier(nn.Flatten(), batch_size=3).fit(images, labels, on_progress=done.append)
    classifier.predict_proba(images[:2], on_progress=done.append)
    assert done == [3, 6, 7, 2]


def test_a_checkpoint_brings_preprocessing_size_channels_and_similarity(checkpoints, folder):
    from fewshot_ext.models import load_network

    classifier = FewShotClassifier(checkpoints[0])
    assert (classifier.image_size, classifier.backbone.network.channels) == (8, 1)
    assert classifier.head == FineTuning(similarity="cosine")
    classifier.fit(folder)
    files = sorted(folder.rglob("*.png"))
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in files]).unsqueeze(1)
    torch.testing.assert_close(classifier._support, extract_features(load_network(checkpoints[0]), pixels))
    assert FewShotClassifier(str(checkpoints[0]), ProtoNet("cosine")).fit(folder).score(folder) > 0.5


def test_simpleshot_with_the_mean_of_the_base_classes():
    images, labels = some(2, 2)
    mean = DIGITS.images.flatten(1).float().div(255).mean(0)
    classifier = FewShotClassifier(nn.Flatten(), "simpleshot", base_mean=mean).fit(images, labels)
    expected = FewShotClassifier(
        nn.Flatten(), "simpleshot", preprocessing=lambda x: x / 255 - mean.view(1, 8, 8), base_mean=torch.zeros(64)
    ).fit(images, labels)
    torch.testing.assert_close(
        classifier.decision_function(images), expected.decision_function(images), rtol=1e-4, atol=1e-5
    )


class TestSaveAndLoad:
    @pytest.mark.parametrize("head", ["finetune", "protonet", SimpleShot("l2n", scale=3.0)])
    def test_a_checkpoint_goes_in_whole(self, head, checkpoints, tmp_path):
        query, _ = some(3, 3, 3, start=10)
        classifier = FewShotClassifier(checkpoints[0], head, seed=5, batch_size=7).fit(*some(2, 3, 1))
        classifier.save(tmp_path / "classifier.pt")
        again = FewShotClassifier.load(tmp_path / "classifier.pt")
        assert torch.equal(again.predict_proba(query), classifier.predict_proba(query))
        assert again.predict(query) == classifier.predict(query)
        assert (again.head, again.seed, again.batch_size, again.image_size) == (classifier.head, 5, 7, 8)
        again.partial_fit(query[:1], ["new"])
        again.save(tmp_path / "again.pt")
        assert FewShotClassifier.load(tmp_path / "again.pt").classes_[-1] == "new"

    def test_a_module_is_known_by_its_weights(self, tmp_path):
        module = nn.Sequential(nn.Flatten(), nn.Linear(64, 8))
        query, _ = some(3, 3, start=10)
        scale = ImageInput((0.5,), (0.5,))
        classifier = FewShotClassifier(module, preprocessing=scale).fit(*some(2, 2))
        classifier.save(tmp_path / "classifier.pt")
        again = FewShotClassifier.load(tmp_path / "classifier.pt", module, preprocessing=scale)
        assert torch.equal(again.predict_proba(query), classifier.predict_proba(query))
        with pytest.raises(ValueError, match=r"backbone: expected the module that .* was saved with, got none"):
            FewShotClassifier.load(tmp_path / "classifier.pt")
        for other, preprocessing in (
            (nn.Sequential(nn.Flatten(), nn.Linear(64, 8)), scale),
            (module, ImageInput((0.4,), (0.5,))),
        ):
            with pytest.raises(ValueError, match=r"backbone: expected the weights that .* was saved with"):
                FewShotClassifier.load(tmp_path / "classifier.pt", other, preprocessing=preprocessing)

    def test_what_cannot_be_saved(self, tmp_path, checkpoints):
        class Other(ProtoNet):
            pass

        images, labels = some(1, 1)
        path = tmp_path / "classifier.pt"
        with pytest.raises(RuntimeError, match="learned nothing yet: call fit first"):
            FewShotClassifier(nn.Flatten()).save(path)
        with pytest.raises(TypeError, match=r"head: expected one of .* to be saved, got Other"):
            FewShotClassifier(nn.Flatten(), Other()).fit(images, labels).save(path)
        for label in (frozenset("a"), (1, frozenset("a"))):
            with pytest.raises(TypeError, match=r"labels: expected texts, .* for a file, got frozenset"):
                FewShotClassifier(nn.Flatten()).fit(images, ["a", label]).save(path)
        with pytest.raises(OSError, match="missing"):
            FewShotClassifier(nn.Flatten()).fit(images, labels).save(tmp_path / "missing" / "classifier.pt")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("content", ["text", "cut", "other", "later", "pickle"])
    def test_a_file_that_is_no_classifier(self, content, tmp_path):
        path = tmp_path / "classifier.pt"
        FewShotClassifier(nn.Flatten()).fit(*some(1, 1)).save(path)
        if content == "text":
            path.write_text("classifier")
        elif content == "cut":
            path.write_bytes(path.read_bytes()[:-500])
        else:
            later = {**torch.load(path, weights_only=True), "format_version": 99}
            torch.save({"other": {"a": 1}, "later": later, "pickle": nn.Flatten()}[content], path)
        with pytest.raises(
            ValueError, match=r"classifier\.pt does not hold a FewShotClassifier that this version reads: "
        ):
            FewShotClassifier.load(path, nn.Flatten())

    def test_a_backbone_too_many_and_a_missing_file(self, checkpoints, tmp_path):
        FewShotClassifier(checkpoints[0]).fit(*some(1, 1)).save(tmp_path / "classifier.pt")
        with pytest.raises(ValueError, match=r"expected none, for .* holds its own"):
            FewShotClassifier.load(tmp_path / "classifier.pt", nn.Flatten())
        with pytest.raises(FileNotFoundError):
            FewShotClassifier.load(tmp_path / "missing.pt")


class Flat(nn.Module):
    def forward(self, images):
        return images


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"head": "svm"}, ValueError, r"head: expected one of finetune, .*, got 'svm'"),
        ({"head": 3}, TypeError, "head: expected a name or a Head, got int"),
        ({"head": "simpleshot"}, ValueError, "base_mean: expected a value for SimpleShot"),
        ({"batch_size": 0}, ValueError, "batch_size: expected at least 1"),
        ({"seed": -1}, ValueError, "seed: expected at least 0"),
        ({"image_size": 0}, ValueError, "image_size: expected at least 1"),
        ({"backbone": 3}, TypeError, "backbone: expected a module"),
    ],
)
def test_bad_settings_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        FewShotClassifier(**{"backbone": nn.Flatten(), **arguments})


@pytest.mark.parametrize(
    ("images", "labels", "error", "message"),
    [
        (torch.zeros(2, 1, 8, 8), ["a"], ValueError, "labels: expected one an image: 2 images, 1 labels"),
        (torch.zeros(2, 1, 8, 8), None, ValueError, "labels: expected a value, unless images is a folder"),
        (torch.zeros(2, 1, 8, 8), ["a", []], TypeError, r"labels: expected hashable values, got \[\]"),
        (torch.zeros(0, 1, 8, 8), [], ValueError, "images: expected at least one image, got none"),
        ([], [], ValueError, "images: expected at least one image, got none"),
        (
            torch.zeros(2, 8, 8),
            ["a", "b"],
            ValueError,
            r"images: expected a tensor \[N, C, H, W\], got shape \(2, 8, 8\)",
        ),
        (torch.zeros(2, 8, 8, 3), ["a", "b"], ValueError, r"or \[N, H, W, C\] arrays, got \(2, 8, 8, 3\)"),
        (torch.zeros(2, 4, 8, 8), ["a", "b"], ValueError, r"1 or 3 channels, got \(2, 4, 8, 8\)"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.int64), ["a", "b"], TypeError, "uint8 or floats .* tensor of torch.int64"),
        (np.zeros((2, 8, 8), dtype=np.int32), ["a", "b"], TypeError, "uint8 or floats .* array of int32"),
        (
            np.zeros((8, 8), dtype=np.uint8),
            ["a"],
            ValueError,
            r"array \[N, H, W\] or \[N, H, W, C\], got shape \(8, 8\)",
        ),
        (
            torch.full((2, 1, 8, 8), 1.5),
            ["a", "b"],
            ValueError,
            r"floats in \[0, 1\], not yet normalized, got 1.5 to 1.5",
        ),
        (torch.full((2, 1, 8, 8), -0.1), ["a", "b"], ValueError, "got -0.1 to -0.1"),
        (torch.full((2, 1, 8, 8), float("nan")), ["a", "b"], ValueError, "got nan to nan"),
        ({"a": 1}, ["a"], TypeError, "images: expected a uint8 tensor .*, got dict"),
        ([torch.zeros(1, 8, 8), b"x"], ["a", "b"], TypeError, "got a list of bytes"),
        (["missing.png"], ["a"], ValueError, "image_size: expected a value to read picture files"),
    ],
)
def test_bad_images_and_labels_are_named_and_nothing_is_lost(images, labels, error, message):
    classifier = FewShotClassifier(nn.Flatten(), "protonet").fit(*some(1, 1))
    query, _ = some(2, 2, start=5)
    before = classifier.decision_function(query)
    for learn in (classifier.fit, classifier.partial_fit):
        with pytest.raises(error, match=message):
            learn(images, labels)
    assert torch.equal(classifier.decision_function(query), before)


def test_bad_files_and_folders_are_named(tmp_path, folder):
    classifier = FewShotClassifier(nn.Flatten(), image_size=8)
    with pytest.raises(FileNotFoundError, match=r"images: '.*missing\.png' is not a file"):
        classifier.fit([tmp_path / "missing.png"], ["a"])
    with pytest.raises(NotADirectoryError, match="missing"):
        classifier.fit(tmp_path / "missing")
    with pytest.raises(ValueError, match="lies in no class's folder"):
        classifier.fit(folder / "digit 0")
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match=r"class's folder 'empty' in .* holds no pictures"):
        classifier.fit(folder)
    (folder / "empty" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match=r"broken\.png"):
        classifier.fit(folder)
    assert classifier.classes_ == ()


def test_backbones_that_do_not_fit_are_named():
    images, labels = some(1, 1)
    with pytest.raises(ValueError, match="the backbone does not take images of 1x8x8"):
        FewShotClassifier(nn.Conv2d(3, 4, 3)).fit(images, labels)
    with pytest.raises(ValueError, match=r"backbone: expected features \[B, D\], got \[2, 1, 8, 8\]"):
        FewShotClassifier(Flat()).fit(images, labels)
    with pytest.raises(ValueError, match="features that are not finite"):
        FewShotClassifier(nn.Flatten(), preprocessing=lambda x: x * float("nan")).fit(images, labels)


def test_queries_of_another_size_are_named():
    classifier = FewShotClassifier(nn.Flatten()).fit(*some(1, 1))
    larger = torch.zeros(2, 1, 9, 9, dtype=torch.uint8)
    message = "images: expected the size of those learned: they give 81 features, those gave 64"
    with pytest.raises(ValueError, match=message):
        classifier.predict(larger)
    with pytest.raises(ValueError, match=message):
        classifier.partial_fit(larger, ["a", "b"])


def test_score_counts_labels_before_any_work():
    classifier = FewShotClassifier(nn.Flatten()).fit(*some(1, 1))
    with pytest.raises(ValueError, match="labels: expected one an image: 2 images, 3 labels"):
        classifier.score(some(1, 1)[0], ["a", "b", "c"])


def test_nothing_learned_yet():
    with pytest.raises(RuntimeError, match="learned nothing yet: call fit first"):
        FewShotClassifier(nn.Flatten()).predict(some(1)[0])


def test_11_labels_that_are_not_a_number_are_no_classes():
    images = torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8)
    nan = float("nan")
    for labels in ([0.0, nan, 0.0, nan], np.array([1, np.nan, 1, 2]), [(1, nan), (1, nan), (1, 2), (1, 2)]):
        with pytest.raises(ValueError, match="labels: expected values that equal themselves, got NaN"):
            FewShotClassifier(nn.Flatten(), head="protonet").fit(images, labels)


# 13
@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((64, 64, 3), np.uint8),
        np.zeros((64, 64, 4), np.uint8),
        np.zeros((64, 64, 1), np.uint8),
        np.zeros((64, 64), np.uint8),
        np.zeros((64, 64, 3), np.float32),
        torch.zeros(3, 64, 64, dtype=torch.uint8),
    ],
    ids=lambda picture: f"{type(picture).__name__}{list(picture.shape)}",
)
def test_one_picture_is_no_set_of_them(picture):
    images = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    classifier = FewShotClassifier(nn.Flatten(), "protonet").fit(images, ["a", "b"])
    for call in (classifier.predict, classifier.predict_proba, lambda images: classifier.fit(images, ["a"] * 64)):
        with pytest.raises(ValueError, match=r"write images\[None\] for a set of one"):
            call(picture)
    assert len(classifier.predict(np.zeros((64, 64, 3), np.uint8)[None])) == 1


def test_the_temperature_divides_the_logits_and_is_saved(tmp_path):
    query, _ = some(4, 4, start=10)
    plain = FewShotClassifier(nn.Flatten(), "protonet_cosine").fit(*some(2, 2))
    soft = FewShotClassifier(nn.Flatten(), "protonet_cosine", temperature=4.0).fit(*some(2, 2))
    expected = (10 * plain.decision_function(query) / 4).softmax(1)
    torch.testing.assert_close(soft.predict_proba(query), expected)
    assert soft.predict(query) == plain.predict(query)
    soft.save(tmp_path / "soft.pt")
    again = FewShotClassifier.load(tmp_path / "soft.pt", nn.Flatten())
    assert again.temperature == 4
    assert torch.equal(again.predict_proba(query), soft.predict_proba(query))
    content = torch.load(tmp_path / "soft.pt")
    del content["temperature"]  # as earlier versions wrote it
    torch.save(content, tmp_path / "old.pt")
    assert FewShotClassifier.load(tmp_path / "old.pt", nn.Flatten()).temperature == 1
    torch.save({**content, "temperature": -1.0}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="does not hold a FewShotClassifier"):
        FewShotClassifier.load(tmp_path / "bad.pt", nn.Flatten())


@pytest.mark.parametrize("temperature", [0.0, -2.0, float("nan")])
def test_a_temperature_that_is_none(temperature):
    with pytest.raises(ValueError, match="temperature: expected a"):
        FewShotClassifier(nn.Flatten(), temperature=temperature)


@pytest.mark.parametrize("head", ["finetune", "protonet", "protonet_cosine", "nearest_neighbor_euclidean"])
def test_images_of_other_classes_are_rejected(head):
    classifier = FewShotClassifier(nn.Flatten(), head).fit(*some(8, 8))
    known, labels = some(30, 30, start=20)
    others = DIGITS.images[DIGITS.labels == 4][:30]
    predicted = classifier.predict(known, reject=0.1)
    assert predicted.count(None) < 15
    assert all(a in (b, None) for a, b in zip(predicted, labels, strict=True))
    assert classifier.predict(others, reject=0.1).count(None) > 15
    assert None not in classifier.predict(others)
    sets = classifier.predict_set(known, level=0.9)
    assert sum(label in labels_ for label, labels_ in zip(labels, sets, strict=True)) > 45
    assert all(set(labels_) <= set(classifier.classes_) for labels_ in sets)
    found = classifier.assess(known)
    torch.testing.assert_close(found.probabilities, classifier.predict_proba(known))
    assert found.predict(0.1) == predicted
    assert found.predict_set(0.9) == sets


def test_an_assessment_does_not_depend_on_the_neighbors(monkeypatch):
    classifier = FewShotClassifier(nn.Flatten(), batch_size=3).fit(*some(3, 3))
    query, _ = some(4, 4, start=10)
    whole = classifier.assess(query)
    for name, value in (("fewshot_ext.classifier._BYTES_AT_ONCE", 1), ("fewshot_ext.classifier._QUERIES_AT_ONCE", 1)):
        monkeypatch.setattr(name, value)
    parts = classifier.assess(query)
    assert torch.equal(parts.p_values.known, whole.p_values.known)
    assert torch.equal(parts.p_values.labels, whole.p_values.labels)


def test_what_cannot_be_rejected():
    query, _ = some(1, 1)
    classifier = FewShotClassifier(nn.Flatten(), "protonet")
    with pytest.raises(RuntimeError, match="call fit first"):
        classifier.predict(query, reject=0.5)
    classifier.fit(*some(3, 1))
    for call in (lambda: classifier.predict(query, reject=0.5), lambda: classifier.predict_set(query, level=0.5)):
        with pytest.raises(ValueError, match="each is left out in turn, got 1 of 'digit 1'"):
            call()
    classifier.fit(*some(3, 3))
    with pytest.raises(ValueError, match=r"reject: expected at least 1/7 = 0.1429, the finest level of 6"):
        classifier.predict(query, reject=0.1)
    with pytest.raises(ValueError, match=r"level: expected at most 6/7 = 0.8571, beyond which"):
        classifier.predict_set(query)
    for level in (0, 1, float("nan")):
        with pytest.raises(ValueError, match="reject: expected a"):
            classifier.predict(query, reject=level)
    classifier.fit(query.repeat(2, 1, 1, 1), [None, "one"] * 2)
    with pytest.raises(ValueError, match="reject: expected no class that is called None"):
        classifier.predict(query, reject=0.5)
