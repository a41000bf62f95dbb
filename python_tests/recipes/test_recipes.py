import re
from dataclasses import replace

import pytest
import yaml

from fewshot_ext.cli import main
from fewshot_ext.data import AugmentationConfig, ImageInput
from fewshot_ext.data.download import BY_HAND, REMOTE
from fewshot_ext.heads import HEAD_GROUPS, DeepEMDHead
from fewshot_ext.models import BackboneConfig, StructuredClassifierConfig, build_backbone
from fewshot_ext.recipes import (
    load_recipe,
    read_recipe,
    recipe_names,
    recipe_path,
    recipe_table,
)
from fewshot_ext.training import MetaTrainingConfig, PreTrainingConfig, ValidationConfig
from fewshot_ext.training.schedule import warmup_cosine

LOSSES = {"cosine": ("cosine", 30.0), "softmax": ("dot", 5.0)}
BASELINES = {"baseline": ("dot", 1.0), "baseline++": ("cosine", 2.0)}
# The official scripts: margin, weight decay, and DropBlock's rate and size, None for none.
PUBLISHED = {
    "miniimagenet_resnet12_neg_cosine_1shot": (-0.02, 1e-4, (0.1, 5)),
    "miniimagenet_resnet12_neg_cosine_5shot": (-0.01, 1e-4, (0.1, 5)),
    "miniimagenet_resnet12_neg_softmax_1shot": (-0.01, 3e-4, (0.1, 5)),
    "miniimagenet_resnet12_neg_softmax_5shot": (-0.1, 1e-5, (0.1, 5)),
    "miniimagenet_resnet18_neg_cosine_1shot": (-0.05, 5e-5, (0.2, 3)),
    "miniimagenet_resnet18_neg_cosine_5shot": (-0.02, 1e-4, (0.2, 3)),
    "miniimagenet_resnet18_neg_softmax_1shot": (-0.3, 1e-4, None),
    "miniimagenet_resnet18_neg_softmax_5shot": (-0.3, 5e-5, None),
    "cub_resnet18_neg_cosine_1shot": (-0.01, 5e-4, (0.1, 5)),
    "cub_resnet18_neg_cosine_5shot": (-0.01, 1e-3, (0.1, 5)),
    "cub_resnet18_neg_softmax_1shot": (-0.05, 5e-3, None),
    "cub_resnet18_neg_softmax_5shot": (-0.005, 3e-3, None),
    "mini2cub_resnet18_neg_cosine_5shot": (-0.05, 5e-5, None),
    "mini2cub_resnet18_neg_softmax_5shot": (-0.005, 1e-6, None),
}
# Networks of the paper's table 1 that no script is published for, and the side of their images.
OPEN = {f"miniimagenet_{name}_neg_{loss}": side for name, side in (("conv4", 84), ("wrn28_10", 80)) for loss in LOSSES}
CLOSER_LOOK = [f"{data}_resnet18_{row}" for data in ("cub", "mini2cub", "miniimagenet") for row in BASELINES]
SMALL = [
    "digits_conv4_cosine",
    "miniimagenet32_conv4_cosine",
    "miniimagenet32_conv4_deepemd",
    "miniimagenet32_conv4_neg_cosine",
    "omniglot28_conv4_cosine",
    "omniglot28_conv4_deepemd",
    "omniglot28_conv4_neg_cosine",
]


DEEPEMD = [f"{data}_resnet12_deepemd" for data in ("cifarfs", "cub", "fc100", "miniimagenet", "tieredimagenet")]


def test_the_recipes_are_these():
    assert recipe_names() == sorted([*PUBLISHED, *OPEN, *CLOSER_LOOK, *SMALL, *DEEPEMD])


