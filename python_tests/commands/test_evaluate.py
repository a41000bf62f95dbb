import json
import sys

import pytest
import yaml

from fewshot_ext.cli import main
from fewshot_ext.data import ImageArchive, Split, load_digits

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ["--data", "digits", "--episodes", "8", "--shots", "1", "2", "--queries", "3", "--finetuning.steps", "2"]


def evaluate(checkpoints, output, *arguments):
    return main(["evaluate", "--checkpoint", *map(str, checkpoints), "--output", str(output), *SMALL, *arguments])


def test_two_checkpoints_in_one_table(checkpoints, tmp_path, capsys):
    output = tmp_path / "made" / "here"
    assert evaluate(checkpoints, output, "--heads", "finetune", "simpleshot", "matchingnet") == 0
    printed = capsys.readouterr()
    assert "5-way accuracy (%) on the novel classes of digits" in printed.out
    assert "difference to seed_0 on the same episodes" in printed.out
    assert [line.split(":")[0] for line in printed.err.splitlines()] == ["seed_0", "seed_1"]
    content = json.loads((output / "results.json").read_text())
    assert len(content["accuracies"]) == 12
    assert content["config"]["finetuning"]["steps"] == 2
    assert [backbone["path"] for backbone in content["backbones"]] == [str(path) for path in checkpoints]
    assert len(list((output / "features").iterdir())) == 4

    config = output / "config.yaml"
    assert main(["evaluate", "--config", str(config), "--output", str(tmp_path / "b"), "--no_cache"]) == 0
    again = json.loads((tmp_path / "b" / "results.json").read_text())
    assert again["accuracies"] == content["accuracies"]
    assert not (tmp_path / "b" / "features").exists()


def test_the_table_of_deepemd_beside_another_head(checkpoints, tmp_path, capsys):
    from fewshot_ext.heads import HEAD_GROUPS

    settings = ["--shots", "3", "--deepemd.classifier.passes", "1", "--local_features.regions", "2"]
    assert evaluate(checkpoints[:1], tmp_path / "a", "--heads", "protonet", "deepemd_table", *settings) == 0
    content = json.loads((tmp_path / "a" / "results.json").read_text())
    heads = ["protonet", *HEAD_GROUPS["deepemd_table"]]
    assert [row["head"] for row in content["accuracies"]] == heads
    assert content["config"]["head_settings"]["deepemd@sampling"]["maps"]["regions"] == 2
    printed = capsys.readouterr().out
    assert all(head in printed for head in heads)
    config = str(tmp_path / "a" / "config.yaml")
    assert main(["evaluate", "--config", config, "--output", str(tmp_path / "b"), "--no_cache"]) == 0
    assert json.loads((tmp_path / "b" / "results.json").read_text())["accuracies"] == content["accuracies"]


