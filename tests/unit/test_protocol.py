"""Frames of the model host protocol."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedline.model_host import protocol
from embedline.model_host.protocol import FrameDecoder, ProtocolError, encode_frame, pack_texts, unpack_texts

TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=20)


@given(frames=st.lists(st.tuples(st.integers(), st.binary(max_size=200)), max_size=6), piece=st.integers(1, 50))
def test_frames_survive_any_cut_of_the_stream(frames: list[tuple[int, bytes]], piece: int) -> None:
    stream = b"".join(encode_frame({"id": number}, payload) for number, payload in frames)
    decoder = FrameDecoder()
    found = [
        (frame.header["id"], frame.payload)
        for start in range(0, len(stream), piece)
        for frame in decoder.feed(stream[start : start + piece])
    ]
    assert found == frames


@given(texts=TEXTS)
def test_texts_survive(texts: list[str]) -> None:
    lengths, payload = pack_texts(texts)
    assert unpack_texts(json.loads(json.dumps(lengths)), payload) == texts


@pytest.mark.parametrize(
    ("header_bytes", "payload_bytes"),
    [(0, 0), (1, 0), (protocol.MAX_HEADER_BYTES + 1, 0), (2, protocol.MAX_PAYLOAD_BYTES + 1), (2**32 - 1, 2**32 - 1)],
)
def test_lengths_out_of_bounds_are_refused_before_the_body_is_waited_for(header_bytes: int, payload_bytes: int) -> None:
    with pytest.raises(ProtocolError, match="bytes"):
        list(FrameDecoder().feed(struct.pack(">II", header_bytes, payload_bytes)))


@pytest.mark.parametrize("header", [b"nonsense", b"[1, 2]", b'"text"', b"\xff\xfe{}", b"[" * 100_000])
def test_a_header_that_is_no_json_object_is_refused(header: bytes) -> None:
    with pytest.raises(ProtocolError, match="header"):
        list(FrameDecoder().feed(struct.pack(">II", len(header), 0) + header))


def test_a_frame_that_the_other_side_would_refuse_is_not_sent() -> None:
    with pytest.raises(ProtocolError, match="payload"):
        encode_frame({}, bytes(protocol.MAX_PAYLOAD_BYTES + 1))


@pytest.mark.parametrize(
    ("lengths", "payload"),
    [
        (None, b""),
        ("ab", b"ab"),
        ([1.0], b"a"),
        ([True], b"a"),
        ([-1, 2], b"a"),
        ([3], b"ab"),
        ([1], b"ab"),
        ([1, 1], "é".encode()),
    ],
)
def test_lengths_that_do_not_fit_the_payload_are_refused(lengths: object, payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        unpack_texts(lengths, payload)
