"""Going back behind compare_chunkings and forward again."""

from __future__ import annotations

import psycopg
from alembic import command

from support import alembic_config, scalar

_FUNCTIONS = "SELECT count(*) FROM pg_proc WHERE proname IN ('compare_chunkings', '_embed_chunkings')"


def test_the_functions_go_and_come_back(database: psycopg.Connection, database_dsn: str) -> None:
    command.downgrade(alembic_config(database_dsn), "0024-1")
    assert scalar(database, _FUNCTIONS) == 0
    command.upgrade(alembic_config(database_dsn), "head")
    assert scalar(database, _FUNCTIONS) == 2
