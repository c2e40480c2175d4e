"""Servers that only search follow the rows and the cutovers of a pipeline."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

import psycopg
import pytest

from embedline.dev.cluster.server import Cluster
from generated_names import PAGE
from replicating import prepare, reading, refresh, subscribe, wait_until_caught_up, wait_until_copied
from small_models import register_static
from support import create_pages, create_pipeline, scalar, searching, settle, wait_until
from upgrading import add_version, cut_over, settle_versions
from working import remove_all, working, writing

ROWS = 60
BREAD = "a loaf of bread"


class StartCluster(Protocol):
    def __call__(self, *, settings_: dict[str, str]) -> Cluster: ...


@pytest.fixture(scope="module")
def servers(start_cluster: StartCluster) -> list[Cluster]:
    """Three servers with Embedline.

    Databases of theirs without it stand for servers that have only pgvector.
    """
    # A subscription that has stopped begins again after that time.
    return [start_cluster(settings_={"wal_retrieve_retry_interval": "200ms"}) for _ in range(3)]


@pytest.fixture
def publisher(servers: list[Cluster]) -> Iterator[psycopg.Connection]:
    """A database with 60 embedded pages, of which nothing is published yet."""
    with psycopg.connect(servers[0].dsn(), autocommit=True) as connection:
        create_pages(connection, ROWS)
        create_pipeline(connection, index_method="none")
        settle(connection)
        register_static(connection, 64)
        yield connection
        remove_all(connection)
        connection.execute("SELECT embedline.drop_model('static-64')")
        # A version that gave way takes its model along.
        if not scalar(connection, "SELECT EXISTS (SELECT FROM embedline.model WHERE name = 'static-256')"):
            register_static(connection, 256)


@pytest.fixture
def bare(servers: list[Cluster], publisher: psycopg.Connection) -> Iterator[psycopg.Connection]:
    """A database of another server, without Embedline and PL/Python.

    Its subscription ends with the test.
    """
    with psycopg.connect(servers[1].dsn("postgres"), autocommit=True) as maintenance:
        maintenance.execute("CREATE DATABASE bare")
        with psycopg.connect(servers[1].dsn("bare"), autocommit=True) as connection:
            yield connection
            for (name,) in connection.execute("SELECT subname FROM pg_subscription").fetchall():
                connection.execute(f"DROP SUBSCRIPTION {name}")
        maintenance.execute("DROP DATABASE bare WITH (FORCE)")


def query_vector(publisher: psycopg.Connection, text: str = BREAD) -> str:
    """Return the vector of a text by the model that serves on the publisher."""
    return str(scalar(publisher, "SELECT embedline.embed_query('page', %s)", (text,)))


def shown(session: psycopg.Connection) -> tuple[int, int, int]:
    """Return the rows of the routing view, and the fewest and most dimensions."""
    query = "SELECT count(*), min(vector_dims(embedding)), max(vector_dims(embedding)) FROM page_embedding"
    row = session.execute(query).fetchone()
    assert row is not None
    return row


def is_cut_over(publisher: psycopg.Connection) -> bool:
    """Try to cut over to version 2; return whether it was not refused."""
    with contextlib.suppress(psycopg.errors.ObjectNotInPrerequisiteState):
        cut_over(publisher, 2)
        return True
    return False


def test_a_cutover_reaches_a_subscriber_without_an_empty_or_mixed_moment(
    publisher: psycopg.Connection, bare: psycopg.Connection
) -> None:
    publisher.execute("CREATE ROLE replicator LOGIN REPLICATION PASSWORD 'secret'")
    publisher.execute("SELECT embedline.publication('page', with_source => true, subscriber_role => 'replicator')")
    publisher.execute("GRANT SELECT ON page TO replicator")
    prepare(publisher, bare)
    subscribe(publisher, bare, user="replicator", password="secret")
    assert scalar(bare, "SELECT array_agg(extname ORDER BY extname) FROM pg_extension") == ["plpgsql", "vector"]
    assert shown(bare) == (ROWS, 256, 256)
    vector = query_vector(publisher)
    ranked = bare.execute("SELECT key, chunk, score FROM page_search(%s, 5)", (vector,)).fetchall()
    expected = searching(publisher, "page", BREAD, 5)
    assert [(key, chunk) for key, chunk, _ in ranked] == [(key, chunk) for key, chunk, _ in expected]
    assert [score for _, _, score in ranked] == pytest.approx([score for _, _, score in expected], abs=1e-6)

    # The source's own changes come along: a deleted row is gone in its own transaction, before any worker.
    publisher.execute("DELETE FROM page WHERE id = 3; UPDATE page SET views = 7 WHERE id = 4")
    wait_until_caught_up(publisher, 1)
    assert shown(bare) == (ROWS - 1, 256, 256)
    assert scalar(bare, "SELECT views FROM page_embedding WHERE id = 4") == 7
    settle(publisher)

    add_version(publisher, "static-64")
    settle_versions(publisher)
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="not published") as refused:
        cut_over(publisher, 2)
    assert "subscriber_ddl('page')" in (refused.value.diag.message_hint or "")
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="may lack"):
        publisher.execute("SELECT embedline.publication('page')")
    prepare(publisher, bare)
    publisher.execute("SELECT embedline.publication('page', tables_created => true)")
    refresh(bare)
    first = scalar(publisher, "SELECT model_fingerprint FROM " + PAGE("routing") + " WHERE version = 1")

    def by_fingerprint(session: psycopg.Connection) -> object:
        return session.execute("SELECT key, version FROM page_search(%s, 1, %s)", (vector, first)).fetchone()

    # The application goes on writing, and a worker embeds it.
    write = "SELECT pg_sleep(0.02); UPDATE page SET body = 'Rockets ' || random() WHERE id = 8"
    with (
        working(publisher),
        writing(publisher, write),
        reading(bare, shown) as views,
        reading(bare, by_fingerprint) as searches,
    ):
        chunk = "SELECT chunk LIKE '%Rockets%' FROM page_embedding WHERE id = 8"
        wait_until(lambda: scalar(bare, chunk), 30, "changes arrive")
        for number, dimensions in ((2, 64), (1, 256), (2, 64)):
            if number == 1:
                publisher.execute("SELECT embedline.rollback('page')")
            else:
                # Refused while workers are behind with the writer.
                wait_until(lambda: is_cut_over(publisher), 30, "version 2 has caught up")
            wait_until(views.sees((ROWS - 1, dimensions, dimensions)), 20, f"version {number} is shown")
    assert views.results.keys() == {(ROWS - 1, 256, 256), (ROWS - 1, 64, 64)}
    assert searches.results.keys() == {(expected[0][0], 1)}

    # Without a fingerprint a vector of the model of before is refused, with the model that serves now.
    with pytest.raises(psycopg.errors.DataException, match="256 dimensions, and version 2 has 64") as mismatch:
        bare.execute("SELECT page_search(%s)", (vector,))
    assert "fingerprint" in (mismatch.value.diag.message_hint or "")
    with pytest.raises(psycopg.errors.UndefinedObject, match="no version here was embedded by"):
        bare.execute("SELECT page_search(%s, 3, 'of another model')", (vector,))
    same = bare.execute("SELECT key FROM page_search(%s, 5)", (query_vector(publisher),)).fetchall()
    assert same == [(key,) for key, _, _ in searching(publisher, "page", BREAD, 5)]

    settle(publisher)
    publisher.execute("SELECT embedline.drop_embedding_version('page', 1, rollback_window => '0')")
    publisher.execute("UPDATE page SET body = 'Sourdough is a bread' WHERE id = 5")
    settle(publisher)
    wait_until_caught_up(publisher, 1)
    refresh(bare)
    bare.execute(f"SELECT {PAGE('forget')}(1)")
    assert scalar(bare, "SELECT chunk FROM page_search(%s, 1)", (query_vector(publisher, "Sourdough is a bread"),))
    assert bare.execute("SELECT version, serves, is_shown FROM page_versions").fetchall() == [(2, True, True)]
    assert scalar(bare, "SELECT chunk FROM page_embedding WHERE id = 5") == "Title 5\n\nSourdough is a bread"

    bare.execute("DROP SUBSCRIPTION embedline_page")
    publisher.execute("SELECT embedline.drop_publication('page'); REVOKE SELECT ON page FROM replicator")
    publisher.execute("DROP ROLE replicator")


def test_a_subscriber_that_lacks_a_version_is_told_and_loses_nothing(
    publisher: psycopg.Connection, bare: psycopg.Connection, servers: list[Cluster]
) -> None:
    publisher.execute("SELECT embedline.publication('page')")
    prepare(publisher, bare)
    subscribe(publisher, bare)
    add_version(publisher, "static-64")
    # Against the HINT: the subscriber has no such table yet.
    publisher.execute("SELECT embedline.publication('page', tables_created => true)")
    settle_versions(publisher)
    log = servers[1].log_file
    missing = f'target relation "{PAGE.version(2)}" does not exist'
    wait_until(lambda: missing in log.read_text(), 20, "the subscription has stopped")
    publisher.execute("UPDATE page SET body = 'Rye bread' WHERE id = 5")
    settle(publisher)
    assert shown(bare) == (ROWS, 256, 256)
    # The way on: create it. The subscription begins again by itself, and changes of before are not lost.
    prepare(publisher, bare)
    wait_until(
        lambda: scalar(bare, "SELECT chunk FROM page_embedding WHERE id = 5") == "Title 5\n\nRye bread",
        30,
        "it goes on",
    )
    # Cut over before the copy was asked for: it stays with the version that it has whole.
    cut_over(publisher, 2)
    publisher.execute("UPDATE page SET body = 'White bread' WHERE id = 6")
    settle(publisher)
    wait_until_caught_up(publisher, 1)
    assert shown(bare) == (ROWS, 256, 256)
    assert scalar(bare, "SELECT chunk FROM page_embedding WHERE id = 6") == "Title 6\n\nWhite bread"
    text = log.read_text()
    assert 'WARNING:  version 2 of pipeline "page" serves on the publisher, and its copy is not complete here' in text
    assert "HINT:  ALTER SUBSCRIPTION embedline_page REFRESH PUBLICATION; begins the copy." in text
    assert bare.execute("SELECT version, serves, is_shown FROM page_versions ORDER BY 1").fetchall() == [
        (1, False, True),
        (2, True, False),
    ]
    refresh(bare)
    assert scalar(bare, f"SELECT {PAGE('route')}()") is True
    assert shown(bare) == (ROWS, 64, 64)
    # A transaction that holds the view delays it, and no reader waits behind it. Three tries instead of 6 s of them.
    text = scalar(publisher, "SELECT embedline.subscriber_ddl('page')")
    bare.execute(text.replace("1..200", "1..3"))
    with psycopg.connect(servers[1].dsn("bare")) as holder:
        holder.execute("SELECT 1 FROM page_embedding")
        publisher.execute("SELECT embedline.rollback('page')")
        held = 'WARNING:  sessions hold public."page_embedding", so it does not show version 1 yet'
        wait_until(lambda: held in log.read_text().replace('"public"', "public"), 20, "it is told")
        assert shown(bare) == (ROWS, 64, 64)
    assert scalar(bare, f"SELECT {PAGE('route')}()") is True
    assert shown(bare) == (ROWS, 256, 256)
    cut_over(publisher, 2)
    wait_until(lambda: shown(bare) == (ROWS, 64, 64), 20, "it follows again by itself")
    # Views of the application on the routing view stay where they are.
    bare.execute("CREATE VIEW mine AS SELECT id, embedding FROM page_embedding")
    publisher.execute("SELECT embedline.rollback('page')")
    wait_until(lambda: shown(bare) == (ROWS, 256, 256), 20, "it follows again by itself")
    publisher.execute("TRUNCATE page")
    settle(publisher)
    wait_until_caught_up(publisher, 1)
    assert shown(bare) == (0, None, None)


def test_a_version_of_another_type_reaches_a_subscriber_with_its_grants(
    publisher: psycopg.Connection, bare: psycopg.Connection, servers: list[Cluster]
) -> None:
    bare.execute("CREATE ROLE region_reader")
    publisher.execute("SELECT embedline.publication('page', with_source => true)")
    add_version(publisher, "static-64", column_type="halfvec", chunking="sentences", chunk_tokens=40)
    settle_versions(publisher)
    publisher.execute("SELECT embedline.publication('page', tables_created => true)")
    bare.execute(scalar(publisher, "SELECT embedline.subscriber_ddl('page', reader => 'region_reader')"))
    subscribe(publisher, bare)
    with reading(bare, lambda session: session.execute("SELECT count(*) > 0 FROM page_embedding").fetchone()) as seen:
        cut_over(publisher, 2)
        kind = "SELECT pg_typeof(embedding)::text FROM page_embedding LIMIT 1"
        wait_until(lambda: scalar(bare, kind) == "halfvec", 20, "version 2 is shown")
    assert seen.results.keys() == {(True,)}
    bare.execute("SET ROLE region_reader")
    assert scalar(bare, "SELECT count(*) FROM page_embedding") >= ROWS
    found = bare.execute("SELECT key FROM page_search(%s, 3)", (query_vector(publisher),)).fetchall()
    assert found == [(key,) for key, _, _ in searching(publisher, "page", BREAD, 3)]
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        bare.execute(f"SELECT * FROM {PAGE('chunk')}")
    bare.execute("RESET ROLE")
    # The type changes, so the view is made again, which what depends on it forbids.
    bare.execute("CREATE VIEW mine AS SELECT id, embedding FROM page_embedding")
    publisher.execute("SELECT embedline.rollback('page')")
    depends = "and the type of its vectors changes"
    wait_until(lambda: depends in servers[1].log_file.read_text(), 20, "it is told")
    assert scalar(bare, kind) == "halfvec"
    bare.execute(f"DROP VIEW mine; SELECT {PAGE('route')}()")
    assert scalar(bare, kind) == "vector"
    bare.execute("REASSIGN OWNED BY region_reader TO postgres; DROP OWNED BY region_reader; DROP ROLE region_reader")


def test_names_that_need_quoting_and_partitions_are_published(
    publisher: psycopg.Connection, bare: psycopg.Connection
) -> None:
    schema, key = '"My $body$ Schema"', '"Key, 1% %I \\ \'""x"'
    publisher.execute(
        f"CREATE SCHEMA {schema};"
        f' CREATE TABLE {schema}."Order" ({key} text, b uuid DEFAULT gen_random_uuid(), "Te xt" text,'
        f" PRIMARY KEY ({key}, b)) PARTITION BY RANGE ({key});"
        f' CREATE TABLE {schema}.leaf PARTITION OF {schema}."Order" DEFAULT;'
        f" INSERT INTO {schema}.\"Order\" ({key}, \"Te xt\") VALUES ('a', 'bread'), ('b', 'law')"
    )
    create_pipeline(publisher, "odd", f'{schema}."Order"', '"Te xt"', index_method="none")
    settle(publisher)
    publisher.execute("SELECT embedline.publication('odd', with_source => true)")
    prepare(publisher, bare, "odd")
    subscribe(publisher, bare, "odd")
    vector = scalar(publisher, "SELECT embedline.embed_query('odd', 'bread')")
    found = bare.execute(f"SELECT key, chunk FROM {schema}.odd_search(%s, 1)", (vector,)).fetchall()
    assert found == [(row, chunk) for row, chunk, _ in searching(publisher, "odd", "bread", 1)]
    for given in ((None, 1), (vector, None), (vector, 0)):
        with pytest.raises(psycopg.errors.InvalidParameterValue, match="a vector and a k of at least 1") as refused:
            bare.execute(f"SELECT * FROM {schema}.odd_search(%s, %s)", given)
        assert refused.value.diag.message_hint
    publisher.execute(f"UPDATE {schema}.\"Order\" SET {key} = 'c' WHERE {key} = 'a'")
    settle(publisher)
    wait_until_caught_up(publisher, 1)
    assert bare.execute(f"SELECT {key} FROM {schema}.odd_embedding ORDER BY 1").fetchall() == [("b",), ("c",)]
    bare.execute("DROP SUBSCRIPTION embedline_odd")
    publisher.execute("SELECT embedline.drop_pipeline('odd')")
    publisher.execute(f"DROP SCHEMA {schema} CASCADE")


def test_each_region_writes_locally_and_searches_the_rows_of_all(servers: list[Cluster]) -> None:
    regions = ("eu", "us", "ap")
    with contextlib.ExitStack() as stack:
        sessions = {
            region: stack.enter_context(psycopg.connect(server.dsn(), autocommit=True))
            for region, server in zip(regions, servers, strict=True)
        }
        for region, session in sessions.items():
            session.execute(f"CREATE TABLE docs_{region} (id integer PRIMARY KEY, body text)")
            session.execute(f"INSERT INTO docs_{region} VALUES (1, 'A text about bread, written in {region}')")
            create_pipeline(session, f"docs_{region}", f"docs_{region}", "body")
            settle(session)
            session.execute(f"SELECT embedline.publication('docs_{region}', with_source => true)")
        for there, publisher in sessions.items():
            for here, subscriber in sessions.items():
                if here != there:
                    prepare(publisher, subscriber, f"docs_{there}")
                    name, dsn = f"docs_{there}", servers[regions.index(there)].dsn()
                    subscriber.execute(
                        f"CREATE SUBSCRIPTION {name}_in_{here} CONNECTION '{dsn}' PUBLICATION embedline_{name}"
                    )
        everywhere = " UNION ALL ".join(
            f"SELECT id, body, embedding FROM docs_{region}_embedding" for region in regions
        )
        for session in sessions.values():
            wait_until_copied(session)
            session.execute(f"CREATE VIEW docs_everywhere AS {everywhere}")
        for region, session in sessions.items():
            session.execute(f"INSERT INTO docs_{region} VALUES (2, 'Rockets, as {region} sees them')")
            settle(session)
        for session in sessions.values():
            wait_until_caught_up(session, 2)
        for region, session in sessions.items():
            # The region's own model embeds the query: its fingerprint is that of the others' vectors.
            fingerprints = " UNION ".join(
                f"SELECT model_fingerprint FROM docs_{other}_versions" for other in regions if other != region
            )
            own = scalar(session, "SELECT fingerprint FROM embedline.model WHERE name = 'static-256'")
            assert session.execute(fingerprints).fetchall() == [(own,)]
            nearest = session.execute(
                "SELECT body FROM docs_everywhere"
                f" ORDER BY embedding <=> (SELECT embedline.embed_query('docs_{region}', 'rockets')) LIMIT 3"
            ).fetchall()
            assert {body for (body,) in nearest} == {f"Rockets, as {other} sees them" for other in regions}
            # What comes from the others disturbs neither the region's pipeline nor its checks.
            assert session.execute(f"SELECT * FROM embedline.verify('docs_{region}', sample => 0)").fetchall() == []
            findings = "SELECT finding, subject FROM embedline.doctor() WHERE finding LIKE 'publication%'"
            assert session.execute(findings).fetchall() == []
        for session in sessions.values():
            for (name,) in session.execute("SELECT subname FROM pg_subscription").fetchall():
                session.execute(f"DROP SUBSCRIPTION {name}")
