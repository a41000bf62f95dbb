"""A set of the form of In-Shop Clothes from its list to the measures: queries are searched in the gallery alone."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fewshot_ext.cli import main
from fewshot_ext.data import ImageArchive, Split, load_digits
from fewshot_ext.models import load_network

# The command sets the number of threads of the process; the fixture sets it back.
pytestmark = pytest.mark.usefixtures("one_thread")

# Statuses of the pictures of each item. The last item has a gallery that nothing asks for.
ITEMS = {
    **{f"id_{number}": ["train"] * 6 for number in range(4)},
    "id_4": ["query", "gallery", "gallery"],
    "id_5": ["query", "query", "gallery"],
    "id_6": ["gallery", "query", "gallery", "gallery"],
    "id_7": ["gallery", "query", "query"],
    "id_8": ["gallery"] * 3,
}
TRAIN = ["--epochs", "1", "--classes-per-batch", "4", "--backbone.width", "4", "--backbone.pooled-blocks", "2",
         "--backbone.embedding", "6", "--measurement.map-ks", "[5]", "--measurement.clusters", "true",
         "--threads", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def in_shop(tmp_path_factory):
    """The folder of the list and of img, which has a digit for each item; and the rows of the list."""
    root, digits = tmp_path_factory.mktemp("in_shop"), load_digits()
    rows = []
    for label, (item, uses) in enumerate(ITEMS.items()):
        images = digits.images[digits.labels == label]
        for number, use in enumerate(uses):
            name = f"img/WOMEN/Dresses/{item}/{number:02}_1_front.png"
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[number, 0].numpy()).save(root / name)
            rows.append((name, item, use))
    lines = ["   ".join(row) for row in rows]
    (root / "list_eval_partition.txt").write_text(
        "\n".join([str(len(rows)), "image_name item_id evaluation_status", *lines]) + "\n", encoding="utf-8"
    )
    return root, rows


@pytest.fixture(scope="module")
def packed(in_shop):
    root, _ = in_shop
    output = root.parent / f"{root.name}.npz"
    split = ["--split", str(root / "list_eval_partition.txt")]
    assert main(["data", "pack", "--source", str(root), *split, "--output", str(output)]) == 0
    return output


@pytest.fixture(scope="module")
def trained(packed):
    output = packed.parent / "trained"
    assert main(["metric-train", "--data", str(packed), *TRAIN, "--output", str(output)]) == 0
    return output


def oracle(checkpoint, root, rows, ks):
    """The measures of the pictures that the list calls queries and gallery, by brute force in numpy."""
    network = load_network(checkpoint)
    sides = {}
    for use in ("query", "gallery"):
        own = [(name, item) for name, item, status in rows if status == use]
        images = np.stack([np.asarray(Image.open(root / name)) for name, _ in own])[:, None]
        with torch.inference_mode():
            vectors = network(torch.from_numpy(images)).double().numpy()
        sides[use] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.array([item for _, item in own])
    (queries, own), (gallery, items) = sides["query"], sides["gallery"]
    right = items[(-queries @ gallery.T).argsort(axis=1, kind="stable")] == own[:, None]
    found = {f"recall_at_{k}": right[:, :k].any(1).mean() for k in ks}
    precision = right.cumsum(1) / np.arange(1, right.shape[1] + 1) * right
    count = right.sum(1)
    found["map_at_r"] = np.mean([row[:r].sum() / r for row, r in zip(precision, count, strict=True)])
    found["r_precision"] = np.mean([row[:r].sum() / r for row, r in zip(right, count, strict=True)])
    found["map_at_5"] = np.mean(precision[:, :5].sum(1) / count)
    singular = np.linalg.svd(queries, compute_uv=False) / np.sqrt(len(queries))
    found["coding_rate"] = 0.5 * np.log1p(queries.shape[1] * singular**2 / 0.25).sum()
    return found


def test_the_packed_set_has_the_queries_of_the_list(packed, capsys):
    novel = ImageArchive.load(packed).subset(Split.NOVEL)
    assert (len(novel), novel.num_classes, int(novel.is_query.sum())) == (16, 5, 6)
    assert json.loads(packed.with_name(f"{packed.name}.json").read_text())["queries"] == 6
    assert main(["data", "info", str(packed)]) == 0
    assert "6 of the novel images are queries, searched among the other 10 alone" in capsys.readouterr().out


def test_training_and_search_measure_what_brute_force_does(in_shop, packed, trained, tmp_path, capsys):
    expected = oracle(trained / "last.ckpt", *in_shop, (1, 2, 4, 8))
    assert 0 < expected["recall_at_1"] < 1  # or it would show nothing
    seen, unseen = json.loads((trained / "history.json").read_text())["rows"]
    assert {name: unseen[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert (seen["images"], unseen["images"]) == (24, 16)
    assert json.loads((trained / "run.json").read_text())["data"]["queries"] == 6
    search = ["retrieve", "--checkpoint", str(trained / "last.ckpt"), "--data", str(packed), "--map-ks", "5"]
    assert main([*search, "--output", str(tmp_path), "--threads", "1"]) == 0
    measures = json.loads((tmp_path / "retrieval.json").read_text())["measures"]
    assert {name: measures[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert (measures["queries"], measures["query_classes"], measures["gallery_images"]) == (6, 4, 10)
    assert (measures["nmi"], measures["f1"]) == pytest.approx((unseen["nmi"], unseen["f1"]))
    assert "6 queries of 4 classes, searched among 10 images of its gallery" in capsys.readouterr().out
    lines = (tmp_path / "neighbors.csv").read_text().splitlines()[1:]
    assert len(lines) == 6 * 8
    names = [{line.split(",")[column] for line in lines} for column in (0, 3)]
    assert names[0] == {"id_4/0", "id_5/0", "id_5/1", "id_6/1", "id_7/1", "id_7/2"}
    assert not names[0] & names[1]


def test_the_second_stage_takes_its_candidates_from_the_gallery(packed, trained, tmp_path, capsys):
    search = ["retrieve", "--checkpoint", str(trained / "last.ckpt"), "--data", str(packed), "--no-nmi",
              "--output", str(tmp_path), "--threads", "1"]  # fmt: skip
    assert main([*search, "--rerank", "11"]) == 2
    assert "rerank: expected at most 10, the images that are searched, got 11" in capsys.readouterr().err
    assert main([*search, "--rerank", "8"]) == 0
    measures = json.loads((tmp_path / "retrieval.json").read_text())["measures"]
    assert measures["recall_at_8_reranked"] == measures["recall_at_8"]


def test_collapse_searches_in_the_gallery(in_shop, packed, tmp_path):
    settings = ["backbone.width=4", "backbone.pooled_blocks=2", "backbone.embedding=6", "classes_per_batch=4"]
    assert main(["analyze", "collapse", "--data", str(packed), "--seeds", "0", "--epochs", "1", "--losses", "triplet",
                 "--set", *settings, "--output", str(tmp_path)]) == 0  # fmt: skip
    rows = json.loads((tmp_path / "collapse.json").read_text())["rows"]
    names = ("coding_rate", "recall_at_1", "map_at_r")
    measured = sorted(tuple(row[name] for name in names) for row in rows if row["classes"] == "unseen")
    expected = [oracle(checkpoint, *in_shop, (1,)) for checkpoint in tmp_path.rglob("last.ckpt")]
    expected = sorted(tuple(found[name] for name in names) for found in expected)
    assert len(measured) == 2
    assert measured == [pytest.approx(found, rel=1e-5) for found in expected]


def test_pictures_that_are_missing_are_counted_and_an_empty_gallery_is_refused(in_shop, tmp_path, capsys):
    root, rows = in_shop
    place, output = tmp_path / "set", tmp_path / "set.npz"
    for name, _, use in rows:
        if use == "train" or ("/id_4/" in name and use == "query") or "/id_5/" in name:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes((root / name).read_bytes())
    lines = [" ".join(row) for row in rows if row[1] not in ("id_6", "id_7", "id_8")]
    text = "\n".join([str(len(lines)), "image_name item_id evaluation_status", *lines])
    (tmp_path / "list.txt").write_text(text, encoding="utf-8")
    pack = ["data", "pack", "--source", str(place), "--split", str(tmp_path / "list.txt"), "--output", str(output)]
    assert main(pack) == 0
    told = capsys.readouterr().err
    assert "listed pictures that are not there: 2, such as 'img/WOMEN/Dresses/id_4/01_1_front.png'" in told
    assert "queries whose class has no picture in the gallery: 1, such as 'img/WOMEN/Dresses/id_4/00_1" in told
    run = ["--data", str(output), *TRAIN, "--measurement.ks", "[1]"]
    assert main(["metric-train", *run, "--output", str(tmp_path / "out")]) == 2
    assert "unseen classes, 4 images: labels: expected another sample of each query's class" in capsys.readouterr().err
    next(place.rglob("id_5/02_1_front.png")).unlink()
    assert main(pack) == 0
    capsys.readouterr()
    assert main(["metric-train", *run, "--output", str(tmp_path / "out")]) == 2
    assert "is_query: expected images to search beside the queries, got 3 queries alone" in capsys.readouterr().err
