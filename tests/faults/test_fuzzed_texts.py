"""Texts of every kind, through the whole pipeline: each is stored with its own vector, or given up with its reason."""

from __future__ import annotations

import base64
import random
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import psycopg
import pytest

from stub_provider import StubProvider, vector_of
from support import assert_exact, create_pipeline, drain, scalar

DIMENSIONS = 8
# Of the random texts. Change it here to try others.
SEED = 17


def _of_every_plane(chance: random.Random) -> Iterator[str]:
    """Yield texts of code points of each plane; surrogates are none, and PostgreSQL knows no NUL."""
    for plane in range(17):
        for _ in range(12):
            points = [chance.randrange(plane << 16, (plane + 1) << 16) for _ in range(chance.randrange(1, 120))]
            yield "".join(chr(point) for point in points if point and not 0xD800 <= point <= 0xDFFF)


def _odd(chance: random.Random) -> Iterator[str]:
    words = "Knead the dough, and bake it. Größe, naïve, Ωμέγα, 日本語, العربية."
    yield from (chr(control) for control in (*range(1, 32), *range(127, 160)))
    yield from (
        f"before{chr(control)}after" for control in (*range(1, 32), 0x7F, 0xAD, 0x200B, 0x2028, 0xFEFF, 0xFFFE, 0xFFFF)
    )
    yield from ("\\u0000", "\\x00", "%00", "x &#0; y", "␀", "\u2400", "\x01\x02\x03" * 50)
    yield from (
        words.encode().decode(codec, "replace").replace("\0", "")
        for codec in ("cp1252", "latin-1", "cp437", "utf-16-le")
    )
    yield from (
        words.encode(codec, "replace").decode("utf-8", "replace").replace("\0", "")
        for codec in ("utf-16", "utf-32", "shift-jis", "utf-7")
    )
    yield words.encode("utf-16-le").decode("latin-1").replace("\0", " ")
    yield from ("\ufeff" + words, words[::-1], "\u202e" + words, unicodedata.normalize("NFD", words))
    yield from ("e" + "\u0301" * 5000, "👩‍👩‍👧‍👦" * 300, "a" * 20_000, "\n" * 5000 + "x", "\t \r\n\u00a0\u3000")
    yield "<html><body>" + "<div class='x'>" * 500 + "text &amp; &lt;b&gt; <script>alert(1)</script>" + "</div>" * 500
    yield base64.b64encode(chance.randbytes(9000)).decode()
    yield from ("", " ", "\u200b", "\u2060\u200d", ".", "'; DROP TABLE page; --", "$1 %s {} \\", "NULL", "\\N", "\\.")
    yield from (
        "".join(chance.choices(words + "\x0b\u2029\U0001f600\u0300", k=chance.randrange(1, 900))) for _ in range(60)
    )


def _embed(texts: Sequence[str]) -> npt.NDArray[np.float32]:
    return np.stack([vector_of(text, DIMENSIONS) for text in texts])


@pytest.mark.parametrize("chunking", ["recursive", "sentences", "markdown", "fixed"])
def test_every_text_is_stored_with_its_own_vector_or_given_up_with_its_reason(
    stub_database: psycopg.Connection, stub: StubProvider, chunking: str
) -> None:
    db, chance = stub_database, random.Random(SEED)
    texts = [*_of_every_plane(chance), *_odd(chance)]
    db.execute("SELECT embedline.create_model('stub', 'openai', 'stub', base_url => %s)", (stub.url,))
    db.execute("CREATE TABLE page (id integer PRIMARY KEY, body text, raw bytea)")
    with db.cursor().copy("COPY page (id, body) FROM STDIN") as copy:
        for number, text in enumerate(texts):
            copy.write_row((number, text))
    # Halves of surrogates and cut sequences are no text, and an expression that reads bytes as one fails for them alone.
    no_text = (b"\xed\xa0\x80", b"\xed\xb0\x80 low", b"\xc3", b"\xf8\x88\x80\x80\x80", b"\xc0\x80", b"ab\x00cd")
    for number, raw in enumerate(no_text, len(texts)):
        db.execute("INSERT INTO page VALUES (%s, NULL, %s)", (number, raw))
    content = "coalesce(body, convert_from(raw, 'UTF8'))"
    create_pipeline(db, "page", "page", content, "stub", chunking=chunking, chunk_tokens=60, index_method="none")
    drain(db)
    dead = dict(db.execute("SELECT (key ->> 'id')::integer, message FROM embedline.dead_letter").fetchall())
    assert set(range(len(texts), len(texts) + len(no_text))) <= dead.keys()
    assert all(dead.values())
    # What is given up of the others has nothing to embed in it.
    assert {texts[number].strip() for number in dead if number < len(texts)} <= {
        text.strip() for text in texts if not any(unicodedata.category(one)[0] in "LNPS" for one in text)
    }
    db.execute("DELETE FROM page WHERE body IS NULL")
    drain(db)
    assert assert_exact(db, embed=_embed) > len(texts) / 2
    assert scalar(db, "SELECT sum(count) FROM embedline.verify('page')") in (None, 0)
