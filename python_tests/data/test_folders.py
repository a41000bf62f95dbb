import os

import pytest
import torch
from PIL import Image

from fewshot_ext.data import Split, load_cifar100, load_images, load_split, read_folder
from fewshot_ext.data.folders import list_folder
from fewshot_ext.data.splits import ClassSplit

SQUARE = (8, 8)


def roles(listing):
    return dict(zip(listing.class_names, listing.class_split, strict=True))


def test_pictures_and_labels_belong_together(picture_tree):
    root = picture_tree({"b/2.png": SQUARE, "a/1.png": SQUARE, "b/3.png": SQUARE})
    archive = read_folder(root)
    assert archive.class_names == ("a", "b")
    assert archive.labels.tolist() == [0, 1, 1]
    assert archive.images.shape == (3, 3, 8, 8)
    assert archive.images[:, 0, 0, 0].tolist() == [10, 0, 20]
    assert archive.class_split.tolist() == [Split.NOVEL] * 2


def test_folders_of_roles(picture_tree):
    root = picture_tree(
        {"train/a/1.png": SQUARE, "val/b/1.png": SQUARE, "test/c/1.png": SQUARE, "test/d/1.png": SQUARE}
    )
    listing = list_folder(root)
    assert roles(listing) == {"a": Split.BASE, "b": Split.VALIDATION, "c": Split.NOVEL, "d": Split.NOVEL}


def test_halves_are_the_first_and_the_last_classes_by_name(picture_tree):
    names = ["002.b", "001.z", "004.a", "003.c", "005.d"]
    listing = list_folder(picture_tree({f"images/{name}/1.png": SQUARE for name in names}), "halves")
    assert listing.class_names == sorted(names)
    assert roles(listing) == {name: Split.BASE if name < "003" else Split.NOVEL for name in names}


def test_omniglot_as_it_comes(picture_tree):
    root = picture_tree(
        {
            "python/images_background/Greek/character01/0001_01.png": SQUARE,
            "python/images_background/Greek/character02/0002_01.png": SQUARE,
            "python/images_evaluation/Tengwar/character01/0003_01.png": SQUARE,
        }
    )
    listing = list_folder(root, class_depth=2)
    assert roles(listing) == {
        "Greek/character01": Split.BASE,
        "Greek/character02": Split.BASE,
        "Tengwar/character01": Split.NOVEL,
    }
    split = ClassSplit({"Greek/character02": Split.BASE, "Tengwar/character01": Split.VALIDATION})
    assert roles(list_folder(root, split)) == dict(split.roles)
    assert list_folder(root, split).left_out == 1
    # 21: one rule for all commands; what it does with folders in folders is told.
    assert list_folder(root).class_names == ["Greek", "Tengwar"]
    assert list_folder(root).passed_over == (
        "folders above those of the classes stepped over: 1, namely 'python'",
        "folders in a class's, their pictures being of that class: 3, such as "
        "'python/images_background/Greek/character01'",
    )


# 16
def test_one_role_for_all_merges_a_class_in_several_roles(picture_tree):
    root = picture_tree({"train/cat/1.png": SQUARE, "test/cat/2.png": SQUARE, "test/dog/3.png": SQUARE})
    listing = list_folder(root, Split.NOVEL)
    assert listing.class_names == ["cat", "dog"]
    assert listing.labels == [0, 0, 1]
    with pytest.raises(ValueError, match=r"class 'cat' of .* is both novel and base: --split"):
        list_folder(root)


# 21
def test_folders_in_a_class_belong_to_it(picture_tree):
    root = picture_tree({"cat/day1/1.png": SQUARE, "cat/day2/2.png": SQUARE, "dog/3.png": SQUARE})
    assert list_folder(root).class_names == ["cat", "dog"]
    assert list_folder(root).labels == [0, 0, 1]
    assert list_folder(root, ClassSplit({"cat": Split.BASE, "dog": Split.NOVEL})).labels == [0, 0, 1]


# 12
def test_a_listed_name_in_several_folders_is_that_of_its_class(picture_tree, tmp_path):
    names = [f"{folder}/IMG_{number}.png" for folder in ("cat", "dog", "owl") for number in (1, 2)]
    root = picture_tree(dict.fromkeys(names, SQUARE))
    (tmp_path / "s.csv").write_text(
        "filename,label,split\nIMG_1.png,cat,train\nIMG_2.png,dog,test\nIMG_1.png,owl,test\nIMG_9.png,owl,test\n"
    )
    listing = list_folder(root, tmp_path / "s.csv")
    assert [str(file.relative_to(root)) for file in listing.files] == [
        "cat/IMG_1.png",
        "dog/IMG_2.png",
        "owl/IMG_1.png",
    ]
    assert listing.classes == ["cat", "dog", "owl"]
    assert listing.passed_over == (
        "listed pictures that are not there: 1, such as 'IMG_9.png'",
        "pictures that the split does not name left out: 3, such as 'cat/IMG_2.png'",
    )


