"""Commands on checkpoints that other code wrote, and what they say that they assumed."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from checkpoint_cases import negative_margin, resnet12
from PIL import Image

from fewshot_ext import FewShotClassifier
from fewshot_ext.cli import main
from fewshot_ext.data import ImageArchive, Split
from fewshot_ext.models import conv4, load_network
from fewshot_ext.models.network import read_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ["--data", "digits", "--episodes", "4", "--shots", "1", "--queries", "2", "--heads", "protonet"]


@pytest.fixture
def official(tmp_path):
    torch.save(negative_margin("resnet12")[1], tmp_path / "best_model.tar")
    return tmp_path / "best_model.tar"


@pytest.fixture
def gray(tmp_path):
    torch.manual_seed(0)
    torch.save(conv4(1, width=8, pooled_blocks=3).state_dict(), tmp_path / "gray.pth")
    return tmp_path / "gray.pth"


@pytest.fixture(scope="module")
def colored(tmp_path_factory):
    """Three base and two novel classes of colored noise, as pictures in folders and as an image set."""
    root, draw = tmp_path_factory.mktemp("colored"), np.random.default_rng(0)
    images = draw.integers(0, 256, (5, 8, 3, 32, 32), dtype=np.uint8)
    images[:, :, 0] = (np.arange(5)[:, None, None, None] * 60).astype(np.uint8)
    for label, of_class in enumerate(images[3:]):
        for index, image in enumerate(of_class):
            folder = root / ("support" if index < 3 else "query") / f"class {label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{index}.png")
    labels = torch.arange(5).repeat_interleave(8)
    split = torch.tensor([Split.BASE] * 3 + [Split.NOVEL] * 2, dtype=torch.uint8)
    archive = ImageArchive(torch.from_numpy(images).flatten(0, 1), labels, tuple("abcde"), split)
    archive.save(root / "colored.npz")
    return root


def test_evaluate_knows_features_by_what_was_given(gray, tmp_path):
    command = ["evaluate", "--checkpoint", str(gray), *SMALL, "--image-size", "8", "--output", str(tmp_path / "out")]
    found = []
    for more in ([], ["--mean", "[0.9]", "--std", "[0.1]"]):
        assert main([*command, *more]) == 0
        found.append(len(list((tmp_path / "out" / "features").iterdir())))
    assert found == [1, 2], "the features of one preprocessing must not be taken for those of another"


def test_what_is_assumed_is_said_on_standard_error(official, colored, tmp_path):
    command = [sys.executable, "-m", "fewshot_ext.cli", "retrieve", "--checkpoint", str(official), "--no-nmi"]
    command += ["--query", str(colored / "query"), "--neighbors", "2", "--ks", "1", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    first = done.stderr.splitlines()[0]
    assert first.startswith(f"{official} is read as the official code of Negative Margin Matters: resnet12, 4 channels")
    assert "assumed is: image_size 84, mean (0.507, 0.487, 0.441)" in first
    assert "Traceback" not in done.stderr


def test_classify_takes_the_size_for_the_network_where_it_has_none_of_its_own(official, checkpoints, colored, tmp_path):
    command = ["classify", "--support", str(colored / "support"), "--query", str(colored / "query")]
    command += ["--head", "protonet", "--output", str(tmp_path / "out")]
    results = tmp_path / "out" / "results.json"
    for options, size in (([], 96), (["--image-size", "32"], 36)):
        assert main([*command, "--checkpoint", str(official), *options]) == 0
        # Pictures are read 1.15 times as large as the network sees them.
        assert json.loads(results.read_text())["image_size"] == size
    assert main([*command, "--checkpoint", str(checkpoints[0]), "--image-size", "9"]) == 0
    assert json.loads(results.read_text())["image_size"] == 9


@pytest.fixture
def wide(tmp_path):
    """Two classes of wide pictures that differ at their ends alone, which a cut to the middle square would lose."""
    draw = np.random.default_rng(0)
    middle, ends = draw.integers(256, size=(40, 40, 3), dtype=np.uint8), (0, 255)
    for label, end in enumerate(ends):
        for side, shift in (("support", 0), ("query", 1)):
            picture = np.pad(middle, ((0, 0), (40, 40), (0, 0)), constant_values=end)
            folder = tmp_path / side / f"class {label}"
            folder.mkdir(parents=True)
            Image.fromarray(np.roll(picture, shift, 0)).save(folder / "a.png")
    return tmp_path


def test_commands_bring_picture_files_to_the_network_as_its_code_does(official, wide):
    checkpoint = ["--checkpoint", str(official)]
    support, query = str(wide / "support"), str(wide / "query")
    assert FewShotClassifier(official, "protonet").fit(support).score(query) == 1
    command = ["classify", *checkpoint, "--support", support, "--query", query, "--head", "protonet"]
    assert main([*command, "--output", str(wide / "a")]) == 0
    assert json.loads((wide / "a" / "results.json").read_text())["accuracy"] == 1
    command = ["retrieve", *checkpoint, "--query", support, "--gallery", query, "--ks", "1", "--no-nmi"]
    assert main([*command, "--neighbors", "1", "--output", str(wide / "b")]) == 0
    assert '"recall_at_1": 1.0' in (wide / "b" / "retrieval.json").read_text()
    pair = [str(wide / "support" / f"class {label}" / "a.png") for label in (0, 1)]
    command = ["analyze", "matches", *checkpoint, "--query", pair[0], "--support", pair[1]]
    assert main([*command, "--output", str(wide / "c")]) == 0
    assert json.loads((wide / "c" / "matches.json").read_text())["rows"][0]["distance"] > 0.01


def test_meta_training_goes_on_from_the_official_deepemd(colored, tmp_path):
    case = resnet12("module.encoder.")
    torch.save({"params": case.state}, tmp_path / "max_acc.pth")
    command = ["meta-train", "--data", str(colored / "colored.npz"), "--checkpoint", str(tmp_path / "max_acc.pth")]
    command += ["--way", "3", "--queries", "1", "--steps", "1", "--epochs", "1", "--image-size", "32"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    trained = read_checkpoint(tmp_path / "out" / "last.ckpt")["hyper_parameters"]
    assert trained["stage"] == "meta-training" and trained["network"]["image_size"] == 32
    assert trained["network"]["mean"] == tuple(value / 255 for value in (125.3, 123.0, 113.9))
    assert load_network(tmp_path / "out" / "last.ckpt").out_features == 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image-size", "0"], "image_size: expected at least 1, got 0"),
        (["--mean", "[0.5]"], "mean and std: expected both or neither"),
        (["--similarity", "euclidean"], "similarity"),
        (["--scale", "0"], "scale: expected a number above 0, got 0"),
    ],
)
def test_wrong_settings_get_one_line(options, message, gray, tmp_path, capsys):
    assert main(["evaluate", "--checkpoint", str(gray), *SMALL, *options, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_settings_beside_a_checkpoint_of_ours(checkpoints, tmp_path, capsys):
    command = ["evaluate", "--checkpoint", str(checkpoints[0]), *SMALL, "--output", str(tmp_path / "out")]
    assert main([*command, "--image-size", "84"]) == 2
    assert "image_size: expected null beside a checkpoint, which brings its own, got 84" in capsys.readouterr().err
