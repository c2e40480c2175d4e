"""Where each chunker cuts."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest
from tokenizers import Tokenizer

from embedline.chunking import Chunk, ChunkingSpec, chunking_spec
from embedline.chunking.factory import make_chunker
from embedline.chunking.markdown import heading_paths
from embedline.chunking.semantic import cuts, neighbour_distances
from embedline.chunking.sentences import sentence_spans
from embedline.errors import InvalidParameter
from support import MODELS


@functools.cache
def _tokenizer_text() -> str:
    loaded = json.loads((MODELS / "minilm" / "tokenizer.json").read_text(encoding="utf-8"))
    return json.dumps({**loaded, "truncation": None, "padding": None})


def _chunks(method: str, text: str, tokens: int, overlap: int = 0, prefix: str = "", **options: float) -> list[Chunk]:
    spec = ChunkingSpec(method, tokens, overlap, tuple(options.items()))
    return make_chunker(spec, _tokenizer_text(), _embed_by_first_word)(text, prefix=prefix)


def _texts(chunks: Sequence[Chunk]) -> list[str]:
    return [chunk.content.strip() for chunk in chunks]


def _embed_by_first_word(texts: Sequence[str], breathe: Callable[[], None]) -> npt.NDArray[np.float32]:
    """One direction for each first word, with a little of what the second word is."""
    subjects = {"Rivers": 0, "Rockets": 1, "Violins": 2}
    matrix = np.zeros((len(texts), 4), dtype=np.float32)
    for i, text in enumerate(texts):
        matrix[i, subjects[text.split()[0]]] = 1
        matrix[i, 3] = 0.01 * len(text)
    return matrix


# --- spec


@pytest.mark.parametrize(
    ("method", "tokens", "overlap", "options", "words"),
    [
        ("magic", 256, 0, {}, "not known"),
        ("recursive", 0, 0, {}, "chunk_tokens"),
        ("recursive", None, 0, {}, "chunk_tokens"),
        ("fixed", 10, 10, {}, "chunk_overlap"),
        ("fixed", 10, -1, {}, "chunk_overlap"),
        ("recursive", 256, 0, {"percentile": 90}, '"percentile"'),
        ("semantic", 256, 0, {"percentile": 100}, '"percentile"'),
        ("semantic", 256, 0, {"percentile": True}, '"percentile"'),
        ("semantic", 256, 0, {"percentile": "95"}, '"percentile"'),
        ("semantic", 256, 0, {"buffer": 1}, '"buffer"'),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused_with_a_hint(
    method: str, tokens: int | None, overlap: int, options: dict[str, object], words: str
) -> None:
    with pytest.raises(InvalidParameter, match=words) as caught:
        chunking_spec(method, tokens, overlap, options)
    assert caught.value.hint


def test_none_measures_nothing() -> None:
    assert chunking_spec("none", 256, 0, {}) == ChunkingSpec("none")


def test_semantic_without_a_model_is_refused() -> None:
    with pytest.raises(InvalidParameter, match="semantic"):
        make_chunker(ChunkingSpec("semantic", 256), None, None)


# --- prefix


def test_the_prefix_is_embedded_and_not_stored_in_the_content() -> None:
    (chunk,) = _chunks("recursive", "  The body. ", 256, prefix="Title\n")
    assert (chunk.content, chunk.prefix, chunk.embedded_text) == ("  The body. ", "Title\n", "Title\nThe body.")


def test_the_same_content_under_another_prefix_is_another_chunk() -> None:
    plain, titled, other = (_chunks("recursive", "The body.", 256, prefix=p)[0] for p in ("", "One\n", "Two\n"))
    assert len({plain.digest, titled.digest, other.digest}) == 3


def test_a_prefix_that_is_too_long_leaves_half_of_the_chunk_to_the_content() -> None:
    text = "A sentence of six words stands here. " * 40
    chunks = _chunks("recursive", text, 32, prefix="word " * 100)
    tokenizer = Tokenizer.from_str(_tokenizer_text())
    for chunk in chunks:
        assert len(tokenizer.encode(chunk.prefix, add_special_tokens=False)) == 16
        assert len(tokenizer.encode(chunk.embedded_text, add_special_tokens=False)) <= 32
    assert "".join(chunk.content for chunk in chunks) == text


# --- sentences


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ('He said "Stop." Then he left.', ['He said "Stop."', "Then he left."]),
        ("It costs 3.50 or e.g. less. Really?! Yes.", ["It costs 3.50 or e.g. less.", "Really?!", "Yes."]),
        ("Wait... and see. Now", ["Wait... and see.", "Now"]),
        ("if a != b, then a?.b is read. Next", ["if a != b, then a?.b is read.", "Next"]),
        ("A line that is\nwrapped by hand. Next", ["A line that is\nwrapped by hand.", "Next"]),
        ("A heading\n\nA paragraph\n \r\nAnother", ["A heading", "A paragraph", "Another"]),
        ("1. Open the lid. 2. Close it.", ["1. Open the lid.", "2. Close it."]),
        ("That was in 1999. Then more.", ["That was in 1999.", "Then more."]),
        ("今日は晴れ。明日は雨!「本当?」はい。", ["今日は晴れ。", "明日は雨!「本当?」はい。"]),
        ("今日は晴れ。明日は雨！「本当？」はい。", ["今日は晴れ。", "明日は雨！", "「本当？」", "はい。"]),
        ("यह एक वाक्य है। यह दूसरा है।", ["यह एक वाक्य है।", "यह दूसरा है।"]),
        ("هل هذا سؤال؟ نعم.", ["هل هذا سؤال؟", "نعم."]),
        ("\n\nA beginning. An end.\n", ["A beginning.", "An end."]),
        ("", []),
    ],
)
def test_sentences_end_where_a_reader_sees_an_end(text: str, sentences: list[str]) -> None:
    spans = list(sentence_spans(text))
    assert [text[start:end].strip() for start, end in spans] == sentences
    assert "".join(text[start:end] for start, end in spans) == text


def test_whole_sentences_are_packed() -> None:
    sentences = [f"Sentence number {n} is short." for n in range(12)]
    chunks = _chunks("sentences", " ".join(sentences), 19)
    assert _texts(chunks) == [" ".join(sentences[i : i + 3]) for i in range(0, 12, 3)]


def test_an_overlap_repeats_whole_sentences() -> None:
    sentences = [f"Sentence number {n} is short." for n in range(5)]
    chunks = _chunks("sentences", " ".join(sentences), 19, overlap=7)
    assert _texts(chunks) == [" ".join(sentences[0:3]), " ".join(sentences[2:5])]


def test_a_sentence_that_is_longer_than_a_chunk_is_split_and_its_neighbours_stay_whole() -> None:
    long = "word " * 50 + "end."
    texts = _texts(_chunks("sentences", f"First one. {long} Last one.", 20))
    assert texts[0].startswith("First one.")
    assert texts[-1].endswith("Last one.")
    assert " ".join(texts) == f"First one. {long} Last one."


# --- markdown

_GUIDE = """# Guide

