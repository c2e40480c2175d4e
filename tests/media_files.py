"""Make images and recordings as people store them."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import soundfile
from PIL import Image


def picture(width: int = 60, height: int = 40) -> Image.Image:
    """Return an image with a gradient, and a red mark in its upper left corner."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 // max(1, width - 1), y * 255 // max(1, height - 1), (x + y) % 256], axis=2)
    image = Image.fromarray(pixels.astype(np.uint8))
    image.paste((255, 0, 0), (0, 0, max(1, width // 3), max(1, height // 3)))
    return image


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Return the file of an image."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, pixels: bytes) -> bytes:
    """Return a PNG whose header tells this size, whatever its pixels are."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def tone(seconds: float, rate: int = 16_000, hertz: float = 440.0) -> np.ndarray:
    """Return samples of a sine wave at half of full scale."""
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def recorded(samples: np.ndarray, rate: int = 16_000, kind: str = "WAV", subtype: str | None = None) -> bytes:
    """Return the file of a recording."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()
