"""Decode hostile files in a process of little memory.

Prints how each case ended, as JSON. The caller reads an exit status other than 0 as a crash of a decoder.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Iterator

import numpy as np
from PIL import Image

from embedline.chunking.spec import chunking_spec
from embedline.core.media import MediaPart, Modality
from embedline.errors import InputRejected
from embedline.media import audio, images
from media_files import encoded, picture, png, recorded, tone

# Bytes of address space: libraries and threads reserve about 600 MB.
MEMORY = 1200 << 20
_SEED = 20
# Segments of each file that are decoded.
_SEGMENTS = 2
_RECIPES = {
    "image": chunking_spec("tiles", None, None, {"tile_pixels": 800}, "image"),
    "audio": chunking_spec("silence", None, None, {}, "audio"),
}


def _ends(modality: Modality, data: bytes) -> str:
    """Decode each segment; return "decoded" or the reason."""
    try:
        module = images if modality == "image" else audio
        for start, end in module.segments(data, _RECIPES[modality])[:_SEGMENTS]:
            part = MediaPart(modality, data, start, end)
            found = images.picture(part).size[0] if modality == "image" else len(audio.samples(part, 16_000))
            assert found > 0
    except InputRejected as error:
        assert error.message and "\n" not in error.message
        return "rejected"
    return "decoded"


def _originals() -> Iterator[tuple[str, Modality, bytes]]:
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"):
        yield kind, "image", encoded(picture(), kind)
    yield "progressive JPEG", "image", encoded(picture(), "JPEG", progressive=True)
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        yield compression, "image", encoded(picture(), "TIFF", compression=compression)
    for kind, subtype in (
        ("WAV", None),
        ("FLAC", None),
        ("OGG", "VORBIS"),
        ("OGG", "OPUS"),
        ("MP3", None),
        ("AIFF", None),
    ):
        yield subtype or kind, "audio", recorded(tone(0.3), kind=kind, subtype=subtype)


def fuzz(tries: int) -> dict[str, dict[str, int]]:
    """Change bytes of files of each kind."""
    rng = np.random.default_rng(_SEED)
    ends: dict[str, dict[str, int]] = {}
    for name, modality, original in _originals():
        counts = ends.setdefault(name, {"decoded": 0, "rejected": 0})
        for number in range(tries):
            data = bytearray(original)
            # Headers matter most, so that half of the changes lie in the first bytes.
            reach = len(data) if number % 2 else min(len(data), 200)
            for place in rng.integers(0, reach, rng.integers(1, 6)):
                data[place] = rng.integers(0, 256)
            counts[_ends(modality, bytes(data))] += 1
    return ends


def bombs() -> dict[str, str]:
    """Decode small files that tell of many pixels or samples."""
    side = 7000
    grey = Image.new("L", (side, side))
    cases: list[tuple[str, Modality, bytes]] = [
        ("png of 3.6 billion pixels", "image", png(60_000, 60_000, b"")),
        ("png of 49 million pixels", "image", encoded(grey, "PNG")),
        ("png of 49 million transparent pixels", "image", encoded(Image.new("RGBA", (side, side)), "PNG")),
        ("gif of 49 million pixels", "image", encoded(grey, "GIF")),
        ("tiff of 49 million pixels", "image", encoded(grey, "TIFF", compression="tiff_adobe_deflate")),
        ("tiff of 49 million real numbers", "image", encoded(grey.convert("F"), "TIFF", compression="tiff_lzw")),
        ("jpeg of 49 million pixels", "image", encoded(grey.convert("CMYK"), "JPEG")),
        ("webp of 49 million pixels", "image", encoded(grey.convert("RGB"), "WEBP", lossless=True, method=0)),
        ("flac of an hour", "audio", recorded(np.zeros(3600 * 8000, dtype=np.int16), 8000, "FLAC")),
        ("flac of three hours", "audio", recorded(np.zeros(10_800 * 1000, dtype=np.int16), 1000, "FLAC")),
    ]
    del grey
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    ends = {}
    for name, modality, data in cases:
        since = time.monotonic()
        ends[name] = _ends(modality, data)
        if "-v" in sys.argv:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            print(name, len(data), ends[name], round(time.monotonic() - since, 2), "s", peak, "MB", file=sys.stderr)
    return ends


if __name__ == "__main__":
    if sys.argv[1] == "fuzz":
        # Decoders warn of damaged files.
        os.close(2)
        os.open(os.devnull, os.O_WRONLY)
        print(json.dumps(fuzz(int(sys.argv[2]))))
    else:
        print(json.dumps(bombs()))
