"""Going back behind derived vectors and forward again."""

from __future__ import annotations

import psycopg
from alembic import command

from support import alembic_config, create_pages, create_pipeline, drain, scalar

_GENERATED = """
    SELECT (SELECT count(*) FROM pg_class WHERE relname ~ 'readers_derived')
        + (SELECT count(*) FROM pg_proc WHERE proname ~ 'readers_derived')
        + (SELECT count(*) FROM pg_trigger WHERE tgname ~ 'readers_derived')
"""
_CREATE = "SELECT embedline.create_derived('readers', 'page', 'event', subject => 'reader', item_key => 'page')"


def test_down_and_up_again_with_derived_vectors(database: psycopg.Connection, database_dsn: str) -> None:
    create_pages(database, 5)
    create_pipeline(database, index_method="none")
    database.execute("CREATE TABLE event (reader integer, page integer); INSERT INTO event VALUES (1, 2), (2, 3)")
    database.execute(_CREATE)
    drain(database)
    command.downgrade(alembic_config(database_dsn), "0025-1")
    assert scalar(database, _GENERATED) == 0
    database.execute("INSERT INTO event VALUES (1, 3); UPDATE page SET body = 'other' WHERE id = 2")
    command.upgrade(alembic_config(database_dsn), "head")
    database.execute(_CREATE)
    drain(database)
    assert scalar(database, "SELECT item_count FROM readers_derived WHERE subject = 1") == 2
