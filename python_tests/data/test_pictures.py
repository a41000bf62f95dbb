import os
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont, features

from fewshot_ext import _extras
from fewshot_ext.data import contact_sheet, fonts, pictures, read_image


def quadrants(height=8, width=8):
    """An RGB picture whose corners are red, green, blue and white, clockwise from the upper left."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = (255, 0, 0)
    pixels[: height // 2, width // 2 :] = (0, 255, 0)
    pixels[height // 2 :, width // 2 :] = (0, 0, 255)
    pixels[height // 2 :, : width // 2] = (255, 255, 255)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".gif", ".tif", ".ppm", ".jpg", ".webp"])
def test_formats(tmp_path, suffix):
    quadrants(32, 48).save(tmp_path / f"a{suffix}", **({"lossless": True} if suffix == ".webp" else {}))
    image = read_image(tmp_path / f"a{suffix}")
    assert image.shape == (3, 32, 48)
    assert image.dtype == torch.uint8
    expected = torch.from_numpy(np.array(quadrants(32, 48))).permute(2, 0, 1)
    corners = image[:, 2::28, 2::44].int() - expected[:, 2::28, 2::44].int()
    assert corners.abs().max() <= 12


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    quadrants(8, 12).save(tmp_path / "a.png", exif=exif)
    image = read_image(tmp_path / "a.png")
    # Six says that the camera was turned: the left edge of the file is the upper edge of the picture.
    assert image.shape == (3, 12, 8)
    assert image[:, 0, 0].tolist() == [255, 255, 255]
    assert image[:, 0, -1].tolist() == [255, 0, 0]
    assert pictures.picture_size(tmp_path / "a.png") == (12, 8, "RGB")


@pytest.mark.parametrize(
    ("picture", "gray", "color"),
    [
        (Image.new("L", (4, 4), 100), 100, (100, 100, 100)),
        (Image.new("1", (4, 4), 1), 255, (255, 255, 255)),
        (Image.fromarray(np.full((4, 4), 0x6400, np.uint16)), 100, (100, 100, 100)),
        (Image.new("RGBA", (4, 4), (255, 0, 0, 0)), 255, (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (255, 0, 0, 255)), 76, (255, 0, 0)),
        (Image.new("LA", (4, 4), (0, 0)), 255, (255, 255, 255)),
        (Image.new("RGB", (4, 4), (255, 0, 0)).quantize(4), 76, (255, 0, 0)),
    ],
)
def test_modes(tmp_path, picture, gray, color):
    picture.save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", mode="L")[:, 0, 0].tolist() == [gray]
    assert read_image(tmp_path / "a.png")[:, 0, 0].tolist() == list(color)


def test_resizing(tmp_path):
    quadrants(20, 60).save(tmp_path / "a.png")
    # The middle third of the width, and so both halves of it; stretched, the corners stay corners.
    cropped = read_image(tmp_path / "a.png", 10)
    assert cropped.shape == (3, 10, 10)
    assert cropped[:, 1, 1].tolist() == [255, 0, 0]
    assert cropped[:, 1, 8].tolist() == [0, 255, 0]
    stretched = read_image(tmp_path / "a.png", 40, resize="stretch")
    assert stretched.shape == (3, 40, 40)
    assert stretched[:, 38, 1].tolist() == [255, 255, 255]
    stripes = np.zeros((30, 90, 3), np.uint8)
    stripes[:, 30:60] = 255
    Image.fromarray(stripes).save(tmp_path / "b.png")
    assert read_image(tmp_path / "b.png", 10).min() > 200
    assert read_image(tmp_path / "b.png", 10, resize="stretch").min() == 0


def test_a_large_jpeg_is_reduced_while_it_is_decoded(tmp_path):
    quadrants(800, 800).save(tmp_path / "a.jpg", quality=95)
    image = read_image(tmp_path / "a.jpg", 20)
    expected = torch.from_numpy(np.array(quadrants(20, 20))).permute(2, 0, 1)
    assert (image[:, ::19, ::19].int() - expected[:, ::19, ::19].int()).abs().max() <= 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size: expected at least 1, got 0"),
        ({"mode": "RGBA"}, "mode: expected RGB or L, got 'RGBA'"),
        ({"resize": "squeeze"}, "resize: expected crop or stretch, got 'squeeze'"),
        ({"filter": "cubic"}, "filter: expected one of lanczos, bilinear, got 'cubic'"),
    ],
)
def test_bad_arguments_of_read_image(arguments, message):
    with pytest.raises(ValueError, match=message):
        read_image("no_such_file.png", **arguments)


def test_files_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        read_image(tmp_path / "missing.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.png' is not a picture"):
        read_image(tmp_path / "text.png")
    (tmp_path / "empty.png").write_text("")
    with pytest.raises(ValueError, match=r"empty\.png' is not a picture"):
        read_image(tmp_path / "empty.png")
    Image.new("F", (4, 4)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match=r"cannot decode '.*float\.tif': pixels of mode 'F' have no fixed range"):
        read_image(tmp_path / "float.tif")
    quadrants(9, 9).save(tmp_path / "large.png")
    monkeypatch.setattr(pictures, "MAX_PIXELS", 80)
    with pytest.raises(ValueError, match=r"large\.png' has too many pixels: 9 x 9, at most 80 are taken"):
        read_image(tmp_path / "large.png")


@pytest.mark.parametrize("side", [9000, 60000])
def test_a_decompression_bomb_is_refused_by_its_header(tmp_path, side):
    # A BMP of 54 bytes, all header.
    header = struct.pack("<2sIHHI", b"BM", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, side, side, 1, 24, *[0] * 6)
    (tmp_path / "bomb.bmp").write_bytes(header)
    with pytest.raises(ValueError, match=r"bomb\.bmp' has too many pixels"):
        read_image(tmp_path / "bomb.bmp")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif", ".webp", ".tif", ".bmp"])
def test_no_cut_or_flipped_byte_gives_another_error(tmp_path, suffix):
    generator = np.random.default_rng(0)
    noise = Image.fromarray(generator.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    noise.save(tmp_path / f"good{suffix}")
    content = (tmp_path / f"good{suffix}").read_bytes()
    bad = tmp_path / f"bad{suffix}"
    refused = 0
    for position in generator.integers(0, len(content), 150).tolist():
        flipped = bytearray(content)
        flipped[position] ^= 0xFF
        for spoilt in (content[:position], bytes(flipped)):
            bad.write_bytes(spoilt)
            try:
                assert read_image(bad).dim() == 3
            except ValueError as error:
                refused += 1
                assert "bad" in str(error)
    assert refused > 100


# 15
@pytest.mark.parametrize(
    ("suffix", "format", "options"),
    [(".jpe", "JPEG", {}), (".jfif", "JPEG", {}), (".avif", "AVIF", {"quality": 95}), (".jp2", "JPEG2000", {})],
)
def test_other_formats_and_suffixes(tmp_path, suffix, format, options):
    if {"AVIF": "avif", "JPEG2000": "jpg_2000"}.get(format, "jpg") not in features.get_supported():
        pytest.skip(f"this Pillow has no {format}")
    quadrants(32, 48).save(tmp_path / f"a{suffix}", format, **options)
    assert suffix in pictures.suffixes()
    expected = torch.from_numpy(np.array(quadrants(32, 48))).permute(2, 0, 1)
    corners = read_image(tmp_path / f"a{suffix}")[:, 2::28, 2::44].int() - expected[:, 2::28, 2::44].int()
    assert corners.abs().max() <= 12
    assert pictures.picture_size(tmp_path / f"a{suffix}") == (32, 48, "RGB")


# 15
def test_heic_where_pillow_heif_is_installed(tmp_path):
    pytest.importorskip("pillow_heif").register_heif_opener()
    quadrants(64, 64).save(tmp_path / "a.heic", quality=95)
    assert ".heic" in pictures.suffixes()
    expected = torch.from_numpy(np.array(quadrants(64, 64))).permute(2, 0, 1)
    assert (read_image(tmp_path / "a.heic")[:, 8::48, 8::48].int() - expected[:, 8::48, 8::48].int()).abs().max() <= 12


def test_contact_sheet_shows_each_picture_in_its_place():
    colors = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=torch.uint8)
    images = [color.view(3, 1, 1).expand(3, 10 + 40 * index, 20) for index, color in enumerate(colors)]
    sheet = contact_sheet(images, ["a", "b\nc", ""], columns=2, cell=64, borders=["black", None, "#ff00ff"])
    pixels = np.array(sheet)
    gap = 5
    step_y = (sheet.height - gap) // 2
    assert sheet.width == 2 * (64 + gap) + gap
    for index, color in enumerate(colors.tolist()):
        left, top = gap + index % 2 * (64 + gap), gap + index // 2 * step_y
        assert pixels[top + 32, left + 32].tolist() == color
    # The first is twice as wide as high: 32 pixels of it in the middle of the cell, then its border.
    assert pixels[gap + 16, gap + 32].tolist() == [255, 0, 0]
    assert pixels[gap + 15, gap + 32].tolist() == [0, 0, 0]
    assert pixels[gap + 5, gap + 32].tolist() == [255, 255, 255]
    assert pixels[gap + 64 + 2 : gap + 64 + 20, gap : gap + 64].min() < 128
    assert pixels[step_y + gap + 66 :, gap : gap + 64].min() == 255


def test_contact_sheet_takes_a_batch_of_gray_images_and_long_captions():
    images = torch.zeros(5, 1, 8, 8, dtype=torch.uint8)
    short, long = (
        contact_sheet(images, [text] * 5, cell=48) for text in ("a", "a_very_long_name_without_any_space " * 9)
    )
    assert short.width == long.width
    assert short.height < long.height < short.height + 4 * 20
    assert np.array(long)[60:].min() < 128


@pytest.mark.parametrize("caption", ["", " ", "one two three four five six seven eight nine", "x" * 200, "a/b/c" * 20])
def test_wrapped_captions_fit(caption):
    from PIL import ImageFont

    font = ImageFont.load_default(size=12)
    lines = pictures.wrapped(caption, font, 96).split("\n")
    assert len(lines) <= 3
    assert all(font.getlength(line) <= 96 for line in lines)
    if font.getlength(caption) <= 96:
        assert lines == [caption.strip()]


# 19
@pytest.mark.parametrize(
    ("caption", "drawn"),
    [
        ("Größe", "Größe"),
        ("ñandú Łódź Ω Москва", "ñandú Łódź Ω Москва"),
        ("u\u0308", "ü"),  # as macOS writes the names of files
        ("猫", r"\u732b"),
        ("\U0001f98a", r"\U0001f98a"),
        (os.fsdecode(b"\xff"), r"\udcff"),
        ("a\nb\tc", r"a\nb\tc".replace(r"\n", "\n")),
    ],
)
def test_captions_have_no_boxes(caption, drawn):
    assert fonts.drawable(caption) == drawn
    size = 40
    box = ImageFont.truetype(fonts.caption_font(size).path, size).getmask("\uffff")
    assert box.getbbox()  # what a font without the glyph draws
    assert all(bytes(fonts.caption_font(size).getmask(letter)) != bytes(box) for letter in drawn if letter not in "\n ")
    image = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    assert np.array_equal(*(np.array(contact_sheet(image, [text])) for text in (caption, drawn)))


# 19
def test_a_dollar_sign_begins_no_formula():
    assert fonts.figure_text("5 $ or 猫 $") == r"5 \$ or \u732b \$"


GOOD = torch.zeros(3, 4, 4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("images", "changes", "error", "message"),
    [
        ([], {}, ValueError, "images: expected at least one picture"),
        ([GOOD.float()], {}, TypeError, r"images\[0\]: expected a torch\.uint8 tensor, got torch\.float32"),
        ([GOOD, np.zeros((3, 4, 4))], {}, TypeError, r"images\[1\]: expected a torch\.uint8 tensor, got ndarray"),
        ([GOOD[0]], {}, ValueError, r"images\[0\]: expected shape \[1 or 3, H, W\], got shape \(4, 4\)"),
        ([GOOD[:2]], {}, ValueError, r"got shape \(2, 4, 4\)"),
        ([GOOD[:, :0]], {}, ValueError, r"got shape \(3, 0, 4\)"),
        ([GOOD], {"captions": []}, ValueError, "1 pictures, 0 captions"),
        ([GOOD], {"columns": 0}, ValueError, "columns: expected at least 1, got 0"),
        ([GOOD], {"cell": 31}, ValueError, "cell: expected at least 32, got 31"),
        ([GOOD], {"borders": []}, ValueError, "1 pictures, 0 borders"),
        ([GOOD], {"borders": ["reddish"]}, ValueError, "borders: expected color names.*reddish"),
    ],
)
def test_bad_arguments_of_contact_sheet(images, changes, error, message):
    with pytest.raises(error, match=message):
        contact_sheet(images, **{"captions": ["a"] * len(images), **changes})


def test_without_pillow(monkeypatch, tmp_path):
    monkeypatch.setattr(_extras, "is_installed", lambda name: name != "PIL")
    for call in (lambda: read_image(tmp_path / "a.png"), lambda: contact_sheet([GOOD], ["a"])):
        with pytest.raises(ImportError, match=r"'PIL' is missing; pip install 'fewshot_ext\[train\]'"):
            call()
