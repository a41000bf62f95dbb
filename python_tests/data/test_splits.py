import gzip
import json

import numpy as np
import pytest

from fewshot_ext.data import SPLIT_NAMES, Split, load_split

SIZES = {
    "miniimagenet": (64, 16, 20),
    "tieredimagenet": (351, 97, 160),
    "cub": (100, 50, 50),
    "cub_easyfsl": (140, 30, 30),
    "cifar_fs": (64, 16, 20),
    "fc100": (60, 20, 20),
    "omniglot_vinyals": (1028, 172, 423),
}


@pytest.fixture
def write(tmp_path):
    """Writes a file of text, of anything JSON can say, or of bytes, and returns its path."""

    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def sizes(split):
    return tuple(len(split.of(role)) for role in Split)


def test_every_official_split_has_its_published_sizes():
    assert set(SIZES) == set(SPLIT_NAMES)
    for name, expected in SIZES.items():
        assert sizes(load_split(name)) == expected


def test_official_splits_name_the_classes_of_their_sets():
    assert load_split("cub").roles.keys() == load_split("cub_easyfsl").roles.keys()
    assert load_split("cifar_fs").roles.keys() == load_split("fc100").roles.keys()
    assert load_split("cifar_fs").roles["train"] == Split.BASE
    assert load_split("cub").roles["001.Black_footed_Albatross"] == Split.BASE
    # Superclasses stay together in FC100.
    assert {load_split("fc100").roles[fish] for fish in ("flatfish", "ray", "shark", "trout")} == {Split.BASE}


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("miniimagenet", "miniimagenet_ravi"),
        ("tieredimagenet", "tieredimagenet/test.json"),
        ("cub", "cub/torchmeta_closerlook_val.json"),
        ("cub_easyfsl", "cub/easyfsl_train.json"),
        ("cifar_fs", "cifar_fs/train.txt"),
        ("cifar_fs", "cifar_fs/torchmeta_train.json"),
        ("omniglot_vinyals", "omniglot_vinyals"),
    ],
)
def test_shipped_lists_are_those_of_the_official_files(real_data, name, path):
    official = load_split(real_data("splits") / path)
    assert dict(official.roles) == dict(load_split(name).roles)
    if name == "miniimagenet":
        assert len(official.files) == 60000
        assert official.files["n0153282900000005.jpg"] == "n01532829"


def test_fc100_superclasses(real_data):
    assert sizes(load_split(real_data("splits") / "fc100")) == (12, 4, 4)


def test_miniimagenet_pack_has_the_split_that_ships(real_data):
    from fewshot_ext.data import ImageArchive

    pack = ImageArchive.load(real_data("miniimagenet32_small.npz"))
    assert dict(zip(pack.class_names, pack.class_split.tolist(), strict=True)) == dict(load_split("miniimagenet").roles)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ({"train": ["a"], "val": ["b"], "test": ["c"]}, "mine.json"),
        ({"base": ["a"], "validation": [["super", "b"]], "novel": ["c"], "author": "me"}, "mine.json"),
        ("filename,label,split\n1.jpg,a,train\n2.jpg,b,val\n3.jpg,c,test\n", "mine.csv"),
    ],
)
def test_one_file_for_all_roles(write, content, name):
    split = load_split(write(name, content))
    assert dict(split.roles) == {"a": Split.BASE, "b": Split.VALIDATION, "c": Split.NOVEL}
    assert dict(split.files) == ({"1.jpg": "a", "2.jpg": "b", "3.jpg": "c"} if name.endswith("csv") else {})


def test_three_csv_files_by_one_of_them_or_by_their_folder(write):
    path = write("s/train.csv", "filename,label\na1.jpg,a\na2.jpg,a\n")
    write("s/val.csv.gz", gzip.compress(b"filename,label\nb1.jpg,b\n"))
    write("s/test.csv", "\ufefffilename,label\nc1.jpg,c\n")
    write("s/README.txt", "about")
    assert sizes(load_split(path.parent)) == (1, 1, 1)
    assert sizes(load_split(path)) == (1, 1, 1)
    assert load_split(path).files["b1.jpg"] == "b"


def test_closer_look_files_name_all_classes_in_each(write):
    def lists(labels):
        images = [f"/home/somebody/CUB/images/c{label}/{label}.jpg" for label in labels]
        return {"label_names": ["c0", "c1", "c2", "c3"], "image_names": images, "image_labels": labels}

    path = write("base.json", lists([0, 0, 2]))
    write("val.json", lists([1]))
    write("novel.json", lists([3]))
    split = load_split(path)
    assert dict(split.roles) == {"c0": 0, "c2": 0, "c1": 1, "c3": 2}
    assert split.files["c2/2.jpg"] == "c2"


def closer_look(*images, labels=("a", "b", "c")):
    numbers = [labels.index(image.partition("/")[0]) for image in images]
    return {"label_names": labels, "image_names": [f"/far/{image}" for image in images], "image_labels": numbers}


