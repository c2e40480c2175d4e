"""A filter thins out every mode alike, with its caller's rights and nothing more."""

from __future__ import annotations

import psycopg
import pytest
from psycopg import errors

from conftest import Connect, MakeRole
from embedline.client.build_index import PsycopgClient, build
from embedline.core.names import vector_index
from generated_names import PAGE
from support import create_pages, create_pipeline, drain, scalar, searching

INDEX = vector_index("page", 1)
MODES = ("vector", "keyword", "hybrid")
QUESTION = "Body number about violins"


@pytest.fixture
def page(database: psycopg.Connection) -> psycopg.Connection:
    """200 embedded rows with keywords; views is the row's number."""
    create_pages(database, 200)
    database.execute("UPDATE page SET views = id")
    create_pipeline(database, keyword="english")
    drain(database)
    return database


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("condition", "keys"),
    [
        ("views = 4", {4}),
        ("views < 4 OR views = 11", {1, 2, 3, 11}),
        ("page.views = 4", None),
        ("title IN ('Title 5', 'Title 6') AND body LIKE '%number%'", {5, 6}),
        ("views = (SELECT max(p.views) FROM page AS p)", {200}),
        ("false", set()),
        ("NULL", set()),
        ("e'\\x41' = 'A' AND views = 7 AND title <> $q$; DROP TABLE page; --$q$", {7}),
    ],
)
def test_a_filter_lets_through_what_it_says(
    page: psycopg.Connection, mode: str, condition: str, keys: set[int] | None
) -> None:
    if keys is None:
        with pytest.raises(errors.UndefinedTable):
            searching(page, "page", QUESTION, 10, mode=mode, filter=condition)
        return
    found = searching(page, "page", QUESTION, 10, mode=mode, filter=condition)
    assert {int(row[0]) for row in found} == keys


@pytest.mark.parametrize("mode", MODES)
def test_policies_and_filters_hold_together(
    page: psycopg.Connection, connect: Connect, make_role: MakeRole, mode: str
) -> None:
    one, other = make_role("embedline_reader"), make_role("embedline_reader")
    page.execute(f"GRANT SELECT ON page TO {one}, {other}")
    page.execute("ALTER TABLE page ENABLE ROW LEVEL SECURITY")
    page.execute(f"CREATE POLICY first_half ON page TO {one} USING (views <= 100)")
    page.execute(f"CREATE POLICY second_half ON page TO {other} USING (views > 100)")
    for role, expected in ((one, {97, 98, 99, 100}), (other, {101, 102})):
        found = searching(
            connect(role), "page", QUESTION, 10, mode=mode, filter="views BETWEEN 97 AND 102 OR true = (views < 0)"
        )
        assert {int(row[0]) for row in found} == expected


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "condition",
    [
        "(SELECT count(*) FROM secret) >= 0",
        "EXISTS (SELECT FROM embedline.dead_letter)",
        f"EXISTS (SELECT FROM {PAGE('chunk')})",
        "pg_read_file('/etc/passwd') IS NOT NULL",
        "lo_import('/etc/passwd') > 0",
        "views IN (SELECT embedline.embed_pending(1))",
    ],
)
def test_a_filter_has_its_callers_rights(
    page: psycopg.Connection, connect: Connect, make_role: MakeRole, mode: str, condition: str
) -> None:
    reader = make_role("embedline_reader")
    page.execute("CREATE TABLE secret (n integer)")
    page.execute(f"GRANT SELECT ON page TO {reader}")
    with pytest.raises(errors.InsufficientPrivilege):
        searching(connect(reader), "page", QUESTION, 10, mode=mode, filter=condition)


