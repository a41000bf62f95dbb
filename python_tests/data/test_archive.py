from dataclasses import replace

import numpy as np
import pytest
import torch

from fewshot_ext.data import ImageArchive, Split, load_digits


def arrays(**changes):
    """Arguments of a fit archive: 12 gray 4 x 4 images of three classes; ``changes`` spoil it."""
    arguments = {
        "images": np.arange(12 * 16, dtype=np.uint8).reshape(12, 4, 4),
        "labels": np.arange(12) % 3,
        "class_names": ["a", "b", "c"],
        "class_split": np.array([0, 1, 2]),
    }
    return {**arguments, **changes}


def test_from_arrays_takes_gray_and_color_images():
    assert ImageArchive.from_arrays(**arrays()).images.shape == (12, 1, 4, 4)
    color = np.random.default_rng(0).integers(0, 256, (12, 4, 5, 3), dtype=np.uint8)
    archive = ImageArchive.from_arrays(**arrays(images=color))
    assert archive.images.shape == (12, 3, 4, 5)
    assert archive.images[7, 2, 1, 4] == color[7, 1, 4, 2]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"images": np.zeros((12, 4, 4), np.float32)},
            TypeError,
            "images: expected a uint8 array, got float32",
        ),
        ({"images": np.zeros((12, 4), np.uint8)}, ValueError, "images: expected .* got shape"),
        ({"images": np.zeros((12, 4, 4, 2), np.uint8)}, ValueError, "1 or 3 channels"),
        (
            {"images": np.zeros((0, 4, 4), np.uint8), "labels": np.zeros(0, int)},
            ValueError,
            "at least one image",
        ),
        ({"labels": np.zeros(12)}, TypeError, "labels: expected an integer array, got float64"),
        ({"labels": np.zeros(11, int)}, ValueError, "12 images, 11 labels"),
        ({"labels": np.full(12, 3)}, ValueError, r"labels: expected numbers in \[0, 3\), got 3 to 3"),
        ({"labels": np.full(12, -1)}, ValueError, "got -1 to -1"),
        (
            {"image_fields": {"drawer": np.full(12, 2**63, np.uint64)}},
            ValueError,
            "drawer: expected integers that int64 holds, got 9223372036854775808",
        ),
        ({"class_names": ["a", "b", "b"]}, ValueError, "class_names: expected all to be different"),
        ({"class_split": np.array([0, 1])}, ValueError, "3 classes, 2 values"),
        ({"class_split": np.array([0, 1, 3])}, ValueError, "class_split: expected 0 .* got 0 to 3"),
        ({"class_split": np.array([0, -1, 2])}, ValueError, "got -1 to 2"),
    ],
)
def test_bad_arrays_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        ImageArchive.from_arrays(**arrays(**changes))


def test_constructor_refuses_what_is_no_tensor():
    good = ImageArchive.from_arrays(**arrays())
    with pytest.raises(TypeError, match=r"images: expected a torch\.uint8 tensor, got list"):
        ImageArchive([], good.labels, good.class_names, good.class_split)
    with pytest.raises(TypeError, match=r"labels: expected a torch\.int64 tensor, got torch\.int32"):
        ImageArchive(good.images, good.labels.int(), good.class_names, good.class_split)


def test_subset_relabels_and_keeps_images():
    archive = ImageArchive.from_arrays(**arrays(class_split=np.array([2, 0, 2])))
    novel = archive.subset(Split.NOVEL)
    assert novel.class_names == ("a", "c")
    assert torch.equal(novel.images, archive.images[archive.labels != 1])
    assert novel.labels.tolist() == [0, 1] * 4
    with pytest.raises(ValueError, match="no validation classes"):
        archive.subset(Split.VALIDATION)


def test_hold_out_parts_every_class_and_is_seeded():
    base = load_digits().subset(Split.BASE)
    kept, held = base.hold_out(0.4, torch.Generator().manual_seed(0))
    assert len(kept) + len(held) == len(base)
    counts = base.labels.bincount()
    assert torch.equal(held.labels.bincount(), (counts * 0.4).round().long())
    together = torch.cat([kept.images, held.images]).flatten(1).tolist()
    assert sorted(together) == sorted(base.images.flatten(1).tolist())
    again = base.hold_out(0.4, torch.Generator().manual_seed(0))
    assert torch.equal(again[1].images, held.images)
    other = base.hold_out(0.4, torch.Generator().manual_seed(1))
    assert not torch.equal(other[1].images, held.images)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, float("nan")])
