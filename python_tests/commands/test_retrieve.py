"""``fewshot-ext retrieve`` on the digits and on folders of pictures: what it measures, draws and refuses."""

import csv
import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from retrieve_cases import run

from fewshot_ext import _extras
from fewshot_ext.cli import main
from fewshot_ext.commands import retrieve
from fewshot_ext.data import ImageArchive, Split, load_digits
from fewshot_ext.evaluation import FrozenBackbone
from fewshot_ext.models import load_network
from fewshot_ext.retrieval import clustering_metrics, nearest_neighbors, retrieval_metrics
from fewshot_ext.retrieval import pictures as retrieval_images

# The command sets the number of threads of the process; the fixture sets it back.
pytestmark = pytest.mark.usefixtures("one_thread")


def test_measures_are_those_of_the_embeddings(checkpoints, tmp_path, capsys):
    assert run(checkpoints[0], tmp_path, "--data", "digits", "--ks", "1", "5") == 0
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "retrieval.json").read_text())
    novel = load_digits().subset(Split.NOVEL)
    with torch.inference_mode():
        embeddings = load_network(checkpoints[0])(novel.images)
    found = retrieval_metrics(embeddings, novel.labels, ks=(1, 5))
    measures = record["measures"]
    assert {key: measures[key] for key in found.row()} == pytest.approx(found.row(), abs=1e-6)
    clusters = clustering_metrics(embeddings, novel.labels)
    assert (measures["nmi"], measures["f1"]) == pytest.approx(clusters, abs=1e-6)
    assert measures["queries"] == len(novel)
    assert f"{100 * found.recall[5]:.2f} %" in printed
    assert "novel classes of digits: 896 queries of 5 classes, searched among the others" in printed
    assert record["checkpoint"]["sha256"] == FrozenBackbone.from_checkpoint(checkpoints[0]).sha256

    (row,) = csv.DictReader((tmp_path / "retrieval.csv").open())
    assert float(row["recall_at_1"]) == measures["recall_at_1"]
    neighbors = list(csv.DictReader((tmp_path / "neighbors.csv").open()))
    assert len(neighbors) == 8 * len(novel)
    first = nearest_neighbors(embeddings, k=8)[0].tolist()
    expected = [novel.class_names[novel.labels[index]] for index in first]
    assert [row["neighbor_class"] for row in neighbors[:8]] == expected
    assert [row["right"] for row in neighbors[:8]] == [str(name == "5") for name in expected]
    nearest_right = sum(row["right"] == "True" for row in neighbors if row["rank"] == "1") / len(novel)
    assert nearest_right == pytest.approx(found.recall[1])


def test_the_picture_has_a_row_for_each_query(checkpoints, tmp_path):
    assert run(checkpoints[0], tmp_path, "--data", "digits", "--no_nmi", "--rows", "8", "--neighbors", "4") == 0
    with Image.open(tmp_path / "neighbors.png") as picture:
        # Cells of 96 pixels with gaps of 8 between and around them.
        assert picture.width == 5 * 104 + 8
        colors = {color for _, color in picture.getcolors(maxcolors=100_000)}
    assert (0x00, 0x9E, 0x73) in colors  # right ones; with the untrained backbone of the fixture some are wrong
    assert "nmi" not in json.loads((tmp_path / "retrieval.json").read_text())["measures"]


def test_the_seed_decides_the_picture(checkpoints, tmp_path):
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        arguments = ["--data", "digits", "--no_nmi", "--rows", "3", "--seed", seed]
        assert run(checkpoints[0], tmp_path / name, *arguments) == 0
    pictures = [(tmp_path / name / "neighbors.png").read_bytes() for name in "abc"]
    assert pictures[0] == pictures[1] != pictures[2]


def test_folders_of_queries_and_gallery(checkpoints, folders, tmp_path, capsys):
    query, gallery = folders / "query", folders / "gallery"
    assert run(checkpoints[0], tmp_path, "--query", str(query), "--gallery", str(gallery), "--neighbors", "3") == 0
    assert f"{query}: 6 queries of 3 classes, searched among 18 images of {gallery}" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "neighbors.csv").open()))
    assert len(rows) == 18
    assert rows[0]["query"] == str(query / "digit 5" / "0.png")
    assert rows[0]["neighbor"].startswith(str(gallery))
    measures = json.loads((tmp_path / "retrieval.json").read_text())["measures"]
    (row,) = csv.DictReader((tmp_path / "retrieval.csv").open())
    assert (row["gallery"], row["gallery_images"]) == (str(gallery), "18")
    right = [row["right"] == "True" for row in rows if row["rank"] == "1"]
    assert measures["recall_at_1"] == pytest.approx(sum(right) / 6)


