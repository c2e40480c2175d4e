"""Building vector indexes: only over what is verified, with what the server can give, and nothing INVALID stays behind."""

from __future__ import annotations

import threading
from collections.abc import Callable

import psycopg
import pytest
import sqlalchemy
from psycopg import errors, sql
from typer.testing import CliRunner

from embedline.client import build_index, cli
from generated_names import PAGE
from support import create_pages, create_pipeline, scalar, settle, wait_until

Connect = Callable[..., psycopg.Connection]
PAGES = 200


@pytest.fixture
def pages(database: psycopg.Connection) -> psycopg.Connection:
    """A pipeline of 200 pages with a second version of type halfvec; both are complete, neither has its index."""
    create_pages(database, PAGES)
    create_pipeline(database)
    settle(database)
    add = "SELECT embedline.add_embedding_version('page', 'static-256', column_type => 'halfvec')"
    assert scalar(database, add) == 2
    return database


@pytest.fixture
def complete(pages: psycopg.Connection) -> psycopg.Connection:
    _fill(pages)
    return pages


def _fill(connection: psycopg.Connection) -> None:
    def filled() -> bool:
        connection.execute("SELECT embed_pending(1000)")
        query = "SELECT bool_and(state = 'complete' AND missing = 0) FROM embedline.versions WHERE pipeline = 'page'"
        return bool(scalar(connection, query))

    wait_until(filled, 20, "both versions are filled")


def _searched(connection: psycopg.Connection) -> int:
    """Return how many chunks the second version's index finds."""
    with connection.transaction():
        connection.execute(
            "SET LOCAL enable_seqscan = off; SET LOCAL enable_sort = off; SET LOCAL hnsw.ef_search = 1000"
        )
        order = f"ORDER BY embedding_v2 <=> (SELECT embedding_v2 FROM {PAGE.version(2)} LIMIT 1)"
        return len(connection.execute(f"SELECT chunk_id FROM {PAGE.version(2)} {order} LIMIT 1000").fetchall())


def _build(connection: psycopg.Connection, version: int | None = 2, **options: object) -> tuple[str | None, list[str]]:
    told: list[str] = []
    client = build_index.PsycopgClient(connection)
    statement = build_index.build(client, "page", version, listener=build_index.Listener(tell=told.append), **options)  # type: ignore[arg-type]
    return statement, told


def _indexes(connection: psycopg.Connection) -> dict[str, str]:
    return dict(connection.execute("SELECT name, state FROM embedline.index_progress('page')").fetchall())


# --- what is built


def test_each_version_gets_its_own_index(complete: psycopg.Connection) -> None:
    assert _indexes(complete) == {"page_v1_embedding_idx": "missing", "page_v2_embedding_idx": "missing"}
    statement, told = _build(complete)
    assert statement is not None
    assert "halfvec_cosine_ops" in statement
    assert told == []
    assert _indexes(complete) == {"page_v1_embedding_idx": "missing", "page_v2_embedding_idx": "valid"}
    assert _build(complete) == (None, [])
    assert "page_v1_embedding_idx" in str(_build(complete, None)[0])
    assert set(_indexes(complete).values()) == {"valid"}


def test_index_statement_names_a_version(complete: psycopg.Connection) -> None:
    complete.execute(scalar(complete, "SELECT embedline.index_statement('page', 2)"))
    assert scalar(complete, "SELECT embedline.index_statement('page', 2)") is None
    assert "page_v1" in scalar(complete, "SELECT embedline.index_statement('page')")
    with pytest.raises(errors.UndefinedObject, match="version 7"):
        complete.execute("SELECT embedline.index_statement('page', 7)")
    with pytest.raises(errors.UndefinedObject, match="no precision index"):
        complete.execute("SELECT embedline.index_statement('page', 2, 'binary')")


