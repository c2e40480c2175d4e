"""Without a tokenizer the size of a text is estimated by its scripts, and a chunk that is too long is cut in halves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedline.chunking import METHODS, Chunk, ChunkingSpec
from embedline.chunking.chunk import content_digest
from embedline.chunking.factory import make_chunker
from embedline.chunking.halves import cut_chunks, halves
from embedline.core.tokens import average_tokens, estimated_size

# Tokens a character that each text may have at most: the estimate must not be far below.
TEXTS = {
    "English": ("The database writes its pages to disk and reads them again.", 1 / 4),
    "Chinese": ("数据库把数据写入磁盘，然后读取它们。", 1.0),
    "Japanese": ("データベースはページをディスクに書き込みます。", 1.0),
    "Korean": ("데이터베이스는 페이지를 디스크에 씁니다.", 0.8),
    "Thai": ("ฐานข้อมูลเขียนหน้าลงดิสก์และอ่านอีกครั้ง", 1.0),
    "Arabic": ("تكتب قاعدة البيانات صفحاتها على القرص ثم تقرؤها", 0.8),
    "Hebrew": ("מסד הנתונים כותב את הדפים לדיסק", 0.8),
    "Hindi": ("डेटाबेस अपने पृष्ठ डिस्क पर लिखता है", 1.0),
    "Greek": ("Η βάση δεδομένων γράφει τις σελίδες της", 0.8),
    "Russian": ("База данных записывает страницы на диск", 0.5),
    "emoji": ("😀🎉🚀👩‍👩‍👧", 1.5),
}


@pytest.mark.parametrize("script", TEXTS)
def test_the_estimate_knows_scripts(script: str) -> None:
    text, tokens_a_character = TEXTS[script]
    assert estimated_size(text) / 3 >= tokens_a_character * len(text)


def test_latin_text_is_estimated_as_before() -> None:
    text = "Ein längerer Satz – mit “Anführungen” und Gedankenstrichen… "
    assert estimated_size(text) == len(text)
    assert average_tokens("word " * 100) == 125


@pytest.mark.parametrize("script", TEXTS)
@pytest.mark.parametrize("method", [method for method in METHODS if method not in ("none", "semantic")])
def test_chunks_of_every_method_keep_to_the_estimate(method: str, script: str) -> None:
    text = (TEXTS[script][0] + "\n") * 40
    chunks = make_chunker(ChunkingSpec(method, 32), None, None)(text)
    assert "".join(chunk.content for chunk in chunks) == text
    assert max(estimated_size(chunk.prefix + chunk.content.strip()) for chunk in chunks) <= 3 * 32


def _chunk(content: str, start: int = 0, prefix: str = "") -> Chunk:
    return Chunk(0, start, start + len(content), content, content_digest(content, prefix), prefix)


@given(st.text(alphabet="ab \n.漢é", min_size=1, max_size=700), st.integers(0, 50), st.sampled_from(["", "p: "]))
def test_halves_are_two_slices_with_something_in_them(content: str, start: int, prefix: str) -> None:
    chunk = _chunk(content, start, prefix)
    found = halves(chunk)
    if found is None:
        assert estimated_size(content.strip()) < 2 * 96
        return
    first, second = found
    assert first.content + second.content == content
    assert first.content.strip()
    assert second.content.strip()
    assert (first.start, first.end, second.end) == (start, second.start, start + len(content))
    assert {half.prefix for half in found} == {prefix}
    assert all(half.digest == content_digest(half.content, prefix) for half in found)
    assert halves(chunk) == found
    sizes = [estimated_size(half.content.strip()) for half in found]
    assert max(sizes) <= 0.7 * estimated_size(content)


def test_cutting_numbers_the_chunks_again_and_stops_at_the_floor() -> None:
    long, short = _chunk("word " * 100), _chunk("short", 500)
    found = cut_chunks([long, short], {long.digest})
    assert found is not None
    assert [chunk.sequence for chunk in found] == [0, 1, 2]
    assert cut_chunks([long, short], {short.digest}) is None
