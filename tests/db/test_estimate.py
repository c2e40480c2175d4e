"""embedline.estimate: right within its own interval, with the caller's rights, and without a paid request."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from psycopg import errors, sql

from conftest import Connect, MakeRole
from generated_names import Generated
from ledger import install_ledger_functions, reserve, settle
from stub_provider import StubProvider, stub_provider
from support import create_pages, create_pipeline, data_count, drain, scalar
from support import settle as drain_all

Row = tuple[Decimal | None, Decimal | None, Decimal | None, str, str]


def estimate(connection: psycopg.Connection, subject: str, *arguments: Any, **named: Any) -> dict[str, Row]:
    """Return embedline.estimate's rows by figure: value, low, high, unit, note."""
    given = ["%s", *("%s" for _ in arguments), *(f"{name} => %s" for name in named)]
    query = f"SELECT figure, value, low, high, unit, note FROM embedline.estimate({', '.join(given)})"
    return {row[0]: row[1:] for row in connection.execute(query, (subject, *arguments, *named.values()))}


@pytest.fixture(scope="module")
def documents(module_database: psycopg.Connection) -> psycopg.Connection:
    """8,000 documents of very different lengths, neighbours alike; a tenth is empty, some have only white space."""
    module_database.execute(
        "CREATE TABLE document (id integer PRIMARY KEY, title text, body text, lang text NOT NULL DEFAULT 'en')"
    )
    module_database.execute(
        "INSERT INTO document SELECT n, 'Title ' || n, CASE WHEN n % 10 = 0 THEN NULL WHEN n % 101 = 0 THEN '  '"
        " ELSE repeat('Rivers number ' || n || ' run from the mountains to the sea. ',"
        " 1 + (1 + n / 2000) * (hashint4(n) & 3)) END, CASE n % 3 WHEN 0 THEN 'de' ELSE 'en' END"
        " FROM generate_series(1, 8000) AS n"
    )
    module_database.execute("ANALYZE document")
    return module_database


@pytest.mark.parametrize("sample_rows", [150, 600])
def test_a_sample_holds_the_truth_in_its_interval(documents: psycopg.Connection, sample_rows: int) -> None:
    """With 150 rows only some of the blocks are read, with 600 all of them."""
    assert 150 < scalar(documents, "SELECT pg_relation_size('document') / 8192") < 600
    exact = estimate(documents, "document", "static-256", "body", sample_rows=100_000)
    sampled = estimate(documents, "document", "static-256", "body", sample_rows=sample_rows)
    for figure in ("rows", "chunks", "tokens", "vectors", "index", "index memory"):
        true, low, high = exact[figure][:3]
        assert true == low == high
        value, low, high = sampled[figure][:3]
        assert low <= true <= high, figure
        assert low < value < high
        # Narrow enough to be of use.
        assert high - low < 0.5 * float(value)
    assert "counted by the model's tokenizer" in exact["tokens"][4]
    words = scalar(documents, "SELECT avg(length(to_tsvector('english', body))) FROM document WHERE body IS NOT NULL")
    assert float(exact["keyword index"][0]) == pytest.approx(
        float(exact["chunks"][0] * words) * 4 / 2**20, rel=0.5, abs=0.1
    )
    again = estimate(documents, "document", "static-256", "body", sample_rows=sample_rows)
    assert again["tokens"] == sampled["tokens"]


def test_what_was_read_whole_is_what_embedding_makes(documents: psycopg.Connection) -> None:
    kept = "lang = 'en' AND id % 4 = 0"
    create_pipeline(documents, "kept", "document", "body", filter=kept, chunk_tokens=64)
    figures = estimate(documents, "kept", sample_rows=100_000)
    drain_all(documents, 60)
    assert figures["chunks"][0] == data_count(documents, "chunk", "kept")
    states = f"SELECT count(*) FROM {Generated('kept')('document')} WHERE state = 'embedded'"
    assert figures["rows"][0] == scalar(documents, states)
    assert figures["remaining rows"][0] == scalar(documents, f"SELECT count(*) FROM document WHERE {kept}")
    assert figures["remaining tokens"][0] == figures["tokens"][0]
    after = estimate(documents, "kept", sample_rows=100_000)
    assert (after["remaining rows"][0], after["remaining tokens"][0]) == (0, 0)
    assert after["chunks"][0] == figures["chunks"][0]
    documents.execute(f"UPDATE document SET body = body || '.' WHERE id <= 52 AND body IS NOT NULL AND {kept}")
    assert estimate(documents, "kept", sample_rows=100_000)["remaining rows"][0] == 7
    documents.execute("SELECT embedline.drop_pipeline('kept')")