def test_sqlalchemy_builds_as_psycopg_does(complete: psycopg.Connection, database_dsn: str) -> None:
    engine = sqlalchemy.create_engine(database_dsn.replace("postgresql://", "postgresql+psycopg://"))
    phases: list[str] = []
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        client = build_index.SqlAlchemyClient(connection)
        listener = build_index.Listener(lambda phase, percent: phases.append(phase))
        statement = build_index.build(client, "page", 2, listener=listener)
        assert "page_v2" in str(statement)
        assert build_index.build(client, "page", 2) is None
        with pytest.raises(sqlalchemy.exc.DBAPIError) as caught:
            build_index.build(client, "page", 9)
        assert client.sqlstate(caught.value) == "42704"
    engine.dispose()


def test_the_session_has_its_settings_back(complete: psycopg.Connection) -> None:
    complete.execute("SET maintenance_work_mem = '5MB'; SET statement_timeout = '7min'; SET lock_timeout = '3s'")
    _build(complete)
    shown = [
        scalar(complete, f"SHOW {name}")
        for name in ("maintenance_work_mem", "statement_timeout", "lock_timeout", "max_parallel_maintenance_workers")
    ]
    assert shown == ["5MB", "7min", "3s", "2"]


def test_the_command_line_builds_and_says_what_it_found(complete: psycopg.Connection, database_dsn: str) -> None:
    def run(*arguments: str) -> str:
        result = CliRunner().invoke(cli.app, ["build-index", "page", *arguments], env={"EMBEDLINE_DSN": database_dsn})
        return f"{result.exit_code} {result.output}"

    built = run("--version", "2", "--workers", "0")
    assert built.startswith("0")
    assert built.endswith("The index of pipeline page is built and valid.\n")
    assert built.isascii()
    assert _indexes(complete)["page_v2_embedding_idx"] == "valid"
    assert "nothing to build" in run("--version", "2")
    complete.execute(f"DELETE FROM {PAGE.version(1)} WHERE chunk_id = 1")
    refused = run()
    assert refused.startswith("1")
    assert "lacks 1 vectors" in refused
    assert "SELECT * FROM embedline.verify('page', repair => true)" in refused


# --- coverage


def test_a_version_that_is_being_filled_is_refused(pages: psycopg.Connection) -> None:
    with pytest.raises(errors.ObjectNotInPrerequisiteState) as caught:
        _build(pages)
    assert "still being filled" in str(caught.value.diag.message_primary)
    assert "embedline.versions" in str(caught.value.diag.message_hint)
    with pytest.raises(errors.ObjectNotInPrerequisiteState):
        pages.execute("SELECT embedline.build_vector_index('page', 2)")


def test_a_vector_that_is_gone_is_counted(complete: psycopg.Connection) -> None:
    complete.execute(
        f"DELETE FROM {PAGE.version(2)} WHERE chunk_id IN (SELECT chunk_id FROM {PAGE.version(2)} LIMIT 3)"
    )
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="lacks 3 vectors"):
        _build(complete)


def test_a_vector_without_a_direction_is_refused(complete: psycopg.Connection) -> None:
    complete.execute(
        f"UPDATE {PAGE.version(2)} SET embedding_v2 = array_fill(0, ARRAY[256])::halfvec"
        f" WHERE chunk_id = (SELECT min(chunk_id) FROM {PAGE.version(2)})"
    )
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="1 vectors of version 2") as caught:
        _build(complete)
    assert "chunk_id 1" in str(caught.value.diag.message_detail)


def test_new_chunks_that_wait_do_not_hold_the_build_up(complete: psycopg.Connection) -> None:
    complete.execute("UPDATE page SET body = 'new words about violins' WHERE id <= 20")
    # Live changes of the source come first: the second version's queue has the new chunks then.
    complete.execute("SELECT embed_pending(20, 'page')")
    query = "SELECT queued > 0 AND missing = queued FROM embedline.versions WHERE version = 2"
    assert scalar(complete, query)
    assert _build(complete)[0] is not None
    _fill(complete)
    assert _searched(complete) == PAGES