{filler}

## Install

{filler}

```sh
# not a heading
make install
```

{filler}

Use
---

{filler}

### `psql` and **friends** #

{filler}

> # quoted

{filler}
"""


def test_each_chunk_carries_the_headings_above_it() -> None:
    filler = "Some words of this part of the guide, enough to fill a chunk of their own. " * 3
    chunks = _chunks("markdown", _GUIDE.format(filler=filler), 64)
    paths = {chunk.prefix for chunk in chunks}
    assert paths == {
        "", "Guide\n\n", "Guide > Install\n\n", "Guide > Use\n\n", "Guide > Use > psql and friends\n\n",
    }  # fmt: skip
    for chunk in chunks:
        if "make install" in chunk.content:
            assert chunk.prefix == "Guide > Install\n\n"
        if chunk.content.lstrip().startswith("## Install"):
            assert chunk.prefix == "Guide\n\n"
        if "# quoted" in chunk.content:
            assert chunk.prefix == "Guide > Use > psql and friends\n\n"


def test_the_documents_prefix_stands_before_the_headings() -> None:
    filler = "Some words of this part of the guide, enough to fill a chunk of their own. " * 3
    chunks = _chunks("markdown", _GUIDE.format(filler=filler), 64, prefix="Manual\n")
    assert chunks[0].prefix == "Manual\n"
    assert "Manual\nGuide > Install\n\n" in {chunk.prefix for chunk in chunks}


def test_a_path_that_is_too_long_keeps_its_innermost_headings() -> None:
    text = "# " + "Outermost words " * 8 + "\n\n## Inner\n\n" + "Some words to fill it. " * 40
    chunks = _chunks("markdown", text, 32)
    assert chunks[-1].prefix == "Inner\n\n"


def test_markdown_of_one_chunk_has_no_path() -> None:
    assert [chunk.prefix for chunk in _chunks("markdown", "# Guide\n\nShort.", 64)] == [""]


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ("# A\n## B\n# C\n### D\n## E", ["A", "A/B", "C", "C/D", "C/E"]),
        ("A\n=\r\n\r\nB\n-\n", ["A", "A/B"]),
        ("a\n# A\n\n    # code\n", ["A"]),
        ("#hashtag\n\n####### seven\n", []),
        ("~~~\n# code\n~~~\n# A", ["A"]),
        ("---\ntitle: x\n---\n# A\n", ["A"]),
        ("- # in a list\n\n<div>\n# in html\n</div>\n\n# A", ["A"]),
        ("# [A](b) *c* `d`\n\n#\n", ["A c d", ""]),
    ],
)
def test_headings_are_those_of_commonmark(text: str, paths: list[str]) -> None:
    found = list(heading_paths(text, lambda: None))
    assert ["/".join(heading.path) for heading in found] == paths
    for heading in found:
        line = text[heading.start :].splitlines()[0]
        assert line.lstrip().startswith("#") or heading.path[-1] in line


def test_headings_of_a_long_document_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsed window by window, with a fence longer than a window and blocks across the windows' ends."""
    text = "".join(
        f"# Head {n}\n\nText of it\nin two lines.\n\nUnder {n}\n=====\n\n```\n# code\n\n{'x' * (n * 7 % 300)}\n```\n\n"
        "- a\n\n  b\n\n"
        for n in range(60)
    )
    whole = list(heading_paths(text, lambda: None))
    assert len(whole) == 120
    for size in (40, 101, 977):
        monkeypatch.setattr("embedline.chunking.markdown._WINDOW_CHARACTERS", size)
        assert list(heading_paths(text, lambda: None)) == whole
        crlf = list(heading_paths(text.replace("\n", "\r\n"), lambda: None))
        assert [heading.path for heading in crlf] == [heading.path for heading in whole]


