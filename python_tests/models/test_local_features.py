"""The three ways to local features, against slow transcriptions on single images."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from fewshot_ext.data import ImageInput
from fewshot_ext.models import FCN, Grid, Sampling, conv4
from fewshot_ext.models.local_features import random_boxes

pytestmark = pytest.mark.usefixtures("one_thread")


class Pixels(nn.Module):
    """A backbone whose feature map is the image: what reaches it can be seen."""

    def feature_map(self, images):
        return images


class Kept(Pixels):
    """Keeps what reached it."""

    def feature_map(self, images):
        self.images = images
        return images


@pytest.fixture
def images():
    return torch.rand(3, 2, 24, 30, generator=torch.Generator().manual_seed(0))


def test_fcn_lists_the_positions_row_by_row(images):
    features = FCN(Pixels())(images)
    assert features.shape == (3, 24 * 30, 2)
    assert torch.equal(features[1, 2 * 30 + 7], images[1, :, 2, 7])


def test_regions_are_what_the_features_are_made_of(images):
    """Of pixels: the mean over a region is the feature, whatever its kind."""
    for module in (FCN(Pixels(), pyramid=(2, 3, 5)), Grid(Pixels(), (3,)), FCN(Pixels())):
        features, regions = module.eval()(images), module.boxes(images)
        assert regions.shape == (*features.shape[:2], 4)
        for place in (0, 3, features.shape[1] - 1):
            left, top, right, bottom = regions[1, place].round().long().tolist()
            if isinstance(module, Grid):
                crop = F.interpolate(images[1:2, :, top:bottom, left:right], (24, 30), mode="bilinear")
            else:
                crop = images[1:2, :, top:bottom, left:right]
            torch.testing.assert_close(features[1, place], crop.mean((0, 2, 3)))


def test_regions_of_random_crops_are_those_of_the_features(images):
    module = Sampling(Pixels(), regions=4).eval()
    assert torch.equal(module.boxes(images), module.draw(images, 24, 30)[0].double())
    assert torch.equal(module.boxes(images)[2:], module.boxes(images[2:]))


def test_regions_are_those_behind_the_preprocessing():
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    module = FCN(conv4(pooled_blocks=2).eval(), preprocessing=ImageInput((0.5,) * 3, (0.5,) * 3, image_size=64))
    assert module.boxes(images)[1, -1].tolist() == [60.0, 60.0, 64.0, 64.0]


def test_a_side_above_that_of_the_map_is_refused(images):
    with pytest.raises(ValueError, match="sides of at most 24, for the feature map is 24 x 30, got 25"):
        FCN(Pixels(), pyramid=(2, 25))(images)


def test_fcn_pyramid_comes_first(images):
    features = FCN(Pixels(), pyramid=(2, 3))(images)
    assert features.shape == (3, 4 + 9 + 24 * 30, 2)
    torch.testing.assert_close(features[2, 1], images[2, :, :12, 15:].mean((1, 2)))
    torch.testing.assert_close(features[2, 4 + 5], images[2, :, 8:16, 20:].mean((1, 2)))
    assert torch.equal(features[:, 13:], FCN(Pixels())(images))


def official_cells(size, ratio, side):
    """The locations of the official implementation."""
    raw, enlarged = int(size / side), int(size / side * ratio)
    center, cells = raw // 2, []
    for _ in range(side):
        cells.append((max(0, center - enlarged // 2), min(size, center + enlarged // 2)))
        center += raw
    return cells


def official_grid(height, width, ratio=2):
    return [
        [left, top, right, bottom]
        for side in (2, 3)
        for top, bottom in official_cells(height, ratio, side)
        for left, right in official_cells(width, ratio, side)
    ]


@pytest.mark.parametrize(("height", "width"), [(84, 84), (32, 32), (25, 31), (6, 6)])
@pytest.mark.parametrize("ratio", [1.0, 1.7, 2.0, 3.0])
def test_grid_boxes_are_the_official_ones(height, width, ratio):
    boxes, mirrored = Grid(Pixels(), ratio=ratio).eval().draw(torch.zeros(2, 3, height, width), height, width)
    expected = official_grid(height, width, ratio)
    assert boxes.tolist() == [expected, expected]
    assert not mirrored.any()
    assert (boxes[..., 2:] > boxes[..., :2]).all()


def test_grid_ratio_is_drawn_for_every_image_and_grid_in_training():
    grid = Grid(Pixels()).train()
    torch.manual_seed(0)
    boxes, mirrored = grid.draw(torch.zeros(500, 3, 84, 84), 84, 84)
    middle = boxes[:, 4 + 4, 2] - boxes[:, 4 + 4, 0]  # of the 3 x 3 grid, which no edge cuts
    assert middle.min() == 28 and 80 <= middle.max() <= 84 and len(middle.unique()) > 20
    assert 0.45 < mirrored.float().mean() < 0.55
    # One ratio for the whole grid: cells of a row are as wide wherever no edge cuts them.
    assert torch.equal(boxes[:, 4 + 1, 2] - boxes[:, 4 + 1, 0], middle)
    torch.manual_seed(0)
    again, _ = grid.draw(torch.zeros(500, 3, 84, 84), 84, 84)
    assert torch.equal(again, boxes)
    assert not Grid(Pixels(), horizontal_flip=False).train().draw(torch.zeros(9, 3, 84, 84), 84, 84)[1].any()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("height", "width"), [(67, 103), (31, 25), (84, 84)])
@pytest.mark.parametrize("kind", [Grid, Sampling])
def test_regions_are_cut_from_the_stored_picture_as_the_official_code_cuts_them(kind, height, width, training):
    """Of the whole picture, which nothing has resized: crop, then resize, both of Pillow."""
    images = torch.randint(256, (3, 3, height, width), dtype=torch.uint8)
    backbone = Kept().train(training)
    own = ImageInput((0.5,) * 3, (0.25,) * 3, image_size=40, resize=44).train(training)
    module, drawn = kind(backbone, preprocessing=own), []
    draw = module.draw
    module.draw = lambda *arguments: drawn.append(draw(*arguments)) or drawn[0]
    module(images)
    boxes, mirrored = drawn[0]
    if kind is Grid and not training:
        assert boxes[0].tolist() == official_grid(height, width)
    seen = (backbone.images * 0.25 + 0.5).mul(255).unflatten(0, boxes.shape[:2])
    for b, image in enumerate(images):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        for p, box in enumerate(boxes[b].tolist()):
            region = picture.crop(box).resize((40, 40), Image.Resampling.BILINEAR)
            expected = torch.from_numpy(np.array(region)).permute(2, 0, 1)
            expected = expected.flip(-1) if mirrored[b, p] else expected
            # Pillow rounds to whole levels twice, once in each direction.
            assert (seen[b, p] - expected).abs().max() < 1.01


def test_the_view_is_what_the_boxes_are_of():
    images = torch.randint(256, (2, 3, 50, 60), dtype=torch.uint8)
    own = ImageInput((0.0,) * 3, (1.0,) * 3, image_size=40)
    for module in (Grid(Pixels(), preprocessing=own), Sampling(Pixels(), preprocessing=own)):
        torch.testing.assert_close(module.eval().view(images), images / 255)
        boxes = module.boxes(images)
        assert boxes[..., 2].max() > 44 and boxes[..., 3].max() > 44
    fcn = FCN(Pixels(), preprocessing=own).eval()
    assert torch.equal(fcn.view(images), own(images))


def test_grid_features_are_means_over_the_crops(images):
    features = Grid(Pixels()).eval()(images)
    boxes, _ = Grid(Pixels()).eval().draw(images, 24, 30)
    left, top, right, bottom = boxes[1, 6].tolist()
    part = F.interpolate(images[1:2, :, top:bottom, left:right], size=(24, 30), mode="bilinear")
    assert features.shape == (3, 13, 2)
    torch.testing.assert_close(features[1, 6], part.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)


def random_resized_crop(uniform, height, width):
    """The loop of torchvision, fed with given numbers."""
    place, draws = uniform[:2], uniform[2:]
    for attempt in range(10):
        area = height * width * (0.08 + 0.92 * draws[2 * attempt])
        low, high = math.log(3 / 4), math.log(4 / 3)
        aspect = math.exp(low + (high - low) * draws[2 * attempt + 1])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        left, top = (width - w) // 2, (height - h) // 2
        return [left, top, left + w, top + h]
    left, top = int(place[0] * (width - w + 1)), int(place[1] * (height - h + 1))
    return [left, top, left + w, top + h]


@pytest.mark.parametrize(("height", "width"), [(100, 100), (32, 47), (10, 100), (100, 10), (1, 1)])
def test_random_boxes_are_those_of_random_resized_crop(height, width):
    uniform = torch.rand(300, 22, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = [random_resized_crop(row, height, width) for row in uniform.tolist()]
    assert random_boxes(uniform, height, width).tolist() == expected


def test_boxes_that_never_fit_are_the_largest_legal_ones():
    assert random_boxes(torch.full((22,), 0.999), 10, 100).tolist() == [43, 0, 56, 10]
    assert random_boxes(torch.full((22,), 0.999), 100, 10).tolist() == [0, 43, 10, 56]


def test_sampling_is_decided_by_seed_and_pixels(images):
    sampling = Sampling(Pixels(), seed=3).eval()
    features = sampling(images)
    assert features.shape == (3, 9, 2)
    assert torch.equal(sampling(images.flip(0)).flip(0), features)
    assert torch.equal(sampling(images[1:2]), features[1:2])
    assert not torch.equal(Sampling(Pixels(), seed=4).eval()(images), features)
    assert sampling.draw(images, 24, 30)[0].unique(dim=0).shape[0] == 3


def test_sampling_crops_come_from_the_images_before_the_preprocessing(images):
    """Rounding in the preprocessing differs between devices; pixels do not."""
    stored = (images * 255).byte()
    plain = Sampling(Pixels(), preprocessing=ImageInput((0.0, 0.0), (1.0, 1.0))).eval()
    scaled = Sampling(Pixels(), preprocessing=ImageInput((0.0, 0.0), (0.5, 0.5))).eval()
    torch.testing.assert_close(scaled(stored), 2 * plain(stored))


def test_sampling_in_training_follows_the_global_generator(images):
    sampling = Sampling(Pixels()).train()
    first, second = sampling.draw(images, 24, 30), sampling.draw(images, 24, 30)
    assert not torch.equal(first[0], second[0])
    torch.manual_seed(5)
    first = sampling(images)
    torch.manual_seed(5)
    assert torch.equal(sampling(images), first)


def test_sampling_flips_half_of_the_crops_unless_told_not_to():
    images = torch.rand(50, 1, 8, 8)
    share = Sampling(Pixels()).eval().draw(images, 8, 8)[1].double().mean()
    assert abs(share - 0.5) < 4 * math.sqrt(0.25 / 450)
    assert not Sampling(Pixels(), horizontal_flip=False).eval().draw(images, 8, 8)[1].any()


@pytest.mark.parametrize("kind", [FCN, Grid, Sampling])
def test_gradients_reach_the_backbone(kind):
    backbone = conv4(1, width=4, pooled_blocks=2)
    kind(backbone)(torch.rand(4, 1, 16, 16)).sum().backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


@pytest.mark.parametrize("kind", [FCN, Grid, Sampling])
@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_that_of_the_backbone(kind, training):
    features = kind(conv4(1).train(training))
    assert features.training is training and features.backbone.training is training
    assert not features.eval().backbone.training


@pytest.mark.parametrize("kind", [FCN, Grid, Sampling])
def test_no_images(kind):
    assert kind(Pixels()).eval()(torch.zeros(0, 2, 24, 30)).shape[::2] == (0, 2)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: FCN(nn.Flatten()), TypeError, "backbone: expected a method feature_map, Flatten has none"),
        (lambda: FCN(Pixels(), pyramid=(2, 0)), ValueError, "pyramid: expected at least 1, got 0"),
        (lambda: FCN(Pixels(), pyramid=2), TypeError, "pyramid: expected a sequence of integers, got int"),
        (lambda: FCN(Pixels(), pyramid=(2.5,)), TypeError, "pyramid: expected an integer, got float"),
        (lambda: Sampling(Pixels(), regions=2.5), TypeError, "regions: expected an integer, got float"),
        (lambda: Grid(Pixels(), grids=()), ValueError, "grids: expected at least one side"),
        (lambda: Grid(Pixels(), grids=(0,)), ValueError, "grids: expected at least 1, got 0"),
        (lambda: Grid(Pixels(), ratio=0.5), ValueError, "ratio: expected at least 1, got 0.5"),
        (lambda: Grid(Pixels())(torch.rand(1, 1, 5, 9)), ValueError, "images: expected at least 6 x 6 pixels .* 5 x 9"),
        (lambda: Grid(Pixels())(torch.zeros(1, 1, 8, 8).byte()), TypeError, "images: expected floating-point .*uint8"),
        (
            lambda: Sampling(Pixels())(torch.zeros(1, 8, 8)),
            TypeError,
            r"images: expected .* got torch.float32 \[1, 8, 8\]",
        ),
        (lambda: Sampling(Pixels(), regions=0), ValueError, "regions: expected at least 1, got 0"),
        (lambda: Sampling(Pixels(), seed=-1), ValueError, "seed: expected at least 0, got -1"),
    ],
)
def test_bad_input_is_named(build, error, message):
    with pytest.raises(error, match=message):
        build()