def _quarantine(connection: psycopg.Connection, where: str) -> None:
    connection.execute(
        f"""
        WITH gone AS (DELETE FROM {PAGE.version(2)} WHERE {where} RETURNING chunk_id)
        INSERT INTO embedline.version_dead_letter (version_id, chunk_id, key, stage, error_code, message, attempts)
        SELECT v.version_id, gone.chunk_id, jsonb_build_array(gone.chunk_id), 'embed', 'EL012', 'refused', 5
        FROM gone, embedline.version AS v WHERE v.number = 2
        """
    )


def test_quarantined_chunks_are_listed_and_have_to_be_accepted(complete: psycopg.Connection) -> None:
    _quarantine(complete, "chunk_id <= 7")
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="7 chunks") as caught:
        _build(complete)
    assert "[1], [2], [3], [4], [5] and others" in str(caught.value.diag.message_detail)
    hint = str(caught.value.diag.message_hint)
    assert "SELECT embedline.accept_dead_letters('page', 2);" in hint
    assert scalar(complete, hint.partition(";")[0]) == 7
    assert _build(complete)[0] is not None


def test_a_version_with_everything_quarantined_is_never_indexed(complete: psycopg.Connection) -> None:
    _quarantine(complete, "true")
    with pytest.raises(errors.ObjectNotInPrerequisiteState):
        complete.execute("SELECT embedline.accept_dead_letters('page', 2)")
    complete.execute("UPDATE embedline.version_dead_letter SET accepted_by = 'somebody'")
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="no vector at all"):
        _build(complete)


# --- leftovers, failures, other builders


def _leave_invalid(connection: psycopg.Connection, other: psycopg.Connection) -> None:
    """Leave an INVALID index behind: a concurrent build waits for the other session's lock until it times out."""
    statement = scalar(connection, "SELECT embedline.index_statement('page', 2)")
    with other.transaction():
        other.execute(f"LOCK TABLE {PAGE.version(2)} IN ROW EXCLUSIVE MODE")
        connection.execute("SET statement_timeout = '500ms'")
        with pytest.raises(errors.QueryCanceled):
            connection.execute(statement)
    connection.execute("RESET statement_timeout")


def test_an_invalid_leftover_is_dropped_first(complete: psycopg.Connection, connect: Connect) -> None:
    _leave_invalid(complete, connect())
    assert _indexes(complete)["page_v2_embedding_idx"] == "invalid"
    before = scalar(complete, f"SELECT '{PAGE.index(2)}'::regclass::oid::bigint")
    assert _build(complete)[0] is not None
    assert _indexes(complete)["page_v2_embedding_idx"] == "valid"
    assert scalar(complete, f"SELECT '{PAGE.index(2)}'::regclass::oid::bigint") != before


def test_a_build_that_is_cancelled_leaves_nothing_behind(complete: psycopg.Connection, connect: Connect) -> None:
    blocker = connect(autocommit=False)
    blocker.execute(f"LOCK TABLE {PAGE.version(2)} IN ROW EXCLUSIVE MODE")
    failed: list[Exception] = []

    def build() -> None:
        try:
            _build(complete)
        except psycopg.Error as error:
            failed.append(error)

    observer = connect()
    builder = threading.Thread(target=build)
    builder.start()
    waiting = "SELECT count(*) FROM pg_stat_progress_create_index WHERE phase LIKE 'waiting%%'"
    wait_until(lambda: scalar(observer, waiting), 20, "the build waits for the writer")
    assert _indexes(observer)["page_v2_embedding_idx"] == "building"
    # Another builder waits for this one and drops nothing.
    assert "building" in str(scalar(observer, "SELECT embedline._index_plan('page', 2, NULL, NULL)"))
    observer.execute(
        "SELECT pg_cancel_backend(pid) FROM pg_stat_progress_create_index WHERE datname = current_database()"
    )
    blocker.rollback()
    builder.join(timeout=30)
    assert [type(error) for error in failed] == [errors.QueryCanceled]
    assert _indexes(complete)["page_v2_embedding_idx"] == "missing"


