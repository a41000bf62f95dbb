import shutil

import pytest
import torch

from fewshot_ext.data import ImageArchive, Split, load_digits, load_images, load_mnist
from fewshot_ext.data.named import KNOWN, data_folders, open_images, short_name, two_domains


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Two empty folders that names are looked up in."""
    monkeypatch.setenv("FEWSHOT_EXT_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for folder in data_folders():
        folder.mkdir(parents=True)
    return data_folders()


def test_where_names_are_looked_up(monkeypatch, tmp_path):
    monkeypatch.delenv("FEWSHOT_EXT_DATA", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_folders() == [tmp_path / ".cache" / "fewshot_ext"]


def test_any_archive_in_the_folders_has_a_name(folders, archive):
    for folder, rows in zip(folders, (slice(0, 3), slice(3, 12)), strict=True):
        part = ImageArchive(*archive[rows], archive.class_names, archive.class_split)
        part.save(folder / "birds.npz")
        part.save(folder / f"birds_in_{folder.name}.npz")
    assert len(load_images("birds")) == 3
    assert len(load_images("birds_in_fewshot_ext")) == 9
    assert len(load_images(folders[1] / "birds.npz")) == 9


def test_a_folder_of_pictures(picture_tree):
    root = picture_tree({"a/1.png": (6, 6), "b/2.png": (6, 6)})
    assert load_images(root).class_names == ("a", "b")


def parts_of_digits(folder):
    digits = load_digits()
    digits.with_roles({"0": Split.BASE, "1": Split.NOVEL}).save(folder / "low.npz")
    roles = {"5": Split.BASE, "6": Split.VALIDATION, "7": Split.NOVEL, "8": Split.NOVEL}
    digits.with_roles(roles).save(folder / "high.npz")
    return digits


def test_two_domains_train_on_the_first_and_test_on_the_second(folders):
    digits = parts_of_digits(folders[0])
    with pytest.warns(UserWarning, match="left out 1 base classes of the second set"):
        both = load_images(f"low+{folders[0] / 'high.npz'}")
    for role, names in ((Split.BASE, "01"), (Split.VALIDATION, "6"), (Split.NOVEL, "78")):
        part = both.subset(role)
        assert part.class_names == tuple(names)
        whole = digits.with_roles(dict.fromkeys(names, role))
        assert torch.equal(part.images, whole.images) and torch.equal(part.labels, whole.labels)
    assert short_name(f"low+{folders[0] / 'high.npz'}") == "low+high"


def test_a_plus_in_a_path_is_no_sum(folders):
    parts_of_digits(folders[0])
    odd = folders[0] / "c++"
    odd.mkdir()
    shutil.copy(folders[0] / "low.npz", odd / "low+high.npz")
    assert two_domains(str(odd / "low+high.npz")) is None
    assert load_images(odd / "low+high.npz").class_names == ("0", "1")
    assert two_domains(f"{odd / 'low+high.npz'}+high") == (str(odd / "low+high.npz"), "high")
    assert open_images(f"{odd / 'low+high.npz'}+high").class_names == ("0", "1", "6", "7", "8")
    with pytest.raises(FileNotFoundError, match="there is no image set 'lower'"):
        load_images("lower+high")
    with pytest.raises(FileNotFoundError, match=r"there is no image set '\+low'"):
        load_images("+low")


def test_an_unknown_name_lists_what_is_known(folders):
    with pytest.raises(FileNotFoundError) as caught:
        load_images("birds")
    for part in ("'birds'", *KNOWN, *map(str, folders)):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", [name for name, known in KNOWN.items() if known.files])
def test_a_known_set_that_is_not_at_hand_says_how_to_get_it(name, folders):
    with pytest.raises(FileNotFoundError) as caught:
        load_images(name)
    for part in (name, KNOWN[name].how_to_get, KNOWN[name].files[0], str(folders[0])):
        assert part in str(caught.value)


def test_omniglot_evaluation_classes_are_novel(real_data):
    path = real_data("omniglot28.npz")
    for archive in (load_images("omniglot28"), load_images(path)):
        assert archive.class_split.bincount().tolist() == [964, 0, 659]
    assert archive.image_fields["drawer"].max() == 20
    vinyals = load_images("omniglot28_vinyals")
    assert vinyals.class_split.bincount().tolist() == [1028, 172, 423]
    assert len(vinyals) == len(archive)


def test_omniglot_packed_with_novel_classes_stays_so(real_data, folders):
    archive = load_images(real_data("omniglot28.npz"))
    archive.save(folders[0] / "omniglot28.npz")
    assert load_images("omniglot28").class_split.bincount().tolist() == [964, 0, 659]


def test_miniimagenet_packs(real_data):
    small = load_images(real_data("miniimagenet32_small.npz"))
    assert small.images.shape == (3000, 3, 32, 32)
    assert small.class_split.bincount().tolist() == [64, 16, 20]
    assert small.class_words[0] == "house finch, linnet, Carpodacus mexicanus"


@pytest.mark.slow
def test_all_of_miniimagenet(real_data):
    real_data("miniimagenet32_jpeg.npz")
    archive = load_images("miniimagenet32")
    assert archive.images.shape == (60000, 3, 32, 32)
    assert archive.labels.bincount().tolist() == [600] * 100
    small = load_images("miniimagenet32_small")
    # The same pictures but for the JPEG, and so all nearly equal to one of their class.
    for label in (0, 99):
        own, other = (part.images[part.labels == label].float() for part in (archive, small))
        distance = (other.unsqueeze(1) - own).abs().mean((2, 3, 4)).min(1).values
        assert distance.max() < 4


def test_mnist_parts_are_kept_apart(real_data):
    path = real_data("mnist.npz")
    train, test = load_images("mnist"), load_images("mnist_test")
    assert (len(train), len(test)) == (60000, 10000)
    for part in (train, test):
        assert part.subset(Split.BASE).class_names == tuple("0123456")
        assert part.subset(Split.NOVEL).class_names == tuple("789")
    assert torch.equal(load_images(path).images, train.images)
    assert load_mnist(path, "test", base=(9,)).class_split.bincount().tolist() == [1, 0, 9]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"part": "val"}, "part: expected train or test, got 'val'"),
        ({"base": (3, 10)}, r"base: expected digits from 0 to 9, got \[3, 10\]"),
    ],
)
def test_bad_arguments_of_mnist(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_mnist("no_such_file.npz", **arguments)


def test_a_file_that_is_not_mnist(real_data, folders, archive):
    mnist = real_data("mnist.npz")
    archive.save(folders[0] / "mnist.npz")
    with pytest.raises(ValueError, match=r"mnist\.npz' is not MNIST: x_train, y_train, x_test, y_test missing"):
        load_images("mnist")
    # The other way round: under another name the file is taken for an archive.
    shutil.copy(mnist, folders[0] / "digits_again.npz")
    with pytest.raises(ValueError, match=r"'x_train' in .*: expected integers of 1 dimensions"):
        load_images("digits_again")
