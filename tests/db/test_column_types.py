"""Other dimensions and column types on a table that is written and searched all the time: the routing view keeps what it had."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import psycopg
import pytest
from psycopg import errors, sql

from conftest import Connect, MakeRole
from embedline.client.build_index import PsycopgClient, build
from stub_provider import StubProvider, stub_provider, vector_of
from support import assert_exact, scalar, settle, wait_until
from upgrading import add_version, cut_over, settle_versions, versions
from working import create_stub_model, create_stub_pipeline, working

DIMENSIONS = (384, 1536, 3072)
ROWS = 60


@pytest.fixture(scope="module")
def providers() -> Iterator[dict[int, StubProvider]]:
    """A provider of each number of dimensions."""
    with contextlib.ExitStack() as stack:
        yield {dimensions: stack.enter_context(stub_provider(dimensions)) for dimensions in DIMENSIONS}


@pytest.fixture
def page(database: psycopg.Connection, providers: dict[int, StubProvider]) -> psycopg.Connection:
    """A pipeline of 384 dimensions without an index; models d384, d1536 and d3072 are registered."""
    for dimensions, provider in providers.items():
        create_stub_model(database, provider, f"d{dimensions}")
    create_stub_pipeline(database, model="d384", rows=ROWS)
    settle(database)
    return database


def _vectors(texts: Sequence[str], dimensions: int) -> npt.NDArray[np.float32]:
    return np.stack([vector_of(text, dimensions) for text in texts])


def _assert_serves(connection: psycopg.Connection, number: int, column_type: str, dimensions: int) -> None:
    """Assert that a version serves, with vectors of that type, for every row."""
    assert versions(connection, "serving")[number]
    query = "SELECT DISTINCT format_type(a.atttypid, a.atttypmod) FROM pg_attribute AS a WHERE a.attname = 'embedding'"
    assert scalar(connection, f"{query} AND attrelid = 'page_embedding'::regclass") == column_type
    found = connection.execute("SELECT vector_dims(embedding), count(*) FROM page_embedding GROUP BY 1").fetchall()
    assert [width for width, _ in found] == [dimensions]


def _properties(connection: psycopg.Connection) -> list[Any]:
    """Return what people may have given to the routing view: owner, options, grants, comments."""
    grants = (
        "SELECT array_agg(a.grantee::text || a.privilege_type || a.is_grantable ORDER BY 1) FROM aclexplode({}) AS a"
    )
    return connection.execute(
        f"""
        SELECT c.relowner::regrole::text, (SELECT array_agg(o ORDER BY o) FROM unnest(c.reloptions) AS o),
            ({grants.format("c.relacl")} WHERE a.grantee <> c.relowner), obj_description(c.oid, 'pg_class'),
            (SELECT jsonb_agg(jsonb_build_array(a.attname, col_description(c.oid, a.attnum), ({grants.format("a.attacl")}))
                ORDER BY a.attname) FROM pg_attribute AS a WHERE a.attrelid = c.oid AND a.attnum > 0)
        FROM pg_class AS c WHERE c.oid = 'page_embedding'::regclass
        """
    ).fetchall()


class _Application:
    """A writer and a searcher in threads of their own until the block ends."""

    def __init__(self, connect: Connect) -> None:
        self.errors: list[BaseException] = []
        self.rounds = 0
        self._connect = connect
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(work,), daemon=True) for work in (self._write, self._read)
        ]

    def _run(self, work: Any) -> None:
        try:
            with self._connect(options="-c lock_timeout=1s") as connection:
                while not self._ended.is_set():
                    work(connection)
        except BaseException as error:
            self.errors.append(error)

    def _write(self, connection: psycopg.Connection) -> None:
        self.rounds += 1
        connection.execute("UPDATE page SET body = %s WHERE id = %s", (f"round {self.rounds}", self.rounds % ROWS + 1))
        self._ended.wait(0.01)

    def _read(self, connection: psycopg.Connection) -> None:
        assert connection.execute("SELECT key FROM embedline.search('page', 'round 1', 5)").fetchall()
        query = (
            "SELECT id FROM page_embedding ORDER BY embedding <=> (SELECT embedline.embed_query('page', 'x')) LIMIT 5"
        )
        assert len(connection.execute(query, prepare=False).fetchall()) == 5

    def __enter__(self) -> _Application:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(30)
        assert self.errors == []


def _cut_over(connection: psycopg.Connection, number: int) -> None:
    """Cut over while others write: where the version is behind, it says so, and is asked again."""

    def done() -> bool:
        with contextlib.suppress(errors.ObjectNotInPrerequisiteState):
            cut_over(connection, number)
        return bool(versions(connection, "serving")[number])

    wait_until(done, 20, f"version {number} serves")


def test_384_to_1536_to_3072_dimensions_on_a_live_table(
    page: psycopg.Connection, connect: Connect, make_role: MakeRole
) -> None:
    reader, owner = make_role("embedline_reader"), make_role()
    page.execute(sql.SQL("GRANT SELECT ON page_embedding TO {} WITH GRANT OPTION").format(sql.Identifier(reader)))
    page.execute(sql.SQL("GRANT SELECT (id, chunk) ON page_embedding TO {}, public").format(sql.Identifier(reader)))
    page.execute("ALTER VIEW page_embedding SET (security_barrier = true)")
    page.execute(
        "COMMENT ON VIEW page_embedding IS 'what we search'; COMMENT ON COLUMN page_embedding.chunk IS 'the ''words''';"
    )
    page.execute(sql.SQL("GRANT SELECT ON page TO {}").format(sql.Identifier(owner)))
    page.execute(sql.SQL("ALTER VIEW page_embedding OWNER TO {}").format(sql.Identifier(owner)))
    before = _properties(page)
    with working(page, 1, seconds=300), _Application(connect):
        # HNSW indexes vector up to 2,000 dimensions: of 3,072 it becomes halfvec by itself.
        for number, column_type, dimensions in ((2, "vector", 1536), (3, "halfvec", 3072)):
            assert add_version(page, f"d{dimensions}", index_method="hnsw") == number
            wait_until(lambda n=number: versions(page, "state")[n] == "complete", 90, "it is filled")  # type: ignore[misc]
            build(PsycopgClient(page), "page", number)
            _cut_over(page, number)
            _assert_serves(page, number, column_type, dimensions)
            assert _properties(page) == before
        assert scalar(page, "SELECT embedline.rollback('page')") == 2
        _assert_serves(page, 2, "vector", 1536)
        assert _properties(page) == before
    settle_versions(page)
    for number, dimensions in enumerate(DIMENSIONS, 1):
        embed = functools.partial(_vectors, dimensions=dimensions)
        assert assert_exact(page, embed=embed, version=number) == ROWS


@pytest.mark.parametrize(("first", "second"), [("vector", "halfvec"), ("halfvec", "vector")])
def test_vector_and_halfvec_take_each_others_place_on_a_live_table(
    page: psycopg.Connection, connect: Connect, first: str, second: str
) -> None:
    if first == "halfvec":
        add_version(page, "d384", column_type="halfvec")
        settle_versions(page)
        cut_over(page, 2)
        page.execute("SELECT embedline.drop_embedding_version('page', 1, rollback_window => '0')")
    page.execute("ALTER VIEW page_embedding SET (security_barrier = true)")
    before = _properties(page)
    serving = max(versions(page, "serving"))
    with working(page, 1, seconds=300), _Application(connect):
        number = add_version(page, "d384", column_type=second)
        wait_until(lambda: versions(page, "state")[number] == "complete", 90, "it is filled")
        for _ in range(3):
            _cut_over(page, number)
            _assert_serves(page, number, second, 384)
            page.execute("SELECT embedline.rollback('page')")
            _assert_serves(page, serving, first, 384)
            assert _properties(page) == before
    settle_versions(page)
    for version in (serving, number):
        assert assert_exact(page, embed=functools.partial(_vectors, dimensions=384), version=version) == ROWS


DEPENDENTS = {
    "view short": "CREATE VIEW short AS SELECT id FROM page_embedding",
    "materialized view kept": "CREATE MATERIALIZED VIEW kept AS SELECT id FROM page_embedding WITH NO DATA",
    "function found()": "CREATE FUNCTION found() RETURNS bigint BEGIN ATOMIC SELECT count(*) FROM page_embedding; END",
    "function of(page_embedding)": "CREATE FUNCTION of(page_embedding) RETURNS bigint LANGUAGE sql AS 'SELECT 1::bigint'",
    "function of(page_embedding[])": "CREATE FUNCTION of(page_embedding[]) RETURNS bigint LANGUAGE sql AS 'SELECT 1::bigint'",
    "column hit of table hits": "CREATE TABLE hits (hit page_embedding)",
    "trigger instead on view page_embedding": "CREATE TRIGGER instead INSTEAD OF DELETE ON page_embedding FOR EACH ROW"
    " EXECUTE FUNCTION suppress_redundant_updates_trigger()",
    "rule silent on view page_embedding": "CREATE RULE silent AS ON DELETE TO page_embedding DO INSTEAD NOTHING",
    "default value for column chunk of view page_embedding": "ALTER VIEW page_embedding ALTER COLUMN chunk SET DEFAULT 'x'",
}


@pytest.mark.parametrize("dependent", DEPENDENTS)
def test_what_depends_on_the_view_stays_with_the_type_or_is_named_where_it_changes(
    page: psycopg.Connection, dependent: str
) -> None:
    page.execute(DEPENDENTS[dependent].encode())
    add_version(page, "d1536")
    add_version(page, "d384", column_type="halfvec")
    settle_versions(page)
    cut_over(page, 2)
    _assert_serves(page, 2, "vector", 1536)
    with pytest.raises(errors.DependentObjectsStillExist, match="changes from") as refused:
        cut_over(page, 3)
    assert dependent in (refused.value.diag.message_detail or "").replace("public.", "")
    _assert_serves(page, 2, "vector", 1536)
    assert scalar(page, "SELECT count(*) FROM embedline.cutover") == 1


def test_a_view_made_anew_gets_no_grant_that_the_old_one_had_not(page: psycopg.Connection, make_role: MakeRole) -> None:
    role = make_role()
    page.execute(sql.SQL("ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO {}, public").format(sql.Identifier(role)))
    before = _properties(page)
    add_version(page, "d384", column_type="halfvec")
    settle_versions(page)
    cut_over(page, 2)
    assert _properties(page) == before
    page.execute(sql.SQL("ALTER DEFAULT PRIVILEGES REVOKE ALL ON TABLES FROM {}, public").format(sql.Identifier(role)))
