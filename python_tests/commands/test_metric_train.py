"""``fewshot-ext metric-train`` on the digits, and ``analyze collapse`` on top of it."""

import hashlib
import json

import numpy as np
import pytest
import torch
import yaml
from checkpoint_cases import bn_inception, torchvision
from PIL import Image
from scipy.io import savemat
from training_commands import METRIC_TRAIN, check_refused, same_weights

from fewshot_ext import _extras
from fewshot_ext.cli import main
from fewshot_ext.data import AugmentationConfig
from fewshot_ext.models import BackboneConfig, build_backbone
from fewshot_ext.recipes import load_recipe, read_recipe, recipe_names
from fewshot_ext.training import AntiCollapseConfig, MetricTraining, MetricTrainingConfig

# The command sets the number of threads of the process; the fixture sets it back.
pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_run_leaves_checkpoints_history_records_and_a_log(three_splits, tmp_path, capsys):
    output = tmp_path / "made" / "here"
    arguments = [
        "--loss",
        "triplet",
        "--anti_collapse.variant",
        "pair",
        "--anti_collapse.weight",
        "0.01",
        "--seed",
        "4",
    ]
    assert main([*METRIC_TRAIN, "--epochs", "2", *arguments, "--data", three_splits, "--output", str(output)]) == 0
    printed = capsys.readouterr()
    record = json.loads((output / "run.json").read_text())
    results = record["results"]
    lines = printed.err.splitlines()
    assert lines[2] == "loss: triplet, with Anti-Collapse (pair, paper, weight 0.01)"
    assert "batches: 3 classes x 8 images" in lines
    assert "coding rate" in lines[-1]
    assert lines[-1].startswith("epoch 2/2: loss ")
    assert printed.out.startswith("trained 2 epochs: loss ")
    best = 100 * results["best_validation_accuracy"]
    assert f"best epoch {results['best_epoch']}: Recall@1 {best:.2f} % on validation classes" in printed.out
    assert f"{100 * results['unseen']['recall_at_8']:.2f} %" in printed.out
    assert list(output.glob("events.out.tfevents*"))
    assert len(json.loads((output / "history.json").read_text())["rows"]) == 6
    assert record["seed"] == 4
    assert [record["data"][name]["classes"] for name in ("base", "validation", "novel")] == [3, 2, 5]
    config = MetricTraining.from_checkpoint(output / "best.ckpt").config
    assert MetricTrainingConfig.from_dict(record["config"]) == config
    assert (config.loss, config.anti_collapse.weight) == ("triplet", 0.01)
    assert yaml.safe_load((output / "config.yaml").read_text())["seed"] == 4
    assert main(["retrieve", "--checkpoint", str(output / "last.ckpt"), "--data", three_splits, "--no_nmi",
                 "--output", str(tmp_path / "found")]) == 0  # fmt: skip
    found = json.loads((tmp_path / "found" / "retrieval.json").read_text())["measures"]
    last = json.loads((output / "history.json").read_text())["rows"][-1]
    assert found["recall_at_1"] == pytest.approx(last["recall_at_1"])
    assert found["coding_rate"] == pytest.approx(last["coding_rate"], rel=1e-5)


def test_the_record_of_a_run_repeats_it_and_resume_completes_it(tmp_path, capsys):
    assert main([*METRIC_TRAIN, "--epochs", "2", "--data", "digits", "--output", str(tmp_path / "a")]) == 0
    config = ["--config", str(tmp_path / "a" / "config.yaml"), "--output", str(tmp_path / "b")]
    assert main(["metric-train", *config]) == 0
    assert same_weights(tmp_path / "a", tmp_path / "b")
    capsys.readouterr()
    assert main(["metric-train", *config]) == 2
    assert "--resume goes on from it" in capsys.readouterr().err
    assert main(["metric-train", *config, "--resume"]) == 0
    assert "going on after epoch 2 of 2" in capsys.readouterr().err