@pytest.mark.parametrize("name", [*PUBLISHED, *OPEN, *CLOSER_LOOK, "miniimagenet_resnet12_deepemd"])
def test_pictures_packed_as_the_recipe_says_shrink_and_never_grow(name):
    config = load_recipe(name)
    packed = int(re.search(r"# Pack .*--size (\d+) --resize-mode stretch", recipe_path(name).read_text())[1])
    assert config.resize_mode == "stretch"
    assert packed >= ImageInput(config.mean, config.std, image_size=config.image_size, resize=config.resize).resize
    data = name.partition("_")[0]
    if data in ("cub", "miniimagenet"):
        sizes = re.findall(r"--size (\d+)", REMOTE["cub"].next_step if data == "cub" else BY_HAND[data])
        assert str(packed) in sizes


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_have_the_published_values(name):
    margin, weight_decay, drop_block = PUBLISHED[name]
    data, backbone, _, loss, _ = name.split("_")
    config = load_recipe(name)
    assert (config.margin, config.weight_decay) == (margin, weight_decay)
    assert config.loss == loss
    assert config.scale == (30.0 if loss == "cosine" else 10.0 if backbone == "resnet12" else 5.0)
    assert config.backbone.name == backbone
    if drop_block:
        assert (config.backbone.drop_rate, config.backbone.drop_block_size) == drop_block
        assert config.backbone.drop_ramp_steps == 40_000
    else:
        assert config.backbone.drop_rate == 0
    epochs = 200 if data == "cub" else 400
    assert (config.epochs, config.warmup * config.epochs) == (epochs, epochs / 4)
    assert config.warmup_multiplier == 16
    assert (config.batch_size, config.learning_rate, config.minimum_learning_rate) == (256, 3e-3, 1e-6)
    assert config.image_size == (84 if backbone == "resnet12" else 224)
    assert (config.mean, config.std) == ((0.507, 0.487, 0.441), (0.267, 0.257, 0.276))
    augmentation = config.augmentation
    assert (augmentation.crop_scale, augmentation.color_jitter, augmentation.horizontal_flip) == (0.08, 0.4, True)
    assert (augmentation.rotation, augmentation.translation, augmentation.zoom) == (0, 0, 0)
    assert config.label_smoothing == 0
    assert config.head_classes == (200 if data == "cub" else None)
    assert config.validation == ValidationConfig(head="finetune", epochs=20, episodes=100, way=5, shot=5, queries=16)
    assert ("The official code drops 7 to 25 % less" in recipe_path(name).read_text()) == (drop_block is not None)


@pytest.mark.parametrize("name", OPEN)
def test_recipes_without_a_published_margin_say_how_to_choose_it(name, capsys):
    config, text = load_recipe(name), recipe_path(name).read_text()
    similarity, scale = LOSSES[name.rpartition("_")[2]]
    assert (config.similarity, config.scale, config.image_size) == (similarity, scale, OPEN[name])
    assert config.backbone == BackboneConfig(name.removeprefix("miniimagenet_").partition("_neg")[0])
    assert "No margin or weight decay is published" in text
    command = re.search(r"#   fewshot-ext (analyze .*)\n# +(.*)", text)
    words = " ".join(command.groups()).split()
    assert words[words.index("--recipe") + 1] == name
    with pytest.raises(SystemExit):
        main([*words, "--print_config"])
    given = yaml.safe_load(capsys.readouterr().out)
    assert given["losses"] == [config.loss]
    assert {0, config.margin} < set(given[f"{config.loss}_margins"])
    # All else is what the scripts share.
    published = load_recipe(f"miniimagenet_resnet18_neg_{config.loss}_5shot")
    own = ("margin", "weight_decay", "image_size", "backbone")
    assert config == replace(published, **{field: getattr(config, field) for field in own})