def test_a_folder_searched_among_itself(checkpoints, folders, tmp_path):
    assert run(checkpoints[0], tmp_path, "--query", str(folders / "gallery"), "--neighbors", "17", "--ks", "17") == 0
    rows = list(csv.DictReader((tmp_path / "neighbors.csv").open()))
    assert not any(row["query"] == row["neighbor"] for row in rows)
    assert json.loads((tmp_path / "retrieval.json").read_text())["measures"]["recall_at_17"] == 1.0


def test_the_record_of_a_search_repeats_it(checkpoints, tmp_path):
    assert run(checkpoints[0], tmp_path / "a", "--data", "digits", "--ks", "3") == 0
    config = ["--config", str(tmp_path / "a" / "config.yaml"), "--output", str(tmp_path / "b")]
    assert main(["retrieve", *config]) == 0
    first, again = (json.loads((tmp_path / name / "retrieval.json").read_text())["measures"] for name in "ab")
    assert first == again


def test_classes_without_another_image(checkpoints, folders, tmp_path, capsys):
    lonely = tmp_path / "query"
    for label, name in ((5, "digit 5"), (9, "digit 9")):
        (lonely / name).mkdir(parents=True)
        image = load_digits().images[load_digits().labels == label][-1]
        Image.fromarray(image[0].numpy()).save(lonely / name / "x.png")
    arguments = ["--query", str(lonely), "--gallery", str(folders / "gallery"), "--no_nmi"]
    assert run(checkpoints[0], tmp_path / "out", *arguments) == 2
    assert "labels: expected another sample of each query's class" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    found = {}
    for choice in ("exclude", "miss"):
        assert run(checkpoints[0], tmp_path / choice, *arguments, "--lone_queries", choice) == 0
        found[choice] = json.loads((tmp_path / choice / "retrieval.json").read_text())["measures"]
    assert (found["exclude"]["queries"], found["miss"]["queries"]) == (1, 2)
    assert found["miss"]["recall_at_8"] == found["exclude"]["recall_at_8"] / 2


def test_the_picture_has_words_where_classes_are_codes(checkpoints, tmp_path, monkeypatch):
    digits = load_digits()
    words = tuple(f"the digit {name}, a synonym" for name in digits.class_names)
    replace(digits, class_words=words).save(tmp_path / "words.npz")
    captions, draw = [], retrieval_images.contact_sheet
    monkeypatch.setattr(
        retrieval_images,
        "contact_sheet",
        lambda images, texts, **options: captions.extend(texts) or draw(images, texts, **options),
    )
    arguments = ["--data", str(tmp_path / "words.npz"), "--no_nmi", "--rows", "2", "--neighbors", "2"]
    assert run(checkpoints[0], tmp_path / "out", *arguments) == 0
    assert [caption.rpartition(" ")[0].rpartition("\n")[2] for caption in captions] == ["the digit"] * 6
    rows = list(csv.DictReader((tmp_path / "out" / "neighbors.csv").open()))
    assert {row["query_class"] for row in rows} <= set(digits.class_names)