def test_hold_out_refuses_a_bad_fraction(fraction):
    with pytest.raises(ValueError, match="fraction: expected a number in"):
        ImageArchive.from_arrays(**arrays()).hold_out(fraction, torch.Generator())


def test_hold_out_refuses_classes_too_small_to_part():
    with pytest.raises(ValueError, match=r"class 'a' has 4 images"):
        ImageArchive.from_arrays(**arrays()).hold_out(0.01, torch.Generator())


def test_digits_are_the_images_that_scikit_learn_ships():
    digits = load_digits()
    assert digits.images.shape == (1797, 1, 8, 8)
    assert digits.images.max() == 255
    assert digits.subset(Split.BASE).class_names == ("0", "1", "2", "3", "4")
    assert digits.subset(Split.NOVEL).class_names == ("5", "6", "7", "8", "9")


def test_channel_statistics_normalize_the_pixels():
    archive = ImageArchive.from_arrays(**arrays())
    mean, std = archive.channel_statistics()
    pixels = archive.images.double() / 255
    assert mean == pytest.approx([pixels.mean().item()])
    assert std == pytest.approx([pixels.std().item()])


def test_optional_parts_follow_their_images_and_classes(archive):
    novel = archive.subset(Split.NOVEL)
    assert novel.class_words == novel.class_titles == ("size",)
    assert novel.image_fields["drawer"].tolist() == [1995, 4995, 7995, 10995]
    kept, held = archive.hold_out(0.5, torch.Generator().manual_seed(0))
    for part in (kept, held):
        index = (part.image_fields["drawer"] + 5) // 1000
        assert torch.equal(part.images, archive.images[index])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"class_words": ("a",)}, ValueError, "class_words: expected one text a class: 3 classes, 1 texts"),
        (
            {"image_fields": {"drawer": torch.zeros(2, dtype=torch.int64)}},
            ValueError,
            r"image_fields\['drawer'\]: expected one value an image: 12 images, 2 values",
        ),
        (
            {"image_fields": {"drawer": torch.zeros(12)}},
            TypeError,
            r"image_fields\['drawer'\]: expected a torch\.int64",
        ),
        (
            {"image_fields": {"is_query": torch.arange(12)}},
            ValueError,
            r"image_fields\['is_query'\]: expected 0 or 1, got 0 to 11",
        ),
    ],
)
def test_bad_optional_parts_are_named(archive, changes, error, message):
    with pytest.raises(error, match=message):
        replace(archive, **changes)


def test_queries_go_with_their_images_and_tell_sets_apart(archive, tmp_path):
    plain, last = replace(archive, image_fields={}), archive.labels == 2
    marked = replace(plain, image_fields={"is_query": (last & (torch.arange(12) < 6)).long()})
    assert plain.is_query is None and marked.is_query.nonzero().flatten().tolist() == [2, 5]
    assert marked.subset(Split.NOVEL).is_query.tolist() == [True, True, False, False]
    assert marked.subset(Split.BASE).is_query is None
    # Other queries are another measurement; without any the content is what it was before there were some.
    assert marked.checksum() != plain.checksum()
    assert replace(plain, image_fields={"is_query": torch.zeros_like(plain.labels)}).checksum() == plain.checksum()
    assert marked.record("mine")["queries"] == 2 and "queries" not in plain.record("mine")
    marked.save(tmp_path / "marked.npz")
    assert torch.equal(ImageArchive.load(tmp_path / "marked.npz").is_query, marked.is_query)
    alone = replace(plain, image_fields={"is_query": torch.ones_like(plain.labels)})
    with pytest.raises(
        ValueError, match="is_query: expected images to search beside the queries, got 12 queries alone"
    ):
        alone.is_query  # noqa: B018


def test_queries_of_either_of_two_sets_stay_queries(archive):
    plain = replace(archive, class_names=("a", "b", "c"), image_fields={})
    marked = replace(archive, image_fields={"is_query": (archive.labels == 2).long()})
    assert plain.with_test_classes(marked).is_query.nonzero().flatten().tolist() == [13, 15, 17, 19]
    assert marked.with_test_classes(plain).is_query.nonzero().flatten().tolist() == [2, 5, 8, 11]


def test_roles_choose_and_order_the_classes(archive):
    chosen = archive.with_roles({"Größe": Split.BASE, "n01": Split.VALIDATION})
    assert chosen.class_names == ("Größe", "n01")
    assert chosen.class_words == ("size", "cat")
    assert chosen.class_split.tolist() == [Split.BASE, Split.VALIDATION]
    assert torch.equal(chosen.images[chosen.labels == 0], archive.images[archive.labels == 2])
    with pytest.raises(ValueError, match=r"4 of 5 classes are not in the archive: a, b, c, ..."):
        archive.with_roles(dict.fromkeys(("a", "n01", "b", "c", "d"), Split.BASE))