@pytest.mark.parametrize("name", CLOSER_LOOK)
def test_the_baselines_are_trained_as_their_authors_do(name):
    config, (data, _, row) = load_recipe(name), name.split("_")
    assert (config.similarity, config.scale) == BASELINES[row]
    assert (config.margin, config.weight_decay, config.head_classes) == (0, 0, 200)
    assert (config.epochs, config.batch_size, config.image_size) == (200 if data == "cub" else 400, 16, 224)
    assert config.backbone == BackboneConfig("resnet18")
    assert config.augmentation == AugmentationConfig(crop_scale=0.08, color_jitter=0.4, horizontal_flip=True)
    assert (config.mean, config.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    settings = {"peak": config.learning_rate, "minimum": config.minimum_learning_rate, "warmup_multiplier": 16.0}
    rates = {warmup_cosine(step, total_steps=9, warmup_steps=config.warmup * 9, **settings) for step in range(10)}
    assert config.optimizer == "adam" and rates == {1e-3}


@pytest.mark.parametrize("name", DEEPEMD)
def test_the_first_stage_of_deepemd_has_the_published_values(name):
    """The defaults of the official train_pretrain.py, and the transforms of its data sets."""
    config = load_recipe(name)
    assert (config.similarity, config.margin, config.scale, config.label_smoothing) == ("dot", 0, 1, 0)
    assert (config.optimizer, config.learning_rate, config.momentum, config.nesterov) == ("sgd", 0.1, 0.9, True)
    assert (config.decay, config.decay_epochs, config.weight_decay) == (0.2, 30, 5e-4)
    assert (config.epochs, config.batch_size, config.image_size, config.resize) == (120, 128, 84, 92)
    assert config.backbone == BackboneConfig("resnet12")
    assert config.augmentation == AugmentationConfig(crop_scale=0.08, horizontal_flip=True)
    validation = config.validation
    assert (validation.head, validation.epochs, validation.episodes) == ("deepemd", 1, 100)
    assert (validation.way, validation.shot, validation.queries) == (5, 1, 15)
    if name.startswith("cifarfs"):
        assert (config.mean, config.std) == ((0.5071, 0.4866, 0.4409), (0.2009, 0.1984, 0.2023))
    else:
        levels = [125.3, 123.0, 113.9], [63.0, 62.1, 66.7]
        assert (config.mean, config.std) == tuple(tuple(round(level / 255, 4) for level in part) for part in levels)
    second = [other for other in recipe_names("meta-train") if other.startswith(f"{name}_")]
    assert len(second) == len(META_ROWS)


@pytest.mark.parametrize("name", SMALL)
def test_small_recipes_name_their_data_and_suit_it(name):
    config = load_recipe(name)
    data = name.partition("_")[0]
    assert read_recipe(name)["data"] == data
    assert (config.margin < 0) == ("neg" in name)
    assert config.augmentation.horizontal_flip == (data == "miniimagenet32")
    size = {"miniimagenet32": 32, "digits": 8}.get(data, 28)
    # DeepEMD's first stage keeps regions to match: 4 x 4 and 3 x 3 of them.
    sides = {32: 4, 28: 3} if name.endswith("deepemd") else {32: 2, 28: 1, 8: 1}
    assert build_backbone(config.backbone).feature_size(size, size) == 64 * sides[size] ** 2


@pytest.mark.parametrize("data", ["miniimagenet32", "omniglot28"])
def test_the_small_pairs_differ_in_the_margin_alone(data):
    negative, zero = (read_recipe(f"{data}_conv4_{loss}") for loss in ("neg_cosine", "cosine"))
    assert {key for key in negative | zero if negative.get(key) != zero.get(key)} == {"loss", "margin"}


@pytest.mark.parametrize("name", [*PUBLISHED, *OPEN, *CLOSER_LOOK, *SMALL, *DEEPEMD])
def test_the_command_line_reads_what_python_reads(name, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["pretrain", "--config", name, "--output", "out", "--print_config"])
    config = tmp_path / "config.yaml"
    config.write_text(capsys.readouterr().out)
    values = yaml.safe_load(config.read_text())
    for key in ("data", "output", "resume", "seed", "device", "devices", "num_nodes", "threads"):
        values.pop(key)
    assert PreTrainingConfig.for_loss(**values) == load_recipe(name)


def test_options_overrule_the_recipe(capsys):
    with pytest.raises(SystemExit):
        main(["pretrain", "--config", "cub_resnet18_neg_cosine_5shot", "--margin", "-0.5", "--print_config"])
    assert "margin: -0.5" in capsys.readouterr().out


def test_an_unknown_recipe_is_answered_with_the_known_ones(capsys):
    with pytest.raises(
        ValueError, match=r"there is no recipe 'resnet'; the recipes are cifarfs_resnet12_deepemd, cub_"
    ):
        recipe_path("resnet")
    assert main(["pretrain", "--config", "resnet"]) == 2
    assert "there is no recipe 'resnet'; the recipes are cifarfs_resnet12_deepemd, cub_" in capsys.readouterr().err


def test_the_table_has_a_line_a_recipe(capsys):
    lines = recipe_table().splitlines()
    assert [line.split()[0] for line in lines[1:]] == recipe_names()
    line = next(line for line in lines if line.startswith("miniimagenet_resnet18_neg_cosine_1shot"))
    assert line.split()[1:] == ["resnet18", "neg-cosine", "-0.05", "adam", "5e-05", "0.2,", "3", "400", "224"]
    with pytest.raises(SystemExit) as done:
        main(["pretrain", "--list-recipes"])
    assert done.value.code == 0
    assert capsys.readouterr().out.splitlines() == lines


META_DATA = ("cifarfs", "cub", "fc100", "miniimagenet", "tieredimagenet")
META_ROWS = ("fcn_1shot", "fcn_5shot", "fcn_10way_1shot", "grid_1shot", "sampling_1shot")
META_PUBLISHED = [f"{data}_resnet12_deepemd_{row}" for data in META_DATA for row in META_ROWS]
META_BASELINES = {
    "protonet": ("protonet@fcn", 1.0),
    "matchingnet": ("matchingnet@fcn", 1.0),
    "knn": ("knn", 1.0),
    "prediction_fusion": ("prediction_fusion", 10.0),
}
META_SMALL = ["miniimagenet32_conv4_deepemd_fcn_1shot", "omniglot28_conv4_deepemd_fcn_1shot"]


def test_the_recipes_of_meta_training_are_these():
    baselines = [f"{data}_resnet12_{head}_1shot" for data in META_DATA for head in META_BASELINES]
    assert recipe_names("meta-train") == sorted([*META_PUBLISHED, *baselines, *META_SMALL])


@pytest.mark.parametrize("name", META_PUBLISHED)
def test_published_recipes_of_meta_training_have_the_published_values(name):
    """The defaults of the official train_meta.py, and the transforms of its data sets."""
    config, (regions, *setting) = load_recipe(name, "meta-train"), name.partition("deepemd_")[2].split("_")
    assert config.local_features.name == regions
    assert (config.way, config.shot) == (10 if "10way" in setting else 5, int(setting[-1].removesuffix("shot")))
    assert (config.head, config.choice.head) == ("deepemd", DeepEMDHead(temperature=12.5))
    assert (config.queries, config.episodes_per_step) == (15, 1)
    assert (config.epochs, config.steps, config.decay, config.decay_epochs) == (100, 50, 0.5, 10)
    assert (config.learning_rate, config.momentum, config.nesterov, config.weight_decay) == (5e-4, 0.9, True, 5e-4)
    # Crops on grids and random crops are drawn from the whole image.
    crop, flip = (0.08, True) if regions == "fcn" else (0.0, False)
    assert config.augmentation == AugmentationConfig(crop_scale=crop, horizontal_flip=flip)
    assert config.local_features.horizontal_flip
    assert (config.local_features.grids, config.local_features.ratio, config.local_features.regions) == ((2, 3), 2.0, 9)
    assert config.classifier == StructuredClassifierConfig()
    validation = config.validation
    assert (validation.way, validation.shot, validation.queries) == (config.way, config.shot, 15)
    assert (validation.epochs, validation.episodes) == (1, 1000)
    # The pre-trained network is a checkpoint's.
    assert (config.backbone, config.image_size, config.mean, config.std) == (None,) * 4


@pytest.mark.parametrize("head", META_BASELINES)
def test_the_other_rows_of_the_comparison_differ_in_the_head_alone(head):
    name, temperature = META_BASELINES[head]
    config = load_recipe(f"cub_resnet12_{head}_1shot", "meta-train")
    assert config == replace(load_recipe("cub_resnet12_deepemd_fcn_1shot", "meta-train"), head=name)
    assert config.choice.head.logit_scale == temperature
    assert config.validation_head == (name, config.choice)
    assert name in HEAD_GROUPS["deepemd_table"]


@pytest.mark.parametrize("name", META_SMALL)
def test_small_recipes_of_meta_training_name_their_data_and_suit_it(name):
    data = name.partition("_")[0]
    assert read_recipe(name, "meta-train")["data"] == data
    config = load_recipe(name, "meta-train")
    assert config.augmentation.horizontal_flip == (data == "miniimagenet32")
    first_stage = f"{data}_conv4_deepemd"
    assert first_stage in recipe_names()
    assert f"Pre-train with {first_stage}." in recipe_path(name, "meta-train").read_text()


@pytest.mark.parametrize(
    "name", [*(f"cub_resnet12_deepemd_{row}" for row in META_ROWS), "cub_resnet12_protonet_1shot", *META_SMALL]
)
def test_the_command_line_reads_recipes_of_meta_training_as_python_does(name, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["meta-train", "--config", name, "--output", "out", "--print_config"])
    config = tmp_path / "config.yaml"
    config.write_text(capsys.readouterr().out)
    values = yaml.safe_load(config.read_text())
    for key in ("data", "output", "resume", "seed", "device", "devices", "num_nodes", "threads", "checkpoint"):
        values.pop(key, None)
    assert MetaTrainingConfig.from_dict(values) == load_recipe(name, "meta-train")


def test_each_command_has_recipes_of_its_own(capsys):
    assert main(["pretrain", "--config", META_PUBLISHED[0]]) == 2
    assert (
        f"there is no recipe '{META_PUBLISHED[0]}'; the recipes are cifarfs_resnet12_deepemd, cub_"
        in capsys.readouterr().err
    )
    lines = recipe_table("meta-train").splitlines()
    assert [line.split()[0] for line in lines[1:]] == recipe_names("meta-train")
    line = next(line for line in lines if line.startswith("cub_resnet12_deepemd_fcn_5shot"))
    assert line.split()[1:] == ["deepemd", "fcn", "5-way", "5-shot", "15", "0.0005", "100", "50"]
    with pytest.raises(SystemExit) as done:
        main(["meta-train", "--list-recipes"])
    assert done.value.code == 0
    assert capsys.readouterr().out.splitlines() == lines
