"""Encode and decode frames between a backend and the model host.

A frame is a length-prefixed JSON header, then raw bytes:

    4 bytes  length of the header, big-endian
    4 bytes  length of the payload, big-endian
    header   a JSON object, UTF-8
    payload  the texts or files of a request one after another, or the float32 values of an answer

Pure: there are no sockets here. A frame that breaks a rule raises ProtocolError. The connection is then closed, because
the start of the next frame is lost.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from embedline.core.media import MediaPart

# Part of the socket's name, so that sessions of an upgraded package do not meet a host with the old form.
PROTOCOL_VERSION = 2
MAX_HEADER_BYTES = 1 << 20
MAX_PAYLOAD_BYTES = 64 << 20
_LENGTHS = struct.Struct(">II")


class ProtocolError(Exception):
    """The bytes are not a frame of the model host protocol."""


@dataclass(frozen=True)
class Frame:
    """One message: the header as a JSON object and the bytes that follow it."""

    header: dict[str, Any]
    payload: bytes = b""


def encode_frame(header: dict[str, Any], payload: bytes = b"") -> bytes:
    """Return the frame's bytes.

    Raises ProtocolError for a frame that the other side would refuse.
    """
    encoded = json.dumps(header, separators=(",", ":")).encode()
    _check_lengths(len(encoded), len(payload))
    return b"".join((_LENGTHS.pack(len(encoded), len(payload)), encoded, payload))


def _check_lengths(header_bytes: int, payload_bytes: int) -> None:
    if not 2 <= header_bytes <= MAX_HEADER_BYTES:
        raise ProtocolError(f"a header of {header_bytes} bytes is outside 2 to {MAX_HEADER_BYTES}")
    if payload_bytes > MAX_PAYLOAD_BYTES:
        raise ProtocolError(f"a payload of {payload_bytes} bytes is longer than {MAX_PAYLOAD_BYTES}")


class FrameDecoder:
    """Cut a byte stream into frames; bytes may come in pieces of any size."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Take the bytes and yield every complete frame; raises ProtocolError."""
        self._buffer += data
        while (frame := self._next()) is not None:
            yield frame

    def _next(self) -> Frame | None:
        if len(self._buffer) < _LENGTHS.size:
            return None
        header_bytes, payload_bytes = _LENGTHS.unpack_from(self._buffer)
        # Checked before the body arrives, because a wrong length would otherwise fill the memory.
        _check_lengths(header_bytes, payload_bytes)
        payload_start = _LENGTHS.size + header_bytes
        end = payload_start + payload_bytes
        if len(self._buffer) < end:
            return None
        header = _parse_header(bytes(self._buffer[_LENGTHS.size : payload_start]))
        payload = bytes(self._buffer[payload_start:end])
        del self._buffer[:end]
        return Frame(header, payload)


def _parse_header(encoded: bytes) -> dict[str, Any]:
    try:
        header = json.loads(encoded)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("the header is not JSON") from error
    if not isinstance(header, dict):
        raise ProtocolError("the header is not a JSON object")
    return header


def pack_texts(texts: Sequence[str]) -> tuple[list[int], bytes]:
    """Return the byte length of each text, and all texts as one payload.

    Raises UnicodeEncodeError on a surrogate.
    """
    encoded = [text.encode() for text in texts]
    return [len(item) for item in encoded], b"".join(encoded)


def unpack_texts(lengths: object, payload: bytes) -> list[str]:
    """Undo pack_texts.

    Raises ProtocolError if lengths and payload do not belong together.
    """
    try:
        return [text.decode() for text in unpack_files(lengths, payload)]
    except UnicodeDecodeError as error:
        raise ProtocolError("a text is not UTF-8") from error


def unpack_files(lengths: object, payload: bytes) -> list[bytes]:
    """Return the pieces of a payload.

    Raises ProtocolError if lengths and payload do not belong together.
    """
    if not isinstance(lengths, list) or not all(type(length) is int and length >= 0 for length in lengths):
        raise ProtocolError("the text lengths are not a list of natural numbers")
    if sum(lengths) != len(payload):
        raise ProtocolError("the text lengths do not add up to the payload")
    pieces, start = [], 0
    for length in lengths:
        pieces.append(payload[start : start + length])
        start += length
    return pieces


def pack_media(parts: Sequence[MediaPart]) -> tuple[dict[str, Any], bytes]:
    """Return the header's fields for segments, and their files as one payload.

    Each file stands there once.
    """
    places: dict[int, int] = {}
    files: list[bytes] = []
    listed = []
    for part in parts:
        if id(part.data) not in places:
            places[id(part.data)] = len(files)
            files.append(part.data)
        listed.append([part.modality, places[id(part.data)], part.start, part.end])
    return {"lengths": list(map(len, files)), "media": listed}, b"".join(files)


def unpack_media(listed: object, lengths: object, payload: bytes) -> list[MediaPart]:
    """Undo pack_media; raises ProtocolError."""
    files = unpack_files(lengths, payload)
    parts = []
    for entry in listed if isinstance(listed, list) else [None]:
        match entry:
            case [("image" | "audio") as modality, int(place), int(start), int(end)] if 0 <= place < len(files):
                parts.append(MediaPart(modality, files[place], start, end))
            case _:
                raise ProtocolError("a segment is not a modality, a file and a place")
    return parts
