"""``fewshot-ext analyze matches`` on the digits: pairs, numbers, the picture, and what it refuses."""

import csv
import json

import pytest
import torch
from PIL import Image

from fewshot_ext.cli import main
from fewshot_ext.data import ImageArchive, Split, load_digits
from fewshot_ext.evaluation import FrozenBackbone
from fewshot_ext.experiments.matches import ImagePair, draw_pairs, matches_table, measure_matches
from fewshot_ext.models import LocalFeaturesConfig, emd_logits, match_flows

pytestmark = pytest.mark.usefixtures("one_thread")

GRID = LocalFeaturesConfig("grid", grids=(2,))


def run(checkpoint, output, *arguments):
    return main(["analyze", "matches", "--checkpoint", str(checkpoint), "--output", str(output), *map(str, arguments)])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for side, numbers in (("query", (0, 1)), ("support", (2, 3)), ("three", (4, 5, 6)), ("many", range(25))):
        (folder / side).mkdir()
        for number in numbers:
            picture = Image.fromarray(load_digits().images[number][0].numpy()).resize((20, 16))
            picture.save(folder / side / f"a picture with a long name {number}.png")
    return folder


def test_pairs_of_one_class_come_first_and_of_two_after_them():
    novel = load_digits().subset(Split.NOVEL)
    pairs = draw_pairs(novel, same_class=4, other_class=3, seed=1)
    classes = [pair.classes for pair in pairs]
    assert all(first == second for first, second in classes[:4])
    assert len(set(classes[:4])) == 4
    assert all(first != second for first, second in classes[4:])
    for pair in pairs:
        for image, name, label in zip((pair.query, pair.support), pair.names, pair.classes, strict=True):
            assert torch.equal(image, novel.images[int(name)])
            assert novel.class_names[novel.labels[int(name)]] == label
        assert pair.names[0] != pair.names[1]
    again = draw_pairs(novel, same_class=4, other_class=3, seed=1)
    assert [pair.names for pair in again] == [pair.names for pair in pairs]
    assert [pair.names for pair in draw_pairs(novel, seed=2)] != [pair.names for pair in draw_pairs(novel, seed=1)]


def test_numbers_are_those_of_the_matching(checkpoints):
    backbone = FrozenBackbone.from_checkpoint(checkpoints[0])
    pairs = draw_pairs(load_digits().subset(Split.NOVEL), same_class=2, other_class=1)
    drawn, rows, flows = measure_matches(pairs, backbone, local_features=GRID, flows=3)
    module = backbone.network.local_features(GRID)
    with torch.no_grad():
        for pair, shown, row in zip(pairs, drawn, rows, strict=True):
            query, support = module(torch.stack([pair.query, pair.support]))
            torch.testing.assert_close(shown.query_map, query)
            logit = emd_logits(query[None, None], support[None, None], temperature=1.0).item()
            assert row["distance"] == pytest.approx(1 - logit, abs=1e-4)
            match = match_flows(query, support)
            assert row["query_weights"] == pytest.approx(match.query_weight.tolist(), abs=1e-3)
            assert sum(row["support_weights"]) == pytest.approx(4, abs=1e-3)
            torch.testing.assert_close(shown.query_image, pair.query / 255)
            own = [flow for flow in flows if flow["pair"] == row["pair"]]
            expected = (match.flow / 4).flatten().sort(descending=True).values[: len(own)]
            assert [flow["share"] for flow in own] == pytest.approx(expected.tolist(), abs=1e-3)
            assert row["strongest_share"] == own[0]["share"]
            corners = [[flow[f"query_{edge}"] for edge in ("left", "top", "right", "bottom")] for flow in own]
            assert all(corner in row["query_regions"] for corner in corners)
            assert all(-1.0001 <= flow["cosine"] <= 1.0001 for flow in own)
    table = matches_table(rows).splitlines()
    assert len(table) == 4
    assert table[1].split()[:2] == ["1", f"{rows[0]['distance']:.4f}"]
    assert " and " in table[3]


def test_a_data_set_gives_a_picture_and_numbers(checkpoints, tmp_path, capsys):
    options = ["--same_class", 1, "--other_class", 1, "--flows", 2, "--local_features.name", "grid"]
    assert run(checkpoints[0], tmp_path, "--data", "digits", *options) == 0
    written = {"matches.png", "matches.json", "matches.csv", "match_flows.json", "match_flows.csv", "matches.yaml"}
    assert {path.name for path in tmp_path.iterdir()} == written
    printed = capsys.readouterr().out
    assert printed.startswith("pair  distance  query and support")
    assert "written:" in printed
    text = (tmp_path / "matches.json").read_text()
    content = json.loads(text)
    assert len(content["rows"]) == 2
    assert len(content["rows"][0]["query_weights"]) == 13
    assert content["checkpoint"]["sha256"]
    assert content["data"]["name"] == "digits"
    assert str(checkpoints[0].parent) not in text
    with open(tmp_path / "match_flows.csv", newline="") as stream:
        assert [(row["pair"], row["rank"]) for row in csv.DictReader(stream)] == [
            ("1", "1"),
            ("1", "2"),
            ("2", "1"),
            ("2", "2"),
        ]
    with Image.open(tmp_path / "matches.png") as picture:
        assert picture.width > 900
    again = tmp_path / "again"
    assert run(checkpoints[0], again, "--data", "digits", "--config", tmp_path / "matches.yaml") == 0
    assert json.loads((again / "matches.json").read_text())["rows"] == content["rows"]


