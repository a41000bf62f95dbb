"""The font of captions, and texts reduced to the characters that it has."""

import unicodedata
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

_SIZE = 16  # at which glyphs are compared


@cache
def caption_font(size: int) -> "FreeTypeFont":
    """DejaVu Sans, which comes with matplotlib and has the letters of some forty alphabets; Pillow's own without it."""
    from PIL import ImageFont

    package = find_spec("matplotlib")
    file = Path(package.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf" if package and package.origin else None
    return ImageFont.truetype(str(file), size) if file and file.is_file() else ImageFont.load_default(size=size)


def drawable(text: str) -> str:
    """``text`` as ``caption_font`` draws it: what that has no glyph for is escaped, and would else be an empty box.

    Example:
        >>> drawable("Größe \\u732b")
        'Größe \\\\u732b'
    """
    return "".join(
        character if character in "\n " or _has_glyph(character) else character.encode("unicode_escape").decode()
        for character in unicodedata.normalize("NFC", text)
    )


def figure_text(text: str) -> str:
    """``drawable`` for matplotlib, whose font is the same and to which a dollar sign begins a formula."""
    return drawable(text).replace("$", r"\$")


@cache
def _has_glyph(character: str) -> bool:
    # A lone surrogate, as stands for a byte of a file's name that is no UTF-8, is no character at all.
    return unicodedata.category(character) not in ("Cc", "Cs") and _glyph(character) != _glyph("\U0010ffff")


@cache
def _glyph(character: str) -> bytes:
    from PIL import Image, ImageDraw

    image = Image.new("L", (3 * _SIZE, 3 * _SIZE))
    ImageDraw.Draw(image).text((_SIZE, _SIZE), character, fill=255, font=caption_font(_SIZE))
    return image.tobytes()
