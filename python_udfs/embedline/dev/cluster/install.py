"""Register the local models and the scheduled worker.

It runs in the virtual environment, after alembic.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import psycopg

MODELS = ("static-256", "minilm")

_REGISTERED = "SELECT name::text, model FROM embedline.model"
_CREATE_MODEL = "SELECT embedline.create_model(%s, 'sentence-transformers', %s)"
_PROBE = "embedline-set-up"
# Of the same dimensions only, because a table of another width holds the vectors of another model.
_TAKE_OVER = """
    UPDATE embedline.model AS ours SET model = probed.model, fingerprint = probed.fingerprint, probed_fingerprint = NULL
    FROM embedline.model AS probed
    WHERE ours.name = %s AND probed.name = %s AND probed.dimensions = ours.dimensions
"""
_SCHEDULED = "SELECT EXISTS (SELECT FROM pg_catalog.pg_extension WHERE extname = 'pg_cron')"
_SCHEDULE = "SELECT embedline.schedule_workers(1)"
# pg_cron keeps the socket's folder with each job, and a moved cluster has another folder.
_MOVE_JOBS = """
    UPDATE cron.job SET nodename = pg_catalog.current_setting('cron.host')
    WHERE jobname LIKE 'embedline %' AND nodename LIKE '/%' AND nodename <> pg_catalog.current_setting('cron.host')
"""


def register(dsn: str, models: Path) -> list[str]:
    """Register new local models and schedule one worker; return the new models.

    If the database knows a model by the path of a checkout that was moved or copied, it is pointed at this one's
    directory.
    """
    with psycopg.connect(dsn, autocommit=True) as connection:
        known = {str(row[0]): str(row[1]) for row in connection.execute(_REGISTERED)}
        new = [name for name in MODELS if name not in known]
        for name in MODELS:
            if name in new:
                connection.execute(_CREATE_MODEL, (name, str(models / name)))
            elif known[name] != str(models / name) and _is_local(known[name], name):
                _move(connection, name, models / name)
        row = connection.execute(_SCHEDULED).fetchone()
        if row is not None and row[0]:
            connection.execute(_MOVE_JOBS)
            connection.execute(_SCHEDULE)
    return new


def _is_local(path: str, name: str) -> bool:
    """Return True for the path that a checkout's set-up gives this model."""
    return Path(path).parts[-2:] == (".models", name)


def _move(connection: psycopg.Connection[Any], name: str, directory: Path) -> None:
    """Point a registered model at its directory in this checkout."""
    with connection.transaction():
        connection.execute(_CREATE_MODEL, (_PROBE, str(directory)))
        connection.execute(_TAKE_OVER, (name, _PROBE))
        connection.execute("SELECT embedline.drop_model(%s)", (_PROBE,))
    print(f"model {name} is now read from {directory}")


if __name__ == "__main__":
    for model in register(os.environ["EMBEDLINE_DSN"], Path(sys.argv[1])):
        print(f"registered model {model}")
