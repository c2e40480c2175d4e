"""Going back behind batches of providers and forward again."""

from __future__ import annotations

import psycopg
from alembic import command

from generated_names import Generated
from support import alembic_config, create_pages, create_pipeline, drain, scalar

_BATCH = """
    INSERT INTO embedline.provider_batch (pipeline_id, version_id, model_id, config, fingerprint, state)
    SELECT p.pipeline_id, v.version_id, v.model_id, '{}', v.fingerprint, 'waiting'
    FROM embedline.pipeline AS p JOIN embedline.version AS v ON v.version_id = p.serving_version_id
"""
_HOLD = """
    INSERT INTO embedline.provider_batch_hold (batch_id, version_id, of_version, queue_ids)
    SELECT b.batch_id, b.version_id, false, (SELECT array_agg(o.outbox_id) FROM {outbox} AS o) FROM embedline.provider_batch AS b
"""


def test_going_back_makes_rows_due_that_wait_for_a_batch(database: psycopg.Connection, database_dsn: str) -> None:
    create_pages(database, 5)
    create_pipeline(database, index_method="none")
    drain(database)
    outbox = Generated("page")("outbox")
    database.execute("UPDATE page SET body = 'edited' WHERE id <= 3")
    database.execute(f"TRUNCATE {Generated('page')('inbox')}")
    database.execute(
        f"INSERT INTO {outbox} (key_id, not_before) SELECT g, now() + interval '1 day' FROM generate_series(1, 3) AS g"
    )
    database.execute(_BATCH)
    database.execute(_HOLD.format(outbox=outbox).encode())
    command.downgrade(alembic_config(database_dsn), "0030")
    assert scalar(database, f"SELECT bool_and(not_before <= clock_timestamp()) FROM {outbox}")
    assert scalar(database, "SELECT to_regclass('embedline.provider_batch') IS NULL")
    command.upgrade(alembic_config(database_dsn), "head")
    drain(database)
    assert scalar(database, f"SELECT count(*) FROM {Generated('page')('chunk')} WHERE content LIKE '%edited%'") == 3