PLACE = ["--data", "digits", "--output", "out"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--data: expected a value, got none"),
        (["--data", "digits"], "--output: expected a value, got none"),
        (["--data", "nowhere", "--output", "out"], "there is no image set 'nowhere'"),
        ([*PLACE, "--loss", "hinge"], "hinge"),
        ([*PLACE, "--classes_per_batch", "6"], "classes_per_batch: expected at most 5, the classes to train on, got 6"),
        ([*PLACE, "--classes_per_batch", "1"], "a batch of one class has no negatives"),
        (
            [*PLACE, "--loss", "triplet", "--samples_per_class", "1"],
            "samples_per_class: expected at least 2 for triplet",
        ),
        ([*PLACE, "--loss", "triplet", "--anti_collapse.variant", "all_proxy"], "which has no proxies"),
        ([*PLACE, "--anti_collapse.eps", "0"], "eps: expected a number above 0"),
        ([*PLACE, "--measurement.ks", "[1, 5000]"], "ks: expected K in [1, "),
        ([*PLACE, "--milestones", "[0]"], "milestones: expected at least 1"),
        ([*PLACE, "--backbone.pooled_blocks", "4"], "at least 16 x 16, got 8 x 8"),
        ([*PLACE, "--freeze-batch-norm", "true"], "freeze_batch_norm: expected false without a checkpoint"),
        ([*PLACE, "--checkpoint", "nowhere.pth"], "nowhere.pth"),
        ([*PLACE, "--seed", "-1"], "seed: expected at least 0"),
        ([*PLACE, "--devices", "2"], "--devices"),
        (
            ["--config", "missing"],
            "there is no recipe 'missing'; the recipes are cars196_anti_collapse, cub_",
        ),
    ],
)
def test_a_wrong_argument_gets_one_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    check_refused([*METRIC_TRAIN, *arguments], message, capsys)


def test_settings_of_the_backbone_beside_a_checkpoint_are_its_own_or_refused(checkpoints, tmp_path, capsys):
    """What a checkpoint does not have is refused, the option's default too, and never passed over."""
    start = ["metric-train", "--data", "digits", "--checkpoint", str(checkpoints[0]), "--epochs", "1",
             "--classes-per-batch", "3", "--threads", "1"]  # fmt: skip
    for option, value, kept in (("width", "null", 8), ("pooled_blocks", "null", 3), ("name", "resnet18", "conv4")):
        message = f"backbone.{option}: expected {kept}, as checkpoint {checkpoints[0]} has it, got "
        check_refused([*start, f"--backbone.{option}", value, "--output", str(tmp_path / "no")], message, capsys)
    torch.save(torchvision(50).state, tmp_path / "imagenet.pth")
    other = ["metric-train", "--data", "digits", "--checkpoint", str(tmp_path / "imagenet.pth"), "--output", "no"]
    for given in (["--backbone.name", "conv4"], ["--config", "omniglot28_conv4"]):
        check_refused([*other, *given], "backbone.name: expected resnet50, as checkpoint ", capsys)
    given = ["--backbone.width", "8", "--backbone.embedding", "5"]
    assert main([*start, *given, "--output", str(tmp_path / "a")]) == 0
    # The record of the run has what it was trained with, and repeats it.
    settings = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())["backbone"]
    assert (settings["width"], settings["pooled_blocks"], settings["embedding"]) == (8, 3, 5)
    config = str(tmp_path / "a" / "config.yaml")
    assert main(["metric-train", "--config", config, "--output", str(tmp_path / "b")]) == 0
    assert same_weights(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    ("module", "extra"), [("lightning", "train"), ("pytorch_metric_learning", "metric"), ("tqdm", "train")]
)
def test_a_missing_package_of_collapse_names_the_pip_line(module, extra, tmp_path, monkeypatch, capsys):
    is_installed = _extras.is_installed
    monkeypatch.setattr(_extras, "is_installed", lambda name: name != module and is_installed(name))
    assert main(["analyze", "collapse", *COLLAPSE, "--data", "digits", "--output", str(tmp_path)]) == 2
    assert f"'{module}' is missing; pip install 'fewshot_ext[{extra}]'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["miniimagenet32_conv4", "omniglot28_conv4"])
def test_small_recipes_fit_their_data(name, capsys):
    config = load_recipe(name, "metric-train")
    channels, size = (1, 28) if read_recipe(name, "metric-train")["data"].startswith("omniglot") else (3, 32)
    assert build_backbone(config.backbone, channels).feature_size(size, size) == config.backbone.embedding == 64
    assert all(epoch < config.epochs for epoch in config.milestones)
    with pytest.raises(SystemExit):
        main(["metric-train", "--list-recipes"])
    assert name in capsys.readouterr().out


# The official antico_runs.sh: epochs, milestones, factor and first epochs without the backbone.
ANTI_COLLAPSE = {
    "cub_anti_collapse": (100, (), None, 0),
    "cars196_anti_collapse": (300, (100,), 0.5, 0),
    "sop_anti_collapse": (400, (190, 250), 0.2, 1),
    "inshop_anti_collapse": (400, (190, 250), 0.2, 1),  # no script: those of SOP
}


