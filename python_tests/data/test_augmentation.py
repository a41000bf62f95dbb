import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional

from fewshot_ext import _extras
from fewshot_ext.data import AugmentationConfig, ImageInput

RGB = {"mean": (0.0,) * 3, "std": (1.0,) * 3}


def ramp(height=16, width=16, count=1):
    """RGB images whose red tells the column and whose green tells the row of a pixel; blue is 128."""
    rows = torch.linspace(0, 255, height).view(-1, 1).expand(height, width)
    columns = torch.linspace(0, 255, width).expand(height, width)
    return torch.stack([columns, rows, torch.full_like(rows, 128)]).byte().expand(count, -1, -1, -1)


def test_11_integer_means_and_deviations():
    images = torch.arange(48, dtype=torch.uint8).view(1, 3, 4, 4)
    torch.testing.assert_close(ImageInput((0, 0, 0), (1, 1, 1)).eval()(images), images / 255)
    for mean, std, message in (
        ((0, 0), (1,), "std: expected a number a channel as mean has, 2, got 1"),
        ((0,), (0,), "std: expected a number above 0, got 0"),
        ((math.nan,), (1,), "mean: expected a finite number, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            ImageInput(mean, std)
    with pytest.raises(TypeError, match="mean: expected a number, got str"):
        ImageInput(("0",), (1,))


def test_evaluation_stretches_to_115_percent_and_cuts_the_middle_out():
    images = torch.randint(256, (3, 3, 50, 40), dtype=torch.uint8)
    out = ImageInput(**RGB, image_size=84).eval()(images)
    stretched = functional.interpolate(images / 255, (96, 96), mode="bilinear", antialias=True)
    torch.testing.assert_close(out, stretched[..., 6:90, 6:90])


def test_evaluation_keeps_the_size_where_none_is_asked():
    images = torch.randint(256, (3, 3, 50, 40), dtype=torch.uint8)
    torch.testing.assert_close(ImageInput(**RGB).eval()(images), images / 255, rtol=0, atol=0)


def test_training_without_crops_is_evaluated_and_then_augmented():
    images = torch.randint(256, (64, 3, 20, 20), dtype=torch.uint8)
    module = ImageInput(**RGB, augmentation=AugmentationConfig(horizontal_flip=True), image_size=16)
    expected = module.eval()(images)
    flipped = (module.train()(images) == expected.flip(-1)).flatten(1).all(1)
    same = (module.train()(images) == expected).flatten(1).all(1)
    assert 10 < flipped.sum() < 54
    assert 10 < same.sum() < 54


def torchvision_boxes(count, smallest_scale):
    """Width and height of the boxes that torchvision's RandomResizedCrop draws in a square of side 1."""
    generator = random.Random(0)
    boxes = []
    for _ in range(count):
        for _ in range(10):
            area = generator.uniform(smallest_scale, 1)
            ratio = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
            width, height = math.sqrt(area * ratio), math.sqrt(area / ratio)
            if width <= 1 and height <= 1:
                break
        else:
            width = height = 1.0
        boxes.append((width, height))
    return torch.tensor(boxes).unbind(1)


@pytest.mark.parametrize("size", [None, 24])
def test_crops_lie_inside_and_are_distributed_as_torchvisions(size):
    module = ImageInput(**RGB, augmentation=AugmentationConfig(crop_scale=0.2), image_size=size)
    torch.manual_seed(0)
    out = module(ramp(64, 64, 5000))
    side = size or 64
    assert out.shape == (5000, 3, side, side)
    # The middle row and column of what comes out tell the box: color is a linear function of place.
    columns, rows = out[:, 0, side // 2], out[:, 1, :, side // 2]
    assert (columns.diff(dim=1) >= -1e-6).all()
    # From the second pixel to the last but one: those at the edge may reach over that of the image.
    width, height = ((part[:, -2] - part[:, 1]) * (63 / 64) * side / (side - 3) for part in (columns, rows))
    expected_width, expected_height = torchvision_boxes(5000, 0.2)
    quantiles = torch.linspace(0.05, 0.95, 10)
    for found, expected in (
        (width * height, expected_width * expected_height),
        (width / height, expected_width / expected_height),
    ):
        torch.testing.assert_close(found.quantile(quantiles), expected.quantile(quantiles), atol=0.025, rtol=0)
    # Where there is room, the box is anywhere in it.
    place = (columns.mean(1) - width / 2) / (1 - width)
    place = place[width < 0.8]
    torch.testing.assert_close(place.quantile(quantiles), quantiles, atol=0.05, rtol=0)


def test_a_crop_equals_the_same_box_resized():
    images = torch.randint(256, (8, 3, 40, 40), dtype=torch.uint8)
    module = ImageInput(**RGB, augmentation=AugmentationConfig(crop_scale=0.2), image_size=24)
    # A box whose edges are those of pixels, doubled.
    box = (torch.full((8, 1), 12 / 40), torch.full((8, 1), 12 / 40), torch.full((8, 1), -0.1), torch.full((8, 1), 0.1))
    module.crop._draw_boxes = lambda images, dtype: box
    left, top = 18 - 6, 22 - 6
    crop = images[..., top : top + 12, left : left + 12] / 255
    expected = functional.interpolate(crop, (24, 24), mode="bilinear", align_corners=False)
    # At the edge of a crop its neighbors in the image take part, as they do not after cutting.
    torch.testing.assert_close(module(images)[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], atol=1e-5, rtol=0)


def pillow(image, size, box=None):
    """A ``[C, H, W]`` uint8 image, or the box in it, resized by Pillow, as torchvision does on its pictures."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    return torch.from_numpy(np.array(picture.resize((size, size), Image.Resampling.BILINEAR, box))).permute(2, 0, 1)


@settings(max_examples=25)
@given(height=st.integers(12, 70), width=st.integers(12, 70), size=st.integers(8, 40), seed=st.integers(0, 99))
def test_crops_are_those_of_pillow_whether_they_shrink_or_grow(height, width, size, seed):
    torch.manual_seed(seed)
    images = torch.randint(256, (4, 3, height, width), dtype=torch.uint8)
    config = AugmentationConfig(crop_scale=0.08, horizontal_flip=True)
    module, drawn = ImageInput(**RGB, augmentation=config, image_size=size), []
    draw = module.crop._draw_boxes
    module.crop._draw_boxes = lambda *arguments: drawn.append(draw(*arguments)) or drawn[0]
    out = module(images)
    half_width, half_height, x, y = (part.squeeze(1).double() for part in drawn[0])
    edges = torch.stack([x - half_width, y - half_height, x + half_width, y + half_height], 1)
    boxes = ((edges + 1) / 2 * torch.tensor([width, height] * 2)).clamp_min(0)
    for found, image, box in zip(out * 255, images, boxes.tolist(), strict=True):
        box = (box[0], box[1], min(box[2], width), min(box[3], height))
        expected = pillow(image, size, box).float()
        # Pillow rounds to whole levels twice, once in each direction.
        assert min((found - expected).abs().max(), (found - expected.flip(-1)).abs().max()) < 1.01


@pytest.mark.parametrize(("height", "width"), [(10, 100), (100, 10)])
def test_crops_of_long_images(height, width):
    module = ImageInput(**RGB, augmentation=AugmentationConfig(crop_scale=0.9), image_size=8)
    out = module(ramp(height, width, 200))
    assert out.isfinite().all()
    # No try fits: the short side whole, and of the long one 4/3 of it.
    whole, part = (out[:, 1, :, 4], out[:, 0, 4]) if height < width else (out[:, 0, 4], out[:, 1, :, 4])
    assert (whole[:, -1] - whole[:, 0]).min() > 0.8
    assert (part[:, -1] - part[:, 0]).max() < 0.15
    torch.testing.assert_close(part[:, 3:5].mean(1), torch.full((200,), 0.5), atol=0.01, rtol=0)


def test_half_of_the_images_are_mirrored_with_and_without_crops():
    for config in (AugmentationConfig(horizontal_flip=True), AugmentationConfig(horizontal_flip=True, crop_scale=0.5)):
        torch.manual_seed(0)
        out = ImageInput(**RGB, augmentation=config)(ramp(count=1000))
        mirrored = out[:, 0, 8, 0] > out[:, 0, 8, -1]
        assert 420 < mirrored.sum() < 580
        assert (out[:, 1, 0, 8] < out[:, 1, -1, 8]).all()


def pillow_jitter(image, brightness, contrast, saturation):
    """Brightness, contrast and saturation as the closer-look code changes them, with Pillow."""
    from PIL import ImageEnhance

    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    picture = ImageEnhance.Brightness(picture).enhance(brightness)
    picture = ImageEnhance.Contrast(picture).enhance(contrast)
    picture = ImageEnhance.Color(picture).enhance(saturation)
    import numpy as np

    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


def test_color_jitter_is_that_of_pillow(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (6, 3, 9, 9), dtype=torch.uint8, generator=generator)
    draws = torch.rand(3, 6, 1, 1, 1, generator=generator)
    draws[:, 0] = 0.0
    draws[:, 1] = 0.999
    module = ImageInput(**RGB, augmentation=AugmentationConfig(color_jitter=0.4))
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: draws)
    out = module(images)
    for index, image in enumerate(images):
        factors = (1 + 0.4 * (2 * draws[:, index].flatten() - 1)).tolist()
        # Pillow rounds after each of its three steps, and the mean to a whole gray level.
        torch.testing.assert_close(out[index], pillow_jitter(image, *factors), atol=5 / 255, rtol=0)


def test_color_jitter_leaves_gray_gray():
    gray = torch.randint(256, (32, 1, 8, 8), dtype=torch.uint8)
    config = AugmentationConfig(color_jitter=0.4)
    torch.manual_seed(0)
    one = ImageInput((0.0,), (1.0,), config)(gray)
    torch.manual_seed(0)
    three = ImageInput(**RGB, augmentation=config)(gray.expand(-1, 3, -1, -1))
    torch.testing.assert_close(three, one.expand(-1, 3, -1, -1))
    assert (one - gray / 255).abs().max() > 0.1


EVERYTHING = AugmentationConfig(
    crop_scale=0.08, rotation=10, translation=0.1, zoom=0.1, color_jitter=0.4, horizontal_flip=True
)


@pytest.mark.parametrize("config", [AugmentationConfig(), EVERYTHING])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [None, 12])
def test_the_input_is_left_alone_and_its_memory_format_kept(config, training, size):
    images = torch.randint(256, (4, 3, 10, 10), dtype=torch.uint8)
    before = images.clone()
    module = ImageInput(**RGB, augmentation=config, image_size=size).train(training)
    torch.manual_seed(0)
    out = module(images)
    assert torch.equal(images, before)
    assert out.is_contiguous()
    torch.manual_seed(0)
    last = module(images.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, out, atol=1e-6, rtol=1e-5)


def test_the_same_seed_gives_the_same_images_and_another_seed_others():
    images = torch.randint(256, (4, 3, 10, 10), dtype=torch.uint8)
    module = ImageInput(**RGB, augmentation=EVERYTHING)
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(module(images))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_pixels_stay_in_range():
    module = ImageInput(**RGB, augmentation=AugmentationConfig(crop_scale=0.05, color_jitter=0.9, horizontal_flip=True))
    out = module(torch.randint(256, (256, 3, 10, 10), dtype=torch.uint8))
    assert out.min() >= 0
    assert out.max() <= 1 + 1e-6


def test_mean_and_deviation_are_taken_off_last():
    images = torch.full((2, 3, 4, 4), 255, dtype=torch.uint8)
    out = ImageInput((0.5, 0.25, 0.0), (0.5, 0.25, 2.0), AugmentationConfig(horizontal_flip=True))(images)
    assert out[:, :, 0, 0].tolist() == [[1.0, 3.0, 0.5]] * 2


def test_a_checkpoint_carries_mean_and_deviation_and_nothing_else():
    assert set(ImageInput(**RGB, augmentation=EVERYTHING, image_size=84).state_dict()) == {"mean", "std"}


def test_what_is_not_uint8_is_refused():
    with pytest.raises(TypeError, match=r"images: expected a torch\.uint8 tensor, got torch\.float32"):
        ImageInput(**RGB)(torch.rand(2, 3, 4, 4))
    with pytest.raises(ValueError, match="image_size: expected at least 1, got 0"):
        ImageInput(**RGB, image_size=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resize": 92}, "resize: expected null without an image_size, got 92"),
        ({"image_size": 84, "resize": 83}, "resize: expected at least image_size, 84, got 83"),
        ({"image_size": 84, "resize_mode": "fold"}, "resize_mode: expected one of crop, stretch, got 'fold'"),
    ],
)
def test_what_cannot_be_resized_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ImageInput(**RGB, **settings)


def test_kornia_is_needed_for_rotations_alone(monkeypatch):
    monkeypatch.setattr(_extras, "is_installed", lambda name: name != "kornia")
    ImageInput(**RGB, augmentation=AugmentationConfig(crop_scale=0.08, color_jitter=0.4, horizontal_flip=True))
    with pytest.raises(ImportError, match=r"'kornia' is missing; pip install 'fewshot_ext\[train\]'"):
        ImageInput(**RGB, augmentation=AugmentationConfig(rotation=math.pi))
