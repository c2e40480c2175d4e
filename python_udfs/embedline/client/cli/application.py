"""The application of all commands, their common options, their failures.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 something was found that a person should see, 130 stopped by Ctrl-C.
`evaluate` and `doctor` have codes of their own, see their modules.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Annotated, Any, NoReturn

import psycopg
import typer

import embedline
from embedline.client.connection import Connection, connect, lines, server_message
from embedline.errors import EmbedlineError

EXIT_FAILED = 1
EXIT_FOUND = 3
EXIT_STOPPED = 130
# The largest number that the functions of the database take.
INT4 = 2**31 - 1
# Headings of the list of commands.
OBSERVE, OPERATE, UPGRADE, INSTALL = "Observe", "Operate", "Change the model", "Install"
TRANSFER = "Take vectors in and out"
# Set to 1, an unexpected error is shown with its traceback.
_TRACEBACK = "EMBEDLINE_TRACEBACK"
_NO_DATABASE = "Name another database with --dsn or EMBEDLINE_DSN; embedline COMMAND --help shows the forms."
_INSTALLED = "SELECT to_regnamespace('embedline') IS NOT NULL"


class CommandLine(typer.Typer):
    """The application: rich on a terminal, plain in a pipe, without tracebacks."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command that the arguments name."""
        if not (sys.stdout.isatty() and sys.stderr.isatty()):
            # Without it typer draws boxes around the help and around errors, also in a pipe.
            self.rich_markup_mode = None
        try:
            return super().__call__(*args, **kwargs)
        except Exception as error:
            if os.environ.get(_TRACEBACK) == "1":
                raise
            told = " ".join(str(error).split()) or "no message"
            hint = f"{_TRACEBACK}=1 shows where it was raised; report it as a fault of Embedline."
            typer.echo(f"error: {lines(f'unexpected {type(error).__name__}: {told}', None, hint)}", err=True)
            sys.exit(EXIT_FAILED)


app = CommandLine(
    help="Vector embeddings in PostgreSQL, kept true to their source rows.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Dsn = Annotated[
    str,
    typer.Option(
        envvar="EMBEDLINE_DSN",
        # If it is empty, libpq's environment (PGSERVICE, PGHOST, PGDATABASE, ...) names the database; else `connect`
        # names the setting.
        default_factory=str,
        help="postgresql:///mydb, or any other connection string of libpq, such as 'service=mydb' or 'host=db1 dbname=mydb'."
        " Without it PGSERVICE, PGHOST, PGDATABASE and the like count.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print Alembic's own messages, too.")]
Pipeline = Annotated[str, typer.Argument(help="Name of the pipeline.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"embedline {embedline.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Vector embeddings in PostgreSQL, kept true to their source rows."""


@contextlib.contextmanager
def session(dsn: str) -> Iterator[Connection]:
    """Connect in autocommit mode.

    An error of the database ends the command with its message, detail and hint.
    """
    connection: Connection | None = None
    try:
        with connect(dsn) as connection:
            yield connection
    except EmbedlineError as error:
        fail(lines(error.message, error.detail, error.hint))
    except psycopg.Error as error:
        fail(_told(error, dsn, is_connected=connection is not None))
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_STOPPED) from None


def _told(error: psycopg.Error, dsn: str, *, is_connected: bool) -> str:
    """Return an error of the database in words, with the next step as HINT."""
    if not is_connected:
        return lines(" ".join(str(error).split()), None, _NO_DATABASE)
    # A missing table may be the user's, such as a table of canaries.
    missing = psycopg.errors.InvalidSchemaName | psycopg.errors.UndefinedTable | psycopg.errors.UndefinedFunction
    if isinstance(error, missing) and "embedline" in (error.diag.message_primary or ""):
        with contextlib.suppress(psycopg.Error), connect(dsn) as connection:
            row = connection.execute(_INSTALLED).fetchone()
            if row is not None and row[0]:
                message = f"the database has an older Embedline than this command: {error.diag.message_primary}"
                return lines(message, None, "embedline upgrade")
        return lines("Embedline is not installed in this database", None, "embedline upgrade")
    return str(server_message(error))


def rows_as_json(connection: Connection, query: str, parameters: tuple[object, ...] = ()) -> list[dict[str, Any]]:
    """Return the rows of a query as PostgreSQL writes them in JSON.

    So numbers stay numbers.
    """
    found = connection.execute(f"SELECT to_jsonb(r) FROM ({query}) AS r".encode(), parameters).fetchall()
    return [row[0] for row in found]


def fail(message: str) -> NoReturn:
    """Print an error and end the command with exit code 1."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(EXIT_FAILED)
