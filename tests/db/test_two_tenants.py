"""Two tenants of one source: whatever one of them reads or calls, nothing of the other's rows comes out.

The source has row-level security. Each tenant may read the source and is a reader, as an application's login is. The texts and
keys of the hidden tenant hold a word that stands nowhere else.
"""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
from psycopg import errors, sql

from conftest import Connect, MakeRole
from small_models import register_static
from stub_fixtures import running_stub, stub
from stub_provider import StubProvider
from support import create_pipeline, drain, scalar, settle, wait_until
from upgrading import add_version, settle_versions

__all__ = ["running_stub", "stub"]

# In every text, key, title and query of the hidden tenant.
SECRET = "s3cret"
# A word of both tenants' texts.
SHARED = "zebrafish"
ROWS = 40
_OBJECTS = """
    SELECT format('%I.%I', n.nspname, c.relname), has_schema_privilege(n.oid, 'USAGE')
    FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') ORDER BY 1
"""
_ROUTINES = """
    SELECT p.oid::regproc::text, p.pronamespace::regnamespace::text, p.prokind = 'p', p.proargnames[1:p.pronargs],
        ARRAY(SELECT format_type(t, NULL) FROM unnest(p.proargtypes) AS t), p.pronargdefaults
    FROM pg_proc AS p
    WHERE p.pronamespace::regnamespace::text ~ '^embedline' AND has_function_privilege(p.oid, 'EXECUTE')
        AND has_schema_privilege(p.pronamespace, 'USAGE') ORDER BY 1
"""


def _hostile_session(
    database: psycopg.Connection, connect: Connect, make_role: MakeRole, stub: StubProvider
) -> psycopg.Connection:
    """Return a session of one tenant, beside another one with rows in each place that holds any."""
    mine, other = make_role("embedline_reader"), make_role("embedline_reader")
    database.execute(
        "CREATE TABLE page (id text PRIMARY KEY, tenant name, title text, body text);"
        "CREATE TABLE event (event_id integer PRIMARY KEY, tenant name, reader text, page text);"
        "ALTER TABLE page ENABLE ROW LEVEL SECURITY; ALTER TABLE event ENABLE ROW LEVEL SECURITY;"
        "CREATE POLICY own ON page USING (tenant = current_user);"
        "CREATE POLICY own ON event USING (tenant = current_user);"
        f"GRANT SELECT, INSERT ON page, event TO {mine}, {other}"
    )
    for tenant, word in ((mine, "public"), (other, SECRET)):
        database.execute(
            "INSERT INTO page SELECT format('%%s-%%s', %(word)s::text, n), %(tenant)s,"
            " format('Title %%s %%s', %(word)s::text, n), format('Some %%s about %%s number %%s', %(word)s::text,"
            " %(shared)s::text, n) FROM generate_series(1, %(rows)s) AS n",
            {"tenant": tenant, "word": word, "shared": SHARED, "rows": ROWS},
        )
        database.execute(
            "INSERT INTO event SELECT n + %s, %s, 'reader ' || %s::text, id FROM page"
            " CROSS JOIN generate_series(1, 3) AS n WHERE tenant = %s AND id LIKE %s",
            (0 if word == "public" else 100, tenant, word, tenant, "%-1"),
        )
    database.execute("SELECT embedline.create_model('stub', 'openai', 'stub', base_url => %s)", (stub.url,))
    create_pipeline(database, content="body", model="stub", keyword="english", document_prefix="title", tenant="tenant")
    # The provider repeats the text that it refuses, and the row ends as a dead letter.
    refused = {
        "match": f"{SECRET} poison",
        "status": 400,
        "body": '{"error": {"message": "no: ' + SECRET + ' poison"}}',
    }
    stub.behave(rules=[refused], remember=True)
    settle(database)
    database.execute("INSERT INTO page VALUES (%s, %s, 'x', %s)", (f"{SECRET}-poison", other, f"{SECRET} poison"))
    wait_until(lambda: drain(database) == 0 and scalar(database, "SELECT count(*) FROM embedline.dead_letter") == 1)
    register_static(database, 64)
    add_version(database, "static-64")
    settle_versions(database)
    database.execute("SELECT embedline.create_derived('readers', 'page', 'event', 'reader', 'page')")
    settle(database)
    database.execute("SELECT embedline.sample_queries('page', 1)")
    with connect(other) as session:
        rows = session.execute("SELECT key FROM embedline.search('page', %s)", (f"{SECRET} {SHARED}",)).fetchall()
        assert {key.split("-")[0] for (key,) in rows} == {SECRET}
    database.execute("UPDATE page SET body = body || ' again' WHERE tenant = %s AND id LIKE '%%-2'", (other,))
    database.execute("SELECT embedline.verify('page')")
    database.execute("ANALYZE")
    return connect(mine)


