"""What holds for every chunker and every text: exact slices, room for the prefix, and time that grows with the text."""

from __future__ import annotations

import functools
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from embedline.chunking import METHODS, Chunk, ChunkingSpec
from embedline.chunking.chunk import Chunker, content_digest, nothing
from embedline.chunking.factory import make_chunker
from embedline.chunking.markdown import markdown_split
from embedline.chunking.measure import measure_of
from embedline.chunking.measured import Room
from embedline.core.tokens import CHARACTERS_PER_TOKEN
from support import MODELS

_MEASURED = tuple(method for method in METHODS if method != "none")
_MODELS = ("static-256", "minilm", None)
_WORDS = (
    *("word ", "sentence. ", "Really? ", "1. ", "e.g. this ", "...", "naïve ", "ß", "x" * 50),
    *("\n", "\n\n", "\r\n", "   ", "\t", "\u200b", "\u0301", "e\u0301", "\ufdfa", "漢字。", "👩‍👩‍👧", "👍🏽"),
    *(
        "# Head\n",
        "## Next\n\n",
        "Under\n---\n",
        "```\n# code\n```\n",
        "- item\n",
        "> quoted\n",
        "|a|b|\n",
        "[link](x) ",
    ),
)
_TEXTS = st.one_of(
    st.text(),
    st.text(alphabet="ab \n.", max_size=400),
    st.text(alphabet=" \n", max_size=80),
    st.lists(st.sampled_from(_WORDS), max_size=120).map("".join),
)


@functools.cache
def _tokenizer_text(model: str | None) -> str | None:
    if model is None:
        return None
    loaded = json.loads((MODELS / model / "tokenizer.json").read_text(encoding="utf-8"))
    return json.dumps({**loaded, "truncation": None, "padding": None})


@functools.cache
def _tokenizer(model: str) -> Tokenizer:
    return Tokenizer.from_str(_tokenizer_text(model))


def embed_by_length(texts: Sequence[str], breathe: Callable[[], None]) -> npt.NDArray[np.float32]:
    """Vectors that turn with the length of the text: enough for cuts to fall somewhere."""
    breathe()
    angles = np.array([len(text) for text in texts], dtype=np.float32)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


@functools.cache
def _chunker(method: str, model: str | None, tokens: int, overlap: int = 0) -> Chunker:
    return make_chunker(ChunkingSpec(method, tokens, overlap), _tokenizer_text(model), embed_by_length)


def _size(model: str | None, text: str) -> float:
    if model is None:
        return len(text) / CHARACTERS_PER_TOKEN
    return len(_tokenizer(model).encode(text, add_special_tokens=False).ids)


def _assert_slices(text: str, chunks: list[Chunk]) -> None:
    assert [chunk.sequence for chunk in chunks] == list(range(len(chunks)))
    for chunk in chunks:
        assert text[chunk.start : chunk.end] == chunk.content
        assert chunk.content
        assert chunk.digest == content_digest(chunk.content, chunk.prefix)
        assert chunk.content.strip() or len(chunks) == 1, "an empty text for the model"
    if text:
        assert (chunks[0].start, chunks[-1].end) == (0, len(text))
    else:
        assert chunks == []


@pytest.mark.parametrize("model", _MODELS)
@pytest.mark.parametrize("method", _MEASURED)
@settings(deadline=None, max_examples=60)
@given(
    text=_TEXTS,
    tokens=st.sampled_from([1, 2, 7, 32, 256]),
    prefix=st.sampled_from(["", "Title\n", "A long title " * 9]),
)
@example(text=".\x1b0A", tokens=1, prefix="")
def test_slices_without_overlap_rebuild_the_text(
    method: str, model: str | None, text: str, tokens: int, prefix: str
) -> None:
    chunks = _chunker(method, model, tokens)(text, prefix=prefix)
    _assert_slices(text, chunks)
    assert "".join(chunk.content for chunk in chunks) == text


@pytest.mark.parametrize("model", _MODELS)
@pytest.mark.parametrize("method", _MEASURED)
@settings(deadline=None, max_examples=60)
@given(
    text=_TEXTS,
    tokens=st.sampled_from([8, 32]),
    overlap=st.sampled_from([1, 4, 7]),
    prefix=st.sampled_from(["", "Title\n"]),
)
@example(text="000ࠀ\r!0\x80\x84𐀀", tokens=8, overlap=1, prefix="")
@example(text="0000? 0\n:00", tokens=8, overlap=4, prefix="Title\n")
@example(text="dorw     ddddddoooooorrrrrrwwwwww\ndorw \n   ßß\r\nword word", tokens=8, overlap=1, prefix="Title\n")
@example(text="00000\x80\x80𐀀𠀀𠀀𐀀", tokens=8, overlap=7, prefix="")
def test_slices_with_overlap_cover_the_text_in_order(
    method: str, model: str | None, text: str, tokens: int, overlap: int, prefix: str
) -> None:
    chunks = _chunker(method, model, tokens, overlap)(text, prefix=prefix)
    _assert_slices(text, chunks)
    for before, after in itertools.pairwise(chunks):
        assert before.start < after.start <= before.end
        assert before.end < after.end


