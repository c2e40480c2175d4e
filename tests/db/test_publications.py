"""Publications that hold our tables: PostgreSQL refuses UPDATE and DELETE on a published table without an identity."""

from __future__ import annotations

import psycopg
import pytest

from conftest import Connect, MakeRole
from generated_names import PAGE, Generated
from support import create_pages, create_pipeline, scalar, settle
from upgrading import add_version, settle_versions
from working import work_until_idle

# Tables of ours that a publication may hold, and whose rows it could not name. Later tables are covered, too.
_WITHOUT_IDENTITY = """
    SELECT c.oid::regclass::text FROM pg_class AS c
    WHERE c.relnamespace::regnamespace::text LIKE 'embedline%' AND c.relkind IN ('r', 'p') AND c.relpersistence = 'p'
        AND NOT (c.relreplident = 'f' OR EXISTS (
            SELECT FROM pg_index AS i WHERE i.indrelid = c.oid AND i.indisvalid AND i.indimmediate AND CASE c.relreplident
                WHEN 'd' THEN i.indisprimary WHEN 'i' THEN i.indisreplident ELSE false END))
    ORDER BY 1
"""


def test_every_table_of_ours_has_a_replica_identity(database: psycopg.Connection) -> None:
    create_pages(database, 3)
    create_pipeline(database, tenant="'tenant ' || id", document_prefix="title", index_method="hnsw")
    add_version(database, "minilm", chunk_tokens=50)
    assert scalar(database, "SELECT count(*) FROM pg_tables WHERE schemaname = 'embedline_data'") >= 9
    assert database.execute(_WITHOUT_IDENTITY).fetchall() == []


@pytest.mark.parametrize("tables", ["ALL TABLES", "TABLES IN SCHEMA embedline, embedline_data"])
def test_a_publication_of_all_tables_stops_neither_capture_nor_workers(
    database: psycopg.Connection, tables: str
) -> None:
    create_pages(database, 20)
    create_pipeline(database)
    database.execute(f"CREATE PUBLICATION everything FOR {tables}")
    settle(database)
    database.execute("UPDATE page SET body = body || ' edited' WHERE id <= 10")
    work_until_idle(database)
    database.execute("DELETE FROM page WHERE id <= 5")
    database.execute("UPDATE page SET id = id + 100 WHERE id = 20")
    work_until_idle(database)
    database.execute("SELECT embedline.requeue('page', key => '{\"id\": 7}', include_embedded => true)")
    add_version(database, "minilm")
    settle_versions(database)
    database.execute("SELECT * FROM embedline.verify('page', repair => true)")
    status = "SELECT pending, last_error FROM embedline.status"
    assert database.execute(status).fetchall() == [(0, None)]
    assert scalar(database, "SELECT count(*) FROM page_embedding") == 15
    database.execute("TRUNCATE page")
    settle(database)
    assert scalar(database, f"SELECT count(*) FROM {PAGE('chunk')}") == 0
    database.execute("SELECT embedline.drop_pipeline('page')")


# --- publications of Embedline's own


def publish(connection: psycopg.Connection, **options: object) -> list[tuple[str, bool]]:
    """Publish pipeline page; return the published tables, and which are new."""
    named = "".join(f", {option} => %s" for option in options)
    query = f"SELECT published_table, is_new FROM embedline.publication('page'{named}) ORDER BY 1"
    return connection.execute(query, (*options.values(),)).fetchall()


def update_all(connection: psycopg.Connection) -> None:
    """Change what an application may change of its rows."""
    connection.execute("UPDATE page SET views = views + 1, body = body || '!'; DELETE FROM page WHERE id = 2")


def test_a_pipeline_publishes_what_a_subscriber_needs_and_no_queue(database: psycopg.Connection) -> None:
    create_pages(database, 3)
    create_pipeline(database, index_method="none")
    tables = [PAGE("chunk"), PAGE("hidden"), PAGE("routing"), PAGE.version(1)]
    assert publish(database) == [(table, True) for table in tables]
    assert publish(database) == [(table, False) for table in tables]
    assert scalar(database, "SELECT count(*) FROM embedline.doctor() WHERE subject = 'embedline_page'") == 0
    add_version(database, "minilm")
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match=r"would publish .*page_v2") as refused:
        publish(database)
    assert "tables_created => true" in (refused.value.diag.message_hint or "")
    assert (PAGE.version(2), True) in publish(database, tables_created=True)
    routing = f"SELECT version, serves, model_fingerprint = fingerprint FROM {PAGE('routing')} ORDER BY 1"
    assert database.execute(routing).fetchall() == [(1, True, False), (2, False, False)]
    settle(database)
    update_all(database)
    settle(database)
    database.execute("SELECT embedline.drop_publication('page')")
    assert scalar(database, "SELECT count(*) FROM pg_publication WHERE pubname = 'embedline_page'") == 0
    with pytest.raises(psycopg.errors.UndefinedObject, match="has no publication"):
        database.execute("SELECT embedline.drop_publication('page')")
    with pytest.raises(psycopg.errors.UndefinedObject, match="has no publication"):
        database.execute("SELECT embedline.subscriber_ddl('page')")
    publish(database)
    database.execute("SELECT embedline.drop_pipeline('page')")
    assert scalar(database, "SELECT count(*) FROM pg_publication WHERE pubname = 'embedline_page'") == 0