def _no_relation_shows_a_hidden_row(hostile: psycopg.Connection) -> None:
    shown = 0
    for name, _ in hostile.execute(_OBJECTS).fetchall():
        try:
            rows = hostile.execute(sql.SQL("SELECT t::text FROM {} AS t").format(sql.SQL(name))).fetchall()
        except (errors.InsufficientPrivilege, errors.FeatureNotSupported, errors.ObjectNotInPrerequisiteState):
            continue
        assert [row for row in rows if SECRET in str(row[0])] == [], name
        shown += len(rows)
    assert shown > 1000
    # The tenant's own rows are there, so the view was read.
    assert scalar(hostile, "SELECT count(DISTINCT id) FROM page_embedding") == ROWS


def _argument(hostile: psycopg.Connection, name: str, kind: str) -> Any:
    """Return a value that asks for as much as a parameter can."""
    words = (
        "SELECT array_agg(hashtextextended(w, 0)) FROM unnest(ARRAY['zebrafish', 's3cret', 'number', 'poison']) AS w"
    )
    if kind == "text":
        return {"query": SHARED, "subject": f"reader {SECRET}", "key": f"{SECRET}-1"}.get(
            name, "readers" if name == "name" else "page"
        )
    return {
        "text[]": [f"{SECRET}-1"], "bigint[]": scalar(hostile, words) if name == "words" else [1, 2, 3, 4],
        "integer[]": [0, 1, 2, 3], "double precision[]": [1.0] * 4, "bigint": 1000, "integer": 1, "boolean": False,
        "double precision": 1.0, "bytea[]": [b"x"], "real": 1.0,
    }.get(kind)  # fmt: skip


def _no_routine_returns_a_hidden_row(hostile: psycopg.Connection, database: psycopg.Connection) -> None:
    hidden = {
        row[0] for row in database.execute("SELECT chunk_id FROM page_embedding WHERE id LIKE %s", (SECRET + "%",))
    }
    own = {
        row[0] for row in database.execute("SELECT chunk_id FROM page_embedding WHERE NOT id LIKE %s", (SECRET + "%",))
    }
    assert len(hidden) >= ROWS
    called = set()
    for name, schema, is_procedure, names, kinds, defaults in hostile.execute(_ROUTINES).fetchall():
        if is_procedure or schema == "embedline_data":
            continue
        given = []
        for parameter, kind in list(zip(names or [], kinds, strict=False))[: len(kinds) - defaults]:
            value = _argument(hostile, parameter, kind)
            if kind in ("vector", "halfvec"):
                width = 64 if "_v2_" in name else 8
                value = "[" + ",".join(["0.5"] * width) + "]"
            given.append((value, kind))
        call = f"SELECT * FROM {name}({', '.join(f'%s::{kind}' for _, kind in given)})"
        try:
            cursor = hostile.execute(call, [value for value, _ in given])
        except psycopg.Error as error:
            assert error.sqlstate is not None and not error.sqlstate.startswith("XX"), (name, str(error))
            continue
        called.add(name.split(".")[-1])
        columns = [column.name for column in cursor.description or ()]
        for row in cursor.fetchall():
            assert SECRET not in str(row), (name, row)
            found = dict(zip(columns, row, strict=True))
            assert found.get("chunk_id") not in hidden, (name, row)
            assert not any(isinstance(value, bytes) and len(value) > 8 * 4 for value in row), (name, row)
    assert {
        "page_v1_keyword_read",
        "page_v1_nearest",
        "page_v1_stored",
        "page_v2_ranked",
        "search",
        "metrics",
    } <= called
    assert own