@pytest.mark.parametrize("name", ANTI_COLLAPSE)
def test_published_recipes_have_the_published_values(name):
    """The scripts, and the defaults of their parameters.py."""
    config, (epochs, milestones, factor, warmup) = load_recipe(name, "metric-train"), ANTI_COLLAPSE[name]
    assert (config.epochs, config.milestones, config.warmup_epochs) == (epochs, milestones, warmup)
    assert factor in (None, config.decay_factor)
    assert (config.loss, config.classes_per_batch, config.samples_per_class) == ("proxy_anchor", 45, 2)
    assert (config.optimizer, config.learning_rate, config.weight_decay) == ("adam", 1e-5, 4e-4)
    assert config.proxy_learning_rate == pytest.approx(2000 * config.learning_rate)
    assert config.anti_collapse == AntiCollapseConfig("batch_proxy", "official", 1.0, 0.0035, 0.5, 1.0, 1.0)
    # The network is the checkpoint's, and so are mean and standard deviation.
    assert config.backbone == BackboneConfig(embedding=512, pooling="average_max")
    assert config.freeze_batch_norm
    assert (config.image_size, config.resize, config.resize_mode) == (224, 256, "crop")
    assert (config.mean, config.std) == (None, None)
    assert config.augmentation == AugmentationConfig(crop_scale=0.08, horizontal_flip=True)
    ks = (1, 10, 20, 30, 40) if name.startswith("inshop") else (1, 2, 4, 8)
    assert (config.measurement.ks, config.measurement.map_ks) == (ks, (1000,))


def test_the_recipes_are_these():
    assert recipe_names("metric-train") == sorted([*ANTI_COLLAPSE, "miniimagenet32_conv4", "omniglot28_conv4"])


def pictures_of(form, folder):
    """Six classes of three tiny pictures, as the archive of a public set holds them; returns its split."""
    rows = []
    for number in range(18):
        label, value = number // 3, number % 3
        place = {
            "cub": f"images/{label + 1:03}.Bird_{label}/{number}.jpg",
            "cars196": f"car_ims/{number:06}.jpg",
            "sop": f"chair_final/{label}_{value}.JPG",
            "inshop": f"img/MEN/id_{label}/{value}_front.jpg",
        }[form]
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40 + number, 36), 10.0 * (label + 1)).convert("RGB").save(folder / place)
        rows.append((place, label))
    if form == "cub":
        return "halves"
    if form == "cars196":
        kinds = [("relative_im_path", object), ("class", object)]
        annotations = np.array([(place, label + 1) for place, label in rows], dtype=kinds)
        names = np.array([f"Car {label}" for label in range(6)], dtype=object)
        savemat(folder / "cars_annos.mat", {"annotations": annotations, "class_names": names})
        return str(folder / "cars_annos.mat")
    if form == "sop":
        for name, part in (("train", rows[:9]), ("test", rows[9:])):
            lines = [f"{number} {label} 1 {place}" for number, (place, label) in enumerate(part)]
            text = "\n".join(["image_id class_id super_class_id path", *lines])
            (folder / f"Ebay_{name}.txt").write_text(text)
        return str(folder / "Ebay_train.txt")
    status = ["train"] * 9 + ["query", "gallery", "gallery"] * 3
    lines = [f"{place}   id_{label}   {use}" for (place, label), use in zip(rows, status, strict=True)]
    text = "\n".join(["18", "image_name item_id evaluation_status", *lines])
    (folder / "list_eval_partition.txt").write_text(text)
    return str(folder / "list_eval_partition.txt")


