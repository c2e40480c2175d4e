"""Define images and recordings on their way to a model."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from embedline.errors import InputRejected, InvalidParameter

Modality = Literal["text", "image", "audio"]
# What a pipeline's content can be besides text.
MEDIA: tuple[Modality, ...] = ("image", "audio")
# Bytes of the largest value that is embedded. A request to the model host carries at most 64 MiB.
MAX_MEDIA_BYTES = 32 << 20
# Bytes of media for each token of a request, so that a request of the default 300,000 tokens carries at most 37 MiB.
_BYTES_PER_TOKEN = 128
# Work that a segment counts as when a slice for the model is filled, in characters of a text. A small vision transformer
# reads 50 to 200 patches of an image, and a token counts as four characters.
_WORK_CHARACTERS = 400
# First bytes of FLAC, Ogg and AIFF.
_RECORDINGS = (b"fLaC", b"OggS", b"FORM")


@dataclass(frozen=True, slots=True)
class MediaPart:
    """One segment of an image or a recording: what a model reads in place of a text.

    `start` and `end` are its place in the whole, in milliseconds of a recording. In an image they are pixels, counted
    row by row as y × width + x, from the first pixel to one past the last. (0, 0) is the whole. `data` is the file as
    it is stored; only the model host decodes it.
    """

    modality: Modality
    data: bytes
    start: int = 0
    end: int = 0
    # True while `data` is the content of a row that holds an address; see core.file_addresses.
    is_address: bool = False

    @property
    def tokens(self) -> int:
        """Return the size by which requests are packed, in tokens."""
        return max(1, len(self.data) // _BYTES_PER_TOKEN)

    def __len__(self) -> int:
        """Return the model's work in characters, the same for each segment."""
        return _WORK_CHARACTERS


# What a model makes a vector of.
ModelInput = str | MediaPart


def media_digest(data_digest: bytes, start: int, end: int) -> bytes:
    """Return what identifies a segment: 16 bytes of a SHA-256.

    It stands in the column content_hash. `data_digest` is the SHA-256 of the whole file. Captions are left out,
    because no model reads them.
    """
    return hashlib.sha256(data_digest + f"{start} {end}".encode()).digest()[:16]


def only_texts(inputs: Sequence[ModelInput]) -> list[str]:
    """Return inputs that are all texts; raise InputRejected for a segment of media."""
    texts = [given for given in inputs if isinstance(given, str)]
    if len(texts) < len(inputs):
        raise InputRejected("this provider embeds texts only")
    return texts


def modality_of(data: bytes, modalities: Collection[str]) -> Modality:
    """Return what a file is by its first bytes.

    If the model takes only images or only recordings, it is that.
    """
    media: list[Modality] = [known for known in MEDIA if known in modalities]
    if len(media) == 1:
        return media[0]
    # A frame of MP3 begins with eleven bits that are set; a JPEG begins otherwise.
    is_mp3 = data[:3] == b"ID3" or (data[:1] == b"\xff" and data[1:2] >= b"\xe0")
    return "audio" if is_mp3 or data[:4] in _RECORDINGS or data[8:12] == b"WAVE" else "image"


def harmless_input(modalities: Collection[str], text: str) -> ModelInput:
    """Return a small input that a model of these modalities takes.

    It is the text, a white image or a silent recording.
    """
    if "text" in modalities:
        return text
    return MediaPart("image", _white_png()) if "image" in modalities else MediaPart("audio", _silent_wav())


def _white_png(side: int = 32) -> bytes:
    rows = zlib.compress((b"\0" + b"\xff" * 3 * side) * side)
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _silent_wav(seconds: int = 2, rate: int = 16_000) -> bytes:
    samples = bytes(2 * seconds * rate)
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, rate, 2 * rate, 2, 16)
    body = b"WAVE" + form + b"data" + struct.pack("<I", len(samples)) + samples
    return b"RIFF" + struct.pack("<I", len(body)) + body


def require_modality(modality: str) -> Modality:
    """Return the modality of that name or raise InvalidParameter."""
    for known in ("text", *MEDIA):
        if modality == known:
            return known
    raise InvalidParameter(f'modality "{modality}" is not known', hint="Use one of text, image, audio.")