@pytest.mark.parametrize(
    ("row_filter", "message"),
    [
        ("views > 3", "names views, which is not in the replica identity"),
        ("body ~ 'bread' AND id > 1", "names body"),
        ("length(public.own(id)) > 1", "no row filter of a publication"),
        ("true); DROP TABLE page; --", "not a single SQL expression"),
        ("nothing > 3", "not an expression over the columns"),
    ],
)
def test_a_row_filter_that_would_stop_the_application_is_refused(
    database: psycopg.Connection, row_filter: str, message: str
) -> None:
    create_pages(database, 3)
    create_pipeline(database, index_method="none")
    database.execute("CREATE FUNCTION own(id integer) RETURNS text LANGUAGE sql IMMUTABLE AS 'SELECT id::text'")
    with pytest.raises(psycopg.errors.InvalidParameterValue, match=message):
        publish(database, with_source=True, source_filter=row_filter)
    update_all(database)
    assert scalar(database, "SELECT count(*) FROM pg_publication_rel") == 0


def test_a_row_filter_on_the_key_stays_until_another_is_given(database: psycopg.Connection) -> None:
    create_pages(database, 3)
    create_pipeline(database, index_method="none")
    publish(database, with_source=True, source_filter="id > 1")
    publish(database)
    kept = "SELECT rowfilter FROM pg_publication_tables WHERE tablename = 'page'"
    assert scalar(database, kept) == "(id > 1)"
    update_all(database)
    database.execute("ALTER TABLE page REPLICA IDENTITY FULL")
    publish(database, source_filter="views < 100")
    update_all(database)
    assert scalar(database, kept) == "(views < 100)"
    publish(database, with_source=False)
    assert database.execute(kept).fetchall() == []


@pytest.mark.parametrize("is_partitioned", [False, True])
def test_a_source_without_a_replica_identity_is_published_once_it_has_one(
    database: psycopg.Connection, is_partitioned: bool
) -> None:
    database.execute(
        "CREATE TABLE page (id integer NOT NULL UNIQUE, body text)"
        + (
            " PARTITION BY RANGE (id); CREATE TABLE leaf PARTITION OF page FOR VALUES FROM (0) TO (9)"
            if is_partitioned
            else ""
        )
    )
    database.execute("INSERT INTO page VALUES (1, 'one'), (2, 'two')")
    create_pipeline(database, "page", "page", "body", index_method="none")
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="no replica identity") as refused:
        publish(database, with_source=True)
    hint = refused.value.diag.message_hint or ""
    assert hint.startswith(f"ALTER TABLE public.{'leaf' if is_partitioned else 'page'} REPLICA IDENTITY USING INDEX")
    database.execute(hint.encode())
    publish(database, with_source=True)
    database.execute("UPDATE page SET body = 'three' WHERE id = 2; DELETE FROM page WHERE id = 1")


def test_the_owner_of_a_source_publishes_it_and_others_do_not(
    database: psycopg.Connection, connect: Connect, make_role: MakeRole
) -> None:
    create_pages(database, 3)
    owner, other = make_role("embedline_admin"), make_role("embedline_admin")
    replicator = make_role()
    database.execute(f"ALTER TABLE page OWNER TO {owner}")
    create_pipeline(database, index_method="none")
    database.execute("ALTER TABLE page ENABLE ROW LEVEL SECURITY")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        publish(connect(other))
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="has rights on the tables already"):
        publish(connect(owner), subscriber_role=owner)
    publish(connect(owner), subscriber_role=replicator)
    assert connect(replicator).execute(f"SELECT count(*) FROM {PAGE('chunk')}").fetchone() == (0,)
    # Policies are no part of a publication, so a subscriber closes the texts until it has its own.
    text = scalar(connect(owner), "SELECT embedline.subscriber_ddl('page')")
    assert 'ALTER TABLE embedline_data."page_chunk" ENABLE ROW LEVEL SECURITY;' in text
    add_version(database, "minilm")
    publish(connect(owner), tables_created=True)
    assert connect(replicator).execute(f"SELECT count(*) FROM {PAGE.version(2)}").fetchone() == (0,)
    connect(owner).execute("SELECT embedline.drop_publication('page')")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        connect(replicator).execute(f"SELECT count(*) FROM {PAGE('chunk')}")


def test_no_reader_can_name_our_tables_by_a_role_of_subscribers(
    database: psycopg.Connection, connect: Connect, make_role: MakeRole
) -> None:
    create_pages(database, 3, "hidden")
    create_pages(database, 3)
    owner, group, reader, plain = make_role("embedline_admin"), make_role(), make_role("embedline_reader"), make_role()
    database.execute(f"ALTER TABLE page OWNER TO {owner}")
    create_pipeline(database, "hidden", "hidden", index_method="none")
    create_pipeline(database, index_method="none")
    settle(database)
    hidden = Generated("hidden")("chunk")
    for role, member, words in (
        (group, owner, f'"{group}" has a member, "{owner}"'),
        (group, reader, f'"{group}" has a member, "{reader}"'),
        (reader, plain, "has rights on the tables already"),
    ):
        database.execute(f"GRANT {role} TO {member}")
        with pytest.raises(psycopg.errors.InvalidParameterValue, match=words):
            publish(connect(owner), subscriber_role=role)
        for session in (connect(owner), connect(member)):
            with pytest.raises(psycopg.errors.InsufficientPrivilege, match="permission denied for schema"):
                session.execute(f"SELECT content FROM {hidden}")
        database.execute(f"REVOKE {role} FROM {member}")
    database.execute(f"GRANT {group} TO {plain}")
    publish(connect(owner), subscriber_role=group)
    assert scalar(connect(plain), f"SELECT count(*) FROM {PAGE('chunk')}") == 3
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="permission denied for table"):
        connect(plain).execute(f"SELECT content FROM {hidden}")