def test_pictures_of_ones_own(checkpoints, pictures, tmp_path):
    options = ["--query", pictures / "query", "--support", pictures / "support", "--local_features.name", "grid"]
    assert run(checkpoints[0], tmp_path, *options) == 0
    rows = json.loads((tmp_path / "matches.json").read_text())["rows"]
    assert [(row["query"][-1], row["support"][-1]) for row in rows] == [("0", "2"), ("1", "3")]
    assert "query_class" not in rows[0]


def test_one_picture_is_matched_with_all_of_the_other_side(checkpoints, pictures):
    from fewshot_ext.commands.analyze.matches import _read_pairs

    backbone = FrozenBackbone.from_checkpoint(checkpoints[0])
    (one, _) = sorted((pictures / "query").iterdir())
    for sides in ((one, pictures / "three"), (pictures / "three", one)):
        pairs, _ = _read_pairs(*map(str, sides), backbone)
        assert len(pairs) == 3
        assert len({pair.names for pair in pairs}) == 3
        assert pairs[0].query.shape == (1, 8, 8)


BOTH = ["--data", "digits"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected either --data, or --query and --support"),
        (["--query", "x.png"], "expected either --data, or --query and --support"),
        ([*BOTH, "--query", "x.png"], "expected either --data, or --query and --support"),
        (["--query", "x.png", "--support", "missing.png"], "x.png"),
        (["--query", "QUERY", "--support", "THREE"], "as many pictures, or one on either side, got 2 and 3"),
        (["--query", "MANY", "--support", "MANY"], "pairs: expected 1 to 24 for one picture, got 25"),
        ([*BOTH, "--weighting", "norm"], "weighting: expected one of cross_reference, uniform"),
        ([*BOTH, "--classes", "test"], "classes: expected one of base, validation, novel"),
        ([*BOTH, "--classes", "validation"], "validation"),
        ([*BOTH, "--flows", "0"], "flows: expected at least 1"),
        ([*BOTH, "--columns", "0"], "columns: expected at least 1"),
        ([*BOTH, "--same_class", "6"], "same_class: expected at most 5, the classes with two images, got 6"),
        ([*BOTH, "--same_class", "0", "--other_class", "0"], "pairs: expected 1 to 24 for one picture, got 0"),
        ([*BOTH, "--other_class", "25"], "pairs: expected 1 to 24 for one picture, got 29"),
        ([*BOTH, "--same_class", "-1"], "same_class: expected at least 0"),
        ([*BOTH, "--seed", "-1"], "seed: expected at least 0"),
        ([*BOTH, "--threads", "0"], "threads: expected at least 1"),
        ([*BOTH, "--local_features.pyramid", "[2]"], "pyramid: expected sides of at most 1"),
        ([*BOTH, "--local_features.name", "grid", "--local_features.grids", "[9]"], "at least 18 x 18 pixels"),
        ([*BOTH, "--checkpoint", __file__], "is not the checkpoint of a pre-training"),
        ([*BOTH, "--device", "tpu"], "device: expected auto"),
    ],
)
def test_a_wrong_argument_gets_one_line_and_exit_code_2(arguments, message, checkpoints, pictures, tmp_path, capsys):
    places = {"QUERY": pictures / "query", "THREE": pictures / "three", "MANY": pictures / "many"}
    assert run(checkpoints[0], tmp_path / "out", *(places.get(argument, argument) for argument in arguments)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1, printed.err
    assert printed.err.startswith("fewshot-ext analyze matches: error: ")
    assert message in printed.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["--checkpoint", "--output"])
def test_required_options(missing, checkpoints, capsys):
    options = {"--checkpoint": str(checkpoints[0]), "--output": "out", "--data": "digits"}
    given = [part for pair in options.items() if pair[0] != missing for part in pair]
    assert main(["analyze", "matches", *given]) == 2
    assert f"{missing}: expected a value" in capsys.readouterr().err


def test_one_class_has_no_pair_of_two():
    archive = ImageArchive(
        torch.zeros(2, 1, 8, 8, dtype=torch.uint8),
        torch.zeros(2, dtype=torch.int64),
        ("alone",),
        torch.tensor([Split.NOVEL], dtype=torch.uint8),
    )
    assert len(draw_pairs(archive, same_class=1, other_class=0)) == 1
    with pytest.raises(ValueError, match="other_class: expected 0 where there is one class, got 1"):
        draw_pairs(archive, same_class=0, other_class=1)


def test_too_many_pairs_are_refused(checkpoints):
    backbone = FrozenBackbone.from_checkpoint(checkpoints[0])
    image = torch.zeros(1, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="pairs: expected 1 to 24 for one picture, got 25"):
        measure_matches([ImagePair(image, image, ("a", "b"))] * 25, backbone)


def test_a_full_disk_prints_the_distances(checkpoints, tmp_path, capsys, monkeypatch):
    from fewshot_ext.experiments import matches

    def full(path, write):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(matches, "replace_file", full)
    options = ["--same_class", 1, "--other_class", 0]
    assert run(checkpoints[0], tmp_path, "--data", "digits", *options) == 1
    printed = capsys.readouterr()
    assert "distance" in printed.out
    assert "cannot write the results: " in printed.err
