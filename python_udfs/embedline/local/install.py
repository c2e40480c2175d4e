"""Registers the local models and the scheduled worker: runs in the virtual environment, after alembic."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psycopg

MODELS = ("static-256", "minilm")

_REGISTERED = "SELECT name::text FROM embedline.model"
_CREATE_MODEL = "SELECT embedline.create_model(%s, 'sentence-transformers', %s)"
_SCHEDULED = "SELECT EXISTS (SELECT FROM pg_catalog.pg_extension WHERE extname = 'pg_cron')"
_SCHEDULE = "SELECT embedline.schedule_workers(1)"


def register(dsn: str, models: Path) -> list[str]:
    """Register the local models that the database does not know yet and schedule one worker; return the new models."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        known = {str(row[0]) for row in connection.execute(_REGISTERED)}
        new = [name for name in MODELS if name not in known]
        for name in new:
            connection.execute(_CREATE_MODEL, (name, str(models / name)))
        row = connection.execute(_SCHEDULED).fetchone()
        if row is not None and row[0]:
            connection.execute(_SCHEDULE)
    return new


if __name__ == "__main__":
    for model in register(os.environ["EMBEDLINE_DSN"], Path(sys.argv[1])):
        print(f"registered model {model}")
