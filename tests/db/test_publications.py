"""Publications that hold our tables: PostgreSQL refuses UPDATE and DELETE on a published table without an identity."""

from __future__ import annotations

import psycopg
import pytest

from generated_names import PAGE
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