def test_queries_are_those_of_the_list_that_are_there(picture_tree, tmp_path):
    names = [f"img/MEN/{item}/{view}.png" for item in ("id_1", "id_2", "id_3") for view in ("front", "side", "back")]
    root = picture_tree(dict.fromkeys(names, SQUARE))
    uses = ["train"] * 3 + ["query", "gallery", "query"] * 2
    lines = [f"{name} {name.split('/')[2]} {use}" for name, use in zip(names, uses, strict=True)]
    (root / "list_eval_partition.txt").write_text(
        "\n".join(["9", "image_name item_id evaluation_status", *lines]), encoding="utf-8"
    )
    listing = list_folder(root, root / "list_eval_partition.txt")
    assert [file.name[0] for file, is_query in zip(listing.files, listing.is_query, strict=True) if is_query] == [
        *"bfbf"
    ]
    assert listing.passed_over == ("files of other kinds (1 .txt) passed over: 1, namely 'list_eval_partition.txt'",)
    (root / names[4]).unlink()
    (root / names[5]).unlink()
    assert list_folder(root, root / "list_eval_partition.txt").passed_over[1:] == (
        f"listed pictures that are not there: 2, such as {names[4]!r}",
        f"queries whose class has no picture in the gallery: 1, such as {names[3]!r}",
    )
    assert list_folder(root).is_query == [False] * 7


# 12
def test_a_listed_name_that_fits_several_pictures_elsewhere_is_refused(picture_tree, tmp_path):
    root = picture_tree({"day1/1.png": SQUARE, "day2/1.png": SQUARE, "day2/2.png": SQUARE, "dog/3.png": SQUARE})
    (tmp_path / "train.csv").write_text("filename,label\n1.png,cat\n2.png,dog\n")
    with pytest.raises(ValueError, match=r"lists '1\.png', which fits several .*: 'day1/1\.png' and 'day2/1\.png'"):
        list_folder(root, tmp_path / "train.csv")
    # The folder of another class is not the place to take a picture from.
    (tmp_path / "train.csv").write_text("filename,label\n3.png,cat\n2.png,dog\n")
    with pytest.raises(ValueError, match=r"1 of them have no picture in .*: cat"):
        list_folder(root, tmp_path / "train.csv")


# 17
def test_a_class_whose_name_is_not_utf8_is_refused_before_the_work(picture_tree):
    root = picture_tree({"a/1.png": SQUARE, "b/1.png": SQUARE})
    (root / "b").rename(root / os.fsdecode(b"Gr\xf6"))
    with pytest.raises(ValueError, match=r"class's folder 'Gr\\udcf6' in .* has a name that is not UTF-8"):
        list_folder(root)


# 21
def test_a_class_without_pictures_is_refused(picture_tree):
    root = picture_tree({"images/a/1.png": SQUARE, "images/b/2.png": SQUARE})
    (root / "annotations").mkdir()  # where no classes are, a folder without pictures is none of them
    assert list_folder(root).passed_over[0] == "folders without pictures passed over: 1, namely 'annotations'"
    (root / "images" / "c").mkdir()
    (root / "images" / "c" / "1.raw").touch()
    with pytest.raises(ValueError, match=r"folder 'images/c' in .* holds no pictures: .* \(1 \.raw\) passed over: 1"):
        list_folder(root)


# 14
def test_what_is_passed_over_goes_with_the_images(picture_tree):
    root = picture_tree({"train/a/1.png": SQUARE, "test/b/2.png": SQUARE})
    (root / "train" / "a" / ".DS_Store").touch()
    told = "hidden files and folders passed over: 1, namely 'train/a/.DS_Store'"
    for read in (read_folder, load_images):
        with pytest.warns(UserWarning, match="hidden files and folders passed over: 1"):
            archive = read(root)
        assert archive.subset(Split.NOVEL).record("mine")["passed_over"] == [told]


def test_one_role_for_all_even_where_folders_tell_another(picture_tree):
    assert roles(list_folder(picture_tree({"a/1.png": SQUARE, "b/1.png": SQUARE}), Split.BASE)) == {"a": 0, "b": 0}


def test_a_class_called_train_is_a_class(picture_tree):
    assert list_folder(picture_tree({"bus/1.png": SQUARE, "train/1.png": SQUARE})).class_names == ["bus", "train"]


def test_one_folder_of_one_class(picture_tree):
    assert list_folder(picture_tree({"a/1.png": SQUARE})).class_names == ["a"]
    assert list_folder(picture_tree({"a/1.png": SQUARE}) / "..").class_names == ["a"]


def test_an_official_split_finds_its_classes_by_folder_or_by_file_name(picture_tree):
    names = load_split("miniimagenet").roles
    flat = {f"images/{name}{number:08d}.jpg": SQUARE for name in names for number in range(2)}
    deep = {f"ILSVRC/train/{name}/{name}_7.jpg": SQUARE for name in names}
    root = picture_tree({**flat, **deep, "ILSVRC/train/n99999999/n99999999_7.jpg": SQUARE})
    for folder, images in ((root / "images", 200), (root / "ILSVRC", 100), (root, 300)):
        listing = list_folder(folder, "miniimagenet")
        assert roles(listing) == dict(names)
        assert len(listing.files) == images
    assert list_folder(root, "miniimagenet").left_out == 1