def test_rotations_are_classes_of_their_own():
    square = torch.arange(4 * 9, dtype=torch.uint8).view(4, 1, 3, 3)
    archive = ImageArchive(
        images=square,
        labels=torch.tensor([0, 1, 1, 0]),
        class_names=("a", "b"),
        class_split=torch.tensor([Split.BASE, Split.NOVEL], dtype=torch.uint8),
        class_words=("ay", "bee"),
        image_fields={"drawer": torch.arange(4)},
    )
    turned = archive.with_rotations()
    assert turned.num_classes == 8
    assert len(turned) == 16
    for number in range(4):
        label = turned.class_names.index(f"b/rot{90 * number:03d}")
        own = turned.labels == label
        assert torch.equal(turned.images[own], square[1:3].rot90(number, (2, 3)))
        assert turned.image_fields["drawer"][own].tolist() == [1, 2]
        assert turned.class_split[label] == Split.NOVEL
        assert turned.class_words[label] == "bee"


def test_only_square_images_are_rotated(archive):
    with pytest.raises(ValueError, match=r"only square images .* got 6 x 5"):
        archive.with_rotations()


# 17
@pytest.mark.parametrize("name", ["class_names", "class_words"])
def test_names_that_no_file_could_hold_are_refused(archive, name):
    with pytest.raises(ValueError, match=r"expected text that UTF-8 can hold, got 'Gr\\udcf6'"):
        replace(archive, **{name: ("a", "b", "Gr\udcf6")})


def test_test_classes_of_another_set_keep_what_both_have(archive):
    other = replace(archive, class_names=("a", "b", "c"), class_words=None, image_fields={})
    both = archive.with_test_classes(other)
    assert both.class_names == (*archive.class_names, "b", "c")
    assert both.class_words == (*archive.class_words, "b", "c")
    assert both.class_split.tolist() == [0, 0, 0, 1, 2]
    assert not both.image_fields and both.labels.bincount().tolist() == [4] * 5
    assert torch.equal(both.images[both.labels == 4], archive.images[archive.labels == 2])
    drawers = replace(other, image_fields={"drawer": archive.image_fields["drawer"] + 1, "age": archive.labels})
    both = archive.with_test_classes(drawers)
    assert list(both.image_fields) == ["drawer"]
    assert both.image_fields["drawer"][-1] == archive.image_fields["drawer"][archive.labels != 0][-1] + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"classes of two sets: expected other ones .*, got 2 in both: n02, Größe"),
        ({"images": torch.zeros(12, 3, 6, 6, dtype=torch.uint8)}, "expected one shape, got 3 x 6 x 5 and 3 x 6 x 6"),
        ({"class_split": torch.tensor([0, 1, 1], dtype=torch.uint8)}, "the images have no novel classes"),
    ],
)
def test_sets_that_are_no_two_domains(archive, changes, message):
    with pytest.raises(ValueError, match=message):
        archive.with_test_classes(replace(archive, **changes))


def test_held_out_images_are_not_among_the_base_classes(archive, tmp_path):
    assert not archive.has_held_out
    marked = replace(archive, image_fields={"held_out": (torch.arange(12) > 5).long()})
    training, held_out = marked.subset(Split.BASE), marked.subset(Split.BASE, held_out=True)
    first = archive.labels == 0
    assert torch.equal(training.images, archive.images[:6][first[:6]])
    assert torch.equal(held_out.images, archive.images[6:][first[6:]])
    assert training.class_names == held_out.class_names == ("n01",)
    # Images of other classes are not concerned, and neither is a mark on them alone.
    assert len(marked.subset(Split.NOVEL)) == 4
    assert not replace(marked, image_fields={"held_out": archive.labels}).has_held_out
    marked.save(tmp_path / "marked.npz")
    assert ImageArchive.load(tmp_path / "marked.npz").checksum() == marked.checksum() != archive.checksum()
    # They stay held out where the set is the first of two domains.
    other = replace(archive, class_names=("a", "b", "c"), class_words=None)
    assert len(marked.with_test_classes(other).subset(Split.BASE, held_out=True)) == 6
    with pytest.raises(ValueError, match="the base classes have no images held out from training"):
        archive.subset(Split.BASE, held_out=True)
    with pytest.raises(ValueError, match="the base classes have no images to train on: all are held out"):
        replace(archive, image_fields={"held_out": torch.ones(12).long()}).subset(Split.BASE)
