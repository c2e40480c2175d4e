"""Tables rewritten, moved and given away in the middle of a backfill, a fill and an index build."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator

import psycopg
import pytest
from psycopg import sql

from conftest import Connect, MakeRole
from generated_names import PAGE
from small_models import register_static
from support import assert_exact, create_pages, create_pipeline, embed_static, scalar, searching, settle
from upgrading import add_version, settle_versions
from working import working

ROWS = 1200
# Of the application's table; {role} is another owner. The last ones leave it as it was.
OF_THE_SOURCE = (
    "VACUUM FULL page",
    "CLUSTER page USING page_pkey",
    "REINDEX TABLE CONCURRENTLY page",
    "ALTER TABLE page SET UNLOGGED",
    "ALTER TABLE page SET LOGGED",
    "ALTER TABLE page SET TABLESPACE elsewhere",
    "ALTER TABLE page OWNER TO {role}",
    "CREATE SCHEMA moved; GRANT ALL ON SCHEMA moved, public TO {role}; ALTER TABLE page SET SCHEMA moved",
    "VACUUM FULL moved.page",
    "ALTER TABLE moved.page SET SCHEMA public",
    "ALTER TABLE page SET TABLESPACE pg_default",
)
# Of the tables of Embedline, which a DBA treats like any other.
OF_OURS = (
    f"VACUUM FULL {PAGE('chunk')}",
    f"VACUUM FULL {PAGE('document')}, {PAGE('outbox')}, {PAGE('inbox')}, {PAGE('claim')}",
    f"CLUSTER {PAGE('chunk')} USING page_chunk_pkey",
    f"VACUUM FULL {PAGE.version(1)}",
    f"REINDEX TABLE CONCURRENTLY {PAGE.version(1)}",
    f"REINDEX TABLE CONCURRENTLY {PAGE('chunk')}",
    f"ALTER TABLE {PAGE('chunk')} SET TABLESPACE elsewhere",
    f"ALTER TABLE {PAGE.version(1)} SET TABLESPACE elsewhere",
    f"ALTER TABLE {PAGE('chunk')} SET TABLESPACE pg_default",
    f"ALTER TABLE {PAGE.version(1)} SET TABLESPACE pg_default",
    "VACUUM FULL embedline.backfill_range, embedline.version_queue, embedline.signal, embedline.version",
)


@pytest.fixture
def page(database: psycopg.Connection) -> Iterator[psycopg.Connection]:
    """A source of some blocks, and a tablespace beside the default one."""
    database.execute("SET allow_in_place_tablespaces = on")
    database.execute("CREATE TABLESPACE elsewhere LOCATION ''")
    create_pages(database, ROWS)
    yield database
    for kind in ("TABLE", "INDEX"):
        database.execute(f"ALTER {kind} ALL IN TABLESPACE elsewhere SET TABLESPACE pg_default")
    database.execute("DROP TABLESPACE elsewhere")


def _run(connection: psycopg.Connection, statements: str) -> None:
    for statement in statements.split("; "):
        connection.execute(statement)


def _write(connection: psycopg.Connection, step: int) -> None:
    """Change, remove and add some rows, as the application goes on doing."""
    table = scalar(connection, "SELECT source::text FROM embedline.pipeline")
    connection.execute(
        f"UPDATE {table} SET body = 'changed ' || id || ' in step {step}' WHERE id % 97 = {step};"
        f"DELETE FROM {table} WHERE id = {900 + step};"
        f"INSERT INTO {table} (id, title, body) VALUES ({5000 + step}, 'New', 'row of step {step}')"
    )


def _assert_whole(connection: psycopg.Connection) -> None:
    assert assert_exact(connection) >= ROWS
    findings = "SELECT finding, count FROM embedline.verify('page', repair => false) WHERE count > 0"
    assert connection.execute(findings).fetchall() == []
    assert searching(connection, "page", "Body about rivers", k=5)


def test_a_backfill_goes_through_rewrites_and_moves(page: psycopg.Connection, make_role: MakeRole) -> None:
    role = make_role()
    create_pipeline(page, index_method="none")
    for step, statement in enumerate([*OF_THE_SOURCE, *OF_OURS]):
        scalar(page, "SELECT embedline.embed_pending(20)")
        _run(page, statement.format(role=role))
        _write(page, step)
    assert scalar(page, "SELECT count(*) FROM embedline.backfill_range WHERE NOT done") > 0, "it was not in the middle"
    settle(page)
    _assert_whole(page)


def test_a_fill_goes_through_rewrites_and_moves(page: psycopg.Connection, make_role: MakeRole) -> None:
    role = make_role()
    register_static(page, 64)
    create_pipeline(page, index_method="none")
    settle(page)
    add_version(page, "static-64", index_method="none")
    page.execute("SELECT embedline.configure_backfill('page', 2, backfill_rate => 60)")
    of_fill = (f"VACUUM FULL {PAGE.version(2)}", f"ALTER TABLE {PAGE.version(2)} SET TABLESPACE elsewhere")
    with working(page):
        for step, statement in enumerate([*OF_THE_SOURCE, *OF_OURS, *of_fill]):
            _run(page, statement.format(role=role))
            _write(page, step)
        assert scalar(page, "SELECT missing FROM embedline.versions WHERE version = 2") > 0, "it was not in the middle"
    page.execute("SELECT embedline.configure_backfill('page', 2, backfill_rate => 100000)")
    settle_versions(page)
    _assert_whole(page)
    assert assert_exact(page, version=2, embed=functools.partial(embed_static, dimensions=64)) >= ROWS


def test_an_index_build_goes_through_rewrites_and_moves(
    page: psycopg.Connection, connect: Connect, make_role: MakeRole
) -> None:
    role = make_role()
    create_pipeline(page)
    settle(page)
    statement = scalar(page, "SELECT embedline.index_statement('page')")
    builder = connect()
    failed: list[Exception] = []

    def build() -> None:
        try:
            builder.execute(statement)
        except Exception as error:
            failed.append(error)

    # Waits for this transaction, so the build is under way for as long as it is open.
    with connect(autocommit=False) as blocker:
        blocker.execute(sql.SQL("SELECT count(*) FROM {}").format(sql.SQL(PAGE.version(1))))
        thread = threading.Thread(target=build)
        thread.start()
        for step, change in enumerate(OF_THE_SOURCE):
            # REINDEX CONCURRENTLY would wait for the open transaction, too.
            if "CONCURRENTLY" not in change:
                _run(page, change.format(role=role))
            _write(page, step)
        assert thread.is_alive(), "it was not in the middle"
        blocker.rollback()
    thread.join()
    assert failed == []
    for change in OF_OURS:
        _run(page, change)
    assert scalar(page, "SELECT index_state FROM embedline.status") == "valid"
    page.execute(f"REINDEX INDEX CONCURRENTLY {PAGE.index(1)}")
    settle(page)
    _assert_whole(page)
