"""Resized parts of images against Pillow, on the processor's two ways and on a GPU."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fewshot_ext.data import resampling
from fewshot_ext.data.resampling import resized_parts

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def pillow(image, box, size, alone):
    picture = Image.fromarray(image.numpy(), mode="F")
    if alone:
        picture, box = picture.crop(box), None
    return torch.from_numpy(np.array(picture.resize(size[::-1], Image.Resampling.BILINEAR, box)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("small", [0, 10**6], ids=["one by one", "together"])
@pytest.mark.parametrize("alone", [True, False])
@settings(max_examples=15)
@given(data=st.data())
def test_parts_are_those_of_pillow(device, small, alone, data):
    """Of pictures of floats, which it does not round."""
    side = st.integers(1, 60)
    height, width, size = data.draw(side), data.draw(side), (data.draw(side), data.draw(side))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    images, corners = torch.rand(2, 3, height, width), torch.rand(2, 4, 2, 2, dtype=torch.float64)
    limit = torch.tensor([width, height])
    least = torch.minimum(torch.tensor(1.0), limit - corners.amax(2) * (limit - 1))  # at least a pixel
    first = corners.amin(2) * (limit - 1)
    boxes = torch.cat([first, torch.maximum(corners.amax(2) * limit, first + least)], -1)
    if alone:
        boxes = torch.cat([boxes[..., :2].floor(), boxes[..., 2:].ceil()], -1)
    mirrored = torch.rand(2, 4) < 0.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resampling, "_SMALL", small)
        found = resized_parts(images.to(device), boxes, size, mirrored, alone=alone).cpu()
    assert found.shape == (2, 4, 3, *size)
    for b, p, c in np.ndindex(2, 4, 3):
        expected = pillow(images[b, c], tuple(boxes[b, p].tolist()), size, alone)
        expected = expected.flip(-1) if mirrored[b, p] else expected
        torch.testing.assert_close(found[b, p, c], expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("small", [0, 10**6], ids=["one by one", "together"])
def test_dtypes_gradients_and_nothing_at_all(small, monkeypatch):
    monkeypatch.setattr(resampling, "_SMALL", small)
    box = torch.tensor([[[1, 2, 7, 9]]])
    images = torch.randint(256, (1, 3, 10, 9), dtype=torch.uint8)
    found = resized_parts(images, box, (4, 3))
    assert found.dtype == torch.float32 and found.is_contiguous()
    torch.testing.assert_close(resized_parts(images.double(), box, (4, 3)).float(), found)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(resized_parts(images, box, (4, 3)), found)
    pixels = torch.rand(1, 1, 10, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: resized_parts(x, box, (4, 3), alone=True), (pixels,))
    assert resized_parts(images[:0], box[:0], (4, 3)).shape == (0, 1, 3, 4, 3)
