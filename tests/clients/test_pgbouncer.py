"""Searches, the routing view and workers through PgBouncer in transaction mode."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
import sqlalchemy as sa

import pooler
from embedline.client.integrations.langchain import EmbedlineRetriever
from embedline.client.integrations.sqlalchemy import search
from support import create_pages, create_pipeline, scalar, settle, wait_until

_SEARCH = "SELECT key FROM embedline.search('page', %s, 2)"
_VIEW = (
    "SELECT id::text FROM page_embedding ORDER BY embedding <=> (SELECT embedline.embed_query('page', %s)), id LIMIT 2"
)
_LOCKS = (
    "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
    " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
)
_BACKEND = "SELECT pg_backend_pid()"


@pytest.fixture
def pool(database: psycopg.Connection, database_dsn: str) -> Iterator[str]:
    """URI of a database with a pipeline of twenty pages, through PgBouncer."""
    create_pages(database, 20)
    create_pipeline(database)
    settle(database)
    prepared = {"max_prepared_statements": "100"} if pooler.version() >= (1, 21) else {}
    with pooler.pooled(database_dsn, **prepared) as dsn:
        yield dsn


def test_searches_take_turns_in_the_sessions_of_a_pool(database: psycopg.Connection, pool: str) -> None:
    wanted = [row for (row,) in database.execute(_SEARCH, ("violins",))]
    clients = [psycopg.connect(pool, autocommit=True, prepare_threshold=None) for _ in range(6)]
    try:
        for client in clients:
            assert [row for (row,) in client.execute(_SEARCH, ("violins",))] == wanted
            assert [row for (row,) in client.execute(_VIEW, ("violins",))] == wanted
        sessions = {scalar(client, _BACKEND) for client in clients}
        assert len(sessions) < len(clients)
        # What a search sets ends with it: the next client of a session finds nothing.
        left = (
            "SELECT count(*) FROM pg_settings WHERE source = 'session' AND name LIKE 'hnsw.%' AND setting <> reset_val"
        )
        assert [scalar(client, left) for client in clients] == [0] * len(clients)
    finally:
        for client in clients:
            client.close()


def test_prepared_searches_need_a_pgbouncer_that_follows_them(pool: str) -> None:
    follows = pooler.version() >= (1, 21)
    with (
        psycopg.connect(pool, autocommit=True) as client,
        psycopg.connect(pool, autocommit=True, prepare_threshold=None) as other,
    ):
        wanted = client.execute(_SEARCH, ("violins",), prepare=True).fetchall()
        prepared_in = scalar(other, _BACKEND)
        with other.transaction():
            # It holds the session in which the statement was prepared, so the client gets another one.
            assert scalar(other, _BACKEND) == prepared_in
            if follows:
                assert client.execute(_SEARCH, ("violins",), prepare=True).fetchall() == wanted
            else:
                with pytest.raises(psycopg.errors.InvalidSqlStatementName):
                    client.execute(_SEARCH, ("violins",), prepare=True)


def test_the_clients_search_through_a_pool(pool: str) -> None:
    retriever = EmbedlineRetriever(connection=pool, pipeline="page", k=2)
    engine = sa.create_engine(
        pool.replace("postgresql:", "postgresql+psycopg:"), connect_args={"prepare_threshold": None}
    )
    try:
        wanted = [document.id for document in retriever.invoke("violins")]
        for _ in range(10):
            with engine.begin() as connection:
                found = connection.execute(sa.select(search("page", "violins", k=2).c.key)).scalars().all()
            assert found == wanted
    finally:
        retriever.close()
        engine.dispose()


def test_a_worker_keeps_one_session_and_leaves_no_lock(database: psycopg.Connection, pool: str) -> None:
    database.execute("UPDATE page SET body = body || ' again'")
    with psycopg.connect(pool, autocommit=True, prepare_threshold=None) as client:
        client.execute("CALL embedline.run_worker(until_idle => true)")
    assert scalar(database, "SELECT pending FROM embedline.status") == 0
    assert scalar(database, _LOCKS) == 0


def test_a_time_limit_of_the_pool_ends_the_client_s_wait_and_not_the_worker(
    database: psycopg.Connection, database_dsn: str
) -> None:
    create_pages(database, 20)
    create_pipeline(database)
    with (
        pooler.pooled(database_dsn, query_timeout="1") as dsn,
        psycopg.connect(dsn, autocommit=True, prepare_threshold=None) as client,
    ):
        with pytest.raises(psycopg.OperationalError):
            client.execute("CALL embedline.run_worker(max_seconds => 4)")
        # Its client is gone, as is the pool's connection, but the server has not noticed.
        assert scalar(database, "SELECT workers_alive FROM embedline.status") == 1
    wait_until(lambda: scalar(database, _LOCKS) == 0, what="the worker's time is over")
    assert scalar(database, "SELECT pending FROM embedline.status") == 0
