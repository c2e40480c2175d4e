"""Going back behind rerankers and forward again."""

from __future__ import annotations

import psycopg
import pytest
from alembic import command
from psycopg import errors

from support import MODELS, alembic_config, scalar

_WIDTHS = "SELECT array_agg(dimensions ORDER BY dimensions) FROM embedline.model"
_CREATE = "SELECT embedline.create_model('r', 'sentence-transformers', %s, task => 'rerank')"


def test_down_and_up_again_with_a_reranker(database: psycopg.Connection, database_dsn: str) -> None:
    reranker = (str(MODELS / "reranker"),)
    database.execute(_CREATE, reranker)
    command.downgrade(alembic_config(database_dsn), "0022-1")
    # The code before asks a model for its dimensions, so the reranker is gone, and only it.
    assert scalar(database, _WIDTHS) == [256, 384]
    with pytest.raises(errors.NotNullViolation):
        database.execute("UPDATE embedline.model SET dimensions = NULL")
    command.upgrade(alembic_config(database_dsn), "head")
    assert scalar(database, "SELECT array_agg(DISTINCT task) FROM embedline.model") == ["embed"]
    with pytest.raises(errors.CheckViolation):
        database.execute("UPDATE embedline.model SET task = 'rerank'")
    database.execute(_CREATE, reranker)
