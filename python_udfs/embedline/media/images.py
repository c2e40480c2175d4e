"""Decode images with Pillow, and choose their segments."""

from __future__ import annotations

import functools
import io
from typing import TYPE_CHECKING

from embedline.chunking.spec import ChunkingSpec
from embedline.core.media import MediaPart
from embedline.errors import InputRejected
from embedline.media.kinds import decoding, kind_of, require_size
from embedline.media.places import require_few, starts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image, ImageFile

# Pixels of the largest image. Decoding takes up to 8 bytes a pixel, so 400 MB of the model host's 4096.
MAX_PIXELS = 50_000_000
# Most passes of a progressive JPEG: usual ones have about 10. Each costs the time of the whole image, however few
# bytes it has.
MAX_SCANS = 100
_START_OF_SCAN, _PROGRESSIVE = b"\xff\xda", b"\xff\xc2"
_ORIENTATION = 0x0112
# Orientations that exchange width and height.
_SIDEWAYS = (5, 6, 7, 8)
# Texts without which a PNG has no orientation. It may stand behind the pixels, where only decoding finds it.
_PNG_ORIENTATION = (b"eXIf", b"exif", b"xmp")
_WHITE = (255, 255, 255)


def segments(data: bytes, spec: ChunkingSpec) -> list[tuple[int, int]]:
    """Return the places of an image's segments in pixels, in order.

    Reads the header only, where that tells the size. Raises InputRejected.
    """
    with decoding("image"), _opened(data) as image:
        width, height = _turned_size(image, data)
    if spec.method == "none":
        return [(0, width * height)]
    size, overlap = int(spec.size), int(spec.shared)
    columns, rows = starts(width, size, overlap), starts(height, size, overlap)
    require_few(len(columns) * len(rows), "tiles")
    right, below = min(size, width) - 1, min(size, height) - 1
    return [(y * width + x, (y + below) * width + x + right + 1) for y in rows for x in columns]


def picture(part: MediaPart) -> Image.Image:
    """Return a segment as 8-bit RGB, upright, transparent parts white.

    Raises InputRejected.
    """
    return cut(whole(part.data), part)


def cut(image: Image.Image, part: MediaPart) -> Image.Image:
    """Return a segment of an image that `whole` decoded."""
    width, height = image.size
    if part.end == 0 or (part.start, part.end) == (0, width * height):
        return image
    if not 0 <= part.start < part.end <= width * height:
        raise InputRejected("the segment lies outside the image")
    (y, x), (last_y, last_x) = divmod(part.start, width), divmod(part.end - 1, width)
    if last_x < x:
        raise InputRejected("the segment is no rectangle of the image")
    return image.crop((x, y, last_x + 1, last_y + 1))


def whole(data: bytes) -> Image.Image:
    """Return a whole image as 8-bit RGB, upright, transparent parts white.

    Of an animation it is the first frame. Raises InputRejected.
    """
    from PIL import ImageOps

    with decoding("image"), _opened(data) as image:
        image.load()
        # A GIF, for one, may grow by its first frame.
        _require_pixels(image)
        if _may_be_turned(image, data):
            ImageOps.exif_transpose(image, in_place=True)
        return _rgb(image)


def _opened(data: bytes) -> ImageFile.ImageFile:
    """Open an image's header, with the decoder of its first bytes and no other."""
    require_size(data, "image")
    kind = kind_of(data, "image")
    from PIL import Image

    _register_decoders()
    if kind == "JPEG":
        _require_few_scans(data)
    try:
        image = Image.open(io.BytesIO(data), formats=[kind])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InputRejected(f"the image has more than {MAX_PIXELS} pixels") from None
    _require_pixels(image)
    if kind == "TIFF" and image.info.get("compression") == "jpeg" and _PROGRESSIVE in data:
        raise InputRejected("the image is a TIFF with a progressive JPEG inside")
    return image


@functools.cache
def _register_decoders() -> None:
    """Have Pillow know its decoders of our kinds.

    They are imported one by one, because Image.init would register all that Pillow has.
    """
    from PIL import (
        AvifImagePlugin,
        BmpImagePlugin,
        GifImagePlugin,
        JpegImagePlugin,
        PngImagePlugin,
        TiffImagePlugin,
        WebPImagePlugin,
    )

    del (
        AvifImagePlugin,
        BmpImagePlugin,
        GifImagePlugin,
        JpegImagePlugin,
        PngImagePlugin,
        TiffImagePlugin,
        WebPImagePlugin,
    )


def _require_pixels(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InputRejected(
            f"the image has {width} × {height} pixels; at most {MAX_PIXELS} are decoded",
            hint="Store a smaller copy, and embed that.",
        )
    if width < 1 or height < 1:
        raise InputRejected("the image has no pixels")


def _require_few_scans(data: bytes) -> None:
    # Two such bytes are nowhere else in the pixels of a JPEG.
    if data.count(_START_OF_SCAN) > MAX_SCANS:
        raise InputRejected(f"the image is a JPEG of more than {MAX_SCANS} passes")


def _may_be_turned(image: ImageFile.ImageFile, data: bytes) -> bool:
    """Return False if a file asks for no turn.

    To know more, a PNG may have to be decoded.
    """
    return image.format != "PNG" or any(word in data for word in _PNG_ORIENTATION)


def _turned_size(image: ImageFile.ImageFile, data: bytes) -> tuple[int, int]:
    """Return width and height after the turn that the file asks for."""
    width, height = image.size
    # Pillow tells the size of a TIFF as it is after the turn.
    if image.format == "TIFF" or not _may_be_turned(image, data):
        return width, height
    return (height, width) if image.getexif().get(_ORIENTATION) in _SIDEWAYS else (width, height)


def _rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if image.has_transparency_data:
        covering = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", covering.size, _WHITE)
        white.paste(covering, mask=covering.getchannel("A"))
        return white
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> NDArray[np.uint8]:
    """Return the grey values of 16 or 32 bits as 0 to 255."""
    import numpy as np

    # Changed in place, because each copy of the largest image has 200 MB.
    values = np.array(image, dtype=np.float32)
    np.nan_to_num(values, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
    if image.mode.startswith("I;16"):
        top = 65535.0
    else:
        highest = float(values.max(initial=0.0))
        # Values of 32 bits have no white of their own: that of the narrowest kind that holds them all.
        top = next((top for top in (1.0 if image.mode == "F" else 255.0, 255.0, 65535.0) if highest <= top), highest)
    values *= 255.0 / top
    values += 0.5
    np.clip(values, 0, 255, out=values)
    return values.astype(np.uint8)