def test_a_parallel_build_that_fails_is_tried_again_serially(complete: psycopg.Connection) -> None:
    # PostgreSQL builds over a small table alone.
    complete.execute("SET min_parallel_table_scan_size = 0")
    client = _TakesTooMuch(complete)
    told: list[str] = []
    assert (
        build_index.build(client, "page", 2, parallel_workers=2, listener=build_index.Listener(tell=told.append))
        is not None
    )
    assert client.failures == ["53100"]
    assert any("serially" in notice for notice in told)
    assert _indexes(complete) == {"page_v1_embedding_idx": "missing", "page_v2_embedding_idx": "valid"}


class _TakesTooMuch(build_index.PsycopgClient):
    """A session that gives a parallel build more memory than /dev/shm ever has, as where somebody else has filled it."""

    def __init__(self, connection: psycopg.Connection) -> None:
        super().__init__(connection)
        object.__setattr__(self, "failures", [])

    def execute(self, statement: str) -> build_index.Rows:
        if statement.startswith("SET maintenance_work_mem") and not self.failures:
            statement = "SET maintenance_work_mem = '1900GB'"
        try:
            return super().execute(statement)
        except psycopg.Error as error:
            self.failures.append(error.sqlstate)
            raise


# --- pg_cron's part that needs no pg_cron


def test_without_pg_cron_the_error_names_the_command(complete: psycopg.Connection) -> None:
    with pytest.raises(errors.InvalidParameterValue) as caught:
        complete.execute("SELECT embedline.build_vector_index('page', 2)")
    assert caught.value.diag.message_hint == "From a shell: embedline build-index page --version 2"
    _build(complete)
    assert scalar(complete, "SELECT embedline.build_vector_index('page', 2)") == "page_v2_embedding_idx is valid"


def test_a_second_build_on_a_table_gives_way_to_the_first(complete: psycopg.Connection, connect: Connect) -> None:
    plan = scalar(complete, "SELECT embedline._index_plan('page', 2, NULL, NULL)")
    comment = " /* embedline build: maintenance_work_mem = 98304kB, max_parallel_maintenance_workers = 1 */"
    first = connect()
    first.execute("SELECT pg_advisory_lock(%s::integer, %s::integer)", plan["lock_key"])
    with pytest.raises(errors.LockNotAvailable, match=r"another index on .* is being built"):
        complete.execute(plan["statement"] + comment)
    assert _indexes(complete)["page_v2_embedding_idx"] == "missing"
    # From the command line it waits until the first is done.
    waiting = threading.Thread(target=_build, args=(complete,))
    waiting.start()
    first.close()
    waiting.join(timeout=30)
    assert _indexes(connect())["page_v2_embedding_idx"] == "valid"


def test_a_statement_brings_its_settings_in_a_comment(
    complete: psycopg.Connection, connect: Connect, make_role: Callable[..., str]
) -> None:
    statement = scalar(complete, "SELECT embedline.index_statement('page', 2)")
    comment = " /* embedline build: maintenance_work_mem = 98304kB, max_parallel_maintenance_workers = 1 */"
    complete.execute(statement + comment)
    assert scalar(complete, "SHOW maintenance_work_mem") == "96MB"
    assert scalar(complete, "SHOW max_parallel_maintenance_workers") == "1"
    assert _indexes(complete)["page_v2_embedding_idx"] == "valid"
    # A role without any right of ours builds an index as ever.
    role = make_role()
    complete.execute(sql.SQL("CREATE SCHEMA its AUTHORIZATION {}").format(sql.Identifier(role)))
    other = connect(role)
    other.execute("CREATE TABLE its.note (id integer); CREATE INDEX ON its.note (id)")
    assert scalar(other, "SHOW maintenance_work_mem") == scalar(connect(), "SHOW maintenance_work_mem")