def test_lists_of_files_tell_the_classes_of_a_flat_folder(picture_tree, tmp_path):
    root = picture_tree({f"images/{number}.png": SQUARE for number in range(4)})
    (tmp_path / "train.csv").write_text("filename,label\n0.png,a\n3.png,b\n")
    (tmp_path / "test.csv").write_text("filename,label\n1.png,c\n")
    listing = list_folder(root, tmp_path / "train.csv")
    assert [
        (file.name, listing.class_names[label]) for file, label in zip(listing.files, listing.labels, strict=True)
    ] == [
        ("0.png", "a"),
        ("3.png", "b"),
        ("1.png", "c"),
    ]
    assert listing.left_out == 1


@pytest.mark.parametrize(
    ("pictures", "split", "message"),
    [
        (["train/a/1.png", "test/a/1.png"], None, "class 'a' of .* is both novel and base"),
        (["train/a/1.png", "test/b/1.png", "extra/c/1.png"], None, "folders for roles, .* beside the folder 'extra'"),
        (["1.png", "a/2.png"], None, r"'1\.png' in .* lies in no class's folder"),
        (["1.png"], None, "lies in no class's folder"),
        (["train/1.png", "test/b/1.png"], None, r"'train/1\.png' in .* lies in no class's folder"),
        (["a/1.png"], "miniimagenet", "'miniimagenet' names 100 classes; 100 of them have no picture in .*: n01532829"),
        ([], None, "no pictures in"),
    ],
)
def test_trees_that_make_no_sense(picture_tree, tmp_path, pictures, split, message):
    (tmp_path / "pictures").mkdir()
    root = picture_tree(dict.fromkeys(pictures, SQUARE))
    (tmp_path / "pictures").mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=message):
        list_folder(tmp_path / "pictures" if not pictures else root, split)


def test_sizes_must_be_equal_or_given(picture_tree):
    root = picture_tree({"a/1.png": (8, 8), "b/2.png": (8, 9)})
    with pytest.raises(ValueError, match=r"2\.png' is 8 x 9, but '.*1\.png' is 8 x 8: give a size"):
        read_folder(root)
    assert read_folder(root, size=5).images.shape == (2, 3, 5, 5)


@pytest.mark.parametrize(("mode", "channels"), [(None, 1), ("L", 1), ("RGB", 3)])
def test_gray_pictures_stay_gray_unless_told(picture_tree, mode, channels):
    root = picture_tree({"a/1.png": SQUARE, "b/2.png": SQUARE}, mode="L")
    assert read_folder(root, mode=mode).images.shape[1] == channels
    assert read_folder(root, mode=mode, size=4).images[1].unique().tolist() == [10]


def test_one_color_picture_makes_the_archive_color(picture_tree):
    root = picture_tree({"a/1.png": SQUARE}, mode="L")
    Image.new("RGB", (8, 8), "red").save(root / "a" / "2.png")
    assert read_folder(root).images[:, :, 0, 0].tolist() == [[0, 0, 0], [255, 0, 0]]


def test_a_damaged_picture_is_named(picture_tree):
    root = picture_tree({"a/1.png": SQUARE, "b/2.png": SQUARE, "b/3.png": SQUARE})
    content = (root / "b/2.png").read_bytes()
    (root / "b/2.png").write_bytes(content[:45])
    with pytest.raises(ValueError, match=r"cannot decode '.*b/2\.png'"):
        read_folder(root, size=8)


@pytest.mark.parametrize("arguments", [{"size": -1}, {"mode": "CMYK"}, {"resize": "fold"}])
def test_bad_arguments_come_before_any_work(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments)) + ": expected"):
        read_folder("no_such_folder", **arguments)


def test_cifar_from_its_binary_files(cifar):
    archive = load_cifar100(cifar)
    assert archive.images.shape == (600, 3, 32, 32)
    assert archive.labels.bincount().tolist() == [6] * 100
    assert archive.images[507, :, 31, 5].tolist() == [7, 57, 107]
    split = archive.with_roles(load_split("fc100").roles)
    assert split.class_split.bincount().tolist() == [60, 20, 20]
    label = split.class_names.index("apple")
    assert split.images[split.labels == label][:, 0].unique().tolist() == [archive.class_names.index("apple")]
    (cifar / "test.bin").write_bytes((cifar / "test.bin").read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"test\.bin': expected 307400 bytes \(100 images\), got 307399"):
        load_cifar100(cifar)
    (cifar / "fine_label_names.txt").write_text("apple")
    with pytest.raises(ValueError, match="expected 100 classes, got 1"):
        load_cifar100(cifar)
    (cifar / "train.bin").unlink()
    with pytest.raises(OSError, match=r"fine_label_names|train\.bin"):
        load_cifar100(cifar / "missing")


def test_reading_leaves_torch_a_tensor_that_may_be_written(picture_tree):
    archive = read_folder(picture_tree({"a/1.png": SQUARE}))
    archive.images.zero_()
    assert torch.equal(archive.images, torch.zeros_like(archive.images))
