import pytest

from fewshot_ext.cli import main
from fewshot_ext.models import build_backbone
from fewshot_ext.recipes import load_recipe, read_recipe, recipe_names, recipe_path, recipe_table
from fewshot_ext.training import PreTrainingConfig

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
SMALL = [
    "miniimagenet32_conv4_cosine",
    "miniimagenet32_conv4_neg_cosine",
    "omniglot28_conv4_cosine",
    "omniglot28_conv4_neg_cosine",
]


def test_the_recipes_are_these():
    assert recipe_names() == sorted([*PUBLISHED, *SMALL])


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_have_the_published_values(name):
    margin, weight_decay, drop_block = PUBLISHED[name]
    data, backbone, _, loss, shot = name.split("_")
    config = load_recipe(name)
    assert (config.margin, config.weight_decay) == (margin, weight_decay)
    assert config.similarity == loss
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
    assert config.validation.shot == int(shot.removesuffix("shot"))


@pytest.mark.parametrize("name", SMALL)
def test_small_recipes_name_their_data_and_suit_it(name):
    config = load_recipe(name)
    data = name.partition("_")[0]
    assert read_recipe(name)["data"] == data
    assert (config.margin < 0) == ("neg" in name)
    assert config.augmentation.horizontal_flip == (data == "miniimagenet32")
    size = 32 if data == "miniimagenet32" else 28
    assert build_backbone(config.backbone).feature_size(size, size) == {32: 256, 28: 64}[size]


@pytest.mark.parametrize("data", ["miniimagenet32", "omniglot28"])
def test_the_small_pairs_differ_in_the_margin_alone(data):
    negative, zero = (read_recipe(f"{data}_conv4_{loss}") for loss in ("neg_cosine", "cosine"))
    assert {key for key in negative | zero if negative.get(key) != zero.get(key)} == {"loss", "margin"}


@pytest.mark.parametrize("name", [*PUBLISHED, *SMALL])
def test_the_command_line_reads_what_python_reads(name, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["pretrain", "--config", name, "--output", "out", "--print_config"])
    config = tmp_path / "config.yaml"
    config.write_text(capsys.readouterr().out)
    import yaml

    values = yaml.safe_load(config.read_text())
    for key in ("data", "output", "resume", "seed", "device", "devices", "num_nodes", "threads"):
        values.pop(key)
    assert PreTrainingConfig.for_loss(**values) == load_recipe(name)


def test_options_overrule_the_recipe(capsys):
    with pytest.raises(SystemExit):
        main(["pretrain", "--config", "cub_resnet18_neg_cosine_5shot", "--margin", "-0.5", "--print_config"])
    assert "margin: -0.5" in capsys.readouterr().out


def test_an_unknown_recipe_is_answered_with_the_known_ones(capsys):
    with pytest.raises(ValueError, match=r"there is no recipe 'resnet'; the recipes are cub_resnet18_neg_cosine_1shot"):
        recipe_path("resnet")
    assert main(["pretrain", "--config", "resnet"]) == 2
    assert "there is no recipe 'resnet'; the recipes are cub_" in capsys.readouterr().err


def test_the_table_has_a_line_a_recipe(capsys):
    lines = recipe_table().splitlines()
    assert [line.split()[0] for line in lines[1:]] == recipe_names()
    line = next(line for line in lines if line.startswith("miniimagenet_resnet18_neg_cosine_1shot"))
    assert line.split()[1:] == ["resnet18", "neg-cosine", "-0.05", "5e-05", "0.2,", "3", "400", "224"]
    with pytest.raises(SystemExit) as done:
        main(["pretrain", "--list-recipes"])
    assert done.value.code == 0
    assert capsys.readouterr().out.splitlines() == lines
