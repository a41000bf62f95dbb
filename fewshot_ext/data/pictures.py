"""Picture files in and out: reading one as a tensor, and contact sheets."""

import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fewshot_ext import _extras
from fewshot_ext._validation import check_choice
from fewshot_ext.data.fonts import caption_font, drawable

if TYPE_CHECKING:
    from PIL import Image

# Pillow knows more formats, some of which start other programs (EPS) or are rarely fuzzed.
_FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
}
# What depends on how Pillow was built, by the name of the feature.
_FEATURES = {
    "avif": ("AVIF", (".avif", ".avifs")),
    "jpg_2000": ("JPEG2000", (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx")),
}

# A file of a few kilobytes can claim gigabytes of pixels; no photograph of a data set has as many as this.
MAX_PIXELS = 64_000_000

# Pictures whose sides differ by more are resized with less memory.
_LONG = 8

# What Pillow raises for a damaged file; its own OSErrors carry no errno.
_DAMAGE = (OSError, SyntaxError, ValueError, LookupError, TypeError, EOFError, OverflowError, struct.error, zlib.error)

MODES = ("RGB", "L")
RESIZES = ("crop", "stretch")
# By the names of Pillow's ``Resampling``.
FILTERS = ("lanczos", "bilinear")


def suffixes() -> frozenset[str]:
    """The suffixes of the files that are taken for pictures: those of the formats that can be read here."""
    return frozenset(suffix for suffixes in _formats(_extras.is_installed("PIL")).values() for suffix in suffixes)


def read_image(
    path: str | Path, size: int | None = None, *, mode: str = "RGB", resize: str = "crop", filter: str = "lanczos"
) -> Tensor:
    """One picture file as a tensor, turned the way its EXIF orientation says; transparency becomes white.

    Args:
        path: a JPEG, PNG, BMP, GIF (its first frame), WebP, TIFF or PPM file; AVIF and JPEG 2000 where Pillow was
            built with them, HEIC where pillow-heif is installed.
        size: side of the square to resize to; None keeps the size.
        mode: "RGB" or "L" (gray).
        resize: "crop" brings the short side to ``size`` and cuts the middle out; "stretch" brings both sides to
            ``size``.
        filter: "lanczos", as in the script that made mini-ImageNet, or "bilinear", as torchvision resizes.

    Returns:
        ``[C, H, W]`` uint8; C is 3 for RGB and 1 for L.

    Raises:
        ImportError: Pillow is missing.
        OSError: the file cannot be opened.
        ValueError: it is no picture of these formats, is damaged or cut short, or has more than 64 million
            pixels (checked before they are decoded); a mode, resize, filter or size that is not known. The message
            names the file.

    Example:
        >>> sheet = contact_sheet([torch.zeros(3, 8, 8, dtype=torch.uint8)], ["black"], cell=32)
        >>> sheet.save("black.png")
        >>> read_image("black.png", 16).shape
        torch.Size([3, 16, 16])
    """
    check_reading(size, mode, resize)
    check_choice("filter", filter, *FILTERS)
    return torch.from_numpy(decode(path, size=size, mode=mode, resize=resize, filter=filter))


def check_reading(size: int | None, mode: str | None, resize: str) -> None:
    """Raises ValueError unless these are values that ``read_image`` takes; a mode of None passes."""
    if size is not None and size < 1:
        raise ValueError(f"size: expected at least 1, got {size}")
    if mode is not None and mode not in MODES:
        raise ValueError(f"mode: expected RGB or L, got {mode!r}")
    if resize not in RESIZES:
        raise ValueError(f"resize: expected crop or stretch, got {resize!r}")


def decode(
    source: "str | Path | bytes | Image.Image",
    name: str = "",
    *,
    size: int | None = None,
    mode: str = "RGB",
    resize: str = "crop",
    filter: str = "lanczos",
) -> np.ndarray:
    """As ``read_image``, from a file, from the bytes of one or from a picture of Pillow, as a ``[C, H, W]`` array.

    Args:
        source: a path, the content of a file, or a picture, which is left as it is.
        name: what to call the picture in an error; the path where empty.
        size, mode, resize, filter: as in ``read_image``.
    """
    name = name or repr(str(source))
    from PIL import Image, ImageOps

    there = nullcontext(source) if isinstance(source, Image.Image) else opened(source, name)
    with there as picture, damage_named(name):
        # A JPEG reader can shrink by a power of two while it decodes, several times faster than decoding it all.
        if size is not None and picture.format == "JPEG" and picture is not source:
            picture.draft(None, (2 * size, 2 * size))
        pixels = _in_mode(ImageOps.exif_transpose(picture), mode)
        if size is not None:
            pixels = _resized(pixels, size, resize, filter)
        array = np.asarray(pixels)
    # A copy, because Pillow's arrays are read-only.
    return np.array(array[None] if array.ndim == 2 else array.transpose(2, 0, 1), order="C")


def picture_size(source: str | Path | bytes, name: str = "") -> tuple[int, int, str]:
    """Height, width (the EXIF orientation applied) and mode ("L" or "RGB") from the header alone.

    Raises:
        OSError, ValueError: as ``read_image``.
    """
    name = name or repr(str(source))
    with opened(source, name) as picture, damage_named(name):
        width, height = picture.size
        if picture.getexif().get(0x0112, 1) >= 5:
            width, height = height, width
        gray = picture.mode in ("1", "L", "LA") or picture.mode.startswith("I;16")
        return height, width, "L" if gray else "RGB"


def encode_jpeg(image: np.ndarray, quality: int) -> bytes:
    """A ``[C, H, W]`` uint8 array as JPEG, its colors at full resolution."""
    from PIL import Image

    buffer = io.BytesIO()
    picture = Image.fromarray(image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))
    picture.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def contact_sheet(
    images: Sequence[Tensor],
    captions: Sequence[str],
    columns: int = 8,
    cell: int = 96,
    borders: Sequence[str | None] | None = None,
) -> "Image.Image":
    """Small pictures in rows on white, each with its caption beneath.

    Args:
        images: uint8 tensors ``[C, H, W]`` with C = 1 or 3, or one ``[N, C, H, W]`` tensor; sizes may differ.
            Each is scaled to fit its cell.
        captions: one a picture. Long ones are wrapped and, after three lines, cut. Characters that the font does not
            have, such as Chinese ones, are written as escapes.
        columns: pictures a row.
        cell: side of a cell in pixels, at least 32.
        borders: a color name or "#rrggbb" a picture, or None for no border.

    Raises:
        ImportError: Pillow is missing.
        TypeError: a picture that is no uint8 tensor.
        ValueError: no pictures, a wrong shape, another number of captions or borders than of pictures, an
            unknown color, columns below 1 or a cell below 32.

    Example:
        >>> images = torch.randint(256, (3, 1, 28, 28), dtype=torch.uint8)
        >>> contact_sheet(images, ["a", "b", "c"], columns=2, borders=["green", None, "#D55E00"]).width
        216
    """
    _extras.require("train", "PIL")
    from PIL import Image, ImageDraw

    colors = _check_sheet(images, captions, columns, cell, borders)
    gap, font = max(4, cell // 12), caption_font(max(10, cell // 8))
    texts = [wrapped(drawable(caption), font, cell) for caption in captions]
    ascent, descent = font.getmetrics()
    line_height = ascent + descent
    text_height = max(text.count("\n") + 1 if text else 0 for text in texts) * line_height
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    step_x, step_y = cell + gap, cell + text_height + gap
    sheet = Image.new("RGB", (columns * step_x + gap, rows * step_y + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (image, text) in enumerate(zip(images, texts, strict=True)):
        left, top = gap + index % columns * step_x, gap + index // columns * step_y
        picture = _fitted(image, cell)
        corner = (left + (cell - picture.width) // 2, top + (cell - picture.height) // 2)
        sheet.paste(picture, corner)
        if colors[index] is not None:
            # Around the picture, not over it: the strokes of a letter may end at its edge.
            width = max(2, gap // 2)
            box = (corner[0] - width, corner[1] - width)
            box += (corner[0] + picture.width + width - 1, corner[1] + picture.height + width - 1)
            draw.rectangle(box, outline=colors[index], width=width)
        for number, line in enumerate(text.split("\n")):
            middle = left + (cell - font.getlength(line)) / 2
            draw.text((middle, top + cell + gap // 2 + number * line_height), line, fill="black", font=font)
    return sheet


def _check_sheet(images, captions, columns, cell, borders) -> list[tuple[int, int, int] | None]:
    from PIL import ImageColor

    if not len(images):
        raise ValueError("images: expected at least one picture, got none")
    for index, image in enumerate(images):
        if not isinstance(image, Tensor) or image.dtype != torch.uint8:
            came = image.dtype if isinstance(image, Tensor) else type(image).__name__
            raise TypeError(f"images[{index}]: expected a torch.uint8 tensor, got {came}")
        if image.dim() != 3 or image.shape[0] not in (1, 3) or not image.numel():
            raise ValueError(f"images[{index}]: expected shape [1 or 3, H, W], got shape {tuple(image.shape)}")
    if len(captions) != len(images):
        raise ValueError(f"captions: expected one text a picture: {len(images)} pictures, {len(captions)} captions")
    if columns < 1:
        raise ValueError(f"columns: expected at least 1, got {columns}")
    if cell < 32:
        raise ValueError(f"cell: expected at least 32, got {cell}")
    if borders is None:
        return [None] * len(images)
    if len(borders) != len(images):
        raise ValueError(f"borders: expected one color a picture: {len(images)} pictures, {len(borders)} borders")
    try:
        return [None if color is None else ImageColor.getrgb(color)[:3] for color in borders]
    except ValueError as error:
        raise ValueError(f"borders: expected color names, '#rrggbb' or None: {error}") from error


def _fitted(image: Tensor, cell: int) -> "Image.Image":
    from PIL import Image

    array = image.cpu().permute(1, 2, 0).numpy()
    picture = Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2] == 1 else array))
    scale = cell / max(picture.size)
    # Enlarged pixels stay squares, so that a sheet of 28 x 28 letters shows what the network gets.
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    return picture.resize(tuple(max(1, round(side * scale)) for side in picture.size), how).convert("RGB")


def wrapped(caption: str, font, width: int, most_lines: int = 3) -> str:
    lines: list[str] = []
    for paragraph in caption.split("\n"):
        line = ""
        for character in paragraph:
            if line and font.getlength(line + character) > width:
                # After the last of these where there is one, else in the middle of a long word.
                end = 1 + max(line.rfind(mark) for mark in " /_-") or len(line)
                lines.append(line[:end].rstrip())
                line = line[end:]
            line += character if line else character.lstrip()
        lines.append(line)
    if len(lines) > most_lines:
        last = lines[most_lines - 1]
        while last and font.getlength(last + "...") > width:
            last = last[:-1]
        lines = [*lines[: most_lines - 1], last + "..."]
    return "\n".join(lines).rstrip("\n")


def opened(source: str | Path | bytes, name: str, formats: Sequence[str] = ()) -> "Image.Image":
    """The picture with its header read and its pixels not yet, once their number is known to be bearable."""
    _extras.require("train", "PIL")
    from PIL import Image, UnidentifiedImageError

    formats = formats or tuple(_formats(True))
    try:
        stream = io.BytesIO(source) if isinstance(source, bytes) else Path(source).expanduser()
        picture = Image.open(stream, formats=formats)
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not a picture, or is damaged (formats: {', '.join(formats)})") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} has too many pixels: {error}") from error
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{name} is damaged: {error}") from error
    width, height = picture.size
    if width * height > MAX_PIXELS:
        picture.close()
        raise ValueError(f"{name} has too many pixels: {width} x {height}, at most {MAX_PIXELS:,} are taken")
    return picture


@cache
def _formats(pillow: bool) -> dict[str, tuple[str, ...]]:
    """The formats that can be read here, and their suffixes."""
    found = dict(_FORMATS)
    if pillow:
        from PIL import features

        found |= dict(_FEATURES[name] for name in _FEATURES.keys() & set(features.get_supported()))
        if _extras.is_installed("pillow_heif"):
            import pillow_heif

            pillow_heif.register_heif_opener()
            found["HEIF"] = (".heic", ".heif", ".hif")
    return found


@contextmanager
def damage_named(name: str) -> Iterator[None]:
    """Turns what Pillow raises while it decodes, of many kinds, into one ValueError with the picture's name."""
    try:
        yield
    except _DAMAGE as error:
        raise ValueError(f"cannot decode {name}: {error}") from error


def _in_mode(picture: "Image.Image", mode: str) -> "Image.Image":
    from PIL import Image

    if picture.mode.startswith("I;16"):
        # Pillow's own conversion clips 16-bit gray at 255 instead of scaling it.
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {picture.mode!r} have no fixed range; save it with 8 or 16 bits")
    if picture.mode in ("LA", "PA", "RGBA", "RGBa", "La") or "transparency" in picture.info:
        colors = picture.convert("RGBA")
        white = Image.new("RGBA", colors.size, "white")
        picture = Image.alpha_composite(white, colors)
    return picture.convert(mode)


def short_side_resized(height: int, width: int, side: int) -> tuple[int, int]:
    """Height and width of a picture whose short side becomes ``side``, rounded as torchvision rounds them."""
    return tuple(int(side * length / min(height, width)) for length in (height, width))


def _resized(picture: "Image.Image", size: int, resize: str, filter: str) -> "Image.Image":
    from PIL import Image, ImageOps

    how = Image.Resampling[filter.upper()]
    if resize == "stretch":
        return picture.resize((size, size), how)
    if filter == "lanczos":
        return ImageOps.fit(picture, (size, size), how)
    # As torchvision: resized, and cut at a whole pixel of that.
    height, width = short_side_resized(picture.height, picture.width, size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    if max(height, width) <= _LONG * size:
        return picture.resize((width, height), how).crop((left, top, left + size, top + size))
    # The same but for roundings of the box. The whole of a long and thin picture could take any amount of memory.
    across, down = picture.width / width, picture.height / height
    box = (left * across, top * down, (left + size) * across, (top + size) * down)
    return picture.resize((size, size), how, box=box)
