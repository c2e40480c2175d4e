"""Queries made of texts that nobody has labelled."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from embedline.gate.synthetic_queries import known_item_queries


def test_a_query_is_made_of_the_words_that_tell_a_text_from_the_others() -> None:
    texts = [
        "The server writes the log. The server also vacuums tables, and vacuums them often.",
        "The server writes the log. The server also replicates, by slots and publications.",
        "The server writes the log. The server also encrypts connections with certificates.",
    ]
    first, second, third = known_item_queries(texts)
    assert {"vacuums", "tables", "often"} <= set(first.split())
    assert {"replicates", "slots", "publications"} <= set(second.split())
    assert {"encrypts", "connections", "certificates"} <= set(third.split())
    assert all(len(query.split()) == 6 for query in (first, second, third))


def test_words_stand_in_the_order_of_the_text_as_they_are_written() -> None:
    (query,) = known_item_queries(["Zebras and Apples: zebras, apples, Mangoes"])
    assert query == "Zebras and Apples Mangoes"


def test_a_text_without_words_gives_a_piece_of_it() -> None:
    (chinese, numbers) = known_item_queries(["数据库管理系统" * 20, "1 2 3 4"])
    assert chinese in "数据库管理系统" * 20
    assert 10 < len(chinese) <= 24
    assert numbers == "1 2 3 4"


@given(st.lists(st.text(min_size=1, max_size=200)))
def test_each_text_gives_one_query_of_its_own_characters(texts: list[str]) -> None:
    queries = known_item_queries(texts)
    assert len(queries) == len(texts)
    for query, text in zip(queries, texts, strict=True):
        assert set(query) <= set(text) | {" "}
        assert query == "" or len(query) <= len(text)


def test_the_same_texts_give_the_same_queries() -> None:
    texts = ["one two three four five six seven eight", "nine ten eleven twelve thirteen"]
    assert known_item_queries(texts) == known_item_queries(list(texts))