def test_base_val_holds_out_images_of_base_classes(write):
    path = write("base.json", closer_look("a/1.png", "b/1.png"))
    write("novel.json", closer_look("c/1.png"))
    assert not load_split(path).held_out
    write("base_val.json", closer_look("a/2.png", "b/2.png"))
    for source in (path, path.parent, path.parent / "base_val.json"):
        split = load_split(source)
        assert dict(split.roles) == {"a": Split.BASE, "b": Split.BASE, "c": Split.NOVEL}
        assert split.held_out == {"a/2.png", "b/2.png"} < split.files.keys()


@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        (closer_look("a/2.png", "a/1.png"), r"base_val\.json' holds out 'a/1\.png', which is listed to train on"),
        (closer_look("b/1.png"), r"holds out images of class 'b', of which none are to train on"),
        (closer_look("c/2.png"), r"holds out images of class 'c'|both novel and base"),
        (["a"], r"base_val\.json': expected a list of images, as they are held out"),
    ],
)
def test_held_out_images_that_cannot_be(write, held_out, message):
    path = write("base.json", closer_look("a/1.png"))
    write("novel.json", closer_look("c/1.png"))
    write("base_val.json", held_out)
    with pytest.raises(ValueError, match=message):
        load_split(path)


def test_rotated_classes_count_once(write):
    split = load_split(write("test.txt", "A/character01/rot000\nA/character01/rot090\n\nB/character02/rot270\n"))
    assert dict(split.roles) == {"A/character01": Split.NOVEL, "B/character02": Split.NOVEL}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"mine.json": {"train": ["a", "b"], "test": ["b"]}}, r"class 'b' is both base and novel"),
        # 14: a misspelt role would lose its classes.
        ({"mine.json": {"train": ["a"], "tset": ["b"], "about": "us"}}, "has classes under 'tset', no role"),
        ({"train.json": ["a"], "test.json": ["a"]}, "class 'a' is both novel and base"),
        ({"train.csv": "filename,label\nx/1.jpg,a\nx/1.jpg,b\n"}, r"file 'x/1\.jpg' belongs to both 'a' and 'b'"),
        ({"train.csv": "file,label\n1.jpg,a\n"}, "expected the columns filename, label, got file, label"),
        ({"all.csv": "filename,label\n1.jpg,a\n"}, "expected the columns filename, label, split"),
        ({"all.csv": "filename,label,split\n1.jpg,a,train\n2.jpg,b,holiday\n"}, "line 3: got .*holiday"),
        ({"train.csv": "filename,label\n1.jpg\n"}, "line 2: got"),
        ({"train.csv": ""}, "expected the columns filename, label, got "),
        ({"train.json": "[1"}, r"train\.json' is damaged"),
        ({"a.json": '{"train": ["x"], "test": ["y"], "train": ["z"]}'}, r"a\.json' is damaged: it has 'train' twice"),
        ({"train.json": "1" * 5000}, r"train\.json' is damaged: it has a number of 5,000 digits"),
        ({"train.json": [1, 2]}, r"expected a list of class names or of \[superclass, class\]"),
        ({"train.json": [[]]}, "expected a list of class names"),
        ({"train.json": {"classes": ["a"]}}, "expected a list of classes, got NoneType"),
        ({"train.json": "3"}, "expected a list of classes, got int"),
        ({"mine.json": ["a"]}, "expected a JSON object such as"),
        ({"train.json": []}, "names no class"),
        (
            {"train.json": {"label_names": ["a"], "image_labels": [0]}},
            "expected lists label_names, image_labels and im",
        ),
        (
            {"train.json": {"label_names": ["a"], "image_labels": [1], "image_names": ["x"]}},
            "expected image_labels to give a number below 1 for each image",
        ),
        (
            {"train.json": {"label_names": ["a"], "image_labels": [0, 0], "image_names": ["x"]}},
            "expected image_labels to give a number",
        ),
        ({"mine.txt": "a"}, r"mine\.txt' holds one role, which its name must tell"),
        ({"train.xml": "a"}, r"train\.xml': expected a name that ends in \.csv, \.json, \.txt"),
        ({"train.txt": b"\xff\xfe\x00"}, r"train\.txt' is damaged"),
        ({"train.csv.gz": b"not gzip"}, r"train\.csv\.gz' is damaged"),
        ({"train.csv.gz": gzip.compress(b"filename,label\n" * 50)[:-12]}, r"train\.csv\.gz' is damaged"),
    ],
)
def test_files_that_are_no_split(write, files, message):
    paths = [write(name, content) for name, content in files.items()]
    with pytest.raises(ValueError, match=message):
        load_split(paths[0])


def test_folders_without_one_clear_set_of_files(write, tmp_path):
    with pytest.raises(ValueError, match=r"expected one set of split files such as .* got none"):
        load_split(tmp_path)
    write("easyfsl_train.json", ["a"])
    write("torchmeta_train.json", ["b"])
    with pytest.raises(ValueError, match=r"got easyfsl_\*\.json, torchmeta_\*\.json; name one of the files"):
        load_split(tmp_path)
    assert load_split(tmp_path / "torchmeta_train.json").of(Split.BASE) == ["b"]


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(FileNotFoundError, match=r"there is no split 'minimagenet': .*miniimagenet, tieredimagenet"):
        load_split("minimagenet")


