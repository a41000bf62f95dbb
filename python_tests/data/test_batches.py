import pytest
import torch

from fewshot_ext.data import AugmentationConfig, ImageInput, ShuffledBatches, load_digits, training_batches


@pytest.mark.parametrize(("length", "batch_size", "sizes"), [(10, 4, [4, 4, 2]), (9, 4, [4, 4]), (3, 8, [3])])
def test_an_epoch_visits_every_image_once(length, batch_size, sizes):
    batches = ShuffledBatches(length, batch_size, seed=0)
    drawn = list(batches)
    assert [len(batch) for batch in drawn] == sizes
    assert len(batches) == len(sizes)
    assert len(set(torch.cat(drawn).tolist())) == sum(sizes)


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        batches = ShuffledBatches(50, 8, seed)
        batches.set_epoch(epoch)
        return torch.cat(list(batches)).tolist()

    assert order(0, 3) == order(0, 3)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_loader_hands_out_images_with_their_labels():
    digits = load_digits()
    images, labels = next(iter(training_batches(digits, 32, seed=0)))
    assert images.dtype == torch.uint8
    assert images.shape == (32, 1, 8, 8)
    assert all(
        bool((digits.images[digits.labels == label] == image).flatten(1).all(1).any())
        for image, label in zip(images, labels, strict=True)
    )


@pytest.mark.parametrize(("length", "batch_size"), [(1, 4), (10, 1)])
def test_too_little_for_batch_normalization(length, batch_size):
    with pytest.raises(ValueError, match="at least 2"):
        ShuffledBatches(length, batch_size, seed=0)


def test_evaluation_input_is_normalized_and_nothing_else():
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)
    augmentation = AugmentationConfig(crop_scale=0.2, rotation=10, color_jitter=0.4, horizontal_flip=True)
    out = ImageInput(mean, std, augmentation).eval()(images)
    expected = (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    "augmentation",
    [
        AugmentationConfig(crop_scale=0.3),
        AugmentationConfig(rotation=20, translation=0.2, zoom=0.2),
        AugmentationConfig(color_jitter=0.4),
        AugmentationConfig(horizontal_flip=True),
    ],
)
def test_training_input_is_augmented_image_by_image(augmentation):
    image = torch.randint(256, (1, 3, 12, 10), dtype=torch.uint8)
    module = ImageInput((0.0,) * 3, (1.0,) * 3, augmentation)
    torch.manual_seed(0)
    out = module(image.expand(16, -1, -1, -1))
    assert out.shape == (16, 3, 12, 10)
    assert out.dtype == torch.float32
    assert len({tuple(one.flatten().tolist()) for one in out}) > 1
    torch.manual_seed(0)
    torch.testing.assert_close(module(image.expand(16, -1, -1, -1)), out)


@pytest.mark.parametrize(
    ("field", "value"), [("rotation", -1), ("crop_scale", 1.5), ("zoom", 1.0), ("translation", float("nan"))]
)
def test_bad_augmentation_is_named(field, value):
    with pytest.raises(ValueError, match=field):
        AugmentationConfig(**{field: value})