def test_results_that_cannot_be_written_are_printed(checkpoints, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(retrieve, "replace_text", full)
    assert run(checkpoints[0], tmp_path, "--data", "digits", "--no_nmi") == 1
    printed = capsys.readouterr()
    assert "Recall@1" in printed.out
    assert "written:" not in printed.out
    assert printed.err.endswith("error: No space left on device; not everything was written\n")


def test_a_backbone_without_maps_is_found_before_any_work(with_regions, tmp_path, monkeypatch, capsys):
    plain = FrozenBackbone.open(torch.nn.Flatten())
    monkeypatch.setattr(retrieve.FrozenBackbone, "from_checkpoint", lambda path, settings: plain)
    assert run(with_regions, tmp_path / "out", "--data", "digits", "--rerank", "8") == 2
    assert "the backbone gives no feature maps, which matching needs: Flatten has no method" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected either --data or --query, and not both"),
        (["--data", "digits", "--query", "."], "expected either --data or --query, and not both"),
        (["--data", "digits", "--gallery", "."], "--gallery goes with --query"),
        (["--data", "nowhere"], "there is no image set 'nowhere'"),
        (["--data", "digits", "--split", "test"], "split: expected one of base, validation, novel, got 'test'"),
        (["--data", "digits", "--split", "validation"], "the images have no validation classes"),
        (["--data", "digits", "--ks", "896"], "ks: expected K in [1, 895]"),
        (["--data", "digits", "--ks", "1", "1"], "none twice"),
        (["--data", "digits", "--neighbors", "896"], "neighbors: expected at most 895"),
        (["--data", "digits", "--neighbors", "0"], "neighbors: expected at least 1"),
        (["--data", "digits", "--rows", "0"], "rows: expected at least 1"),
        (["--data", "digits", "--batch_size", "0"], "batch_size: expected at least 1"),
        (["--data", "digits", "--seed", "-1"], "seed: expected at least 0"),
        (["--data", "digits", "--threads", "0"], "threads: expected at least 1"),
        (["--data", "digits", "--rerank", "7"], "rerank: expected at least 8, the largest K, got 7"),
        (["--data", "digits", "--rerank", "0"], "rerank: expected at least 8, the largest K, got 0"),
        (["--data", "digits", "--rerank", "9", "--neighbors", "10"], "rerank: expected at least 10, neighbors, got 9"),
        (
            ["--data", "digits", "--rerank", "896"],
            "rerank: expected at most 895, the images that are searched, got 896",
        ),
        (
            ["--query", "{folders}/query", "--gallery", "{folders}/gallery", "--rerank", "19"],
            "rerank: expected at most 18",
        ),
        (["--data", "digits", "--rerank", "many"], "rerank"),
        (
            ["--data", "digits", "--rerank", "50", "--local_features.pyramid", "[3]"],
            "pyramid: expected sides of at most",
        ),
        (["--data", "digits", "--local_features.name", "crops"], "local_features.name"),
        (
            ["--data", "digits", "--rerank", "50", "--map_memory", "1e-5"],
            "map_memory: expected at least 0.01 GiB for re-ranking, with 1 x 8 numbers for each of 896 images, got "
            "1e-05; raise it, keep them in map_dtype float16 or take fewer regions",
        ),
        (
            ["--query", "{folders}/query", "--gallery", "{folders}/gallery", "--rerank", "9", "--map_memory", "2e-6"],
            "24 images and 0.00 GiB of pictures, got 2e-06",
        ),
        (["--data", "digits", "--map_memory", "0"], "map_memory: expected a number above 0"),
        (["--data", "digits", "--map_dtype", "int8"], "map_dtype: expected one of float32, float16"),
        (["--data", "digits", "--weighting", "norm"], "weighting: expected one of cross_reference, uniform"),
        (["--data", "digits", "--distance", "l1"], "distance: expected one of cosine, euclidean, got 'l1'"),
        (["--data", "digits", "--lone_queries", "drop"], "lone_queries: expected one of error, exclude, miss"),
        (["--data", "digits", "--device", "tpu"], "device: expected auto, cpu or cuda"),
        (["--query", "nowhere"], "'nowhere' is not a folder"),
        (["--query", "{folders}/query/digit 5"], "lies in no class's folder"),
        (["--query", "{folders}/query", "--gallery", "{folders}/query/"], "leave --gallery out"),
        (["--query", "{folders}/query", "--gallery", "{folders}/gallery", "--ks", "19"], "ks: expected K in [1, 18]"),
    ],
)
def test_a_wrong_argument_gets_one_line_and_exit_code_2(
    arguments, message, checkpoints, folders, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    arguments = [argument.format(folders=folders) for argument in arguments]
    assert main(["retrieve", "--checkpoint", str(checkpoints[0]), *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1, printed.err
    assert printed.err.startswith("fewshot-ext retrieve: error: ")
    assert message in printed.err
    assert not (tmp_path / "retrieval").exists()


def test_a_checkpoint_of_the_wrong_kind(tmp_path, capsys):
    assert run(__file__, tmp_path / "out", "--data", "digits") == 2
    assert "is not the checkpoint of a pre-training" in capsys.readouterr().err
    assert run(tmp_path / "none.ckpt", tmp_path / "out", "--data", "digits") == 2
    assert "none.ckpt" in capsys.readouterr().err


def test_weights_that_are_no_numbers_are_found_before_any_work(checkpoints, tmp_path, capsys):
    checkpoint = torch.load(checkpoints[0], weights_only=True)
    next(value for key, value in checkpoint["state_dict"].items() if key.endswith("weight"))[0] = torch.nan
    torch.save(checkpoint, tmp_path / "nan.ckpt")
    assert run(tmp_path / "nan.ckpt", tmp_path / "out", "--data", "digits") == 2
    error = capsys.readouterr().err
    assert "backbone nan.ckpt gives features that are not finite: its training has diverged" in error
    assert not (tmp_path / "out").exists()


def test_images_of_other_channels(checkpoints, tmp_path, capsys):
    digits = load_digits()
    color = ImageArchive(digits.images.repeat(1, 3, 1, 1), digits.labels, digits.class_names, digits.class_split)
    color.save(tmp_path / "color.npz")
    assert run(checkpoints[0], tmp_path / "out", "--data", str(tmp_path / "color.npz")) == 2
    error = capsys.readouterr().err
    assert "backbone last.ckpt does not take the 3x8x8 images of" in error
    assert len(error.splitlines()) == 1


def test_embeddings_that_are_no_numbers_end_the_search_by_name(checkpoints, tmp_path, monkeypatch, capsys):
    def broken(*_, **__):
        raise ValueError("the embeddings of last.ckpt are not finite, the first that of 5/0")

    monkeypatch.setattr(retrieve.LabeledImages, "embed", broken)
    assert run(checkpoints[0], tmp_path, "--data", "digits") == 1
    assert "fewshot-ext retrieve: error: the embeddings of last.ckpt are not finite" in capsys.readouterr().err


def test_embeddings_are_checked(checkpoints):
    backbone = FrozenBackbone.from_checkpoint(checkpoints[0])
    images = retrieve.LabeledImages.of_archive(load_digits())
    backbone.network.register_forward_hook(lambda module, inputs, output: output * float("inf"))
    with pytest.raises(ValueError, match=r"the embeddings of last\.ckpt are not finite, the first that of 0/0"):
        images.embed(backbone, 256, lambda count: None)


def test_a_damaged_picture_is_named(checkpoints, folders, tmp_path, capsys):
    for label in ("a", "b"):
        (tmp_path / "query" / label).mkdir(parents=True)
        (tmp_path / "query" / label / "x.png").write_bytes((folders / "query" / "digit 5" / "0.png").read_bytes())
    (tmp_path / "query" / "b" / "y.png").write_text("no picture")
    assert run(checkpoints[0], tmp_path / "out", "--query", str(tmp_path / "query")) == 2
    assert "y.png" in capsys.readouterr().err


def test_ctrl_c(checkpoints, tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(retrieve.LabeledImages, "embed", interrupt)
    assert run(checkpoints[0], tmp_path, "--data", "digits") == 130
    assert "interrupted before everything was measured; nothing was written" in capsys.readouterr().err


@pytest.mark.parametrize(("module", "extra"), [("PIL", "train"), ("sklearn", "metric")])
def test_a_missing_package_names_the_pip_line(module, extra, checkpoints, tmp_path, monkeypatch, capsys):
    is_installed = _extras.is_installed
    monkeypatch.setattr(_extras, "is_installed", lambda name: name != module and is_installed(name))
    assert run(checkpoints[0], tmp_path, "--data", "digits") == 2
    assert f"pip install 'fewshot_ext[{extra}]'" in capsys.readouterr().err


# 14, 17
def test_what_a_folder_holds_besides_is_said_and_recorded(checkpoints, folders, tmp_path, capsys):
    query, gallery = (shutil.copytree(folders / name, tmp_path / name) for name in ("query", "gallery"))
    (query / "notes.txt").touch()
    (gallery / "digit 5" / "2.png").rename(gallery / "digit 5" / os.fsdecode(b"\xff.png"))
    arguments = ["--query", str(query), "--gallery", str(gallery), "--neighbors", "18", "--no_nmi"]
    assert run(checkpoints[0], tmp_path, *arguments) == 0
    told = "files of other kinds (1 .txt) passed over: 1, namely 'notes.txt'"
    assert told in capsys.readouterr().err
    assert json.loads((tmp_path / "retrieval.json").read_text())["passed_over"] == {"queries": [told]}
    neighbors = csv.DictReader((tmp_path / "neighbors.csv").open(encoding="utf-8"))
    assert any(row["neighbor"].endswith(r"\udcff.png") for row in neighbors)