def test_a_table_without_a_pipeline_is_found_by_the_callers_search_path(documents: psycopg.Connection) -> None:
    documents.execute("CREATE SCHEMA IF NOT EXISTS shop")
    documents.execute('CREATE TABLE shop."Order" (id integer, "The text" text)')
    documents.execute("""INSERT INTO shop."Order" VALUES (1, 'one'), (2, 'two words')""")
    documents.execute("CREATE FUNCTION shop.shout(text) RETURNS text LANGUAGE sql IMMUTABLE RETURN upper($1)")
    documents.execute("SET search_path = shop, public")
    figures = estimate(documents, '"Order"', "static-256", 'shout("The text")')
    documents.execute("RESET search_path")
    assert figures["rows"][:3] == (2, 2, 2)


def test_partitions_are_sampled_together(documents: psycopg.Connection) -> None:
    documents.execute("CREATE TABLE log (id integer, body text) PARTITION BY RANGE (id)")
    documents.execute("CREATE TABLE log_1 PARTITION OF log FOR VALUES FROM (0) TO (1000)")
    documents.execute("CREATE TABLE log_2 PARTITION OF log FOR VALUES FROM (1000) TO (3000)")
    documents.execute("INSERT INTO log SELECT n, 'line ' || n FROM generate_series(0, 2999) AS n")
    figures = estimate(documents, "log", "static-256", "body", sample_rows=300)
    assert figures["rows"][0] == 3000


def test_a_long_document_counts_for_its_whole_length(documents: psycopg.Connection) -> None:
    documents.execute("CREATE TABLE book AS SELECT 1 AS id, repeat('A river runs to the sea. ', 40000) AS body")
    figures = estimate(documents, "book", "static-256", "body")
    assert figures["tokens"][0] == pytest.approx(Decimal(40_000 * 7), rel=Decimal("0.05"))


def test_an_empty_table_takes_nothing(documents: psycopg.Connection) -> None:
    documents.execute("CREATE TABLE nothing (id integer, body text)")
    figures = estimate(documents, "nothing", "static-256", "body")
    assert [figures[name][0] for name in ("rows", "chunks", "tokens")] == [0, 0, 0]


def test_semantic_chunking_pays_for_its_sentences_too(documents: psycopg.Connection) -> None:
    documents.execute("CREATE TABLE essay AS SELECT 1 AS id, repeat('Bread rises. Oil the chain. ', 30) AS body")
    documents.execute("ALTER TABLE essay ADD PRIMARY KEY (id)")
    create_pipeline(documents, "essay", "essay", "body", chunking="semantic")
    create_pipeline(documents, "plain", "essay", "body")
    ratio = estimate(documents, "essay")["tokens"][0] / estimate(documents, "plain")["tokens"][0]
    assert ratio == pytest.approx(Decimal(2), rel=Decimal("0.05"))


def test_money_and_hours_stand_beside_those_of_other_models(documents: psycopg.Connection) -> None:
    documents.execute("SELECT embedline.set_price('static-256', 0.02)")
    figures = estimate(documents, "document", "static-256", "body", sample_rows=300)
    tokens = figures["tokens"][0]
    assert tokens is not None
    assert figures["money"][0] == pytest.approx(tokens * Decimal("0.02") / 1_000_000, abs=Decimal("0.0001"))
    assert figures["hours"][0] is not None
    assert "measured on this machine" in figures["hours"][4]
    # Never used, so not started for a comparison either.
    assert "estimate(…, model => 'minilm')" in figures["hours with minilm"][4]
    assert "money with minilm" not in figures
    other = estimate(documents, "document", "minilm", "body", sample_rows=100)
    assert "measured on this machine" in other["hours with static-256"][4]
    assert other["money with static-256"][0] is not None
    documents.execute("SELECT embedline.set_price('static-256', NULL)")


@pytest.fixture
def provider() -> Iterator[StubProvider]:
    """A remote provider that counts its requests."""
    with stub_provider(8) as provider:
        yield provider


def test_a_remote_model_is_never_asked(database: psycopg.Connection, provider: StubProvider) -> None:
    database.execute(
        "SELECT embedline.create_model('far', 'openai', 'x', base_url => %s, price_per_million_tokens => 2)",
        (provider.url,),
    )
    create_pages(database, 50)
    create_pipeline(database, model="far")
    provider.counts()
    figures = estimate(database, "page")
    assert provider.counts().get("requests", 0) == 0
    assert figures["hours"][0] is None
    assert "no paid request" in figures["hours"][4]
    assert "characters / 4" in figures["tokens"][4]
    # Once the ledger knows its speed, that is used.
    install_ledger_functions(database)
    settle(database, reserve(database, [5000]).reservation_id, 5000)
    database.execute(
        "UPDATE embedline.reservation SET reserved_at = settled_at - interval '2 seconds'",
    )
    figures = estimate(database, "page")
    assert figures["hours"][4] == "2,500 tokens a second, as the ledger measured it"
    assert scalar(database, "SELECT embedline._roll_up_usage()") == 0
    assert provider.counts().get("requests", 0) == 0


