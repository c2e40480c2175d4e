"""Alembic environment: checks the server, runs the revisions, and replays the functions once at head."""

from __future__ import annotations

import os

import psycopg
from alembic import context
from psycopg.errors import Diagnostic
from sqlalchemy import Connection, create_engine, pool

from embedline import installation
from embedline.errors import EmbedlineError

_VERSION_TABLE = {"version_table": "alembic_version", "version_table_schema": "embedline"}


def _database_url() -> str:
    dsn = context.config.get_main_option("sqlalchemy.url") or os.environ.get("EMBEDLINE_DSN")
    if not dsn:
        raise SystemExit(
            "Set EMBEDLINE_DSN, for example EMBEDLINE_DSN=postgresql://postgres@localhost/mydb alembic upgrade head"
        )
    scheme, separator, rest = dsn.partition("://")
    return f"postgresql+psycopg{separator}{rest}" if scheme in ("postgresql", "postgres") else dsn


def _tell_warnings(connection: Connection) -> None:
    """Log what the server warns of while it runs the revisions, and what a downgrade leaves behind.

    Other notices, such as "already exists, skipping", are no news.
    """

    def hear(notice: Diagnostic) -> None:
        message = notice.message_primary or ""
        # The event trigger that follows sources meets tables of an earlier revision.
        is_between = message.startswith("embedline could not look for changes of its sources")
        if (notice.severity_nonlocalized == "WARNING" and not is_between) or " stays: " in message:
            installation.logger.warning("%s: %s", notice.severity_nonlocalized, message)

    driver = connection.connection.driver_connection
    if isinstance(driver, psycopg.Connection):
        driver.add_notice_handler(hear)


def run_offline() -> None:
    context.configure(dialect_name="postgresql", literal_binds=True, **_VERSION_TABLE)
    with context.begin_transaction():
        context.execute("CREATE SCHEMA IF NOT EXISTS embedline")
        context.run_migrations()


def run_online() -> None:
    engine = create_engine(_database_url(), poolclass=pool.NullPool)
    try:
        with engine.connect() as connection:
            with connection.begin():
                installation.check_server(connection)
            _tell_warnings(connection)
            applied = context.config.attributes.get("on_version_apply")
            context.configure(connection=connection, on_version_apply=applied, **_VERSION_TABLE)
            # Alembic's own transaction, so that an operation can leave it (autocommit_block).
            with context.begin_transaction():
                installation.run_script(connection, "SET LOCAL lock_timeout = '10s'")
                installation.run_script(connection, "CREATE SCHEMA IF NOT EXISTS embedline")
                context.run_migrations()
                heads = set(context.get_context().get_current_heads())
                if heads == set(context.script.get_heads()):
                    installation.replay(connection)
                elif not heads:
                    # Alembic needed its version table until now; with it goes the last trace.
                    installation.run_script(connection, "DROP SCHEMA embedline CASCADE")
    except EmbedlineError as error:
        lines = [
            error.message,
            f"DETAIL: {error.detail}" if error.detail else "",
            f"HINT: {error.hint}" if error.hint else "",
        ]
        raise SystemExit("ERROR: " + "\n".join(line for line in lines if line)) from None
    finally:
        engine.dispose()


if context.is_offline_mode():
    run_offline()
else:
    run_online()