# 21
def test_blanks_around_cells_are_no_part_of_them(write):
    split = load_split(write("all.csv", "filename , label, split\n1.jpg, a ,train \n\n2.jpg,b, test\n"))
    assert split.roles == {"a": Split.BASE, "b": Split.NOVEL}
    assert split.files == {"1.jpg": "a", "2.jpg": "b"}


# 12
def test_classes_may_list_pictures_of_the_same_name(write):
    split = load_split(write("train.csv", "filename,label\n1.jpg,a\n1.jpg,b\n2.jpg,b\n"))
    assert split.files == {"a/1.jpg": "a", "b/1.jpg": "b", "2.jpg": "b"}


PRODUCTS = """image_id class_id super_class_id path
1 {0} 1 bicycle_final/111_0.JPG
2 {0} 1 bicycle_final/111_1.JPG
3 {1} 2 cabinet_final/222_0.JPG
"""


def test_the_lists_of_stanford_online_products(write):
    write("Ebay_test.txt", PRODUCTS.format(3, 4).replace("_final/", "_final/t"))
    write("Ebay_info.txt", "image_id class_id super_class_id path")
    split = load_split(write("Ebay_train.txt", PRODUCTS.format(1, 2)))
    assert dict(split.roles) == {"1": Split.BASE, "2": Split.BASE, "3": Split.NOVEL, "4": Split.NOVEL}
    assert split.files["bicycle_final/111_1.JPG"] == "1"
    assert len(split.files) == 6


IN_SHOP = """4
image_name item_id evaluation_status
img/WOMEN/Dresses/id_1/02_1_front.jpg         id_1    train
img/WOMEN/Dresses/id_1/02_2_side.jpg          id_1    train
img/MEN/Denim/id_2/01_1_front.jpg             id_2    query
img/MEN/Denim/id_2/01_2_side.jpg              id_2    gallery
"""


def test_the_list_of_in_shop_clothes(write):
    split = load_split(write("list_eval_partition.txt", IN_SHOP))
    assert dict(split.roles) == {"id_1": Split.BASE, "id_2": Split.NOVEL}
    assert split.files["img/MEN/Denim/id_2/01_2_side.jpg"] == "id_2"
    assert split.queries == {"img/MEN/Denim/id_2/01_1_front.jpg"}
    # A part of the list, put together by hand, has no number above its header.
    assert load_split(write("part.txt", IN_SHOP.partition("\n")[2])).queries == split.queries


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            (("", row), f"list_eval_partition.txt', line 7: expected 3 columns, .* train, query, gallery; got '{row}'")
            for row in ("img/id_2/3.jpg id_2 test", "img/id_2/3.jpg id_2", "3.jpg")
        ),
        (("query", "train"), "class 'id_2' is both base and novel"),
        (
            ("01_2_side.jpg", "01_1_front.jpg"),
            "line 6: file 'img/MEN/Denim/id_2/01_1_front.jpg' is both query and gall",
        ),
        (("4\n", "5\n"), "is damaged: its first line says 5 pictures, and 4 follow"),
        (("4\n", "none\n"), "is damaged: its first line says none pictures, and 4 follow"),
        (("gallery", "query"), "is damaged: it has queries and no gallery"),
    ],
)
def test_a_damaged_list_of_in_shop_clothes(change, message, write):
    text = IN_SHOP + change[1] if not change[0] else IN_SHOP.replace(*change)
    with pytest.raises(ValueError, match=message):
        load_split(write("list_eval_partition.txt", text))


def test_the_list_of_products_has_a_role_in_its_name(write):
    with pytest.raises(ValueError, match=r"Ebay_info\.txt' holds one role, which its name must tell"):
        load_split(write("Ebay_info.txt", PRODUCTS.format(1, 2)))
    with pytest.raises(ValueError, match=r"Ebay_test\.txt', line 5: expected 4 columns; got '4 2 1'"):
        load_split(write("Ebay_test.txt", PRODUCTS.format(1, 2) + "4 2 1\n"))


def test_the_annotations_of_cars196(tmp_path):
    scipy_io = pytest.importorskip("scipy.io")
    path = tmp_path / "cars_annos.mat"
    names = np.array(["AM Hummer", "Ram C/V Van", "Volvo", "smart"], dtype=object)
    rows = [("car_ims/000001.jpg", 1, 0), ("car_ims/000002.jpg", 2, 1), ("car_ims/000003.jpg", 4, 0)]
    kinds = [("relative_im_path", object), ("class", object), ("test", object)]
    scipy_io.savemat(path, {"annotations": np.array(rows, dtype=kinds), "class_names": names})
    split = load_split(path)
    assert split.of(Split.BASE) == ["AM Hummer", "Ram C/V Van"]
    assert split.of(Split.NOVEL) == ["Volvo", "smart"]
    assert dict(split.files) == {rows[0][0]: "AM Hummer", rows[1][0]: "Ram C/V Van", rows[2][0]: "smart"}
    for content in (b"", b"MATLAB 5.0", path.read_bytes()[:150]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"cars_annos\.mat' is damaged: it is no cars_annos\.mat"):
            load_split(path)
