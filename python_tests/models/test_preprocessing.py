"""What networks of other code see of a picture, against a transcription with Pillow of what that code does to it."""

import resource

import numpy as np
import pytest
import torch
from checkpoint_cases import libfewshot, meta_baseline, negative_margin, resnet12, torchvision
from PIL import Image
from sklearn.datasets import load_sample_images

from fewshot_ext.data import AugmentationConfig, ImageInput
from fewshot_ext.data.pictures import decode
from fewshot_ext.evaluation.images import read_for
from fewshot_ext.models import CheckpointSettings, load_network

pytestmark = pytest.mark.usefixtures("one_thread")


def official(picture, resize, size):
    """torchvision's Resize and CenterCrop: ``resize`` is one number, for the short side, or a pair."""
    width, height = picture.size
    if isinstance(resize, int):
        short = min(width, height)
        resize = [int(resize * side / short) for side in (height, width)]
    resized = picture.resize((resize[1], resize[0]), Image.Resampling.BILINEAR)
    top, left = (round((side - size) / 2) for side in resize)
    return levels(resized.crop((left, top, left + size, top + size)))


def levels(picture):
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()


def seen(network, images):
    part = network.preprocessing
    return (part(images) * part.std + part.mean) * 255


ORIGINS = {
    "negative margin": (lambda: negative_margin("resnet12")[1], [96, 96], 84),
    "negative margin, WRN": (lambda: negative_margin("wrn28_10")[1], [92, 92], 80),
    "DeepEMD": (lambda: {"params": resnet12("").state}, [92, 92], 84),
    "torchvision": (lambda: torchvision(18).state, 256, 224),
    "LibFewShot": (lambda: libfewshot("resnet12", "").state, [96, 96], 84),
    "few-shot-meta-baseline, ImageNet": (lambda: meta_baseline("resnet18")[1], 256, 224),
}


@pytest.mark.parametrize("origin", ORIGINS)
def test_pictures_reach_a_network_as_its_own_code_brings_them(origin, tmp_path):
    content, resize, size = ORIGINS[origin]
    torch.save(content(), tmp_path / "file.pth")
    network, draw = load_network(tmp_path / "file.pth"), np.random.default_rng(0)
    for height, width in ((301, 403), (403, 290), (61, 47), (96, 96)):
        picture = Image.fromarray(draw.integers(256, size=(height, width, 3), dtype=np.uint8))
        picture.save(tmp_path / "a.png")
        expected = official(picture, resize, size)
        # Pillow rounds to whole levels twice, once in each direction.
        assert (seen(network, levels(picture).byte()[None]) - expected).abs().max() < 1.01
        read = read_for(tmp_path / "a.png", network.image_size, network.channels, network.resize_mode)
        torch.testing.assert_close(seen(network, read[None])[0], expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["resnet12", "resnet12-wide"])
def test_few_shot_meta_baseline_resizes_mini_imagenet_and_cuts_nothing(name, tmp_path):
    torch.save(meta_baseline(name)[1], tmp_path / "file.pth")
    images = torch.randint(256, (1, 3, 84, 84), dtype=torch.uint8)
    expected = official(Image.fromarray(images[0].permute(1, 2, 0).numpy()), 80, 80)
    assert (seen(load_network(tmp_path / "file.pth"), images) - expected).abs().max() < 1.01


def test_another_margin_can_be_given(tmp_path):
    torch.save(torchvision(50).state, tmp_path / "file.pth")
    network = load_network(tmp_path / "file.pth", CheckpointSettings(resize=232))
    picture = Image.fromarray(np.random.default_rng(0).integers(256, size=(300, 400, 3), dtype=np.uint8))
    assert (seen(network, levels(picture).byte()[None]) - official(picture, 232, 224)).abs().max() < 1.01


@pytest.mark.parametrize("height", [427, 211])
@pytest.mark.parametrize(("resize", "size", "side"), [(96, 84, 256), (92, 84, 256), (257, 224, 384)])
def test_a_stretched_pack_keeps_what_evaluation_and_training_see(height, resize, size, side, tmp_path):
    """As the hints for the published recipes pack: photographs of any shape, stretched to a square."""
    for number, photograph in enumerate(load_sample_images().images):
        picture = Image.fromarray(photograph).resize((640, height))
        picture.save(tmp_path / f"{number}.png")
        stored = torch.from_numpy(decode(tmp_path / f"{number}.png", size=side, resize="stretch"))[None]
        module = ImageInput((0.0,) * 3, (1.0,) * 3, AugmentationConfig(crop_scale=0.08), size, resize)
        assert correlation(module.eval()(stored), official(picture, [resize] * 2, size)) > 0.999
        box = torch.tensor([0.1, 0.2, 0.8, 0.9])  # left, top, right, bottom as shares
        half, center = box[2:] - box[:2], box[2:] + box[:2] - 1
        module.crop._draw_boxes = lambda *_, half=half, center=center: [x.view(1, 1) for x in (*half, *center)]
        edges = tuple((box * torch.tensor([640, height] * 2)).tolist())
        crop = levels(picture.resize((size, size), Image.Resampling.BILINEAR, edges))
        assert correlation(module.train()(stored), crop) > 0.999


def test_long_pictures_take_little_memory(tmp_path):
    """Resized as a whole, the second would have 256 x 2,560,000 pixels."""
    for width, height in ((900, 100), (20_000, 2), (3, 30_000)):
        pixels = np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "long.png")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = decode(tmp_path / "long.png", size=256, resize="crop", filter="bilinear")
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024
        if width == 900:
            whole = Image.fromarray(pixels).resize((2304, 256), Image.Resampling.BILINEAR)
            expected = np.asarray(whole.crop((1024, 0, 1280, 256)), dtype=int)
            assert np.abs(np.moveaxis(found, 0, -1).astype(int) - expected).max() <= 1


def correlation(found, expected):
    return torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1]
