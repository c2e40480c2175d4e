"""embedline.compare_costs: figures worked out by hand, and unknown prices."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import psycopg
import pytest
from psycopg import errors, sql

from conftest import Connect, MakeRole
from stub_provider import stub_provider
from support import scalar

Figures = dict[tuple[str, str], tuple[Decimal | None, str]]
# Tokens of one document with the tokenizer of static-256.
_TOKENS = 10


def compare(connection: psycopg.Connection, subject: str = "letter", **named: Any) -> Figures:
    """Return value and note of each figure by its way and name."""
    given = ", ".join(["%s", *(f"{name} => %s" for name in named)])
    query = f"SELECT way, figure, value, note FROM embedline.compare_costs({given})"
    return {(way, figure): rest for way, figure, *rest in connection.execute(query, (subject, *named.values()))}


@pytest.fixture(scope="module")
def letters(module_database: psycopg.Connection) -> psycopg.Connection:
    """1,000 documents of ten tokens, all of which are read."""
    module_database.execute(
        "CREATE TABLE letter AS SELECT n AS id, 'The river runs from the mountains to the sea.' AS body"
        " FROM generate_series(1, 1000) AS n"
    )
    return module_database


_LETTER = {"own_model": "static-256", "content": "body", "sample_rows": 100_000}
_PRICES = {
    "price_per_million_tokens": Decimal("0.1"),
    "machine_price_per_hour": Decimal("0.5"),
    "own_tokens_per_second": 20_000,
}


def test_the_figures_are_those_worked_out_by_hand(letters: psycopg.Connection) -> None:
    # 10,000 documents a day: 3,043,750 tokens a month; 90 % of them, 2,739,375, in bulk.
    # 2 queries a second of 20 tokens: 105,192,000 tokens a month.
    found = compare(
        letters, **_LETTER, **_PRICES, documents_per_day=10_000, bulk_share=Decimal("0.9"),
        batch_discount=Decimal("0.5"), queries_per_second=2, tokens_per_query=20, search_milliseconds=3,
        storage_price_per_gigabyte=Decimal("0.25"),
    )  # fmt: skip
    values = {name: None if value is None else float(value) for name, (value, _) in found.items()}
    for way in ("hosted", "own"):
        assert values[way, "tokens"] == 1_000 * _TOKENS
        assert values[way, "tokens a month"] == 3_043_750 + 105_192_000
    # 10,000 tokens at 0.05 the million.
    assert values["hosted", "generation"] == 0.0005
    # 2,739,375 × 0.05 + (304,375 + 105,192,000) × 0.10 the million.
    assert values["hosted", "month"] == round(0.13696875 + 10.5496375, 4)
    assert values["hosted", "month streamed"] == round(10.823575, 4)
    assert values["hosted", "month of queries"] == 10.5192
    assert values["own", "month"] == 365.25
    assert values["own", "machines"] == 1
    # 40 of 20,000 tokens a second.
    assert values["own", "query load"] == 0.2
    # 2,739,375 tokens take 136.96875 s.
    assert values["hybrid", "month"] == round(136.96875 / 3600 * 0.5 + 10.5496375, 4)
    # The machine costs 354.7308 more than the queries at the service; that is worth 0.055 the million documents' tokens.
    assert values["hosted and own", "crossover"] == round(105_192_000 + (365.25 - 10.5192) / 0.055 * 1e6)
    assert values["search", "processors"] == 0.01
    stored = (values["own", "vectors"] or 0) + (values["own", "index"] or 0)
    assert values["own", "storage a month"] == pytest.approx(stored / 1024 * 0.25, abs=0.0001)


def test_both_ways_cost_the_same_at_the_crossover_that_it_tells(letters: psycopg.Connection) -> None:
    given = {**_LETTER, **_PRICES, "bulk_share": Decimal("0.5"), "batch_discount": Decimal("0.4")}
    crossover, _ = compare(letters, **given, documents_per_day=1)["hosted and own", "crossover"]
    assert crossover is not None
    documents = crossover / _TOKENS / Decimal("30.4375")
    at = compare(letters, **given, documents_per_day=documents)
    assert at["hosted", "month"][0] == at["own", "month"][0] == Decimal("365.25")
    above = compare(letters, **given, documents_per_day=documents * 2)
    assert (above["hosted", "month"][0] or 0) > (above["own", "month"][0] or 0)


def test_a_rate_limit_sets_the_hours_of_the_service(letters: psycopg.Connection) -> None:
    letters.execute("SELECT embedline.set_rate_limit('static-256', tokens_per_minute => 1000)")
    hours, note = compare(letters, **_LETTER)["hosted", "generation hours"]
    # 10,000 tokens in 10 minutes.
    assert (hours, note) == (Decimal("0.167"), "rate limit: 1,000 tokens a minute")
    # 64 texts of ten tokens are a request.
    letters.execute("UPDATE embedline.model SET max_batch_items = 64 WHERE name = 'static-256'")
    letters.execute("SELECT embedline.set_rate_limit('static-256', requests_per_minute => 1)")
    assert compare(letters, **_LETTER)["hosted", "generation hours"][1] == "rate limit: 640 tokens a minute"
    letters.execute("SELECT embedline.set_rate_limit('static-256')")


def test_what_is_not_known_says_how_to_tell_it(letters: psycopg.Connection) -> None:
    found = compare(letters, **_LETTER)
    assert found["hosted", "month"][0] is None
    assert "set_price('static-256'" in found["hosted", "month"][1]
    assert found["own", "month"] == [None, "no price of a machine: machine_price_per_hour => …"]
    assert found["hybrid", "month"][0] is found["hosted and own", "crossover"][0] is None
    # A model of this machine was timed.
    assert (found["own", "generation hours"][0] or 0) >= 0
    assert scalar(letters, "SELECT tokens_per_second > 0 FROM embedline.model_rate") is True


def test_a_version_cannot_have_the_vectors_of_two_models(letters: psycopg.Connection) -> None:
    found = compare(letters, **{**_LETTER, **_PRICES}, hosted_model="minilm", documents_per_day=10)
    assert found["hybrid", "month"][0] is None
    assert "384 and 256 dimensions" in found["hybrid", "month"][1]
    assert found["hosted", "month"][0] is not None
    # Its vectors are larger.
    assert (found["hosted", "vectors"][0] or 0) > (found["own", "vectors"][0] or 0)


def test_an_empty_table_costs_nothing(letters: psycopg.Connection) -> None:
    letters.execute("CREATE TABLE nothing (id integer, body text)")
    found = compare(letters, "nothing", **_LETTER, **_PRICES, documents_per_day=5, bulk_share=1)
    assert [found[way, "month"][0] for way in ("hosted", "own", "hybrid")] == [0, 0, 0]


def test_the_largest_numbers_still_have_a_cost(letters: psycopg.Connection) -> None:
    most = 10**12
    found = compare(
        letters, **_LETTER, price_per_million_tokens=most, machine_price_per_hour=most,
        own_tokens_per_second=Decimal("0.001"), documents_per_day=most, queries_per_second=most, tokens_per_query=most,
    )  # fmt: skip
    assert (found["own", "month"][0] or 0) > (found["hosted", "month"][0] or 0) > most


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"bulk_share": 2}, "bulk_share must be between 0 and 1, not 2"),
        ({"batch_discount": -1}, "batch_discount must be between 0 and 1, not -1"),
        ({"machine_price_per_hour": -1}, "machine_price_per_hour must be between 0 and 1000000000000, not -1"),
        ({"own_tokens_per_second": 0}, "own_tokens_per_second must be between 0.001 and 1000000000000, not 0"),
        ({"documents_per_day": Decimal("NaN")}, "documents_per_day must be between 0 and 1000000000000, not NaN"),
        ({"queries_per_second": None}, "queries_per_second must not be NULL"),
        ({"own_model": "none"}, 'no model "none"'),
    ],
)
def test_a_wrong_value_is_refused_by_its_name(letters: psycopg.Connection, named: dict[str, Any], message: str) -> None:
    with pytest.raises(psycopg.Error, match=message) as refused:
        compare(letters, **{**_LETTER, **named})
    assert refused.value.diag.message_hint


def test_it_reads_with_the_callers_rights_and_asks_no_provider(
    database: psycopg.Connection, connect: Connect, make_role: MakeRole
) -> None:
    database.execute("CREATE TABLE letter AS SELECT 1 AS id, 'The sea.' AS body")
    role = make_role("embedline_admin")
    with stub_provider(8) as provider:
        database.execute("SELECT embedline.create_model('far', 'openai', 'x', base_url => %s)", (provider.url,))
        provider.counts()
        administrator = connect(role)
        with pytest.raises(errors.InsufficientPrivilege):
            compare(administrator, hosted_model="far", content="body")
        database.execute(sql.SQL("GRANT SELECT ON letter TO {}").format(sql.Identifier(role)))
        found = compare(administrator, hosted_model="far", content="body", machine_price_per_hour=1)
        assert provider.counts().get("requests", 0) == 0
    assert "the speed of far is not measured yet" in found["own", "month"][1]
    with pytest.raises(errors.InsufficientPrivilege):
        compare(connect(make_role("embedline_reader")), hosted_model="far", content="body")
