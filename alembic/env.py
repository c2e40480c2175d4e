"""Check the server, run the revisions, and replay the functions once at head."""

from __future__ import annotations

import psycopg
from alembic import context
from psycopg.errors import Diagnostic
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from embedline.client import install, removal
from embedline.client.connection import engine, lines, server_message
from embedline.errors import EmbedlineError

_DEADLOCK_DETECTED = "40P01"
_VERSION_TABLE = {"version_table": "alembic_version", "version_table_schema": "embedline"}


def _goes_to_base() -> bool:
    """Return True for a downgrade after which no revision is left.

    The command may name its end in any way.
    """
    migration = context.get_context()
    plan = migration.opts.get("fn")
    # `stamp base` ends at base, too, but changes nothing. The plans of other commands are not run here.
    if plan is None or getattr(plan, "__name__", "") != "downgrade":
        return False
    steps = list(plan(migration.get_current_heads(), migration))
    return bool(steps) and not steps[-1].to_revisions


def _tell_warnings(connection: Connection) -> None:
    """Log the server's warnings during the revisions, and a downgrade's leftovers.

    Other notices, such as "already exists, skipping", are not worth a line.
    """

    def hear(notice: Diagnostic) -> None:
        message = notice.message_primary or ""
        # The event trigger that follows sources meets tables of an earlier revision.
        is_between = message.startswith("embedline could not look for changes of its sources")
        if (notice.severity_nonlocalized == "WARNING" and not is_between) or " stays: " in message:
            install.logger.warning("%s: %s", notice.severity_nonlocalized, message)

    driver = connection.connection.driver_connection
    if isinstance(driver, psycopg.Connection):
        driver.add_notice_handler(hear)


def run_offline() -> None:
    context.configure(dialect_name="postgresql", literal_binds=True, **_VERSION_TABLE)
    output = context.get_context().impl.static_output
    is_removal = _goes_to_base()
    with context.begin_transaction():
        output(install.OWN_NAMES + ";")
        output(install.NO_OWNERS_BESIDES + ";")
        if is_removal:
            for statement in removal.before_base():
                output(statement + ";")
        else:
            context.execute("CREATE SCHEMA IF NOT EXISTS embedline")
        context.run_migrations()
        if is_removal:
            for statement in removal.after_base():
                output(statement + ";")


def run_online(tries: int = 3, *, sources_first: bool = False) -> None:
    try:
        # Without a pool of SQLAlchemy's, so that the connection closes with the block.
        with engine(context.config.get_main_option("sqlalchemy.url")).connect() as connection:
            applied = context.config.attributes.get("on_version_apply")
            context.configure(connection=connection, on_version_apply=applied, **_VERSION_TABLE)
            with connection.begin():
                # Of the transaction alone, because behind a pool the next client has this session.
                install.run_script(connection, install.OWN_NAMES)
                is_removal = _goes_to_base()
                if is_removal:
                    install.check_role(connection)
                else:
                    install.check_server(connection)
            _tell_warnings(connection)
            # Alembic's own transaction, so that an operation can leave it (autocommit_block).
            with context.begin_transaction():
                install.run_script(connection, install.OWN_NAMES)
                install.run_script(connection, "SET LOCAL lock_timeout = '10s'")
                if sources_first:
                    install.run_script(connection, install.LOCK_SOURCES)
                # The session that looks first is ended. It has to be the upgrade, which can begin again, and no application.
                install.run_script(connection, "SET LOCAL deadlock_timeout = '10ms'")
                install.run_script(connection, install.NO_OWNERS_BESIDES)
                if is_removal:
                    removal.require_no_dependents(connection)
                    for statement in removal.before_base():
                        install.run_script(connection, statement)
                else:
                    install.run_script(connection, "CREATE SCHEMA IF NOT EXISTS embedline")
                context.run_migrations()
                heads = set(context.get_context().get_current_heads())
                if heads == set(context.script.get_heads()):
                    install.replay(connection)
                elif not heads:
                    for statement in removal.after_base():
                        install.run_script(connection, statement)
    except EmbedlineError as error:
        raise SystemExit("ERROR: " + lines(error.message, error.detail, error.hint)) from None
    except DBAPIError as error:
        if tries > 1 and getattr(error.orig, "sqlstate", None) == _DEADLOCK_DETECTED:
            install.logger.warning("NOTICE: a deadlock with another session has ended the upgrade, which begins again")
            run_online(tries - 1, sources_first=True)
            return
        # A person can only act on the server's message, so the statement and our frames are left out.
        told = server_message(error.orig)
        if told is None:
            raise
        raise SystemExit(f"ERROR: {told}") from None


if context.is_offline_mode():
    run_offline()
else:
    run_online()
