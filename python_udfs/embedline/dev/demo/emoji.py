"""Draw the emoji of Debian's fonts-noto-color-emoji, each with its Unicode name."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image, ImageFont

FONT_PACKAGE = "fonts-noto-color-emoji"
_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
# The only size of the font's pictures, and the square that each is drawn into.
_SIZE, SIDE = 109, 136
# Where Unicode has its emoji. Those of two characters and more, such as flags, are left out.
_BLOCKS = (range(0x80, 0x3300), range(0x1F000, 0x1FB00))
# Parts of other emoji.
_PARTS = ("regional indicator", "emoji modifier")
_UNASSIGNED = "\U0010fffd"
# Emoji that no training sees, and the seed that chooses them.
HELD_OUT, _SEED = 200, 20


@dataclass(frozen=True)
class Emoji:
    """A picture with its name."""

    name: str
    picture: Image.Image


def read_emoji() -> list[Emoji]:
    """Return all emoji in the order of Unicode.

    Raises FileNotFoundError if the font is not installed.
    """
    from PIL import ImageFont

    if not _FONT.is_file():
        raise FileNotFoundError(f"{_FONT} is missing; apt-get install {FONT_PACKAGE}")
    font = ImageFont.truetype(str(_FONT), _SIZE, layout_engine=ImageFont.Layout.BASIC)
    absent = {_draw(font, letter).tobytes() for letter in (_UNASSIGNED, " ")}
    drawn = ((name, _draw(font, letter)) for letter, name in _named_letters())
    return [Emoji(name, picture) for name, picture in drawn if picture.tobytes() not in absent]


def split(count: int) -> tuple[list[int], list[int]]:
    """Return the places of the emoji to train with, and of those to hold out."""
    places = list(range(count))
    random.Random(_SEED).shuffle(places)
    return sorted(places[HELD_OUT:]), sorted(places[:HELD_OUT])


def _named_letters() -> Iterator[tuple[str, str]]:
    for block in _BLOCKS:
        for letter in map(chr, block):
            name = unicodedata.name(letter, "").lower()
            if name and not name.startswith(_PARTS):
                yield letter, name


def _draw(font: ImageFont.FreeTypeFont, letter: str) -> Image.Image:
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (SIDE, SIDE), "white")
    ImageDraw.Draw(picture).text((0, 4), letter, font=font, embedded_color=True)
    return picture
