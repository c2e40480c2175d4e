"""`embedline upgrade` and `downgrade`: install, update and remove Embedline."""

from __future__ import annotations

import logging
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import psycopg
import typer

import embedline
from embedline.client.cli.application import INSTALL, Dsn, Verbose, app, fail, session
from embedline.client.connection import server_message
from embedline.client.migration_display import Direction, MigrationDisplay, quiet_alembic


@app.command(rich_help_panel=INSTALL)
def upgrade(
    dsn: Dsn, revision: Annotated[str, typer.Argument(help="Alembic revision.")] = "head", verbose: Verbose = False
) -> None:
    """Install Embedline into a database, or bring it to the package's version."""
    _migrate(dsn, "upgrade", revision, verbose)


# Without it click takes the revision -1 for an option.
@app.command(context_settings={"ignore_unknown_options": True}, rich_help_panel=INSTALL)
def downgrade(
    dsn: Dsn,
    revision: Annotated[str, typer.Argument(help="Alembic revision; base removes everything.")],
    verbose: Verbose = False,
) -> None:
    """Return to an earlier revision; `base` removes everything except your own tables."""
    _migrate(dsn, "downgrade", revision, verbose)


def _migrate(dsn: str, direction: Direction, revision: str, verbose: bool) -> None:
    from alembic import command
    from alembic.util import CommandError

    with session(dsn) as connection:  # reports a wrong address in one line, not in SQLAlchemy's many
        display = MigrationDisplay(direction, connection.info.dbname)
    config = _alembic_config(dsn)
    config.attributes["on_version_apply"] = display.applied
    if direction == "downgrade":
        # Missing parts of the installation do not matter to a person who removes it.
        logging.getLogger("embedline").addFilter(lambda record: "pg_cron is not in" not in record.getMessage())
    try:
        with quiet_alembic(verbose):
            getattr(command, direction)(config, revision)
        typer.echo(display.summary(revision))
    except SystemExit:
        display.failed()
        raise
    except CommandError as error:
        display.failed()
        fail(str(error))
    except Exception as error:
        original = getattr(error, "orig", None)
        display.failed()
        if not isinstance(original, psycopg.Error):
            raise
        fail(str(server_message(original)))


def _alembic_config(dsn: str) -> Any:
    from alembic.config import Config

    packaged = Path(str(resources.files(embedline))) / "_alembic"
    if packaged.is_dir():
        config = Config(str(packaged / "alembic.ini"))
        config.set_main_option("script_location", str(packaged).replace("%", "%%"))
    else:
        config = Config(str(Path(__file__).resolve().parents[4] / "alembic.ini"))
    config.set_main_option("sqlalchemy.url", dsn.replace("%", "%%"))
    return config