@pytest.mark.parametrize(
    ("form", "network"),
    [("cub", "resnet50"), ("cars196", "bn_inception"), ("sop", "bn_inception"), ("inshop", "resnet50")],
)
def test_a_published_recipe_from_the_pictures_to_the_measures(form, network, tmp_path, capsys):
    """On sets of the form of the public ones and networks with weights of ImageNet's form, all tiny."""
    split = pictures_of(form, tmp_path / "set")
    data, output, checkpoint = tmp_path / "set.npz", tmp_path / "out", tmp_path / "imagenet.pth"
    assert main(["data", "pack", "--source", str(tmp_path / "set"), "--split", split, "--size", "40",
                 "--output", str(data)]) == 0  # fmt: skip
    torch.save((torchvision(50) if network == "resnet50" else bn_inception()).state, checkpoint)
    tiny = ["--epochs", "2", "--milestones", "[1]", "--image-size", "32", "--resize", "40", "--classes-per-batch", "3",
            "--measurement.ks", "[1, 2, 4]", "--backbone.embedding", "16", "--threads", "1"]  # fmt: skip
    assert main(["metric-train", "--config", f"{form}_anti_collapse", "--checkpoint", str(checkpoint),
                 "--data", str(data), *tiny, "--output", str(output)]) == 0  # fmt: skip
    record = json.loads((output / "run.json").read_text())
    assert (record["data"]["base"]["classes"], record["data"]["novel"]["classes"]) == (3, 3)
    assert record["checkpoint"]["sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert record["network"]["backbone"]["name"] == network
    last = json.loads((output / "history.json").read_text())["rows"][-1]
    assert last["classes"] == "unseen" and 0 < last["map_at_1000"] < 1
    assert "recall_at_4" in last and "recall_at_8" not in last
    assert main(["retrieve", "--checkpoint", str(output / "last.ckpt"), "--data", str(data), "--map-ks", "1000",
                 "--ks", "1", "2", "4", "--neighbors", "4", "--output", str(tmp_path / "found")]) == 0  # fmt: skip
    found = json.loads((tmp_path / "found" / "retrieval.json").read_text())["measures"]
    names = ["recall_at_1", "map_at_1000", "coding_rate", *(["nmi", "f1"] if form in ("cub", "cars196") else [])]
    assert [found[name] for name in names] == pytest.approx([last[name] for name in names], rel=1e-5)
    assert ("nmi" in last) == (form in ("cub", "cars196"))
    assert found["queries"] == (3 if form == "inshop" else 9)
    assert capsys.readouterr().out.count("MAP@1000") == 2


COLLAPSE = ["--seeds", "0", "--epochs", "1", "--losses", "contrastive", "proxy_anchor"]
COLLAPSE += ["--proxy_pair_weights", "0.5", "--set"]
COLLAPSE += ["backbone.width=4", "backbone.pooled_blocks=2", "backbone.embedding=6", "classes_per_batch=3"]
COLLAPSE += ["samples_per_class=20"]


def test_collapse(tmp_path, capsys):
    arguments = ["analyze", "collapse", "--data", "digits", *COLLAPSE, "--output", str(tmp_path)]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "ProxyAnchor, Anti-Collapse batch_proxy 1" in printed.out
    assert "unseen classes" in printed.out
    content = json.loads((tmp_path / "collapse.json").read_text())
    assert content["training"]["backbone"]["width"] == 4
    assert {(row["loss"], row["variant"], row["weight"]) for row in content["rows"]} == {
        ("contrastive", "none", 0.0),
        ("contrastive", "pair", 0.1),
        ("proxy_anchor", "none", 0.0),
        ("proxy_anchor", "batch_proxy", 1.0),
        ("proxy_anchor", "pair", 0.5),
    }
    assert str(tmp_path) not in (tmp_path / "collapse.json").read_text()
    assert {f"collapse.{suffix}" for suffix in ("json", "csv", "png", "yaml")} <= {p.name for p in tmp_path.iterdir()}
    assert main(["analyze", "collapse", "--config", str(tmp_path / "collapse.yaml"), "--output", str(tmp_path)]) == 0
    assert "5 of 5 runs are there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--losses", "hinge"], "losses: expected one of"),
        (["--pair_weights", "0"], "pair_weights: expected a number above 0"),
        (["--proxy_variant", "none"], "proxy_variant: expected one of"),
        (["--jobs", "0"], "jobs: expected at least 1"),
        (["--recipe", "fast"], "there is no recipe 'fast'"),
        (["--set", "loss=triplet"], "there is no setting 'loss'"),
        (["--set", "classes_per_batch=9"], "classes_per_batch: expected at most 5"),
        (["--set", "backbone.pooled_blocks=4"], "at least 16 x 16, got 8 x 8"),
    ],
)
def test_a_sweep_that_cannot_be(arguments, message, tmp_path, capsys):
    # What comes last in COLLAPSE are values of --set.
    changes = arguments[1:] if arguments[0] == "--set" else arguments
    command = ["analyze", "collapse", "--data", "digits", "--output", str(tmp_path / "out"), *COLLAPSE, *changes]
    assert main(command) == 2
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1, printed.err
    assert message in printed.err
    assert not list(tmp_path.rglob("*.ckpt"))
