"""Any bytes in a column of images end as segments, or are rejected with a reason."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from embedline.chunking.spec import ChunkingSpec, chunking_spec
from embedline.core.media import MAX_MEDIA_BYTES, MediaPart
from embedline.errors import InputRejected
from embedline.media import images
from media_files import encoded, picture, png

_KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_WHOLE = chunking_spec("none", None, None, {}, "image")


def _tiles(pixels: int, overlap: int = 0) -> ChunkingSpec:
    return chunking_spec("tiles", None, None, {"tile_pixels": pixels, "tile_overlap": overlap}, "image")


def _decoded(data: bytes, place: tuple[int, int] = (0, 0)) -> Image.Image:
    return images.picture(MediaPart("image", data, *place))


def _rejected(data: bytes, spec: ChunkingSpec = _WHOLE) -> str:
    """Return the reason for which a file is rejected."""
    with pytest.raises(InputRejected) as caught:
        for place in images.segments(data, spec):
            _decoded(data, place)
    reason = caught.value.message
    assert "\n" not in reason and "BytesIO" not in reason
    return reason


def _is_red(pixel: tuple[int, ...]) -> bool:
    return pixel[0] > 200 and max(pixel[1:]) < 60


@pytest.mark.parametrize("kind", _KINDS)
def test_each_kind_of_file_is_read_whole(kind: str) -> None:
    data = encoded(picture(), kind)
    assert images.segments(data, _WHOLE) == [(0, 60 * 40)]
    decoded = _decoded(data)
    assert (decoded.mode, decoded.size) == ("RGB", (60, 40))
    assert _is_red(decoded.getpixel((5, 5))) and not _is_red(decoded.getpixel((50, 30)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_stands_upright_and_its_places_too(kind: str, orientation: int) -> None:
    upright = picture(64, 48)
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }.get(orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(upright if turn is None else upright.transpose(turn), kind, exif=exif)
    decoded = _decoded(data)
    assert decoded.size == upright.size
    assert _is_red(decoded.getpixel((4, 4)))
    assert not any(_is_red(decoded.getpixel(corner)) for corner in ((60, 4), (4, 44), (60, 44)))
    places = images.segments(data, _tiles(32))
    assert [_decoded(data, place).size for place in places] == [(32, 32)] * 4
    assert _is_red(_decoded(data, places[0]).getpixel((4, 4)))


def test_the_turn_of_a_png_may_stand_behind_its_pixels() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(picture(64, 48), "PNG", exif=exif)
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    moved = data[:start] + data[end:-12] + data[start:end] + data[-12:]
    assert images.segments(moved, _tiles(48)) == [(0, 48 * 48), (16 * 48, 64 * 48)]
    assert _decoded(moved).size == (48, 64)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("1", "PNG"),
        ("1", "TIFF"),
        ("L", "PNG"),
        ("LA", "PNG"),
        ("P", "PNG"),
        ("PA", "TIFF"),
        ("RGBA", "PNG"),
        ("RGBA", "WEBP"),
        ("RGBA", "AVIF"),
        ("CMYK", "JPEG"),
        ("CMYK", "TIFF"),
        ("YCbCr", "JPEG"),
        ("LAB", "TIFF"),
        ("I;16", "PNG"),
        ("I;16", "TIFF"),
        ("I", "TIFF"),
        ("F", "TIFF"),
    ],
)
def test_each_mode_becomes_eight_bit_rgb(mode: str, kind: str) -> None:
    grey = picture().convert("L")
    if mode in ("I;16", "I"):
        image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
        image = image if mode == "I;16" else Image.fromarray(np.asarray(image).astype(np.int32))
    elif mode == "F":
        image = Image.fromarray(np.asarray(grey).astype(np.float32) / 255)
    elif mode == "LAB":
        image = Image.new("LAB", (60, 40), (128, 10, 10))
    else:
        image = picture().convert("RGBA").convert(mode) if mode in ("PA", "LA") else picture().convert(mode)
    decoded = _decoded(encoded(image, kind))
    assert (decoded.mode, decoded.size) == ("RGB", (60, 40))
    if mode in ("I;16", "I", "F"):
        np.testing.assert_allclose(np.asarray(decoded.convert("L")), np.asarray(grey), atol=1)
    elif mode not in ("1", "LAB"):
        expected = np.asarray(picture().convert("L" if mode[0] == "L" else "RGB").convert("L"))
        assert np.abs(np.asarray(decoded.convert("L")).astype(int) - expected).mean() < 20


def test_values_that_are_no_numbers_are_black() -> None:
    pixels = np.full((4, 4), 0.5, dtype=np.float32)
    pixels[0, 0], pixels[0, 1], pixels[0, 2] = np.nan, np.inf, -np.inf
    decoded = np.asarray(_decoded(encoded(Image.fromarray(pixels), "TIFF")))
    assert decoded[0, :3].tolist() == [[0, 0, 0]] * 3
    assert decoded[1, 1].tolist() == [128, 128, 128]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF"])
def test_transparent_parts_are_white(kind: str) -> None:
    image = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 10, 20))
    decoded = _decoded(encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert decoded.getpixel((15, 10)) == (255, 255, 255)
    assert _is_red(decoded.getpixel((5, 10)))


def test_a_palette_and_a_single_colour_can_be_transparent() -> None:
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([9, 9, 9, 250, 0, 0])
    palette.paste(0, (0, 0, 4, 8))
    assert _decoded(encoded(palette, "PNG", transparency=0)).getpixel((1, 1)) == (255, 255, 255)
    colour = Image.new("RGB", (8, 8), (7, 7, 7))
    assert _decoded(encoded(colour, "PNG", transparency=(7, 7, 7))).getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_of_an_animation_the_first_frame_is_read(kind: str) -> None:
    first, *others = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "green"))
    data = encoded(first, kind, save_all=True, append_images=others)
    assert _is_red(_decoded(data).getpixel((8, 8)))


@given(width=st.integers(1, 120), height=st.integers(1, 120), pixels=st.integers(32, 80), share=st.integers(0, 40))
@settings(deadline=None, max_examples=60)
def test_tiles_cover_the_image_in_order(width: int, height: int, pixels: int, share: int) -> None:
    data = encoded(Image.new("L", (width, height)), "PNG")
    overlap = min(share, pixels // 2)
    places = images.segments(data, _tiles(pixels, overlap))
    assert all(before < after for before, after in pairwise(places))
    covered = np.zeros((height, width), dtype=bool)
    for start, end in places:
        tile = _decoded(data, (start, end))
        assert tile.size == (min(pixels, width), min(pixels, height))
        y, x = divmod(start, width)
        assert end == (y + tile.height - 1) * width + x + tile.width
        covered[y : y + tile.height, x : x + tile.width] = True
    assert covered.all()
    if width > pixels:
        columns = sorted({start % width for start, _ in places})
        assert all(before + pixels - after >= overlap for before, after in pairwise(columns))


def test_a_tile_shows_its_place() -> None:
    image = picture(100, 70)
    data = encoded(image, "PNG")
    places = images.segments(data, _tiles(40))
    assert len(places) == 6
    start, end = places[4]
    assert (start, end) == (30 * 100 + 40, 69 * 100 + 80)
    np.testing.assert_array_equal(np.asarray(_decoded(data, (start, end))), np.asarray(image.crop((40, 30, 80, 70))))


def test_tiles_are_512_pixels_by_themselves() -> None:
    data = encoded(Image.new("L", (513, 512)), "PNG")
    assert images.segments(data, chunking_spec("tiles", None, None, {}, "image")) == [
        (0, 511 * 513 + 512),
        (1, 513 * 512),
    ]


@pytest.mark.parametrize("place", [(0, 2401), (5, 2), (2400, 2500), (-1, 5), (30, 70)])
def test_a_place_that_is_no_part_of_the_image_is_rejected(place: tuple[int, int]) -> None:
    with pytest.raises(InputRejected, match="segment"):
        _decoded(encoded(picture(), "PNG"), place)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the image is empty"),
        (b"a text", "the file is a text, not an image"),
        ("schöner Text".encode() * 200, "the file is a text, not an image"),
        (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "the file is an SVG, not an image"),
        (b'<?xml version="1.0"?><!-- x --><svg width="9"/>', "the file is an SVG, not an image"),
        (b"%PDF-1.7 ", "the file is a PDF, not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "the file is a PostScript, not an image"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom", "the file is a video, not an image"),
        (b"\x1aE\xdf\xa3 webm", "the file is a video, not an image"),
        (b"RIFF\0\0\0\0WAVEfmt ", "the file is a WAV, not an image"),
        (b"\0\1\2\3", "the file is of no known type, not an image"),
        (b"\x89PNG\r\n\x1a\n", "the image cannot be decoded: it is damaged or cut short"),
    ],
)
def test_what_is_no_image_is_rejected_by_its_name(data: bytes, reason: str) -> None:
    assert _rejected(data) == reason


def test_formats_that_are_not_listed_are_never_opened() -> None:
    # Pillow would open each of these.
    for kind in ("PPM", "TGA", "ICNS", "PCX", "DDS", "JPEG2000", "ICO", "SGI", "EPS"):
        assert "not an image" in _rejected(encoded(picture(32, 32), kind))


def test_a_file_of_two_kinds_is_what_it_begins_as() -> None:
    script = encoded(picture(), "GIF") + b"/*'*/=1;alert(document.cookie)//"
    assert _decoded(script).size == (60, 40)
    jpeg = encoded(picture(), "JPEG")
    assert "a PDF" in _rejected(b"%PDF-1.4\n1 0 obj\nstream\n" + jpeg + b"\nendstream\n%%EOF")
    assert _decoded(jpeg + b"%PDF-1.4").size == (60, 40)
    assert "cannot be decoded" in _rejected(b"GIF89a/*" + jpeg)


def test_more_pixels_than_the_limit_are_rejected_by_the_header() -> None:
    assert "more than 50000000 pixels" in _rejected(png(60_000, 60_000, b"\0" * 100))
    assert "at most 50000000 are decoded" in _rejected(png(10_000, 5001, b"\0" * 100))


def test_a_jpeg_of_endless_passes_is_rejected() -> None:
    progressive = encoded(picture(), "JPEG", progressive=True)
    assert _decoded(progressive).size == (60, 40)
    start = progressive.rindex(b"\xff\xda")
    assert "passes" in _rejected(progressive[:-2] + progressive[start:-2] * 200 + b"\xff\xd9")


def test_a_file_over_the_limit_is_rejected_before_it_is_opened() -> None:
    assert "at most" in _rejected(encoded(picture(), "PNG") + b"\0" * MAX_MEDIA_BYTES)


def test_more_tiles_than_the_limit_are_rejected() -> None:
    data = encoded(Image.new("1", (7000, 7000)), "PNG")
    assert "tiles" in _rejected(data, _tiles(32))


@pytest.mark.parametrize("kind", _KINDS)
def test_a_file_that_is_cut_short_is_rejected_at_any_length(kind: str) -> None:
    data = encoded(picture(), kind)
    read = 0
    for length in range(0, len(data) - 1, max(1, len(data) // 60)):
        try:
            decoded = _decoded(data[:length])
        except InputRejected as error:
            assert error.message
        else:
            # Some files end with what no pixel needs.
            assert decoded.size == (60, 40)
            read += length < len(data) - 160
    assert read == 0


def test_a_decoded_image_does_not_keep_the_file() -> None:
    for kind in _KINDS:
        decoded = _decoded(encoded(picture(), kind))
        assert getattr(decoded, "fp", None) is None
        # It is whole without the file.
        assert decoded.resize((6, 4)).size == (6, 4) and decoded.copy().tobytes() == decoded.tobytes()