def _no_search_finds_a_hidden_row(hostile: psycopg.Connection, mode: str) -> None:
    for options in ({}, {"filter": "true"}, {"per_document": True}, {"explain": True}, {"tenant": "page"}):
        given = {"mode": mode, "k": 200, **options}
        named = ", ".join(f"{option} => %({option})s" for option in given)
        with hostile.cursor() as cursor:
            statement = f"SELECT * FROM embedline.search('page', %(words)s, {named})"
            rows = cursor.execute(statement, {"words": f"{SECRET} {SHARED}", **given}).fetchall()
        assert options.get("explain") or len(rows) == ROWS, options
        assert [row for row in rows if SECRET in str(row)] == []


def _a_search_tells_nothing_hidden_of_itself(hostile: psycopg.Connection) -> None:
    """The keys and the number of found rows are those of the tenant alone."""
    assert scalar(hostile, "SELECT count(*) FROM embedline.search('page', %s, 1000)", (SHARED,)) == ROWS
    state = "SELECT state FROM embedline.state('page', %s)"
    assert scalar(hostile, state, (f"{SECRET}-1",)) == scalar(hostile, state, ("no such key",)) == "absent"
    derived = "SELECT * FROM embedline.search_derived('readers', %s)"
    assert hostile.execute(derived, (f"reader {SECRET}",)).fetchall() == []
    assert hostile.execute(derived, ("reader public",)).fetchall() != []
    assert hostile.execute("SELECT subject FROM readers_derived").fetchall() == [("reader public",)]


def _a_condition_is_given_no_hidden_text(hostile: psycopg.Connection) -> None:
    told: list[str] = []
    hostile.add_notice_handler(lambda notice: told.append(str(notice.message_primary)))
    hostile.execute(
        "CREATE FUNCTION pg_temp.leak(given text) RETURNS boolean LANGUAGE plpgsql COST 0.0000001"
        " AS $$ BEGIN RAISE NOTICE 'leak %', given; RETURN true; END $$"
    )
    for column in ("chunk", "id", "title", "body", "page_embedding::text"):
        for view in ("page_embedding", "page_embedding_v2"):
            hostile.execute(f"SELECT count(*) FROM {view} AS page_embedding WHERE pg_temp.leak({column})")
    hostile.execute("SELECT count(*) FROM readers_derived WHERE pg_temp.leak(subject)")
    for mode in ("vector", "keyword"):
        hostile.execute(
            "SELECT count(*) FROM embedline.search('page', %s, 100, mode => %s,"
            " filter => 'pg_temp.leak(body) AND pg_temp.leak(chunk)')",
            (SHARED, mode),
        )
    assert len(told) > ROWS
    assert [message for message in told if SECRET in message] == []


def _a_writer_learns_of_no_hidden_row(hostile: psycopg.Connection) -> None:
    """The capture of a tenant's own write says nothing of what was there."""
    with pytest.raises(errors.UniqueViolation):
        hostile.execute("INSERT INTO page VALUES (%s, current_user, 'x', 'x')", ("public-1",))
    with pytest.raises(errors.InsufficientPrivilege):
        hostile.execute("INSERT INTO page VALUES (%s, 'another', 'x', 'x')", ("public-x",))


def test_a_hostile_tenant_sees_nothing_of_the_other(
    database: psycopg.Connection, connect: Connect, make_role: MakeRole, stub: StubProvider
) -> None:
    hostile = _hostile_session(database, connect, make_role, stub)
    _no_relation_shows_a_hidden_row(hostile)
    _no_routine_returns_a_hidden_row(hostile, database)
    for mode in ("vector", "keyword", "hybrid"):
        _no_search_finds_a_hidden_row(hostile, mode)
    _a_search_tells_nothing_hidden_of_itself(hostile)
    _a_condition_is_given_no_hidden_text(hostile)
    _a_writer_learns_of_no_hidden_row(hostile)
