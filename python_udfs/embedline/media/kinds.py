"""Tell what a file is from its first bytes, and refuse what no decoder may open."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from embedline.core.media import MAX_MEDIA_BYTES, Modality
from embedline.errors import EmbedlineError, InputRejected

IMAGES = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
RECORDINGS = ("WAV", "FLAC", "OGG", "MP3", "AIFF")
_ACCEPTED = {"image": IMAGES, "audio": RECORDINGS}
_NAMES = {"image": "image", "audio": "recording"}
_WITH_AN = ("AIFF", "AVIF", "MP3", "OGG", "SVG")
# First bytes of each kind. Those that are refused are here for the sake of the message.
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"fLaC", "FLAC"),
    (b"OggS", "OGG"),
    (b"%PDF", "PDF"),
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "PostScript"),
    (b"\x1aE\xdf\xa3", "video"),
    (b"PK\x03\x04", "ZIP archive"),
    (b"\x1f\x8b", "gzip archive"),
)
# Kinds inside a RIFF file, by the four bytes after its size.
_RIFF = {b"WAVE": "WAV", b"WEBP": "WEBP", b"AVI ": "video"}
# Bytes that are looked at for words of a text.
_HEAD = 1024


def kind_of(data: bytes, modality: Modality) -> str:
    """Return the kind of a file, for example "PNG".

    Raises InputRejected if it is none of this modality.
    """
    kind = _kind(data)
    if kind in _ACCEPTED[modality]:
        return kind
    noun = _NAMES[modality]
    if not data:
        raise InputRejected(f"the {noun} is empty")
    known = ", ".join(_ACCEPTED[modality])
    seen = f"{'an' if kind in _WITH_AN else 'a'} {kind}" if kind else "of no known type"
    raise InputRejected(f"the file is {seen}, not {'an' if noun == 'image' else 'a'} {noun}", hint=f"Use {known}.")


def require_size(data: bytes, modality: Modality) -> None:
    """Raise InputRejected if a file is larger than any that is embedded."""
    if len(data) > MAX_MEDIA_BYTES:
        raise InputRejected(
            f"the {_NAMES[modality]} has {len(data)} bytes; at most {MAX_MEDIA_BYTES} are embedded",
            hint="Store a smaller copy, and embed that.",
        )


@contextlib.contextmanager
def decoding(modality: Modality) -> Iterator[None]:
    """Turn any error of a decoder into InputRejected.

    The decoder's own words are left out, because some quote the file. A lack of memory passes: it may be that of the
    whole process.
    """
    try:
        yield
    except (EmbedlineError, MemoryError):
        raise
    except Exception as error:
        raise InputRejected(f"the {_NAMES[modality]} cannot be decoded: it is damaged or cut short") from error


def _kind(data: bytes) -> str:
    head = data[:_HEAD]
    if head[:4] in (b"RIFF", b"RIFX"):
        return _RIFF.get(head[8:12], "")
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return "AIFF"
    if head[4:8] == b"ftyp":
        # AVIF's brand may stand among the compatible ones, too.
        brands = head[8 : int.from_bytes(head[:4], "big")]
        return "AVIF" if b"avif" in brands or b"avis" in brands else "video"
    if head.startswith(b"ID3"):
        after = data[_id3_bytes(head) :]
        return "FLAC" if after.startswith(b"fLaC") else "MP3" if _is_mp3_frame(after.lstrip(b"\0")[:4]) else ""
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if _is_mp3_frame(head[:4]):
        return "MP3"
    return _text_kind(head)


def _text_kind(head: bytes) -> str:
    words = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if b"<svg" in words:
        return "SVG"
    if words.startswith((b"<!doctype html", b"<html")):
        return "web page"
    return "text" if head and b"\0" not in head and _is_text(head) else ""


def _is_text(head: bytes) -> bool:
    try:
        head.decode()
    except UnicodeDecodeError as error:
        # A character may be cut by the end of the head.
        return error.start >= _HEAD - 3
    return True


def _id3_bytes(head: bytes) -> int:
    """Return the bytes of a tag of an MP3 file. Its size has seven bits a byte."""
    size = 0
    for byte in head[6:10]:
        size = size << 7 | byte & 0x7F
    return 10 + size


def _is_mp3_frame(head: bytes) -> bool:
    """Return True for the header of a frame of MPEG layer III."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return False
    version, layer = head[1] >> 3 & 3, head[1] >> 1 & 3
    return version != 1 and layer == 1 and head[2] >> 4 != 15 and head[2] >> 2 & 3 != 3