def test_another_model_for_a_pipeline_that_is_there(database: psycopg.Connection) -> None:
    create_pages(database, 40)
    create_pipeline(database)
    drain(database)
    figures = estimate(database, "page", model="minilm")
    assert "vector(384)" in figures["vectors"][4]
    assert "remaining rows" not in figures
    with pytest.raises(psycopg.errors.InvalidParameterValue, match='"page" is a pipeline') as refused:
        estimate(database, "page", content="body")
    assert "content" in str(refused.value.diag.message_hint)


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        ("'none'", "no pipeline and no table", "name of a pipeline"),
        ("'document'", "without a pipeline", "static|small"),
        ("'document', 'static-256'", "without a pipeline", "small"),
        ("'document', 'none', 'body'", 'no model "none"', "create_model"),
        ("'document', 'static-256', 'headline'", "cannot be read", "title"),
        ("'document', 'static-256', 'body) FROM document; DROP TABLE document; SELECT (1'", "not a single", "title"),
        ("'document', 'static-256', 'body', 5", "sample_rows must be between", "1000"),
        ("'document', 'static-256', 'body', NULL", "sample_rows must not be NULL", "default"),
        ("''", "no pipeline and no table", "name of a pipeline"),
    ],
)
def test_what_cannot_be_estimated_says_why(
    documents: psycopg.Connection, arguments: str, message: str, hint: str
) -> None:
    with pytest.raises(psycopg.Error, match=message) as refused:
        documents.execute(f"SELECT * FROM embedline.estimate({arguments})".encode())
    assert refused.value.sqlstate in ("22023", "42704")
    assert any(word in str(refused.value.diag.message_hint) for word in hint.split("|"))


def test_it_reads_with_the_callers_rights_alone(
    database: psycopg.Connection, connect: Connect, make_role: MakeRole
) -> None:
    create_pages(database, 20)
    create_pipeline(database)
    role = make_role("embedline_admin")
    administrator = connect(role)
    for subject in ("('page')", "('page', 'static-256', 'body')"):
        with pytest.raises(errors.InsufficientPrivilege):
            administrator.execute(f"SELECT * FROM embedline.estimate{subject}".encode())
    database.execute(sql.SQL("GRANT SELECT ON page TO {}").format(sql.Identifier(role)))
    assert estimate(administrator, "page")["rows"][0] == 20
    assert estimate(administrator, "page", "static-256", "current_user::text || body")["rows"][0] == 20
    # Row-level security holds for the sample, too.
    database.execute("ALTER TABLE page ENABLE ROW LEVEL SECURITY")
    assert estimate(administrator, "page")["rows"][0] == 0
    with pytest.raises(errors.InsufficientPrivilege):
        connect(make_role("embedline_reader")).execute("SELECT * FROM embedline.estimate('page')")


def test_a_pipelines_columns_may_have_other_names_since(database: psycopg.Connection) -> None:
    create_pages(database, 20)
    create_pipeline(database, content="title || body", filter="views < 10", document_prefix="title")
    before = estimate(database, "page")
    database.execute('ALTER TABLE page RENAME body TO "Key ""q"" %I"; ALTER TABLE page RENAME title TO body')
    assert estimate(database, "page")["tokens"] == before["tokens"]


def test_a_superuser_runs_a_pipelines_expressions_as_their_owner(
    database: psycopg.Connection, connect: Connect, make_role: MakeRole
) -> None:
    create_pages(database, 20)
    owner = make_role("embedline_admin")
    database.execute(
        sql.SQL("ALTER TABLE page OWNER TO {0}; GRANT CREATE ON SCHEMA public TO {0}").format(sql.Identifier(owner))
    )
    admin = connect(owner)
    admin.execute(
        "CREATE FUNCTION mine(x text) RETURNS text LANGUAGE plpgsql STABLE AS"
        f" $$ BEGIN RETURN CASE WHEN current_user = '{owner}' THEN x END; END $$".encode()
    )
    create_pipeline(admin, content="mine(body)", filter="mine(title) IS NOT NULL")
    database.execute(sql.SQL("REVOKE CREATE ON SCHEMA public FROM {}").format(sql.Identifier(owner)))
    assert estimate(database, "page")["rows"][0] == 20
    assert estimate(admin, "page")["rows"][0] == 20