@pytest.mark.parametrize("mode", MODES)
def test_no_function_of_a_reader_is_given_a_hidden_text(
    page: psycopg.Connection, connect: Connect, make_role: MakeRole, mode: str
) -> None:
    reader = make_role("embedline_reader")
    page.execute(f"GRANT SELECT ON page TO {reader}; GRANT SELECT ON page_embedding TO {reader}")
    # Not on the key, and few rows, so that a plan reads all chunks first.
    page.execute("ALTER TABLE page ENABLE ROW LEVEL SECURITY")
    page.execute(f"CREATE POLICY mine ON page TO {reader} USING (body LIKE '%number 25 %')")
    page.execute(f"CREATE SCHEMA AUTHORIZATION {reader}")
    connection = connect(reader)
    connection.execute(
        "CREATE FUNCTION leak(given text) RETURNS boolean LANGUAGE plpgsql COST 0.000001 AS"
        " $$BEGIN RAISE NOTICE 'given %', given; RETURN true; END$$"
    )
    given: list[str] = []
    connection.add_notice_handler(lambda notice: given.append(notice.message_primary or ""))
    connection.execute("SET enable_nestloop = off")
    assert len(connection.execute("SELECT id FROM page_embedding WHERE leak(chunk)").fetchall()) == 1
    assert len(searching(connection, "page", QUESTION, mode=mode, filter="leak(chunk)")) == 1
    nearest = "embedline_search.page_v1_ranked((SELECT embedline.embed_query('page', 'law')), 200)"
    ranked = f"SELECT key FROM {nearest} WHERE leak(chunk)"
    assert len(connection.execute(ranked).fetchall()) == 1
    assert {text for text in given if "Body" in text} == {text for text in given if "Body number 25 " in text} != set()


def test_names_in_a_filter_are_found_along_the_callers_path(page: psycopg.Connection) -> None:
    page.execute("CREATE SCHEMA mine")
    page.execute("CREATE FUNCTION mine.is_wanted(n integer) RETURNS boolean LANGUAGE sql RETURN n = 42")
    with pytest.raises(errors.UndefinedFunction):
        searching(page, "page", QUESTION, filter="is_wanted(views)")
    assert scalar(page, "SHOW search_path") == '"$user", public'
    page.execute("SET search_path = public, mine")
    for mode in MODES:
        assert [row[0] for row in searching(page, "page", QUESTION, mode=mode, filter="is_wanted(views)")] == ["42"]
    assert scalar(page, "SHOW search_path") == "public, mine"


def test_an_error_in_a_filter_is_the_callers(page: psycopg.Connection) -> None:
    with pytest.raises(errors.DivisionByZero):
        searching(page, "page", QUESTION, filter="1 / (views - 5) > 0")
    with pytest.raises(errors.UndefinedColumn):
        searching(page, "page", QUESTION, filter="wings = 2")
    with pytest.raises(errors.DatatypeMismatch):
        searching(page, "page", QUESTION, filter="views")
    assert searching(page, "page", QUESTION)


def test_the_plan_shows_how_a_filter_is_applied(database: psycopg.Connection) -> None:
    create_pages(database, 7000)
    database.execute("UPDATE page SET views = id")
    create_pipeline(database, keyword="english")
    drain(database, max_rows=10_000)
    build(PsycopgClient(database), "page")
    database.execute("VACUUM ANALYZE")

    def plan(condition: str | None) -> str:
        rows = database.execute(
            "SELECT chunk FROM embedline.search('page', %s, mode => 'hybrid', filter => %s, explain => true)",
            (QUESTION, condition),
        )
        return "\n".join(line for (line,) in rows)

    few, many = plan("views < 50"), plan("views > 500")
    assert few.startswith("vector:")
    assert "\nkeyword:" in few
    assert INDEX not in few
    assert INDEX in many
    assert INDEX in plan(None)
    # As many as asked for come through the index, too; and where it gives too few, all are ranked exactly.
    assert len(searching(database, "page", QUESTION, 50, filter="views > 500")) == 50
    assert len(searching(database, "page", QUESTION, 10, filter="views > 500 AND body LIKE '%6999 %'")) == 1