def resolved(capsys, *arguments):
    with pytest.raises(SystemExit):
        main(["evaluate", "--checkpoint", "any.ckpt", "--data", "digits", *arguments, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


def test_a_protocol_sets_defaults_and_nothing_that_is_given(capsys, tmp_path):
    negative_margin, deepemd = (resolved(capsys, "--protocol", name) for name in ("negative_margin", "deepemd"))
    assert negative_margin == resolved(capsys)
    keys = ("way", "shots", "queries", "episodes", "heads")
    assert [negative_margin[key] for key in keys] == [5, [1, 5], 16, 600, ["finetune"]]
    assert [deepemd[key] for key in keys] == [5, [1, 5], 15, [5000, 600], ["deepemd"]]
    assert deepemd["deepemd"]["classifier"] == negative_margin["deepemd"]["classifier"] | {"lr": 100.0}
    decided = {"protocol", "queries", "episodes", "heads", "deepemd"}
    assert {key for key in deepemd if deepemd[key] != negative_margin[key]} == decided
    assert resolved(capsys, "--protocol", "deepemd", "--shots", "5")["episodes"] == [600]

    given = ["--queries", "16", "--heads", "finetune", "--deepemd.classifier.lr", "0.1", "--episodes", "600"]
    expected = negative_margin | {"protocol": "deepemd"}
    assert resolved(capsys, *given, "--protocol", "deepemd") == expected
    assert resolved(capsys, "--protocol=deepemd", *given) == expected
    (tmp_path / "own.yaml").write_text(
        "protocol: deepemd\nqueries: 16\ndeepemd: {classifier: {lr: 0.1}}\nepisodes: 600\n"
    )
    assert resolved(capsys, "--config", str(tmp_path / "own.yaml")) == expected | {"heads": ["deepemd"]}


def test_the_evaluation_of_deepemd_by_its_name(with_regions, tmp_path, capsys):
    arguments = ["--data", "digits", "--protocol", "deepemd", "--episodes", "[4,3]", "--deepemd.classifier.passes", "2"]
    assert main(["evaluate", "--checkpoint", str(with_regions), "--output", str(tmp_path), *arguments]) == 0
    assert "over 4 1-shot episodes and 3 5-shot episodes, 15 queries a class" in capsys.readouterr().out
    content = json.loads((tmp_path / "results.json").read_text())
    assert [(row["head"], row["shot"], len(row["correct"])) for row in content["accuracies"]] == [
        ("deepemd", 1, 4),
        ("deepemd", 5, 3),
    ]
    assert content["config"]["head_settings"]["deepemd"]["classifier"]["lr"] == 100
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["protocol"] == "deepemd"


def test_ctrl_c_prints_what_is_there(checkpoints, tmp_path, capsys, monkeypatch):
    from fewshot_ext.evaluation import comparison

    calls = []

    def interrupted(*arguments, **settings):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return measure(*arguments, **settings)

    measure = comparison.episode_scores
    monkeypatch.setattr(comparison, "episode_scores", interrupted)
    assert evaluate(checkpoints, tmp_path, "--heads", "protonet") == 130
    printed = capsys.readouterr()
    assert "seed_0" in printed.out
    assert "seed_1" not in printed.out
    assert "interrupted, with 1 of 2 backbones done; the same command finds the features" in printed.err
    assert len(json.loads((tmp_path / "results.json").read_text())["accuracies"]) == 2


def test_a_full_disk_loses_no_number(checkpoints, tmp_path, capsys, monkeypatch):
    from fewshot_ext.evaluation import features, results

    def full(path, write):
        raise OSError(28, "No space left on device", str(path))

    def full_later(path, text):
        if path.suffix == ".csv":
            full(path, text)
        replace_text(path, text)

    replace_text = results.replace_text
    monkeypatch.setattr(features, "replace_file", full)
    monkeypatch.setattr(results, "replace_text", full_later)
    with pytest.warns(UserWarning, match="features of seed_0 are not kept for the next run: .*No space left"):
        assert evaluate(checkpoints, tmp_path, "--heads", "protonet") == 1
    printed = capsys.readouterr()
    assert "seed_0    protonet" in printed.out
    assert "No space left on device" in printed.err
    assert "with 1 of 2 backbones done" in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shots", "200"], "200 shots and 3 queries need 203 images a class, but of the novel classes of digits '8'"),
        (["--way", "20"], "way 20 asks for more classes than there are"),
        (["--way", "1"], "way: expected at least 2, got 1"),
        (["--split", "validation"], "no validation classes"),
        (["--open_set", "1"], "open_set: expected at most 0, for the novel classes of digits are 5 and way takes 5"),
        (["--open_set", "-1"], "open_set: expected at least 0, got -1"),
        (["--temperature", "0"], "temperature: expected a number above 0, got 0"),
        (["--split", "test"], "split: expected one of base, validation, novel, got 'test'"),
        (["--heads", "svm"], "head: expected one of finetune, protonet,"),
        (["--heads", "protonet", "protonet"], "none twice"),
        (["--heads", "finetune@fcn"], "asks for maps, but finetune takes feature vectors"),
        (["--heads", "knn"], "head knn on backbone seed_0: neighbors: expected at most 1, the local features"),
        (["--heads", "deepemd", "--local_features.pyramid", "[2]"], "pyramid: expected sides of at most 1"),
        (["--heads", "deepemd@grid", "--local_features.grids", "[9]"], "at least 18 x 18 pixels for a grid of 9 x 9"),
        (["--heads", "deepemd", "--map_memory", "1e-9"], "map_memory: expected at least 0.01 GiB for head deepemd"),
        (["--map_dtype", "int8"], "map_dtype: expected one of float32, float16"),
        (["--deepemd.temperature", "0"], "temperature: expected a number above 0"),
        (["--deepemd.classifier.passes", "-1"], "passes: expected at least 0"),
        (["--episodes", "0"], "episodes: expected at least 1"),
        (["--episodes", "[3,0]"], "episodes: expected at least 1"),
        (["--episodes", "[3,4,5]"], "episodes: expected one number, or one for each of [1, 2] shots, got [3, 4, 5]"),
        (["--protocol", "maml"], "protocol"),
        (["--seed", "-1"], "seed: expected at least 0"),
        (["--threads", "0"], "threads: expected at least 1"),
        (["--batch_size", "0"], "batch_size: expected at least 1"),
        (["--device", "tpu"], "device: expected auto"),
        (["--data", "no_such_set"], "no_such_set"),
        (["--finetuning.lr", "0"], "lr: expected a number above 0"),
        (["--checkpoint", "missing.ckpt"], "missing.ckpt"),
        (["--checkpoint", __file__], "is not the checkpoint of a pre-training"),
    ],
)
def test_a_wrong_argument_gets_one_line_and_exit_code_2(arguments, message, checkpoints, tmp_path, capsys):
    assert evaluate(checkpoints, tmp_path / "out", *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1, printed.err
    assert printed.err.startswith("fewshot-ext evaluate: error: ")
    assert message in printed.err
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_checkpoint_given_twice(checkpoints, tmp_path, capsys):
    assert evaluate([checkpoints[0], checkpoints[0]], tmp_path) == 2
    assert "is given twice" in capsys.readouterr().err


def test_small_classes_are_left_out_where_that_is_asked_for(checkpoints, tmp_path, capsys):
    digits = load_digits()
    few = (digits.labels == 7) & ((digits.labels == 7).cumsum(0) > 4)
    archive = ImageArchive(*digits[~few], digits.class_names, digits.class_split)
    archive.save(tmp_path / "few.npz")
    command = ["--data", str(tmp_path / "few.npz"), "--heads", "protonet", "--way", "4"]
    assert evaluate(checkpoints[:1], tmp_path / "a", *command) == 2
    assert "'7' has 4" in capsys.readouterr().err
    assert evaluate(checkpoints[:1], tmp_path / "b", *command, "--small-classes", "drop") == 0
    told = "novel classes with fewer than 5 images left out: 1, such as '7'"
    assert told in capsys.readouterr().err
    content = json.loads((tmp_path / "b" / "results.json").read_text())
    assert content["data"]["passed_over"] == [told]
    # As if there were no such class.
    roles = {name: Split(role) for name, role in zip(digits.class_names, digits.class_split.tolist(), strict=True)}
    digits.with_roles({name: role for name, role in roles.items() if name != "7"}).save(tmp_path / "without.npz")
    command[1] = str(tmp_path / "without.npz")
    assert evaluate(checkpoints[:1], tmp_path / "c", *command) == 0
    without = json.loads((tmp_path / "c" / "results.json").read_text())
    assert without["accuracies"] == content["accuracies"]
    assert evaluate(checkpoints[:1], tmp_path / "d", *command, "--queries", "400", "--small-classes", "drop") == 2
    assert "small_classes: no novel class of" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["--checkpoint", "--data"])
def test_required_options(missing, checkpoints, capsys):
    arguments = {"--checkpoint": str(checkpoints[0]), "--data": "digits"}
    given = [part for pair in arguments.items() if pair[0] != missing for part in pair]
    assert main(["evaluate", *given]) == 2
    assert missing.strip("-") in capsys.readouterr().err


def test_output_below_a_file(checkpoints, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert evaluate(checkpoints, tmp_path / "file" / "out") == 2
    assert "cannot write to the output folder" in capsys.readouterr().err


def test_help_lists_every_head_and_needs_no_lightning(capsys, monkeypatch):
    from fewshot_ext.heads import HEADS, MAP_HEADS

    monkeypatch.setitem(sys.modules, "lightning", None)
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    shown = capsys.readouterr().out.replace("\n", " ")
    assert all(head in shown for head in (*HEADS, *MAP_HEADS, "deepemd_table"))
