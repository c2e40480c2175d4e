"""Which texts a model's tokenizer can read."""

from __future__ import annotations

import base64
import json
import random
from dataclasses import replace

import pytest
from tokenizers import Tokenizer

from embedline.chunking.chunk import whole_text
from embedline.documents.readability import Readability, mark_unreadable, readability
from embedline.documents.values import Document
from embedline.errors import UnreadableText
from embedline.queue.outbox import ClaimedRow
from support import MODELS

_RANDOM = random.Random(1)
LETTERS = "".join(_RANDOM.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(10_000))
UNREADABLE = {
    "one long word": LETTERS,
    "hex": _RANDOM.randbytes(2000).hex(),
    "base64": base64.b64encode(b"a repeated text. " * 300).decode(),
    "minified code": "f" + LETTERS[:500] + "=" + LETTERS[500:1000] + ";" + LETTERS[1000:1500],
    "Linear B": "".join(chr(0x10000 + number % 80) + " " * (number % 6 == 0) for number in range(300)),
    "Khmer": " ".join(chr(0x1780 + number % 35) * 3 for number in range(200)),
    "Thai": "".join(chr(0x0E01 + number % 45) for number in range(300)),
    "Amharic": " ".join(chr(0x1200 + number) * 4 for number in range(50)),
    "emoji": "😀😁😂🤣😃",
}
READABLE = {
    "English": "The quick brown fox jumps over the lazy dog.",
    "a long word in a sentence": f"The attachment of this letter follows here: {LETTERS[:5000]}",
    "a hex dump in lines": "\n".join(_RANDOM.randbytes(16).hex(" ") for _ in range(20)),
    "German": "Die Straßenbahnhaltestelle wird wegen Überschwemmung gesperrt.",
    "Greek": "Μῆνιν ἄειδε θεά",
    "a name and an emoji": "thank you 👍",
    "punctuation": "... !!! ???",
    "JSON": json.dumps({"name": "value", "list": [1, 2, 3], "more": {"a": "b"}}, separators=(",", ":")),
}


def check(model: str = "minilm", limit: float = 0.5) -> Readability | None:
    tokenizer = Tokenizer.from_file(str(MODELS / model / "tokenizer.json"))
    # As it is stored with the model.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return readability(tokenizer.to_str(), limit)


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_text_of_unknown_tokens_is_found(kind: str) -> None:
    found = check()
    assert found is not None
    assert found.shares([UNREADABLE[kind]])[0] > 0.5


@pytest.mark.parametrize("kind", READABLE)
def test_a_text_that_is_mostly_known_is_let_through(kind: str) -> None:
    found = check()
    assert found is not None
    assert found.shares([READABLE[kind]])[0] <= 0.5


def test_shares_are_those_of_texts_that_are_encoded_whole() -> None:
    found = check()
    assert found is not None
    assert found.parts is not None
    texts = [*UNREADABLE.values(), *READABLE.values()]
    texts += [f"{before} {after}" for before in texts for after in texts]
    whole = replace(found, parts=None)
    assert found.shares(texts) == whole.shares(texts) == found.shares(texts)


def test_nothing_is_unknown_to_a_tokenizer_that_falls_back_to_bytes() -> None:
    assert check("static-256") is None


def test_the_setting_1_looks_at_nothing() -> None:
    assert check(limit=1) is None


def test_without_a_tokenizer_nothing_is_known() -> None:
    assert readability(None, 0.5) is None


def test_a_vocabulary_of_unigrams_names_its_unknown_by_number() -> None:
    model = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0], ["b", -1.0]]}
    tokenizer = {"version": "1.0", "model": model | {"byte_fallback": False}, "added_tokens": []}
    found = readability(json.dumps(tokenizer), 0.5)
    assert found is not None
    assert found.shares(["ab", "xa", "x"]) == [0.0, 0.5, 1.0]
    tokenizer["model"] = model | {"byte_fallback": True}
    assert readability(json.dumps(tokenizer), 0.5) is None


def test_a_document_is_given_up_only_if_no_chunk_can_be_read() -> None:
    found = check()
    assert found is not None
    whole, part, sound, empty = (Document(ClaimedRow((str(number),))) for number in range(4))
    whole.chunks = whole_text(LETTERS)
    part.chunks = [*whole_text(LETTERS), *whole_text("known words")]
    sound.chunks = whole_text("known words")
    mark_unreadable([whole, part, sound, empty], found, lambda: None)
    assert isinstance(whole.problem, UnreadableText)
    assert "100%" in whole.problem.message
    assert part.problem is None
    assert part.unreadable == {part.chunks[0].digest: 1.0}
    assert (sound.problem, sound.unreadable, empty.problem) == (None, {}, None)