# --- fixed


def test_fixed_chunks_have_exactly_the_tokens_asked_for() -> None:
    tokenizer = Tokenizer.from_str(_tokenizer_text())
    text = "Every chunk but the last has the same number of tokens, wherever a sentence ends. " * 20
    chunks = _chunks("fixed", text, 16)
    counts = [len(tokenizer.encode(chunk.content, add_special_tokens=False)) for chunk in chunks]
    assert set(counts[:-1]) == {16}
    assert counts[-1] <= 16


def test_fixed_overlap_repeats_tokens() -> None:
    words = [f"w{n}" for n in range(10)]
    text = " ".join(words)
    size = len(Tokenizer.from_str(_tokenizer_text()).encode("w1", add_special_tokens=False))
    assert _texts(_chunks("fixed", text, 4 * size, overlap=size)) == ["w0 w1 w2 w3", "w3 w4 w5 w6", "w6 w7 w8 w9"]


@pytest.mark.parametrize("character", ["👩‍👩‍👧", "👍🏽", "e\u0301", "\r\n", "ก็"])
def test_fixed_never_cuts_within_a_character(character: str) -> None:
    text = f"a{character}" * 50
    for tokens in (1, 2, 3, 5):
        for tokenizer in (_tokenizer_text(), None):
            chunks = make_chunker(ChunkingSpec("fixed", tokens), tokenizer, None)(text)
            joined = "|".join(chunk.content for chunk in chunks)
            assert joined.count(character) == 50
            assert "".join(chunk.content for chunk in chunks) == text


# --- semantic


def test_semantic_chunks_end_where_the_subject_changes() -> None:
    rivers = "Rivers flow to the sea. Rivers carry sand and stones. Rivers freeze in a cold winter."
    rockets = "Rockets fly to the moon. Rockets burn hydrogen and oxygen."
    violins = "Violins have four strings. Violins are made of spruce and maple."
    chunks = _chunks("semantic", f"{rivers} {rockets} {violins}", 32, percentile=70)
    assert _texts(chunks) == [rivers, rockets, violins]


def test_a_subject_longer_than_a_chunk_is_packed_into_several() -> None:
    text = "Rivers flow to the sea. " * 20 + "Rockets fly to the moon. " * 2
    chunks = _chunks("semantic", text, 32)
    assert len(chunks) > 4
    assert _texts(chunks)[-1] == "Rockets fly to the moon. Rockets fly to the moon."


def test_distances_are_one_minus_the_cosine() -> None:
    matrix = np.array([[1, 0], [3, 3], [0, 0], [0, 2], [np.nan, 1]], dtype=np.float64)
    assert np.allclose(neighbour_distances(matrix), [1 - np.sqrt(0.5), 0, 0, 0])


def test_cuts_follow_distances_above_the_percentile() -> None:
    assert cuts(np.array([0.1, 0.9, 0.2, 0.8, 0.1]), 60) == [2, 4]
    assert cuts(np.full(50, 0.3), 95) == []
    assert cuts(np.array([0.3]), 95) == []
    assert cuts(np.empty(0), 95) == []


def test_sentences_are_embedded_in_blocks_and_the_cuts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f"{('Rivers', 'Rockets', 'Violins')[n // 7 % 3]} number {n} is here. " for n in range(200))
    whole = _chunks("semantic", text, 64, percentile=80)
    monkeypatch.setattr("embedline.chunking.semantic._SENTENCES_PER_BLOCK", 3)
    assert _chunks("semantic", text, 64, percentile=80) == whole