@pytest.mark.parametrize("model", _MODELS)
@pytest.mark.parametrize("method", _MEASURED)
@settings(deadline=None, max_examples=60)
@given(
    text=_TEXTS,
    tokens=st.sampled_from([32, 64, 256]),
    prefix=st.sampled_from(["", "Title\n", "Title: ", "A long title " * 30]),
)
@example(text="\U00010000" * 15 + "\U0001d400", tokens=64, prefix="")
def test_no_chunk_with_its_prefix_is_longer_than_its_limit(
    method: str, model: str | None, text: str, tokens: int, prefix: str
) -> None:
    for chunk in _chunker(method, model, tokens)(text, prefix=prefix):
        assert _size(model, chunk.embedded_text) <= tokens
        assert prefix.startswith(chunk.prefix) or method == "markdown"


def test_a_chunk_of_another_script_keeps_to_its_limit() -> None:
    text = "0000" + "\U00010000" * 15
    chunks = _chunker("recursive", "static-256", 64)(text)
    assert "".join(chunk.content for chunk in chunks) == text
    assert all(_size("static-256", chunk.embedded_text) <= 64 for chunk in chunks)


def test_a_text_on_which_the_splitter_panics_is_cut_all_the_same() -> None:
    text = "dorw     ddddddoooooorrrrrrwwwwww\ndorw  \n  ßß\r\nword word"
    room = Room(capacity=17, overlap=2, prefix_capacity=6)
    measure = measure_of(None)
    spans = [span for span, _ in markdown_split(measure, text, room, nothing)]
    assert spans[0][0] == 0
    assert spans[-1][1] == len(text)
    assert all(end - start <= 17 for start, end in spans)
    assert all(after[0] <= before[1] for before, after in itertools.pairwise(spans))


_HOSTILE = {
    "one word": "x" * 240_000,
    "words in one line": "word " * 48_000,
    "white space": "a" + " " * 239_998 + "b",
    "line breaks": "a\n" * 120_000,
    "full stops": "a" + "." * 240_000,
    "abbreviations": "e.g. " * 48_000,
    "marks": "a" + "\u0301" * 72_000,
}


@pytest.mark.parametrize("kind", _HOSTILE)
@pytest.mark.parametrize("method", _MEASURED)
def test_a_long_text_without_structure_takes_time_that_grows_with_it(method: str, kind: str) -> None:
    """Three times the text takes about three times as long; nine times would be a square."""
    text = _HOSTILE[kind]
    chunker = _chunker(method, "minilm", 256)
    spent = []
    for part in (text[: len(text) // 3], text):
        # The process's own time: what else runs on the machine does not count.
        started = time.process_time()
        chunks = chunker(part)
        spent.append(time.process_time() - started)
        assert "".join(chunk.content for chunk in chunks) == part
    assert spent[1] < 6 * spent[0] + 0.5, spent


@pytest.mark.parametrize("method", _MEASURED)
def test_long_work_can_be_interrupted(method: str) -> None:
    calls = 0

    def on_piece() -> None:
        nonlocal calls
        calls += 1

    _chunker(method, "static-256", 256)("A few words. Another one follows.\n\n" * 10_000, on_piece)
    assert calls >= 5


@pytest.mark.parametrize("method", METHODS)
def test_a_short_text_is_one_chunk_at_once(method: str) -> None:
    chunker = make_chunker(
        ChunkingSpec(method, 256), _tokenizer_text("minilm"), None if method != "semantic" else _never
    )
    text = "Title\n\nA short row: what most tables hold."
    assert [(c.content, c.prefix) for c in chunker(text, prefix="In front: ")] == [(text, "In front: ")]
    calls = _python_calls(chunker, text)
    assert calls <= 20, calls  # all methods make 10 to 15, and 277 to 66,000 for a text of 200 times the length


def _never(texts: Sequence[str], breathe: Callable[[], None]) -> npt.NDArray[np.float32]:
    raise AssertionError("a text of one chunk needs no vectors of its sentences")


def _python_calls(chunker: Chunker, text: str) -> int:
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        chunker(text)
    finally:
        sys.setprofile(None)
    return calls
